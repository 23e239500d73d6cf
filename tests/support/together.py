"""Functions on threads of their own, and a limit to how long a test waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable


def on_threads(*functions: Callable[[], object], limit: float = 120) -> None:
    """Calls each function on a thread of its own, all at once, and waits for them; the test fails after `limit` seconds."""
    threads = [threading.Thread(target=function, daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit)
    waiting = [thread.name for thread in threads if thread.is_alive()]
    assert not waiting, f"still at work: {', '.join(waiting)}"
