"""Reports: a run as text, as HTML, and the live line while a command is at work."""
