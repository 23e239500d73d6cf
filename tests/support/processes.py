"""Scripts in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def printed_by(script: str, devices: int = 1) -> str:
    """What a script prints on so many devices of the CPU; it must go well."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **flags}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
