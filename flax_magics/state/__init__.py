"""What a session is at one moment: models, weights, runs. Frozen, replaced as a whole."""
