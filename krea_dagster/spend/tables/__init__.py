"""The spend tables, brought up to date from the journal."""
