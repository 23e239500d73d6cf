"""From a call to a compiled program: tracing, lowering, XLA, the caches in memory and on disk, and reasons to
recompile.
"""
