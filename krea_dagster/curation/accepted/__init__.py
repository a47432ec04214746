"""What is accepted: rules and verdicts, and exactly as many as are wanted."""
