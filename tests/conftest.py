"""Fixtures that every test may use."""

from __future__ import annotations

import atexit
import builtins
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from traitlets.config import Config


def _fresh_shell(shell_class: Any) -> Iterator[Any]:
    saved = {
        name: getattr(sys, name) for name in ("displayhook", "excepthook", "ps1", "ps2", "ps3") if hasattr(sys, name)
    }
    modules = {name: sys.modules.get(name) for name in ("__main__",)}
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "NoColor" if _version() < (8,) else "nocolor"
    shell_class.clear_instance()
    shell = shell_class.instance(config=config)
    try:
        yield shell
    finally:
        shell.restore_sys_module_state()
        atexit.unregister(shell.atexit_operations)
        shell.atexit_operations()
        shell_class.clear_instance()
        for name, value in saved.items():
            setattr(sys, name, value)
        for name, module in modules.items():
            if module is not None:
                sys.modules[name] = module
        for name in ("get_ipython", "display"):
            builtins.__dict__.pop(name, None)


def _version() -> tuple[int, ...]:
    import IPython

    return tuple(IPython.version_info[:1])


@pytest.fixture
def shell() -> Iterator[Any]:
    """A fresh `InteractiveShell` without colours and without history, gone after the test."""
    from IPython.core.interactiveshell import InteractiveShell

    yield from _fresh_shell(InteractiveShell)
