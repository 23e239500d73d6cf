"""A call run with a draw: made ready, compiled or found, run, and turned into a Run."""
