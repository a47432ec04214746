"""Measures of images: figures of their pixels, taken once and kept by sha256."""
