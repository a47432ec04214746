"""The HTML report on what was spent."""
