"""Every request paid for once and delivered, whatever happens in between."""
