"""Which code is the user's and which is installed, whether Flax is monkey-patched, and what code reads from outside."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from types import CodeType, ModuleType
from typing import Any

from ..base.types import Record

_ROOTS = ("flax.core", "flax.linen", "flax.nnx")
_PUBLIC = ("jax", "jax.lax", "jax.nn", "jax.nn.initializers", "jax.numpy", "jax.random")
"""JAX modules whose public names models read, and which a user might patch; JAX's internals are not watched."""


class FlaxPatches:
    """Notices monkey patches of Flax and JAX: `edition` goes up when an attribute of their modules or classes changes.

    A script checks before every run. A notebook checks before the first run of each cell: a check takes 0.15 ms, and half
    a millisecond where other work has taken the processor's caches.
    """

    def __init__(self) -> None:
        self.edition = 0
        self._places: list[Mapping[str, object]] = []
        self._values: tuple[object, ...] = ()
        self._sizes: list[int] = []
        self._numbers: tuple[int, ...] = ()
        """Where `_values` has numbers: of all that stands there, these alone can be equal and yet mean another program."""
        self._loaded = 0
        self._in_cells = False
        self._looked = False

    def in_cells(self, value: bool) -> None:
        """Sets whether `new_cell` will be called for each cell; one `look` then lasts until the next cell."""
        self._in_cells = value
        self._looked = False

    def new_cell(self) -> None:
        """Has the next `look` compare again: a cell has begun, and may patch something."""
        self._looked = False

    def look(self) -> None:
        """Brings `edition` up to date by comparing every attribute with that of the last look."""
        if self._looked:
            return
        is_same = self._is_same()
        if not is_same or not self._loaded:
            self.edition += 1
        # New modules are watched from now on, but they change no program: `edition` stays.
        if not is_same or self._loaded != len(sys.modules):
            self._loaded, self._places = len(sys.modules), list(_places())
            self._values, self._sizes = self._read(), list(map(len, self._places))
            self._numbers = tuple(i for i, value in enumerate(self._values) if isinstance(value, (int, float, complex)))
        self._looked = self._in_cells

    def _read(self) -> tuple[object, ...]:
        return tuple(chain.from_iterable([place.values() for place in self._places]))

    def _is_same(self) -> bool:
        values = self._read()
        # Tuples compare by identity first, and unlike `map(is_, …)` count no references, for which each of ten thousand
        # objects would have to be fetched once more.
        try:
            if values != self._values or list(map(len, self._places)) != self._sizes:
                return False
        except Exception:  # a comparison with what was put there, such as an array
            return False
        return all(values[i] is self._values[i] for i in self._numbers)


def _places() -> Iterator[Mapping[str, object]]:
    """The namespaces of all watched modules and of the classes that they define."""
    classes: dict[type, None] = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name in _PUBLIC or name.startswith(_ROOTS)):
            yield vars(module)
            values = [value for value in vars(module).values() if isinstance(value, type)]
            classes.update(dict.fromkeys(cls for cls in values if str(cls.__module__).startswith(_ROOTS)))
    yield from map(vars, classes)


library = FlaxPatches()
"""The one of this process: a patch affects every session."""

OUTSIDE = frozenset(
    [
        "builtins", "datetime", "gc", "glob", "importlib", "inspect", "io", "locale", "numpy.random", "os", "os.path",
        "pathlib", "pickle", "platform", "posix", "posixpath", "random", "requests", "secrets", "shutil", "socket",
        "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid", "zoneinfo",
    ]
)  # fmt: skip
"""Modules through which code reads the clock, the environment, files or random numbers: its results may vary."""


class Loads(Record):
    """What a code object's own instructions load from elsewhere; those of inner functions are left out.

    Attributes:
      imports: names of the modules that it imports when it runs.
      names: global name → for each load of it, the chain of attributes read from it: `np.random.rand` is one of `np`.
    """

    imports: list[str]
    names: dict[str, list[list[str]]]


@functools.lru_cache(maxsize=4096)
def loads_of(code: CodeType) -> Loads:
    """The loads of `code`. The result is cached and shared: callers must not change it."""
    loads = Loads([], {})
    attributes: list[str] | None = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            attributes = []
            loads.names.setdefault(step.argval, []).append(attributes)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and attributes is not None:
            attributes.append(step.argval)
        else:
            attributes = None  # any other instruction ends a chain of attributes
            if step.opname == "IMPORT_NAME":
                loads.imports.append(step.argval)
    return loads


def is_outside(value: object) -> bool:
    """Whether `value` is a module of `OUTSIDE` or something defined in one (a builtin is not)."""
    if isinstance(value, ModuleType):
        return value.__name__ in OUTSIDE
    module = getattr(value, "__module__", None)
    return isinstance(module, str) and module in OUTSIDE and module != "builtins"


def reads_outside(name: str, module: ModuleType, code: CodeType) -> bool:
    """Whether `code`, where `name` is the library `module`, reads from `OUTSIDE` through it: `np.random.rand()`."""
    if is_outside(module):
        return True
    for attributes in loads_of(code).names.get(name, ()):
        value: Any = module
        for attribute in attributes:
            value = vars(value).get(attribute)
            if is_outside(value):
                return True
            if not isinstance(value, ModuleType):
                break
        # The module itself is stored or passed on: any attribute named in the code may be read from it later.
        if isinstance(value, ModuleType) and any(is_outside(vars(value).get(other)) for other in code.co_names):
            return True
    return False


@functools.cache
def _library_roots() -> tuple[str, ...]:
    import sysconfig  # takes some milliseconds, and `%load_ext` imports this module

    paths = sysconfig.get_paths()
    return tuple({paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@functools.lru_cache(maxsize=4096)
def library_file(filename: str) -> bool:
    """Whether a code object's file is installed (standard library or site-packages) and not written by the user."""
    return filename.startswith(_library_roots()) or filename.startswith("<frozen ")


def library_module(name: str | None) -> bool:
    """Whether the imported module `name` is installed, and not the user's; False for one that is not imported."""
    module = sys.modules.get(name or "__main__")
    if name is None or name == "__main__" or module is None:
        return False
    file = getattr(module, "__file__", None)
    if file is None:  # a builtin module, or a namespace package, which has a `__path__`
        return name.partition(".")[0] in sys.builtin_module_names or hasattr(module, "__path__")
    return library_file(file)


def nnx_modules() -> tuple[type, ...]:
    """`(nnx.Module,)` for `isinstance`; empty where NNX is not imported, which takes longer than many runs."""
    nnx = sys.modules.get("flax.nnx")
    return () if nnx is None else (nnx.Module,)


def is_module(value: object) -> bool:
    """Whether `value` is a Flax module, linen or NNX."""
    from flax import linen

    return isinstance(value, (linen.Module, *nnx_modules()))


def is_module_class(value: object) -> bool:
    """Whether `value` is a class of Flax modules, linen or NNX."""
    from flax import linen

    return isinstance(value, type) and issubclass(value, (linen.Module, *nnx_modules()))
