"""Measures of images, computed from their pixels once and cached by sha256."""
