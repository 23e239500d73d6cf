"""A model by shapes alone: its modules, their variables, FLOPs and streams."""
