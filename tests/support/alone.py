"""Scripts that run where neither flax_magics nor IPython can be imported, each in a process of its own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from processes import compilation_cache

BLOCKED = 'import runpy, sys\nsys.modules["flax_magics"] = sys.modules["IPython"] = None\n'

AFRESH = BLOCKED + 'runpy.run_path(sys.argv[1], run_name="__main__")\n'

# A process that has imported what every such script imports, touched no device and started no thread, and becomes each
# script by a fork: importing JAX and Flax takes longer than most of the scripts do.
NURSERY = (
    BLOCKED
    + """
import json, os, signal, traceback
import flax.linen, flax.nnx, jax, jax.numpy, numpy

def run(path, folder, environment, output, errors, unoptimised):
    jax.config.update("jax_disable_most_optimizations", unoptimised)
    signal.alarm(300)
    os.dup2(os.open(output, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        runpy.run_path(path, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    child = os.fork()
    if not child:
        run(**json.loads(line))
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
)


@functools.cache
def _nursery() -> subprocess.Popen[str]:
    # Most scripts compile what another one has compiled: JAX's own cache gives it to them. No flax_magics lives in there.
    compiled = tempfile.TemporaryDirectory()
    atexit.register(compiled.cleanup)
    process = subprocess.Popen(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | compilation_cache(compiled.name),
    )
    atexit.register(process.communicate)  # the end of its input is its end
    return process


def run_alone(script: Path, *, afresh: bool = False) -> str:
    """What `script` prints when it is run in its folder, which must go well.

    Args:
      afresh: in a new interpreter; without it, in the fork of one that has imported JAX and Flax.
    """
    import jax

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    unoptimised = jax.config.read("jax_disable_most_optimizations")  # as the session's programs were compiled
    if afresh or not hasattr(os, "fork"):
        done = subprocess.run(
            [sys.executable, "-W", "error::SyntaxWarning", "-c", AFRESH, str(script)],
            capture_output=True,
            text=True,
            cwd=script.parent,
            env=environment,
            timeout=300,
        )
        status, printed, errors = done.returncode, done.stdout, done.stderr
    else:
        nursery = _nursery()
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            output, told = Path(folder) / "output", Path(folder) / "errors"
            output.touch()
            told.touch()
            asked = {
                "path": str(script),
                "folder": str(script.parent),
                "environment": environment,
                "output": str(output),
                "errors": str(told),
                "unoptimised": unoptimised,
            }
            nursery.stdin.write(json.dumps(asked) + "\n")
            nursery.stdin.flush()
            status, printed, errors = int(nursery.stdout.readline()), output.read_text(), told.read_text()
    assert status == 0, f"{script.read_text()}\n{errors}"
    return printed
