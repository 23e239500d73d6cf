"""The commands in an IPython shell. Nothing else imports IPython."""
