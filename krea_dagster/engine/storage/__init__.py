"""The storage root: files written atomically, and images verified."""
