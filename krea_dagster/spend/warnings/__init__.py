"""Warnings about unusual spend."""
