"""Runs notebooks again in fresh kernels, and compares their runs with those in the saved outputs.

Imports neither JAX nor Flax, which only the kernels need.
"""

from __future__ import annotations

from .command import main

__all__ = ["main"]
