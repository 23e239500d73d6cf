"""A Flax module as a session sees it: one Protocol, answered once for linen and once for NNX."""
