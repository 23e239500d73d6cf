"""Stored runs and notebooks made by hand, that the tests of `verify` have in common."""

from __future__ import annotations

import base64
from typing import Any

import nbformat
import numpy as np

from flax_magics.base.files import RUN_JSON, RUNS_JSON

HERE = {
    "versions": {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"},
    "device": "cpu:0",
    "device_kind": "cpu",
    "processor": "x86_64-A",
    "threads": 2,
}
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def sample(*arrays: Any, paths: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """Arrays of which all values are kept."""
    described = [f"{a.dtype.name}[{','.join(map(str, a.shape))}]" for a in arrays]
    return {
        "leaves": [
            {"path": path, "array": text, "values": array.size}
            for path, text, array in zip(paths, described, arrays, strict=True)
        ],
        "bits": base64.b64encode(b"".join(array.tobytes() for array in arrays)).decode(),
        "output": described[0] if len(described) == 1 else f"({', '.join(described)})",
    }


def run(**changes: Any) -> dict[str, Any]:
    """One run as JSON data, with changes."""
    return {
        "version": 1,
        "command": "apply",
        "model": "net",
        "mode": "train",
        "call": "net(x)",
        "seed": 0,
        "draw": 1,
        "samples": None,
        "keys": {"params": "375f238f00000000", "dropout": "f71f4ea900000000"},
        "digest": "0123456789abcdef",
        **sample(VALUES),
        "started": 10.0,
        "replayed": False,
        **HERE,
        **changes,
    }


def cell(*runs: Any, loop: Any = None, source: str = "y = %flax_apply net(x)", tags: tuple[str, ...] = ()) -> Any:
    """A code cell whose outputs hold these runs."""
    bundles = [{RUN_JSON: one} for one in runs] + ([{RUNS_JSON: loop}] if loop is not None else [])
    outputs = [nbformat.v4.new_output("display_data", data) for data in bundles]
    return nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": list(tags)} if tags else {})


def notebook(*cells: Any) -> Any:
    """A notebook of these cells."""
    return nbformat.v4.new_notebook(cells=list(cells))
