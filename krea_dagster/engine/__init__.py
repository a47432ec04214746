"""Pays for every request once and delivers it, also after crashes and outages."""
