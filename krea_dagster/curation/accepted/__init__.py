"""Accepted images: by rules and verdicts, and in the wanted number."""
