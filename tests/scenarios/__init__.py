"""Scenarios across tables, storage roots, keys and hosts: bought once, and never lost."""
