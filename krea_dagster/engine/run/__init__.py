"""Runs: takes requests from the work list to stored images."""
