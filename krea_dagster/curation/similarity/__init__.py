"""Similarity: which images are the same picture, or nearly."""
