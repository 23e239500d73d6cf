"""Checks of what the user's names hold: jitted NNX modules, meshes, loaders, classes that are reloaded in place."""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from ..base.text import plural
from ..base.threads import forked_workers
from ..code.library import is_module, is_module_class, library_module, loads_of, nnx_modules
from .finding import Examined, Finding


def jitted_modules(examined: Examined) -> Finding | None:
    """A plain `jax.jit` over an NNX module: what the function changes in it is lost in silence."""
    nnx = sys.modules.get("flax.nnx")
    jitted = {name: value for name, value in _named(examined) if type(value) is type(jax.jit(lambda: None))}
    if nnx is None or not jitted:
        return None
    modules = {name: value for name, value in _named(examined) if isinstance(value, nnx_modules())}
    for name, function in jitted.items():
        inner = inspect.unwrap(function)
        captured = next(_captured(inner, modules), None)
        if captured is not None:
            text = f"`{name}` is jax.jit of a function that reads the NNX module `{captured}` from outside"
            cost = "its weights are constants of the program, and later ones are never seen"
            mend = f"from flax import nnx\n@nnx.jit\ndef {name}({captured}, …):\n  …"
            return Finding(text, cost, mend, now=True)
        for module in _passed(name, modules, examined):
            # A function that only reads parameters loses nothing.
            changes = "update" in getattr(getattr(inner, "__code__", None), "co_names", ())
            if changes or jax.tree_util.tree_leaves(nnx.state(modules[module], nnx.Not(nnx.Param))):
                text = f"`{name}` is a plain jax.jit, and is called with the NNX module `{module}`"
                cost = "what it changes there (counts of random streams, statistics, weights) is lost in silence"
                return Finding(text, cost, f"from flax import nnx\n{name} = nnx.jit({name}.__wrapped__)", now=True)
    return None


def _named(examined: Examined) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in examined.names.items() if not name.startswith("_"))


def _captured(function: Any, modules: Mapping[str, Any]) -> Iterator[str]:
    """Names of the NNX modules that a function reads from its globals, closes over, is, or is a method of."""
    owner = getattr(function, "__self__", function)
    if isinstance(owner, nnx_modules()):
        yield next((name for name, module in modules.items() if module is owner), "net")
    if isinstance(function, types.FunctionType):
        closed = inspect.getclosurevars(function).nonlocals
        loaded = {name: function.__globals__.get(name) for name in loads_of(function.__code__).names}
        yield from (name for name, value in {**loaded, **closed}.items() if isinstance(value, nnx_modules()))


def _passed(function: str, modules: Mapping[str, Any], examined: Examined) -> Iterator[str]:
    """Names of the modules that the user's code passes to a function, as it was written."""
    for source in examined.sources():
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == function:
                arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
                yield from (node.id for node in arguments if isinstance(node, ast.Name) and node.id in modules)


def explicit_mesh(examined: Examined) -> Finding | None:
    """A mesh of Explicit axes, beside Flax modules."""
    if not (examined.modules or any(is_module(value) for _, value in _named(examined))):
        return None
    around = jax.sharding.get_abstract_mesh()
    meshes: list[tuple[str, Any]] = [("", around)] if not around.empty else []
    meshes += [(name, value) for name, value in _named(examined) if isinstance(value, Mesh)]
    explicit = [(name, mesh) for name, mesh in meshes if AxisType.Explicit in mesh.axis_types]
    if not explicit:
        return None
    name = next((name for name, _ in explicit if name), "mesh")
    mesh = explicit[-1][1]
    sizes, axes = tuple(mesh.shape.values()), tuple(mesh.axis_names)
    kinds = "(AxisType.Auto,)" + f" * {len(axes)}" * (len(axes) > 1)
    lines = [
        "import jax",
        "from jax.sharding import AxisType",
        f"{name} = jax.make_mesh({sizes}, {axes}, axis_types={kinds})",
        *([f"jax.set_mesh({name})"] if not around.empty else []),
    ]
    what = (
        f"`{name}` has Explicit axes" if any(name for name, _ in explicit) else "the mesh that is set has Explicit axes"
    )
    return Finding(what, "Flax's Dropout, Embed and RNN fail on arrays that are sharded so", "\n".join(lines))


def workers(examined: Examined) -> Finding | None:
    """A loader of torch's that forks this process."""
    forking = {name: count for name, value in _named(examined) if (count := forked_workers(value))}
    if not forking:
        return None
    told = ", ".join(f"`{name}` forks {plural(count, 'worker')}" for name, count in forking.items())
    lines = "\n".join(f"{name}.num_workers = 0" for name in forking)
    cost = "a fork of a process in which JAX runs may wait for ever"
    return Finding(told, f"{cost}; multiprocessing_context='forkserver' starts them otherwise", lines, now=True)


def autoreload(examined: Examined) -> Finding | None:
    """Classes of Flax modules that IPython's autoreload changes in place."""
    registry = getattr(getattr(examined.shell, "magics_manager", None), "registry", {})
    reloader = getattr(registry.get("AutoreloadMagics"), "_reloader", None)
    if reloader is None or not reloader.enabled:
        return None
    found: dict[str, str] = {}
    for value in (*examined.modules.values(), *(value for _, value in _named(examined))):
        cls = value if isinstance(value, type) else type(value)
        module = str(cls.__module__)
        if module == "__main__" or library_module(module) or not is_module_class(cls):
            continue
        if module in reloader.modules or (reloader.check_all and module not in reloader.skip_modules):
            found.setdefault(module, cls.__name__)
    if not found:
        return None
    classes = ", ".join(f"`{name}` of {module}" for module, name in found.items())
    cost = (
        "functions that were jitted before an edit go on with the code before it, in silence, until jax.clear_caches()"
    )
    return Finding(f"autoreload changes {classes} in place", cost, "\n".join(f"%aimport -{module}" for module in found))
