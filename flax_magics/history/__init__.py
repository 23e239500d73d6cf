"""The draws of a session as a table, and replays."""
