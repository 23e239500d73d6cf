"""Random keys: the root key, its draws and their streams."""
