"""A run as text, as HTML and as the live line."""
