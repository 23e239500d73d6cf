"""A session's state at one moment (models, weights, runs): frozen, and replaced as a whole."""
