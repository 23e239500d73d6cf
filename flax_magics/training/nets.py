"""The loss of a linen net and that of an NNX module: their parameters, how a user has them, and plain Flax for a run."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax

from ..base.private import trace_of
from ..base.types import Leaf, PyTree
from ..code.fingerprint import Fingerprint
from ..errors import FlaxMagicsError
from ..line.expression import with_arguments
from ..models.base import CallTrace, Model, ModelWithInit, ModelWithVariables, Variables
from ..models.calls import Args, Function, Kwargs, Names, Path
from ..models.switch import cloned
from .loss import Loss, bound

if TYPE_CHECKING:
    from ..models.nnx import NnxModel


def loss_of(model: Model, function: Function, name: str, freeze: tuple[str, ...] = ()) -> Loss:
    """The loss `function` of a net; see `Loss` for the rest."""
    kinds: Mapping[str, Callable[..., Loss]] = {"linen": LinenLoss, "nnx": NnxLoss}
    return kinds[model.api](model, function, name, freeze, True, Fingerprint(function))


class LinenLoss(Loss, frozen=True, eq=False):
    """The loss of a linen net: what is trained is nested like its `params`."""

    model: ModelWithInit

    def init(self, key: object, method: Path, args: Args, kwargs: Kwargs) -> dict[str, PyTree]:
        """`flax.linen.init(loss, net)`."""
        try:
            args, kwargs = tuple(map(bound, args)), {name: bound(value) for name, value in kwargs.items()}
            variables = self.model.init(key, self.function, args, kwargs)
            leaks = any(trace_of(leaf) not in (None, trace_of(key)) for leaf in jax.tree_util.tree_leaves(variables))
        except jax.errors.UnexpectedTracerError:
            leaks = True
        if leaks:
            message = (
                f"`{self.name}` cannot initialise the net: it calls it inside a transform of JAX's own (jax.checkpoint,"
                " jax.grad, …), out of which no new variables come. Initialise it by a call of its own before."
            )
            raise FlaxMagicsError(message, form="%flax_init net(…)")
        return variables

    def trainable(self) -> frozenset[str]:
        """The collections that gradients are taken by."""
        return frozenset({"params"})

    def parted(self, variables: Variables, freeze: tuple[str, ...]) -> PyTree:
        """The parameters that `freeze` leaves."""
        return _without(variables.get("params", {}), freeze)

    def put_into(self, variables: Variables, trained: PyTree) -> Variables:
        """`variables` with `trained` in the place of the trained ones."""
        return {**variables, "params": _over(variables["params"], trained) if self.freeze else trained}

    def as_users(self, values: PyTree) -> PyTree:
        """Parameters, gradients or variables as the user and an optimizer have them: as they are."""
        return values

    def updates(self, written: Variables, grads: PyTree) -> PyTree:
        """What the loss wrote, as the user has it."""
        return written

    def collections_of(self, updates: PyTree) -> set[str]:
        """The collections of what `updates` gives."""
        return set(updates)

    def written(self, record: CallTrace) -> set[str]:
        """The collections that a step writes besides the parameters, of those that there were before it."""
        return record.updated - record.sown - {"params"}

    def types(self, variables: Variables) -> set[str]:
        """What a pattern of `freeze` may name besides paths: nothing."""
        return set()

    def rows(self, grads: PyTree) -> Iterator[tuple[Path, Leaf]]:
        """(path, array) of each gradient."""
        return ((path, leaf) for _, path, leaf, _ in self.model.iter_variables({"params": grads}))

    def lines(
        self, call: str, fields: Iterable[tuple[str, Any]], streams: Names, mutable: Sequence[str], *, metrics: bool
    ) -> str:
        """Plain Flax for one run, without the lines that part frozen parameters from the others.

        Args:
          call: the loss's, with the switches that the command added: `loss(net, batch, train=True)`.
          fields: the net's own switches as they were set.
          streams, mutable: those that the run was given.
          metrics: the loss returns metrics, too.
        """
        net, rest = _arguments(call)
        rngs = "rngs={" + ", ".join(f"'{name}': {name}_key" for name in streams) + "}"
        makes = f"mutable={list(mutable)!r}" if mutable else ""
        bound = ", ".join(filter(None, (self.name, cloned(net, self.model.module, fields), makes)))
        passed = ", ".join(filter(None, ("{**variables, 'params': params}", rest, rngs if streams else "")))
        applied = f"nn.apply({bound})({passed})"
        body = f"return {applied}"
        if mutable and metrics:
            body = f"(value, metrics), updates = {applied}\n    return value, (metrics, updates)"
        aux = ", has_aux=True" if mutable or metrics else ""
        return f"def loss_of(params):\n    {body}\njax.value_and_grad(loss_of{aux})(variables['params'])"


class NnxLoss(Loss, frozen=True, eq=False):
    """The loss of an NNX module: what is trained is type → path → array, and `nnx.State`s are what the user has."""

    model: ModelWithVariables

    def parted(self, variables: Variables, freeze: tuple[str, ...]) -> PyTree:
        """The parameters that `freeze` leaves."""
        trained: dict[str, dict[str, PyTree]] = {}
        for kind in self.model.trainable() & set(variables):
            if not any(fnmatch.fnmatchcase(kind, pattern) for pattern in freeze):
                left = {name: value for name, value in variables[kind].items() if not is_frozen(name, freeze)}
                trained |= {kind: left} if left else {}
        return trained

    def put_into(self, variables: Variables, trained: PyTree) -> Variables:
        """`variables` with `trained` in the place of the trained ones."""
        return {**variables, **{kind: {**variables[kind], **values} for kind, values in trained.items()}}

    def as_users(self, values: PyTree) -> PyTree:
        """Parameters, gradients or variables as the user and an optimizer have them."""
        return self.model.as_state(values)

    def updates(self, written: Variables, grads: PyTree) -> PyTree:
        """What the loss wrote, as the user has it, without keys and counts of streams."""
        # A transform inside the model hands back parameters too, unchanged.
        others = {*self.model.layout.random, *grads}
        return self.model.as_state({name: tree for name, tree in written.items() if name not in others})

    def collections_of(self, updates: PyTree) -> set[str]:
        """The types of what `updates` gives."""
        return {type(leaf).__name__ for _, leaf in self.rows(updates)}

    def written(self, record: CallTrace) -> set[str]:
        """The types that a step writes besides the parameters."""
        return {*self.model.own_variables()} & record.updated - self.model.trainable()

    def types(self, variables: Variables) -> set[str]:
        """What a pattern of `freeze` may name besides paths."""
        return set(variables)

    def rows(self, grads: PyTree) -> Iterator[tuple[Path, Leaf]]:
        """(path, Variable) of each gradient."""
        from ..models.nnx_graph import flat_state

        return ((tuple(map(str, path)), leaf) for path, leaf in flat_state(grads))

    def lines(
        self, call: str, fields: Iterable[tuple[str, Any]], streams: Names, mutable: Sequence[str], *, metrics: bool
    ) -> str:
        """Plain Flax for one run; see `LinenLoss.lines`."""
        from ..models.nnx_graph import mode_by_hand

        (net, rest), model = _arguments(call), cast("NnxModel", self.model)
        parts = [] if model.mode is None else [*mode_by_hand(net, model.layout.nodes, model.mode)]
        keys = ", ".join(f"{stream}={stream}_key" for stream in streams if stream in model.layout.tags)
        parts += [f"nnx.reseed({net}, policy='match_shape', {keys})"] if keys else []
        aux = ", has_aux=True" if metrics else ""
        call = f"nnx.jit(nnx.value_and_grad({self.name}{aux}))({net}{', ' if rest else ''}{rest})"
        if model.gives_rngs:
            call = with_arguments(call, [f"rngs=nnx.Rngs({', '.join(f'{one}={one}_key' for one in streams)})"])
        return "; ".join([*parts, call])


def _arguments(call: str) -> tuple[str, str]:
    """The net and the other arguments of a loss's call, as they are written."""
    net, _, rest = call.partition("(")[2].rpartition(")")[0].partition(",")
    return net.strip(), rest.strip()


def _without(tree: PyTree, freeze: tuple[str, ...], at: str = "") -> PyTree:
    """The tree without its frozen leaves; the tree itself where no pattern is given."""
    if not freeze or not isinstance(tree, Mapping):
        return tree
    left: dict[str, PyTree] = {}
    for name, value in tree.items():
        path = f"{at}/{name}" if at else str(name)
        if isinstance(value, Mapping):
            value = _without(value, freeze, path)
            left |= {name: value} if value else {}
        elif not is_frozen(path, freeze):
            left[name] = value
    return left


def _over(tree: PyTree, trained: PyTree) -> PyTree:
    """The tree with the leaves of `trained` in the place of its own."""
    if not isinstance(tree, Mapping):
        return trained
    return {name: _over(value, trained[name]) if name in trained else value for name, value in tree.items()}


def is_frozen(path: str, freeze: tuple[str, ...]) -> bool:
    """Whether a pattern matches the path of a parameter, or of a module around it: `encoder`, `*/bias`, `Dense_?`."""
    steps = path.split("/")
    around = ["/".join(steps[:n]) for n in range(1, len(steps) + 1)]
    return any(fnmatch.fnmatchcase(one, pattern) for pattern in freeze for one in around)
