"""How long the laps of the edit-and-run loop take, beside the same work by hand: `python -m tests.benchmarks`.

Every lap is timed side by side in one run, by hand and ours in turn, so that a busy machine slows both. "By hand" is what a
careful person writes: a typed key, `jax.random.split`, `init`, `jax.jit` of `apply`, `jax.block_until_ready`.
"""
