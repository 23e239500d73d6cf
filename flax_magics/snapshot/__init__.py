"""A session in a file: written, read, and its variables restored to the registered models."""
