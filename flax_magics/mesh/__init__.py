"""The mesh of a session: how it is chosen, what moves onto it, and what is shown of it."""
