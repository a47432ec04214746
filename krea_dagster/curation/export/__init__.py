"""Exports images as a dataset: selected, split, sharded, verified, and published atomically."""
