"""The draws of a session as records, and one of them run again."""
