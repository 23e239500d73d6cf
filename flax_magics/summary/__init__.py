"""Summaries of a model by shapes alone: modules, variables, FLOPs and streams."""
