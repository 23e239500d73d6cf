"""What people see: a `Run` and its companions as text and as HTML. Nothing is imported until something is shown."""
