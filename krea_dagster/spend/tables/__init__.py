"""The spend tables: made from the journal, kept up to date, and queried."""
