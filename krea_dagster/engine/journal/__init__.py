"""The journal: every request, event, charge and decision, in SQL."""
