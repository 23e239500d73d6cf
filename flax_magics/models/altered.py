"""Names of Flax's are replaced for the time of a trace: by one thread at a time."""

from __future__ import annotations

import threading

REPLACING = threading.RLock()
"""Held from before the first name is read until the last is put back, so that nobody puts back a replacement."""
