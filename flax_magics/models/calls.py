"""A call's arguments split into traced and static leaves, signatures, calls in source, and submodule calls in a trace."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import linecache
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from types import CodeType, FrameType
from typing import Any, TypeAlias, cast

import jax
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import describe
from ..base.types import Leaf, PyTree
from ..code.library import is_module, library_file, nnx_modules
from ..line.expression import positional_names, with_arguments

Names: TypeAlias = tuple[str, ...]
Path: TypeAlias = tuple[str, ...]
Args: TypeAlias = tuple[PyTree, ...]
Kwargs: TypeAlias = dict[str, PyTree]
Function: TypeAlias = Callable[..., PyTree]


class Arguments(Struct, frozen=True):
    """`(args, kwargs)` of a call flattened to named leaves, each traced (an input) or static (in the program).

    Arrays and Python numbers are traced; bools, strings, callables and all other objects are static.

    Attributes:
      treedef: of `(args, kwargs)`.
      parameters: the parameter that receives each argument, positional ones first.
      names, leaves, traced: name, value and kind of each leaf; a name is a parameter with a path, such as `batch['x']`.
      forced: names of int leaves that are static because the model needs their value.
      placed: traced leaves by name that a mesh has copies of: programs take these, reports and replays what was passed.
    """

    treedef: PyTree
    parameters: tuple[str, ...]
    names: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    traced: tuple[bool, ...]
    forced: frozenset[str]
    placed: Mapping[str, Leaf] = {}

    @classmethod
    def of(cls, args: Args, kwargs: Kwargs, signature: inspect.Signature, forced: frozenset[str]) -> Arguments:
        """Flattens `(args, kwargs)`; leaves are named after the parameters of `signature`."""
        paths, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        positional = positional_names(signature, len(args))
        names = tuple(
            (positional[argument.idx] if which.idx == 0 else argument.key) + jax.tree_util.keystr(tuple(inside))
            for (which, argument, *inside), _ in paths
        )
        leaves = tuple(leaf for _, leaf in paths)
        traced = tuple(is_traced(leaf) and name not in forced for name, leaf in zip(names, leaves, strict=True))
        return cls(treedef, (*positional, *sorted(kwargs)), names, leaves, traced, forced)

    @property
    def rows(self) -> Iterator[tuple[str, Leaf, bool]]:
        """(name, leaf, whether it is traced) of each leaf."""
        return zip(self.names, self.leaves, self.traced, strict=True)

    def with_static(self, names: Collection[str]) -> Arguments:
        """A copy in which the leaves of `names` are static."""
        traced = tuple(traced and name not in names for name, _, traced in self.rows)
        return replace(self, traced=traced, forced=self.forced.union(names))

    @property
    def dynamic(self) -> Kwargs:
        """The traced leaves by name: JAX's messages then say `arguments['n']`."""
        return {name: self.placed.get(name, leaf) for name, leaf, traced in self.rows if traced}

    @property
    def static(self) -> tuple[tuple[str, Leaf], ...]:
        """Names and values of the static leaves, in order."""
        return tuple((name, leaf) for name, leaf, traced in self.rows if not traced)

    def leaf(self, name: str) -> Leaf:
        """The leaf called `name`, None where there is none."""
        return dict(zip(self.names, self.leaves, strict=True)).get(name)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the traced leaves that are Python ints."""
        return tuple(name for name, leaf, traced in self.rows if traced and type(leaf) is int)

    def rebuild(self, dynamic: Mapping[str, Leaf]) -> tuple[Args, Kwargs]:
        """`(args, kwargs)` with the traced leaves replaced by those of `dynamic`; static leaves stay."""
        leaves = [dynamic[name] if traced else leaf for name, leaf, traced in self.rows]
        args, kwargs = jax.tree_util.tree_unflatten(self.treedef, leaves)
        return args, kwargs


def is_traced(leaf: object) -> bool:
    """Whether a leaf is data that a program takes as input (an array or number) and not a choice it is compiled for."""
    if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        return isinstance(leaf, jax.Array) or leaf.dtype.kind not in "OUSMm"
    return isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)


def has_tracer(*trees: PyTree) -> bool:
    """Whether any leaf of the trees is a tracer, that is, the code runs inside a JAX transform."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(trees))


def signature_of(leaf: object) -> tuple[Any, ...]:
    """(shape, dtype, weak type, sharding) of a traced leaf: what a compiled program is specialized on.

    The sharding is None unless the user placed the array (it is committed).
    """
    if isinstance(leaf, jax.Array):
        # A key array has no weak type.
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), leaf.sharding if leaf.committed else None
    if isinstance(leaf, (np.ndarray, np.generic)):
        return leaf.shape, leaf.dtype, False, None
    if isinstance(leaf, jax.ShapeDtypeStruct):  # a variable that an init is still computing
        return leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding
    return (), type(leaf), True, None  # a Python number: JAX gives it a weak type


TAKES_ANYTHING = inspect.signature(lambda *args, **kwargs: None)


def readable_signature(function: Function) -> inspect.Signature:
    """The signature of `function`; `TAKES_ANYTHING` where it has none that can be inspected (some builtins)."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return TAKES_ANYTHING


def constructor(cls: Any) -> inspect.Signature:
    """The signature with which a class is constructed, or `TAKES_ANYTHING`."""
    # For an NNX class `inspect.signature` finds its metaclass's `__call__(*args, **kwargs)`.
    if not is_nnx_class(cls):
        return readable_signature(cls)
    signature = readable_signature(cls.__init__)
    return signature if signature is TAKES_ANYTHING else without_self(signature)


def without_self(signature: inspect.Signature) -> inspect.Signature:
    """A signature without its first parameter."""
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def is_nnx_class(cls: object) -> bool:
    """Whether `cls` is a class of NNX modules."""
    return isinstance(cls, type) and issubclass(cls, nnx_modules())


def mask_of(module: Any, args: Args, kwargs: Kwargs) -> tuple[tuple[int, ...], float] | None:
    """(shape, rate) of the mask that a linen or NNX dropout draws when called with these arguments; None if unknown."""
    inputs = args[0] if args else kwargs.get("inputs")
    shape, rate = getattr(inputs, "shape", None), module.rate
    if shape is None or not isinstance(rate, (int, float)):
        return None
    whole = list(shape)
    for dim in module.broadcast_dims:
        whole[dim] = 1  # the mask is broadcast along these axes
    return tuple(whole), float(rate)


class CallText(Struct, frozen=True):
    """A call in the user's code: its text in one line, and the line where it begins."""

    text: str
    line: int

    @classmethod
    def at(cls, code: CodeType, instruction: int) -> CallText | None:
        """The call that an instruction of `code` makes, by its offset; None where the source does not tell."""
        first, last, begin, end = list(code.co_positions())[instruction // 2]
        lines = [] if first is None else linecache.getlines(code.co_filename)[first - 1 : last]
        if first is None or not lines:
            return None
        lines[-1] = lines[-1].encode()[:end].decode()
        lines[0] = lines[0].encode()[begin:].decode()
        text = "".join(lines)
        try:
            tree = ast.parse(f"({text}\n)", mode="eval").body
        except SyntaxError:
            return None
        if not isinstance(tree, ast.Call):
            return None
        return cls(text if len(lines) == 1 else ast.unparse(tree), first)

    @property
    def tree(self) -> ast.Call:
        """Its syntax tree."""
        return cast("ast.Call", ast.parse(self.text, mode="eval").body)

    def _given(self, name: str, place: int) -> ast.expr | ast.keyword | None:
        """What it gives for a parameter, by its name or at its place from 0; `*` and `**` may give anything."""
        tree = self.tree
        by_name = next((each for each in tree.keywords if each.arg in (name, None)), None)
        if by_name is not None:
            return by_name
        anything = next((each for each in tree.args[: place + 1] if isinstance(each, ast.Starred)), None)
        return tree.args[place] if anything is None and place < len(tree.args) else anything

    def argument(self, name: str, place: int) -> str:
        """The text of what it gives for a parameter, see `_given`; empty where nothing."""
        given = self._given(name, place)
        if isinstance(given, ast.keyword) and given.arg is not None:
            return ast.unparse(given.value)
        return "" if given is None else ast.unparse(given)

    def with_argument(self, keyword: str, place: int) -> str:
        """Its text with `name=value` in the place of what it gives for that parameter, or as its last argument."""
        given = self._given(keyword.partition("=")[0], place)
        if given is None or isinstance(given, ast.Starred) or (isinstance(given, ast.keyword) and given.arg is None):
            return with_arguments(self.text, [keyword])
        text = self.text.encode()
        return f"{text[: given.col_offset].decode()}{keyword}{text[given.end_col_offset :].decode()}"


def self_of(frame: FrameType) -> object:
    """The Flax module of which a method runs in a frame; None for any other function, such as a loss."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if not is_module(first):
        return None
    methods = (vars(cls).get(code.co_name) for cls in type(first).__mro__)
    is_method = any(getattr(inspect.unwrap(one), "__code__", None) is code for one in methods if callable(one))
    return first if is_method else None


def is_flax(cls: type) -> bool:
    """Whether a class is one of Flax's own."""
    return cls.__module__.partition(".")[0] == "flax"


def frame_of(module: object) -> FrameType | None:
    """The innermost frame of user code whose first argument is `module`, that is, a running method of it."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        code = frame.f_code
        is_ours = str(frame.f_globals.get("__name__")).startswith(("flax.", "flax_magics."))
        if not is_ours and code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
            return frame
    return None


def last_name(node: ast.expr) -> str:
    """The name at the end of an expression: `Dropout` of `nn.Dropout`; empty for any other than names with dots."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def methods_of(cls: type) -> Iterator[tuple[ast.Module, int]]:
    """The syntax tree of each method in the user's classes, and the line on which it begins."""
    for base in cls.__mro__:
        if is_flax(base) or base is object:
            continue
        for function in vars(base).values():
            code = None
            with suppress(ValueError):  # it is wrapped in itself
                code = getattr(inspect.unwrap(function), "__code__", None)
            if isinstance(code, CodeType) and (parsed := _parsed(code)) is not None:
                yield parsed


@functools.lru_cache(maxsize=64)  # a model's layers ask for the same methods, one after the other
def _parsed(code: CodeType) -> tuple[ast.Module, int] | None:
    """The syntax tree of a function and the line on which it begins; None where its source is not there."""
    # `inspect.getsourcelines` would look through all imported modules for the function's own first: some 15 ms.
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]
    with suppress(SyntaxError, ValueError):
        return ast.parse(textwrap.dedent("".join(inspect.getblock(lines)))), code.co_firstlineno
    return None


class ArgumentPlace(Struct, frozen=True):
    """A call in the source that passes a layer its switch: `nn.Dropout(0.5, deterministic=True)` or `self.drop(x, …)`.

    Attributes:
      expression: the switch's expression.
      line: line of the expression in the file or cell.
      call: lines of the whole call.
      name: the attribute that the call's value is assigned to (`self.name = …`), empty if none.
      keyword: the switch is passed as a keyword, not by position.
    """

    expression: ast.expr
    line: int
    call: range
    name: str
    keyword: bool


def places_of(cls: type, layer: type, switch: str, in_call: bool) -> Iterator[ArgumentPlace]:
    """Every call in the class's methods that passes `switch` to a `layer`: calls of it (`in_call`) or constructions."""
    function: Callable[..., Any] = layer.__call__.__get__(object()) if in_call else layer
    parameters = list(inspect.signature(function).parameters)  # without `self`
    position = parameters.index(switch) if switch in parameters else None
    for tree, start in methods_of(cls):
        assigns = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
        pairs = [(target, node.value) for node in assigns for target in node.targets]
        attributes = [(target.attr, value) for target, value in pairs if isinstance(target, ast.Attribute)]
        names = {id(call): attribute for attribute, value in attributes for call in ast.walk(value)}
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or _makes(call, layer) is in_call:
                continue
            place = range(call.lineno + start - 1, (call.end_lineno or call.lineno) + start)
            expression = next((item.value for item in call.keywords if item.arg == switch), None)
            keyword = expression is not None
            # The positional arguments of `partial` begin with the layer itself, so they are off by one.
            if not keyword and position is not None and len(call.args) > position:
                expression = call.args[position] if last_name(call.func) != "partial" else None
            if expression is not None:
                line = expression.lineno + start - 1
                yield ArgumentPlace(expression, line, place, names.get(id(call), ""), keyword)


def _makes(call: ast.Call, layer: type) -> bool:
    """Whether a call constructs the layer: `nn.Dropout(…)` or `partial(nn.Dropout, …)`."""
    return layer.__name__ in {
        last_name(call.func),
        *(last_name(arg) for arg in call.args if last_name(call.func) == "partial"),
    }


def made_in(module: object, around: object) -> CallText | None:
    """The one call in the source of the module `around` that makes `module`; None where there are none or several."""
    calls = [
        CallText(ast.unparse(call), call.lineno + start - 1)
        for tree, start in methods_of(type(around))
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and last_name(call.func) == type(module).__name__
    ]
    return calls[0] if len(calls) == 1 else None


def in_model(frame: FrameType) -> bool:
    """Whether a method of one of the user's modules runs in a frame, or around it."""
    around = (each for each, _ in traceback.walk_stack(frame) if not library_file(each.f_code.co_filename))
    return any(self_of(each) is not None for each in around)


def is_lifted(frame: FrameType, caller: FrameType) -> bool:
    """Whether one of linen's lifted transforms stands between what runs in a frame and its `caller`."""
    between = itertools.takewhile(lambda step: step[0] is not caller, traceback.walk_stack(frame))
    return any(each.f_globals.get("__name__") == "flax.linen.transforms" for each, _ in between)


def first_line(code: CodeType, added: str, *, in_place_of: str = "") -> str:
    """The first line of a function with one parameter more, or with one by another name."""
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    names = tuple(added if name == in_place_of else name for name in names) if in_place_of else (*names, added)
    return f"def {code.co_name if code.co_name.isidentifier() else 'loss'}({', '.join(names)}):"


def caller_of(frame: FrameType) -> tuple[FrameType, CallText] | tuple[None, None]:
    """The user's code that called what runs in `frame`, a method of a module, and the call as it is written there.

    (None, None) where another module of Flax's, such as `nn.Sequential`, passes on the call, and where nobody's code does.
    """
    for outside, _ in traceback.walk_stack(frame.f_back):
        room, _, inside = str(outside.f_globals.get("__name__")).partition(".")
        if room == "flax_magics" and not inside.startswith("models."):
            break
        if room == "flax_magics" or library_file(outside.f_code.co_filename):
            if type(self_of(outside)).__module__.startswith("flax."):
                break
            continue
        call = CallText.at(outside.f_code, outside.f_lasti)
        return (None, None) if call is None else (outside, call)
    return None, None


LONGEST = 400
"""The most characters of the description of a call's inputs or outputs."""

_numbers = itertools.count(1)
_MARK = r"flax_magics_call_(\d+)\b"


class Called(Struct, frozen=True):
    """One call of a submodule in a trace: path, class and method, with inputs and outputs as `dtype[shape]` text."""

    path: Path
    cls: str
    method: str
    inputs: str
    outputs: str
    mark: int
    """The number in the name scope of its equations, unique in the process."""
    inside: bool
    """Another method of the same module made the call."""


class Calls(Struct):
    """The submodule calls of one trace, in the order in which they began.

    Each call is traced under a name scope of its own, by which its equations are recognized in the jaxpr.
    """

    made: dict[int, Called] = {}
    _running: list[Path] = []

    def note(self, call: Function, args: Args, kwargs: Kwargs, *, path: Path, cls: str, method: str) -> PyTree:
        """Makes the call `call(*args, **kwargs)`, records it, and returns its result."""
        mark = next(_numbers)
        inputs = ", ".join([*map(_spell, args), *(f"{name}={_spell(value)}" for name, value in kwargs.items())])
        self.made[mark] = Called(path, cls, method, inputs, "", mark, path in self._running)
        self._running.append(path)
        try:
            with jax.named_scope(f"flax_magics_call_{mark}"):
                output = call(*args, **kwargs)
        finally:
            self._running.pop()
        self.made[mark] = replace(self.made[mark], outputs=_spell(output))
        return output


def _spell(value: object) -> str:
    nnx = sys.modules.get("flax.nnx")  # without it nothing can be one of its objects
    whole = nnx is not None and isinstance(value, nnx.Pytree)
    return f"{type(value).__name__}(…)" if whole else describe(value, LONGEST)


def marks_of(equation: Any) -> list[int]:
    """The marks of the calls, outermost first, during which an equation of a jaxpr was traced."""
    return [int(mark) for mark in re.findall(_MARK, str(equation.source_info.name_stack))]
