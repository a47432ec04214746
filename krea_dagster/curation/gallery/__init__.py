"""The gallery: one HTML file of small pictures."""
