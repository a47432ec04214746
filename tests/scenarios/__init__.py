"""Whatever the table, the storage root, the key or the host: bought once, and never lost."""
