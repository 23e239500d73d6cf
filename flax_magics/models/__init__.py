"""Adapters of Flax modules: a common Protocol, implemented once for linen and once for NNX."""
