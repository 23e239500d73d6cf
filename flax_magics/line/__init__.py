"""The line of a command: its options, its call as Python, and the commands as data."""
