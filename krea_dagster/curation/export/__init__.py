"""Hands images on as a dataset: chosen, split, put into shards, verified, and published at once."""
