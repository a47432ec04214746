"""The gallery: one HTML file with thumbnails."""
