"""Spend: quotes, tables of purchases, the proof of the accounts, warnings and the report."""
