"""A loss as a model: what runs is the user's function with the net as its first argument, and its gradients.

`%flax_grad loss(net, batch)` is a call like `net(x)`: it has keys, a mode, variables, a program, a replay. So a net with
a loss is given to `execution/` as a model of its own, which is the net in all but three respects: its signature is that
of the loss without the net, its init is `flax.linen.init(loss, net)`, and its pure function takes the gradients. How a
call is bound, initialised, traced, compiled, run, kept and replayed is written once, for both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from msgspec import Struct, field
from msgspec.structs import replace

from ..base.digest import describe, kind_of
from ..base.text import clean
from ..base.types import Leaf, PyTree
from ..code.fingerprint import Fingerprint
from ..code.library import is_module, loads_of, nnx_modules
from ..code.walk import arrays_in
from ..errors import FlaxMagicsError, written
from ..line.expression import positional_names, with_arguments
from ..models.base import (
    ARGUMENTS,
    SOWN,
    CallTrace,
    Forward,
    Model,
    ModelRecord,
    Needs,
    Variables,
)
from ..models.calls import Args, Function, Kwargs, Names, Path, readable_signature, without_self
from ..models.switch import call_switches
from ..report.html import render
from ..report.tables import gradient_lines, gradient_table

if TYPE_CHECKING:
    from ..base.measures import LayerGradient

METHOD: Path = ("loss()",)
"""Stands for the loss where a call names a method of the model: what was learned of the net's own calls stays apart."""


@jax.tree_util.register_pytree_with_keys_class
class Gradients:
    """The loss of one batch, and what it gives: the value of `%flax_grad`, and the output of its Run.

    Attributes:
      loss: a scalar.
      metrics: the dict of scalars that the loss returned beside it; None where it returned the loss alone.
      grads: of the parameters that are not frozen. linen: a tree like `variables['params']`; NNX: an `nnx.State`.
      updates: what the loss wrote (`batch_stats`, say), which the session has not kept. linen: collections by name;
        NNX: an `nnx.State`.
      layers, name: norms and zeros by module of the model called `name`; empty for a copy that a `tree_map` made.
    """

    __slots__ = ("grads", "layers", "loss", "metrics", "name", "updates")

    def __init__(self, loss: Leaf, metrics: Mapping[str, Leaf] | None, grads: PyTree, updates: PyTree) -> None:
        self.loss, self.metrics, self.grads, self.updates = loss, metrics, grads, updates
        self.layers: tuple[LayerGradient, ...] = ()
        self.name = ""

    @property
    def _scalars(self) -> list[str]:
        scalars = [("loss", self.loss), *(self.metrics or {}).items()]
        return [f"{clean(name)} {float(value):.4g}" for name, value in scalars if _is_scalar(value)]

    def __repr__(self) -> str:
        return f"<Gradients: {', '.join(self._scalars)}>"

    def __str__(self) -> str:
        return "\n".join([repr(self), *gradient_lines(self.layers, self.name)]) if self.layers else repr(self)

    def _repr_html_(self) -> str | None:
        if not self.layers:
            return None
        return render(
            "gradients.html",
            {"name": "gradients", "scalars": self._scalars, "layers": gradient_table(self.layers, self.name)},
        )

    # In the order in which JAX flattens a dict: an export writes the digest of that dict, and it is the same.
    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[jax.tree_util.DictKey, PyTree], ...], None]:
        """For JAX: the children by name."""
        names = ("grads", "loss", "metrics", "updates")
        return tuple((jax.tree_util.DictKey(name), getattr(self, name)) for name in names), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[PyTree, ...]) -> Gradients:
        """For JAX."""
        grads, loss, metrics, updates = children
        return cls(loss, metrics, grads, updates)


@jax.tree_util.register_pytree_node_class
class OtherNet:
    """Another linen net among the arguments of a loss, with its variables: in the loss it is the bound module."""

    def __init__(self, module: Any, variables: Variables) -> None:
        self.module, self.variables = module, variables

    def tree_flatten(self) -> tuple[tuple[Variables], Any]:
        """For JAX: the variables are data."""
        return (self.variables,), self.module

    @classmethod
    def tree_unflatten(cls, module: Any, children: tuple[Variables]) -> OtherNet:
        """For JAX."""
        return cls(module, *children)


def bound(argument: PyTree) -> PyTree:
    """An argument of a loss as the loss is given it."""
    return argument.module.bind(argument.variables) if isinstance(argument, OtherNet) else argument


class Loss(Struct, frozen=True, eq=False):
    """A net with a loss, as a model: a `LinenLoss` or an `NnxLoss` (nets.py). What is not defined there is the net's own.

    Attributes:
      model: the net's.
      function: the loss, which is called as `function(net, *args, **kwargs)`.
      name: how the loss is written in the call, such as `loss` or `losses.contrastive`.
      freeze: patterns of the parameters that have no gradients, see `is_frozen`.
      graded: it takes the gradients; if not, its output is `(loss, metrics)`, and nothing that it writes.
    """

    model: Model
    function: Function
    name: str
    freeze: tuple[str, ...] = ()
    graded: bool = True
    _code: Fingerprint = field(default_factory=lambda: Fingerprint(None))

    def as_model(self) -> Model:
        """Itself, as what it is to `execution/`: mypy does not see what `__getattr__` hands on."""
        return cast("Model", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def signature(self, method: Path) -> inspect.Signature:
        """That of the loss without the net."""
        signature = readable_signature(self.function)
        first = next(iter(signature.parameters.values()), None)
        return signature if first is not None and first.kind is first.VAR_POSITIONAL else without_self(signature)

    @property
    def switches(self) -> Names:
        """The switches that the net's call takes as arguments, and which the loss has to pass on."""
        try:
            return call_switches(self.model.signature(()))
        except FlaxMagicsError:  # it has no `__call__`, and the loss calls other methods
            return ()

    def fields_in_mode(self, train: bool, *, fixed: frozenset[str]) -> tuple[Model, tuple[str, ...]]:
        """The net's own switches, without those of `fixed`, parameters of the loss, that its call takes as arguments."""
        model, settings = self.model.fields_in_mode(train, fixed=fixed.intersection(self.switches))
        return replace(self, model=model).as_model(), settings

    def fields_for_init(self, *, fixed: frozenset[str]) -> Loss:
        """See `AnyModel`."""
        return replace(self, model=self.model.fields_for_init(fixed=fixed))

    def with_rngs(self, signature: inspect.Signature, args: Args, kwargs: Kwargs) -> tuple[Model, bool]:
        """The net's; a loss is given the session's `rngs` only where it has a parameter of that name."""
        model, has_rngs = self.model.with_rngs(signature, args, kwargs)
        if "rngs" not in signature.parameters and model.supplied_arguments():
            import dataclasses

            model = dataclasses.replace(model, gives_rngs=False)  # type: ignore[type-var]  # an `NnxModel`
        return replace(self, model=model).as_model(), has_rngs

    def cache_key(self) -> object:
        """The net's and the loss's code together; None where one of them cannot be told."""
        net, loss = self.model.cache_key(), self._code.digest()
        return None if net is None or loss is None else (net, loss, self.freeze, self.graded)

    def code(self) -> bytes | None:
        """A digest of the code of both; None where one cannot be told."""
        net, loss = self.model.code(), self._code.digest()
        return None if net is None or loss is None else net + loss

    def other_arrays(self) -> tuple[Leaf, ...]:
        """Those of the net, and those in the code of the loss."""
        return (*self.model.other_arrays(), *arrays_in(self.function))

    def without_arrays(self) -> Any:
        """See `AnyModel`: for an NNX module a record, of which a replay makes this loss again."""
        model = self.model.without_arrays()
        if isinstance(model, ModelRecord):
            return replace(model, around=lambda model: replace(self, model=model).as_model())
        return replace(self, model=model)

    def forward(self, method: Path, ask: Needs, record: CallTrace, root_impl: str) -> Forward:
        """`jax.value_and_grad` of the loss by the parameters that are not frozen; its output are Gradients.

        What the loss writes is part of the output, so that nothing of it is kept; sown values stay updates.
        """
        run = self.model.forward(self.function, ask, record, root_impl)

        def graded(variables: Variables, keys: Mapping[str, Any], args: Args, kwargs: Kwargs) -> tuple[PyTree, PyTree]:
            trained = self.parameters(variables)
            loss_of = self.of_parameters(run, variables, (keys, args, kwargs))
            if not self.graded:
                value, (metrics, updates) = loss_of(trained)
                record.updated |= updates.keys() & variables.keys()
                return (value, metrics), {}
            (value, (metrics, updates)), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
            sown = {name: tree for name, tree in updates.items() if name == SOWN or name in record.sown}
            written = {name: tree for name, tree in updates.items() if name not in sown and name[0] != ARGUMENTS[0]}
            return Gradients(value, metrics, self.as_users(grads), self.updates(written, grads)), sown

        return graded

    def of_parameters(
        self, run: Forward, variables: Variables, inputs: tuple[PyTree, Args, Kwargs]
    ) -> Callable[[PyTree], tuple[Leaf, tuple[PyTree, PyTree]]]:
        """The function that `jax.value_and_grad` takes: of the trained parameters, to `(loss, (metrics, updates))`.

        Args:
          run: the net's `forward` of the loss.
          inputs: keys, and the arguments after the net.
        """

        def loss_of(trained: PyTree) -> tuple[Leaf, tuple[PyTree, PyTree]]:
            # Made anew in here: NNX lets no object be changed at another level of tracing than its own.
            keys, args, kwargs = jax.tree_util.tree_map(lambda leaf: leaf, inputs)
            args, kwargs = tuple(map(bound, args)), {name: bound(value) for name, value in kwargs.items()}
            try:
                output, updates = run(self.put_into(variables, trained), keys, args, kwargs)
            except (flax_errors.JaxTransformError, flax_errors.TraceContextError) as error:
                raise transformed(self.name, error) from None
            value, metrics = read(self.name, output)
            return value, (metrics, updates)

        return loss_of

    def parameters(self, variables: Variables) -> PyTree:
        """Those of the net's parameters that gradients are taken by. Raises FlaxMagicsError where there are none."""
        trained = self.parted(variables, self.freeze)
        if not jax.tree_util.tree_leaves(trained):
            why = "all of them are frozen" if jax.tree_util.tree_leaves(self.parted(variables, ())) else "it has none"
            raise FlaxMagicsError(f"there is no parameter of the net to take gradients by: {why}.")
        return trained

    def by_hand(self, call: str, method: Path, switch: Names, needs: Needs, *, samples: Names | None) -> str:
        """Empty: whether the loss returns metrics shows in its output only, see `lines`."""
        return ""


def read(name: str, output: PyTree) -> tuple[Leaf, Mapping[str, Leaf] | None]:
    """Loss and metrics of what the loss `name` returned; None for the metrics where it returned the loss alone.

    Raises:
      FlaxMagicsError: it is neither a scalar nor a scalar with a dict of scalars.
    """
    value, metrics = output if type(output) is tuple and len(output) == 2 else (output, None)
    if not _is_scalar(value) or not jnp.issubdtype(jax.typeof(jnp.asarray(value)).dtype, jnp.floating):
        what = describe(value) if _is_array(value) else kind_of(value)
        mean = hasattr(value, "shape") and bool(value.shape) and jnp.issubdtype(value.dtype, jnp.floating)
        # A pair that is no (scalar, metrics) is more likely a forgotten name than a vector.
        raise FlaxMagicsError(
            f"`{name}` returns {what} as its loss, and a loss is one floating-point number: it may return that alone,"
            " or with a dict of metrics beside it.",
            edit="return ….mean()" if mean else None,
            where="loss",
            form=None if mean else f"def {name}(net, batch):\n  …\n  return loss, {{'accuracy': accuracy}}",
        )
    if metrics is None:
        return value, None
    wrong = None
    if not isinstance(metrics, Mapping) or not all(isinstance(key, str) for key in metrics):
        wrong = f"{kind_of(metrics)} beside the loss"
    elif "" in metrics:
        wrong = "a metric without a name"
    else:
        wrong = next((f"{describe(one)} as `{key}`" for key, one in metrics.items() if not _is_scalar(one)), None)
    if wrong is not None:
        raise FlaxMagicsError(
            f"`{name}` returns {wrong}, and metrics are a dict of scalars: one number to a name.",
            edit="return loss, {'accuracy': (logits.argmax(-1) == labels).mean()}",
            where="loss",
        )
    return value, dict(metrics)


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_scalar(value: object) -> bool:
    return value.shape == () if _is_array(value) else isinstance(value, (bool, int, float))  # type: ignore[attr-defined]


def transformed(name: str, error: Exception) -> FlaxMagicsError:
    """The error for a loss that calls the net in a transform which the net's variables and keys do not pass."""
    linen = not isinstance(error, flax_errors.TraceContextError)
    return FlaxMagicsError(
        f"`{name}` calls the net inside a transform of JAX's own (jax.grad, jax.checkpoint, jax.vmap, …), which knows"
        " nothing of its variables and keys: what the net draws or writes there would be lost. Flax's own transforms"
        " in the model do.",
        edit="nn.remat(Block)(…)" if linen else "nnx.remat(…)",
    )


def check(function: Any, call: str, command: str) -> None:
    """Checks what can be told of a loss before it is called.

    Args:
      call: the loss's, as it is written: `loss(net, batch)`.
      command: with its options.

    Raises:
      FlaxMagicsError: it is no function of the user's own, or it is jitted, or it closes over an NNX module.
    """
    name, _, arguments = call.partition("(")
    if is_module(function):
        message = f"`{name}` is a model, and gradients are of a loss: a function that takes the model first."
        line = f"{command} loss({name}, {arguments}" if arguments != ")" else f"{command} loss({name})"
        raise FlaxMagicsError(message, form=f"def loss(net, batch):\n  …\n  return loss\n{line}")
    if not callable(function) or isinstance(function, type):
        message = f"`{name}` is {kind_of(function)}, and a loss is a function that takes the model first."
        raise FlaxMagicsError(message, form="def loss(net, batch):\n  …\n  return loss")
    if type(function).__module__.partition(".")[0] in ("jax", "jaxlib", "flax"):
        message = (
            f"`{name}` is jitted, or wrapped by another transform: what the net draws and writes inside would be lost,"
            " and the whole is compiled in any case."
        )
        is_open = hasattr(function, "__wrapped__")
        raise FlaxMagicsError(message, **(written(f"{command} {name}.__wrapped__({arguments}") if is_open else {}))
    if _takes_gradients(function):
        message = (
            f"`{name}` takes gradients by itself, and {command.split(' ')[0]} takes those of the loss that is in it."
        )
        is_open = str(getattr(function, "__doc__", "")).startswith(_GRADIENTS)
        raise FlaxMagicsError(message, **(written(f"{command} {name}.__wrapped__({arguments}") if is_open else {}))
    for held_by, value in _reads(function):
        if isinstance(value, nnx_modules()):
            raise FlaxMagicsError(
                f"`{name}` reads `{held_by}`, an NNX module, from outside: it would be fixed in the program as it is now."
                " The net is the first argument, and another module is passed beside it.",
                form=f"def {name.rpartition('.')[2]}(net, batch, {held_by}):\n  …\n"
                f"{command} {with_arguments(call, [held_by])}",
            )


_GRADIENTS = ("Gradient of ", "Value and gradient of ")
"""How the docstrings begin that JAX gives to what `jax.grad` and `jax.value_and_grad` return, which holds the loss."""


def _takes_gradients(function: Any) -> bool:
    """Whether a function is what `jax.grad` or `nnx.grad` returned: JAX tells by its docstring, NNX by a name."""
    module = getattr(function, "__globals__", {}).get("__name__", "")
    if module.partition(".")[0] not in ("jax", "flax"):
        return False
    by_nnx = getattr(inspect.unwrap(function), "__name__", "") == "grad_wrapper"
    return by_nnx or str(function.__doc__).startswith(_GRADIENTS)


def _reads(function: Any) -> Iterator[tuple[str, object]]:
    """Names and values that a function reads from its module and from the functions around it."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    if code is None:
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for name in loads_of(code).names:
        if name in function.__globals__:
            yield name, function.__globals__[name]


def check_arguments(loss: Loss, model: str, args: Args, kwargs: Kwargs, switches: Names) -> None:
    """Raises FlaxMagicsError where the arguments after the net do not fit; `switches` are given by the command."""
    signature = readable_signature(loss.function)
    switched = dict.fromkeys(name for name in switches if name in signature.parameters and name not in kwargs)
    placed = positional_names(signature, 1 + len(args))
    switched = {name: None for name in switched if name not in placed}
    try:
        signature.bind(None, *args, **{**switched, **kwargs})
    except TypeError as error:
        plain = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
        takes = str(signature.replace(parameters=plain, return_annotation=signature.empty))
        message = f"`{loss.name}` does not fit the call: {error}."
        raise FlaxMagicsError(message, hint=f"it takes: {loss.name}{takes}") from None
