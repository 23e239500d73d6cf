"""PRNG keys: the root key of a session, its draws, and the streams of a draw."""
