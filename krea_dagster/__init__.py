"""Krea 2 Turbo images as Dagster assets."""
