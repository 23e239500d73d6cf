"""The root key, its draws and their streams, and JAX's generator on the host."""
