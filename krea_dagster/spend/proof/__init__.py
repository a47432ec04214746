"""Proves that journal, files, manifests and account agree."""
