"""Scripts in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def printed_by(script: str, *options: str, devices: int = 1) -> str:
    """What a script prints on so many devices of the CPU; it must go well. `options` are Python's own."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, *options, "-c", textwrap.dedent(script)]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **flags}, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout
