"""The assets and their jobs."""
