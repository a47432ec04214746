"""Credits accounted for: ``quote`` says what would be bought, ``verify`` that the books agree."""
