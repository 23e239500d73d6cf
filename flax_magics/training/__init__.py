"""A loss of the user's, and its gradients. Knows the rooms below `history/`, and none beside it."""
