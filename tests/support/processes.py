"""Scripts in processes of their own."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from typing import Any

from by_hand import SUPPORT


def environment() -> dict[str, str]:
    """The environment of a process on the CPU in which XLA optimises as little as here."""
    import jax

    little = jax.config.read("jax_disable_most_optimizations")
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(little))}


def compilation_cache(folder: str) -> dict[str, str]:
    """The variables of the environment by which processes share in a folder what JAX has compiled."""
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def printed_by(script: str, *options: str, devices: int = 1) -> str:
    """What a script prints on so many devices of the CPU; it must go well. `options` are Python's own."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, *options, "-c", textwrap.dedent(script)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment() | flags, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


FORKS = f"""
import os, signal, sys
sys.path.insert(0, {SUPPORT!r})
{{script}}
for line in sys.stdin:
    if not os.fork():
        signal.alarm(300)
        child(*line.split())
    _, status = os.wait()
    if not os.WIFSIGNALED(status):
        break
"""


class Nursery:
    """A process that runs a script, which defines `child`, and calls that in a fork for each line; each is to be killed.

    Importing JAX and Flax takes longer than most of what a child does, and what it compiles one before has compiled.
    In a `with`, which leaves nothing running.
    """

    def __init__(self, script: str) -> None:
        self._script = FORKS.format(script=textwrap.dedent(script))

    def __enter__(self) -> Nursery:
        self._errors = tempfile.TemporaryFile()
        self._compiled = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", self._script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment() | compilation_cache(self._compiled.name),
            start_new_session=True,
        )
        self._heard = b""
        return self

    def __exit__(self, *_: Any) -> None:
        # A child that lives would be waited for.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._errors.close()
        self._compiled.cleanup()

    def bear(self, *words: object) -> None:
        """Has the next child called with these words, once that before is killed."""
        self._process.stdin.write(f"{' '.join(map(str, words))}\n".encode())  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]

    def line(self, limit: float = 300) -> list[str]:
        """The words of the next line that a child prints; the test fails where none comes within `limit` seconds."""
        output = self._process.stdout.fileno()  # type: ignore[union-attr]
        while b"\n" not in self._heard:
            more = os.read(output, 4096) if select.select([output], [], [], limit)[0] else b""
            if not more:
                self._errors.seek(0)
                raise AssertionError(f"it says no more than {self._heard!r}\n{self._errors.read().decode()}")
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode().split()


JOB = f"""
import os, sys
sys.path.insert(0, {SUPPORT!r})
import jax
rank, count = int(os.environ["RANK"]), int(os.environ["COUNT"])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_enable_recoverability", {{recoverable}})
jax.distributed.initialize(os.environ["COORDINATOR"], count, rank, heartbeat_timeout_seconds={{heartbeat}})
"""


class Job:
    """Processes of one job, all of which run the same script, with their number in `rank`. In a `with`, which leaves none.

    Their lines, and their errors, are read together.
    """

    def __init__(
        self, script: str, folder: str, count: int = 2, *, heartbeat: int = 100, recoverable: bool = True
    ) -> None:
        self._script = JOB.format(heartbeat=heartbeat, recoverable=recoverable) + textwrap.dedent(script)
        self._folder, self._count = folder, count

    def __enter__(self) -> Job:
        with socket.create_server(("127.0.0.1", 0)) as free:
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", self._script],
                cwd=self._folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={
                    **environment(),
                    **{
                        "RANK": str(rank),
                        "COUNT": str(self._count),
                        "COORDINATOR": coordinator,
                        "PYTHONUNBUFFERED": "1",
                    },
                },
            )
            for rank in range(self._count)
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]

    def ended(self, rank: int, limit: float = 240) -> tuple[int, str]:
        """Exit status and output of a process; the test fails where it takes longer than `limit` seconds."""
        process = self.processes[rank]
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            for other in self.processes:
                other.kill()
            said = "\n".join(f"{number}: {other.communicate()[0]}" for number, other in enumerate(self.processes))
            raise AssertionError(f"process {rank} has not ended\n{said}") from None
        return process.returncode, output
