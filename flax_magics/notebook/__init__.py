"""The commands in an IPython shell. No other room imports IPython."""
