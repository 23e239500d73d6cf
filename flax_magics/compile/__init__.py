"""From a call to a compiled program: tracing, lowering, XLA, the caches, and why a program is new."""
