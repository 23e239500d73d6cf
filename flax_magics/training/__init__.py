"""A loss of the user's: its gradients, and the loop that trains with them."""
