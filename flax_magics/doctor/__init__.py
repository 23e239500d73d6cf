"""A kernel that stays healthy: what is wrong with the JAX of this process, and what keeps arrays alive in it."""
