"""A session in a file: written, read, and matched to the models that are registered."""
