"""Runs notebooks again, in fresh kernels, and compares their runs with those that their outputs hold.

Imports neither JAX nor Flax: the kernels do.
"""

from __future__ import annotations

from .command import main

__all__ = ["main"]
