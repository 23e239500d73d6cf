"""The text of a script, put together: imports first, one blank line between cells, two around functions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from .scribe import Scribe
from .wrapping import WIDTH, fitted


@dataclass
class Item:
    """Lines that belong together.

    Attributes:
      apart: it is a function or a class, which stands apart.
      blank: an empty line stands above it in the cell.
    """

    lines: list[str]
    apart: bool = False
    blank: bool = False


def joined(blocks: Sequence[Sequence[Item]]) -> list[str]:
    """The lines of all blocks, with the empty lines between them."""
    out: list[str] = []
    before: Item | None = None
    for block in blocks:
        for i, item in enumerate(block):
            if not item.lines:
                continue
            if before is not None:
                n = 2 if item.apart or before.apart else 1 if item.blank or not i else 0
                out += [""] * n
            out += [line.rstrip() for line in item.lines]
            before = item
    return out


def import_lines(statements: Iterable[ast.Import | ast.ImportFrom], unit: str) -> list[str]:
    """The imports of a script, each once: `__future__`, then the standard library, then everything else."""
    plain: dict[tuple[int, str], str] = {}
    froms: dict[tuple[int, str], dict[str, None]] = {}
    for statement in statements:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                text = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                plain[_section(alias.name), text] = text
        else:
            module = "." * statement.level + (statement.module or "")
            names = froms.setdefault((_section(module), module), {})
            for alias in statement.names:
                names[alias.name + (f" as {alias.asname}" if alias.asname else "")] = None
    out: list[str] = []
    for section in range(3):
        lines = [text for (where, _), text in sorted(plain.items()) if where == section]
        for (where, module), found in sorted(froms.items()):
            if where == section:
                lines += _from(module, sorted(found), unit)
        if lines:
            out += [""] * bool(out) + lines
    return out


def _from(module: str, names: list[str], unit: str) -> list[str]:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return [line]
    return [f"from {module} import (", *(f"{unit}{name}," for name in names), ")"]


def _section(module: str) -> int:
    first = module.partition(".")[0]
    return 0 if first == "__future__" else 1 if first in sys.stdlib_module_names else 2


def digest_function(scribe: Scribe, width: int, has: Container[str], np: str = "np") -> list[str]:
    """The function that prints the digest of one run: what `flax_magics.run.digest_of` states, on little-endian machines.

    Args:
      width: of the column before the digest.
      has: `keys` and `objects`, where some result has leaves that are such.
      np: what NumPy is called.
    """
    before = ""
    inner = ["path = jax.tree_util.keystr(path)"]
    if "objects" in has:
        inner += [
            f"if not isinstance(leaf, (jax.Array, {np}.ndarray, {np}.generic, int, float, complex)):",
            '\thasher.update(f"{path}\\0{leaf!r}\\0".encode())',
            "\tcontinue",
        ]
    if "keys" in has:
        inner += [
            'key_type, dtype = "", getattr(leaf, "dtype", None)',
            "if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):",
            "\tkey_type, leaf = str(dtype), jax.random.key_data(leaf)",
        ]
        before = "{key_type}"
    inner += [
        f'array = {np}.asarray(leaf, order="C")',
        f'header = f"{{path}}\\0{before}{{array.dtype.name}}{{list(array.shape)}}\\0"',
        "hasher.update(header.encode() + array.tobytes())",
    ]
    lines = [
        f"def {scribe.digest}(call, result):",
        '\t"""Prints a digest of the bits of a result, by which two runs can be compared."""',
        "\thasher = hashlib.sha256()",
        "\tfor path, leaf in jax.tree_util.tree_flatten_with_path(result)[0]:",
        *("\t\t" + line for line in inner),
        f'\tprint(f"{{call:<{width}}}  {{hasher.hexdigest()[:16]}}")',
    ]
    if scribe.quote == "'":
        lines = [line if '"""' in line else line.replace('"', "'") for line in lines]
    return fitted((line.replace("\t", scribe.unit) for line in lines), scribe.unit)
