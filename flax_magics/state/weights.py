"""Where a model's weights came from, whether others fit in their place, and which names of the notebook hold some.

A name that held a model's weights, and now holds others, means a training loop of the user's own. A name counts once it
was seen with the very arrays of the model: its variables or params, or a train state with them. What only looks like
weights (gradients, moments of an optimizer, another model's) never was.
"""

from __future__ import annotations

import ast
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from operator import is_

import jax
import numpy as np
from flax.core import meta
from msgspec import Struct
from msgspec.structs import replace

from ..base.digest import is_gone, kind_of, quick_digest
from ..base.text import plural
from ..base.types import Leaf, PyTree
from ..errors import FlaxMagicsError, nearest, written
from ..rng.keys import Draw
from ..run import Note

CURRENT = "flax_magics.session().models['{}'].variables"
"""The expression that returns a model's variables; `%flax_vars` knows the name `flax_magics`, imported or not."""
PREVIOUS = "%flax_vars {0} = flax_magics.session().models['{0}'].previous"
"""The line that brings back weights which an init replaced."""
FOR_THIS_RUN = "given for this run"
COPIES = "a jitted step with donate_argnums takes the arrays that it is given: give it copies of these"
SHOWN = 12
"""How many leaves a message names."""

Collections = Mapping[str, PyTree]
"""The variables of a model: collection → pytree."""


class Mark(Struct, frozen=True):
    """Recognises the arrays of one collection, so that others in their place are noticed.

    Attributes:
      leaves: weak references to the arrays; None for a leaf that has none, such as a Python number.
      digest: of some of their elements; None where any other object counts as another value.
    """

    leaves: tuple[weakref.ref[Leaf] | None, ...]
    digest: bytes | None

    @classmethod
    def of(cls, tree: object, *, sampled: bool) -> Mark:
        """The mark of the arrays in `tree`. `sampled`: equal elements count as the same, in whatever objects."""
        leaves = jax.tree_util.tree_leaves(tree)
        return cls(tuple(map(_reference, leaves)), quick_digest(leaves) if sampled else None)

    def has(self, leaves: list[Leaf]) -> bool:
        """Whether `leaves` are the same objects as the marked arrays."""
        return len(leaves) == len(self.leaves) and all(
            ref is None or ref() is leaf for ref, leaf in zip(self.leaves, leaves, strict=True)
        )


def _reference(leaf: Leaf) -> weakref.ref[Leaf] | None:
    return weakref.ref(leaf) if isinstance(leaf, (jax.Array, np.ndarray)) else None


class WeightSource(Struct, frozen=True):
    """Where a model's variables came from.

    Attributes:
      text: such as `initialised in draw 1` or `set in cell [6]`.
      seed: of the draw that initialised them; None where none did.
      changed: the user's code has replaced them since, in the NNX module or in the dict that holds them.
      marks: collection → what its arrays are recognised by.
      steps: of all trainings that they have had since they were initialised, set or loaded.
    """

    text: str
    seed: int | None = None
    changed: bool = False
    marks: Mapping[str, Mark] = {}
    steps: int = 0

    @classmethod
    def initialised(cls, draw: Draw, variables: Collections, *, in_module: bool = False) -> WeightSource:
        """The source of variables that an init, or the construction of an NNX module, made in `draw`."""
        return cls(f"initialised in draw {draw.number}", draw.seed).over(variables, in_module=in_module)

    @classmethod
    def assigned(cls, cell: int | None, variables: Collections, *, in_module: bool = False) -> WeightSource:
        """The source of variables that the user assigned, in a cell or (None) in a script."""
        text = "set in a script" if cell is None else f"set in cell [{cell}]"
        return cls(text).over(variables, in_module=in_module)

    @classmethod
    def loaded(cls, file: str, variables: Collections, *, in_module: bool = False) -> WeightSource:
        """The source of variables that were read from a file."""
        return cls(f"loaded from {file}").over(variables, in_module=in_module)

    @classmethod
    def trained(cls, before: WeightSource | None, draw: Draw, steps: int, resumed: int) -> WeightSource:
        """The source of variables that a training has made of others.

        Args:
          before: where these came from.
          steps: of the training so far, of which `resumed` were finished before.
        """
        earlier = 0 if before is None or before.changed else before.steps
        total = max(earlier, resumed) + steps - resumed
        of_draw = f" ({steps:,} in draw {draw.number})" if total != steps else ""
        return cls(f"trained, {plural(total, 'step')}{of_draw}", steps=total)

    @classmethod
    def own(cls, name: str) -> WeightSource:
        """The source of variables in an NNX module that the user's code built: only that code knows how."""
        return cls(f"held by {name}")

    def over(self, variables: Collections, *, in_module: bool = False) -> WeightSource:
        """The source with the marks of `variables`.

        Args:
          in_module: an NNX module holds them, where a user's `nnx.jit` puts new objects with the same values.
        """
        marks = {name: Mark.of(tree, sampled=in_module) for name, tree in variables.items()}
        return replace(self, marks=marks)

    @property
    def is_initial(self) -> bool:
        """Whether they are as a draw made them, apart from what runs have written."""
        return self.seed is not None and not self.changed

    def now(self, variables: Collections, updates: Container[str]) -> WeightSource:
        """The source of `variables`, which are held now, in the place of those that were marked.

        Args:
          updates: collections that the session's runs write; other values in these are no change by the user.
        """
        if self.changed:
            return self
        fresh = {}
        for name, mark in self.marks.items():
            if name in updates:
                continue
            leaves = jax.tree_util.tree_leaves(variables.get(name))
            if mark.has(leaves):
                continue
            if mark.digest is None or quick_digest(leaves) != mark.digest:
                return replace(self, changed=True, marks={})
            # Equal values in new objects: next time these objects are recognised at once.
            fresh[name] = Mark(tuple(map(_reference, leaves)), mark.digest)
        return replace(self, marks={**self.marks, **fresh}) if fresh else self

    def describe(self, seed: int | None = None) -> str:
        """The source in words; names the draw's seed if it is not `seed`, under which the session draws now."""
        of_seed = "" if seed is None or self.seed in (None, seed) else f" of seed {self.seed}"
        return self.text + of_seed + (", changed by your code since" if self.changed else "")


class Written(Struct, frozen=True):
    """How the user gave variables, so that a message can say what to write.

    Attributes:
      line: the whole line, with `{}` in the place of the expression.
      expression: as it was written; None where that is unknown.
    """

    line: str
    expression: str | None = None

    @classmethod
    def assignment(cls, name: str) -> Written:
        """The line of an assignment in Python, `models['net'].variables = …`."""
        return cls(f"{CURRENT.format(name)} = {{}}")

    def advice(self, pattern: str) -> dict[str, str]:
        """Advice for an error: the line with `pattern` around the expression, or around a gap if that is unknown."""
        text = self.line.replace("{}", pattern.replace("{}", self.expression or "…"), 1)
        return {"form" if self.expression is None else "write": text}

    @property
    def operand(self) -> str:
        """The expression, as it stands after `**` or before a dot: in parentheses unless it is a simple one."""
        try:
            tree = ast.parse(self.expression or "x", mode="eval").body
        except SyntaxError:
            return "({})"
        simple = (ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.Dict)
        return "{}" if isinstance(tree, simple) else "({})"


def check_collections(name: str, value: object, written: Written, expected: Collections | None = None) -> None:
    """Checks that `value` is a mapping of collections.

    Args:
      expected: variables that fit the model, or their shapes; None where none are known.

    Raises:
      FlaxMagicsError: it is something else, has bare parameters in place of collections, has tracers as leaves, or
        cannot be flattened by JAX.
    """
    what = f"variables of `{name}`"
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        message = f"{what} are a dict of collections, not {kind_of(value)}."
        raise FlaxMagicsError(message, **_from_attributes(name, value, written, expected))
    try:
        leaves = jax.tree_util.tree_leaves(value)
    except ValueError as error:
        message = f"{what}: a dict in them has keys that JAX cannot sort, such as a number beside a string."
        raise FlaxMagicsError(message) from error
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        message = f"{what} cannot be values of a function that is being traced: they are gone when it ends."
        raise FlaxMagicsError(message, hint="give them once it has returned them")
    if "params" in value or not leaves or not all(isinstance(item, Mapping) for item in value.values()):
        return
    modules = [key for key, item in value.items() if set(item) & {"kernel", "bias", "scale", "embedding"}]
    if modules or (expected is not None and not misfits(expected.get("params", {}), value)):
        module = next(iter(modules or value))
        message = f"{what} have no `params`, but `{module}`: these look like the params themselves."
        raise FlaxMagicsError(message, **written.advice(_with_current(name, {"params": "{}"}, expected)))


def check_state(name: str, value: object, written: Written, module: object) -> None:
    """Checks that `value` is a mapping, as an `nnx.State` is; `module` is the one to take its values.

    Raises:
      FlaxMagicsError: it is something else.
    """
    if not isinstance(value, Mapping):
        # An NNX module in place of its state: the advice can name the expression that was written.
        as_written = written if isinstance(value, type(module)) else Written(written.line)
        message = f"variables of `{name}` are an nnx.State, not {kind_of(value)}."
        raise FlaxMagicsError(message, **as_written.advice("nnx.state({})"))


def _from_attributes(name: str, value: object, written: Written, expected: Collections | None) -> dict[str, str]:
    """Advice for an object with the collections as attributes, such as a train state."""
    names = [one for one in (expected or {"params": None}) if isinstance(getattr(value, one, None), Mapping)]
    if "params" not in names:
        return Written(written.line).advice("{'params': {}}")
    owner = written.operand
    return written.advice(_with_current(name, {one: f"{owner}.{one}" for one in names}, expected))


def _with_current(name: str, parts: Mapping[str, str], expected: Collections | None) -> str:
    """The text of a dict of `parts`, completed by the model's other collections."""
    items = [f"'{key}': {value}" for key, value in parts.items()]
    if set(expected or ()) - set(parts):
        items.insert(0, f"**{CURRENT.format(name)}")
    return "{" + ", ".join(items) + "}"


def check_fit(name: str, value: Collections, written: Written, expected: Collections, optional: Container[str]) -> None:
    """Checks that `value` has the structure, shapes and dtypes of `expected`.

    Args:
      optional: collections that it need not have.

    Raises:
      FlaxMagicsError: it differs; the message lists the leaves.
    """
    wanted = {key: tree for key, tree in expected.items() if key in value or key not in optional}
    problems = misfits(wanted, value)
    if not problems:
        return
    missing = [key for key in wanted if key not in value]
    # If only whole collections are missing, the advice takes them from the model.
    if missing and not misfits({key: tree for key, tree in wanted.items() if key in value}, value):
        names = " and ".join(f"`{key}`" for key in missing)
        message = f"variables of `{name}` have no {names}, and the model has."
        raise FlaxMagicsError(message, **written.advice("{**" + CURRENT.format(name) + ", **" + written.operand + "}"))
    raise unfit(name, problems)


def unfit(name: str, problems: list[str]) -> FlaxMagicsError:
    """The error for variables that do not fit a model, with the first `SHOWN` differences."""
    more = len(problems) - SHOWN
    lines = problems[:SHOWN] + ([f"and {more} more"] if more > 0 else [])
    return FlaxMagicsError(f"these variables do not fit `{name}`, and none of them was taken:", hint="\n".join(lines))


def misfits(expected: object, value: object) -> list[str]:
    """A line for each leaf of `value` that differs from `expected`; leaves of `params` without that prefix."""
    wanted, has = _described(expected), _described(value)
    lines = []
    for name, leaf in wanted.items():
        if name not in has:
            lines.append(f"{name}: missing")
        elif has[name] != leaf:
            lines.append(f"{name}: {has[name]}, and the model has {leaf}")
    for name in [name for name in has if name not in wanted]:
        near = nearest(name, [one for one in wanted if one not in has], 1)
        lines.append(f"{name}: the model has none" + (f"; did you mean {near[0]}?" if near else ""))
    return lines


def named_leaves(tree: PyTree) -> dict[str, Leaf]:
    """The leaves by name, such as `Dense_0/kernel`; those of `params` without that prefix."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("params/") for path, _ in leaves)
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def _described(tree: PyTree) -> dict[str, str]:
    """Name → dtype and shape of each leaf, without boxes such as `nn.Partitioned`."""
    leaves = named_leaves(jax.tree_util.tree_map(_unboxed, tree, is_leaf=_boxed))
    return {name: _describe(leaf) for name, leaf in leaves.items()}


def _boxed(leaf: object) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


def _unboxed(leaf: Leaf) -> Leaf:
    inside = jax.tree_util.tree_leaves(leaf) if _boxed(leaf) else []
    return inside[0] if len(inside) == 1 else leaf


def _describe(leaf: Leaf) -> str:
    """`float32[3,4]`; for Python numbers and 64-bit NumPy arrays the dtype that JAX gives them in a run."""
    if isinstance(leaf, (bool, int, float, complex)):
        leaf = np.asarray(leaf)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    dtype = leaf.dtype
    if isinstance(leaf, (np.ndarray, np.generic)):
        dtype = jax.dtypes.canonicalize_dtype(dtype) if dtype.kind in "biufc" else dtype
    return f"{dtype}[{','.join(map(str, leaf.shape))}]"


def check_alive(what: str, variables: object, line: str | None = None, *, hint: str = COPIES) -> None:
    """Checks that no array of the variables was donated or deleted.

    Args:
      what: how a message calls the variables.
      line: the line that makes new ones, with a gap where the call's text is unknown; None for no advice.
      hint: what to do otherwise.

    Raises:
      FlaxMagicsError: an array was donated or deleted.
    """
    if is_gone(variables):
        message = f"{what} are gone: your code has donated or deleted their arrays."
        raise FlaxMagicsError(message, hint=hint, **({} if line is None else written(line)))


class WeightNames:
    """Which names of a notebook hold a model's weights. `models` maps each model to its variables, or to None."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, int]] = {}
        """model → expression (`variables`, `state.params`) → id of its params when these were the model's."""
        self._told: dict[str, tuple[int, ...]] = {}
        """model → ids of the params in the last note, which is not repeated for them."""

    def look(self, models: Mapping[str, Collections | None], names: Mapping[str, object]) -> None:
        """Records which names hold a model's weights now."""
        wanted = {model: params for model, variables in models.items() if (params := _params(variables)) is not None}
        for expression, tree in _trees(names) if wanted else ():
            for model, params in wanted.items():
                inside = _inside(tree, params)
                if inside is not None and _same(inside, params):
                    self.hold(model, expression, tree)

    def hold(self, model: str, expression: str, tree: Collections) -> None:
        """Records that an expression has a model's weights now, and no other model's."""
        for seen in self._seen.values():
            seen.pop(expression, None)
        self._seen.setdefault(model, {})[expression] = _id(tree)

    def chosen(self, model: str, names: Mapping[str, object]) -> None:
        """After the user gave the model other weights: what the names hold now was seen, and passed over on purpose."""
        seen = self._seen.get(model, {})
        seen.update({expression: _id(tree) for expression, tree in _trees(names, seen)})

    def moved(self, model: str, names: Mapping[str, object]) -> bool:
        """Whether a name that held the model's weights holds others now."""
        seen = self._seen.get(model, {})
        return bool(seen) and any(_id(tree) != seen[expression] for expression, tree in _trees(names, seen))

    def note(self, model: str, models: Mapping[str, Collections | None], names: Mapping[str, object]) -> Note | None:
        """A note, once, if names that held `model`'s weights hold others, and `model` is about to run with its own."""
        seen = self._seen.get(model, {})
        moved = {expression: tree for expression, tree in _trees(names, seen) if _id(tree) != seen[expression]}
        ids, params = tuple(map(_id, moved.values())), _params(models.get(model))
        gone = is_gone(params)  # then the run fails, and says what the names hold each time
        if not moved or params is None or (self._told.get(model) == ids and not gone):
            return None
        self._told[model] = ids
        leaves = jax.tree_util.tree_leaves(params)
        others = {}
        for expression, tree in moved.items():
            inside = _inside(tree, params)
            if inside is None or misfits(params, inside):
                continue
            # Donated arrays cannot be compared.
            leaves_inside = jax.tree_util.tree_leaves(inside)
            if is_gone(inside) or not all(isinstance(leaf, jax.Array) for leaf in (*leaves_inside, *leaves)):
                continue
            if not gone and (_same(inside, params) or quick_digest(leaves_inside) == quick_digest(leaves)):
                return None  # the model has the same weights as one of the names
            others[expression] = tree
        return _note(model, models[model] or {}, others) if others else None


def _note(model: str, variables: Collections, others: Mapping[str, Collections]) -> Note:
    verb = "holds" if len(others) == 1 else "hold"
    listed = " and ".join(f"`{expression}`" for expression in others)
    text = f"{listed} {verb} other weights than {model} has, and this run used those of {model}"
    if len(others) > 1:
        return Note("weights", text, form=f"%flax_vars {model} = …")
    ((expression, tree),) = others.items()
    whole = "params" in tree
    pattern, items = ("{}", "**{}") if whole else ("{'params': {}}", "'params': {}")
    if variables.keys() - (tree.keys() if whole else {"params"}):
        pattern = f"{{**{CURRENT.format(model)}, {items}}}"
    return Note("weights", text, **Written(f"%flax_vars {model} = {{}}", expression).advice(pattern))


def _params(variables: Collections | None) -> Collections | None:
    params = None if variables is None else variables.get("params")
    return params if isinstance(params, Mapping) and params else None


def _id(tree: Collections) -> int:
    """The id of the `params` in `tree`, or of `tree` itself where it has none."""
    return id(tree.get("params", tree))


def _inside(tree: Collections, params: Collections) -> Collections | None:
    """What `tree` has in the place of `params`; None unless its keys are the same, as for most names."""
    inside = tree.get("params", tree)
    if not isinstance(inside, Mapping) or inside.keys() != params.keys():
        return None
    try:
        jax.tree_util.tree_structure(inside)
    except ValueError:  # a dict with keys that cannot be sorted is no pytree
        return None
    return inside


def _same(one: PyTree, other: PyTree) -> bool:
    """Whether the leaves of both are the same objects."""
    leaves, others = jax.tree_util.tree_leaves(one), jax.tree_util.tree_leaves(other)
    return len(leaves) == len(others) and all(map(is_, leaves, others))


def _trees(names: Mapping[str, object], only: Iterable[str] | None = None) -> Iterator[tuple[str, Collections]]:
    """Yields expressions of the notebook that are mappings: names, and the `params` of a dataclass (a train state).

    Args:
      only: the expressions to look at, None for all.
    """
    named = list(names) if only is None else dict.fromkeys(one.partition(".")[0] for one in only)
    # Names such as `_` and `_i3` are IPython's own: most of the names in a long notebook.
    for name in [name for name in named if name[:1] != "_"]:
        value = names.get(name)
        is_tree = isinstance(value, Mapping)
        if not is_tree and "params" in getattr(type(value), "__dataclass_fields__", ()):
            # Only a dataclass field is read: a property would run the user's code.
            name, value = f"{name}.params", getattr(value, "params", None)
            is_tree = isinstance(value, Mapping)
        if is_tree and (only is None or name in only):
            yield name, value  # type: ignore[misc]
