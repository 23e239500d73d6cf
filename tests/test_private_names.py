"""Private names of JAX and Flax are fetched in one file, and Flax's methods are replaced in few.

A test that fails here names the file that uses one elsewhere, or what a new version took away.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen  # noqa: F401 - what is fetched from Flax is fetched from `sys.modules`
import jax
import pytest
from flax import nnx  # noqa: F401
from flax.core import FrozenDict

import flax_magics
from flax_magics.base import private

try:
    from flax.typing import HashableMapping
except ImportError:  # Flax 0.11
    from flax.nnx.graph import HashableMapping

ROOT = Path(flax_magics.__file__).parent
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}

IN_MODELS = {
    "_HashableProxy", "_committed", "_context", "_get_stream", "_pytree__nodes", "_pytree__state", "_raw_value",
    "_update_variables", "_var_metadata",
}  # fmt: skip
"""What models/ takes of objects of theirs, or replaces while it traces."""
NOT_THEIRS = {"_field_type", "_fields", "_getframe", "_reloader", "_render_traceback_", "_signal"}
"""Names of dataclasses, named tuples, Python and IPython."""


def own_names() -> Iterator[str]:
    """What the package itself gives a name."""
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def names_read(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported, and attributes by a dot or by a text that `getattr` and the like are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and re.search(r"attr_*$", ast.unparse(node.func)):
            yield from (word.value for word in node.args if isinstance(word, ast.Constant) and type(word.value) is str)


def test_private_names_are_fetched_in_one_file():
    own = set(own_names())
    elsewhere = {}
    for file, tree in TREES.items():
        names = {name for name in names_read(tree) if re.match(r"_[A-Za-z]", name) and name not in own | NOT_THEIRS}
        names |= {name for name in names_read(tree) if re.search(r"\b(jax|jaxlib|flax)\..*\b_[a-z]", name)}
        names -= IN_MODELS if file.startswith("models/") else set()
        if names and file != "base/private.py":
            elsewhere[file] = sorted(names)
    assert elsewhere == {}


def test_methods_of_flax_are_replaced_where_models_are_traced():
    def calling(name: str) -> set[str]:
        return {
            file
            for file, tree in TREES.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name
        }

    # On classes of ours, on an Rngs, and on IPython's.
    on_their_own = {"execution/call.py", "notebook/magics.py", "models/bridge.py", "notebook/free.py"}
    assert calling("setattr") - on_their_own == {"models/base.py"}
    assert calling("replaced") == {"models/bridge.py", "models/linen_trace.py", "models/nnx_trace.py"}


def staging() -> Any:
    seen = []
    jax.make_jaxpr(lambda key: seen.append(private.staging_of(key)))(jax.random.key(0))
    return seen[0]


@pytest.mark.parametrize(
    ("fetch", "expected"),
    [
        (private.is_tracing, False),
        (lambda: private.trace_context_of() is not tuple, True),
        (lambda: len(private.trace_context_names()) in (0, len(private.trace_context_of()())), True),
        (private.is_in_mesh, False),
        (lambda: private.is_compiled_alone(jax.lax.add_p), True),
        (lambda: private.hide_frames(str(ROOT)), True),
        (lambda: staging() is not None, True),
        (lambda: type(private.contents_of(FrozenDict(a=1))), dict),
        (lambda: type(private.contents_of(HashableMapping({"a": 1}))), dict),
        (lambda: type(private.flax_globals()[1]), list),
        (lambda: {name for _, name in private.nnx_stacks()} <= set(private.NNX_STACKS), True),
    ],
    ids=[
        *("trace_state_clean", "trace_context", "trace_context_names", "mesh", "apply_primitive"),
        *("register_exclusion", "custom_staging_rules"),
        *("FrozenDict._dict", "HashableMapping._mapping", "flags, interceptors and rules", "NNX's stacks"),
    ],
)
def test_this_version_has_the_name(fetch: Callable[[], Any], expected: Any) -> None:
    assert fetch() == expected
