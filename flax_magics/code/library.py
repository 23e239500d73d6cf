"""Which code is the user's and which was installed, how Flax's own stands now, and what code reads from outside."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator, Mapping
from operator import is_
from types import CodeType, ModuleType
from typing import Any, NamedTuple

_ROOTS = ("flax.core", "flax.linen", "flax.nnx")
_PUBLIC = ("jax", "jax.lax", "jax.nn", "jax.nn.initializers", "jax.numpy", "jax.random")
"""Modules of JAX whose names models read; what is behind these is JAX's."""


class FlaxPatches:
    """Notices when Flax's own modules and classes are patched: `edition` is another number after each change.

    A script has them looked at before every run, a notebook before the first run of each cell.
    """

    def __init__(self) -> None:
        self.edition = 0
        self._places: list[tuple[Mapping[str, object], tuple[object, ...]]] = []
        self._loaded = 0
        self._in_cells = False
        self._looked = False

    def in_cells(self, value: bool) -> None:
        """Whether `new_cell` will be called for each cell; then one look lasts until the next cell."""
        self._in_cells = value
        self._looked = False

    def new_cell(self) -> None:
        """Has the next `look` compare again."""
        self._looked = False

    def look(self) -> None:
        """Compares Flax's modules and classes with how they were, and brings `edition` up to date."""
        if self._looked:
            return
        is_same = all(
            len(values) == len(place) and all(map(is_, place.values(), values)) for place, values in self._places
        )
        if not is_same or not self._loaded:
            self.edition += 1
        if not is_same or self._loaded != len(sys.modules):  # more modules are no change of those that were there
            self._loaded = len(sys.modules)
            self._places = [(place, tuple(place.values())) for place in _places()]
        self._looked = self._in_cells


def _places() -> Iterator[Mapping[str, object]]:
    """The namespaces of the modules, and of the classes that they define."""
    classes: dict[type, None] = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name in _PUBLIC or name.startswith(_ROOTS)):
            yield vars(module)
            values = [value for value in vars(module).values() if isinstance(value, type)]
            classes.update(dict.fromkeys(cls for cls in values if str(cls.__module__).startswith(_ROOTS)))
    yield from map(vars, classes)


library = FlaxPatches()
"""The patches of this process."""

OUTSIDE = frozenset(
    [
        "builtins", "datetime", "gc", "glob", "importlib", "inspect", "io", "locale", "numpy.random", "os", "os.path",
        "pathlib", "pickle", "platform", "posix", "posixpath", "random", "requests", "secrets", "shutil", "socket",
        "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid", "zoneinfo",
    ]
)  # fmt: skip
"""Modules through which code reads the clock, the environment, files or the host's random numbers."""


class Loads(NamedTuple):
    """What code itself, the functions inside it left out, takes from elsewhere: by its instructions.

    Attributes:
      imports: names of the modules that it imports when it runs.
      names: those that it loads from its module, each with the attributes that it reads one from another after it.
    """

    imports: list[str]
    names: dict[str, list[list[str]]]


@functools.lru_cache(maxsize=4096)
def loads_of(code: CodeType) -> Loads:
    """The loads of `code`, worked out once. The result is shared: it must not be changed."""
    loads = Loads([], {})
    attributes: list[str] | None = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            attributes = []
            loads.names.setdefault(step.argval, []).append(attributes)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and attributes is not None:
            attributes.append(step.argval)
        else:
            attributes = None
            if step.opname == "IMPORT_NAME":
                loads.imports.append(step.argval)
    return loads


def is_outside(value: object) -> bool:
    """Whether `value` is a module of `OUTSIDE`, or something that one of them defines."""
    if isinstance(value, ModuleType):
        return value.__name__ in OUTSIDE
    module = getattr(value, "__module__", None)
    return isinstance(module, str) and module in OUTSIDE and module != "builtins"


def reads_outside(name: str, module: ModuleType, code: CodeType) -> bool:
    """Whether `code`, in which `name` is the library `module`, reaches one of `OUTSIDE` through it: `np.random.rand()`."""
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
        # A module that goes somewhere else: any of the code's attributes may be read from it.
        if isinstance(value, ModuleType) and any(is_outside(vars(value).get(other)) for other in code.co_names):
            return True
    return False


@functools.cache
def _library_roots() -> tuple[str, ...]:
    import sysconfig  # some milliseconds, which `%load_ext` can do without

    paths = sysconfig.get_paths()
    return tuple({paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@functools.lru_cache(maxsize=4096)
def library_file(filename: str) -> bool:
    """Whether code of this file was installed, not written by the user."""
    return filename.startswith(_library_roots()) or filename.startswith("<frozen ")


def library_module(name: str | None) -> bool:
    """Whether `name` is a module that was installed, not one that the user writes."""
    module = sys.modules.get(name or "__main__")
    if name is None or name == "__main__" or module is None:
        return False
    file = getattr(module, "__file__", None)
    if file is None:  # built in, or a namespace package
        return name.partition(".")[0] in sys.builtin_module_names or hasattr(module, "__path__")
    return library_file(file)


def nnx_modules() -> tuple[type, ...]:
    """NNX's Module, as a tuple; empty where nobody has imported NNX, which takes longer than many a run."""
    nnx = sys.modules.get("flax.nnx")
    return () if nnx is None else (nnx.Module,)


def is_module(value: object) -> bool:
    """Whether `value` is an instance of a Flax module, of either API."""
    from flax import linen

    return isinstance(value, (linen.Module, *nnx_modules()))


def is_module_class(value: object) -> bool:
    """Whether `value` is a class of Flax modules, of either API."""
    from flax import linen

    return isinstance(value, type) and issubclass(value, (linen.Module, *nnx_modules()))
