"""The methods of a `Session` that concern a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..base.threads import until_committed
from ..base.types import PyTree
from ..errors import FlaxMagicsError
from ..execution import surroundings
from ..execution.call import Call, as_names
from ..execution.surroundings import stand_outside
from ..state.handles import entry_of
from .loss import METHOD, Loss, check

if TYPE_CHECKING:
    from ..compile.cache import Services
    from ..execution.record import Outcome
    from ..models.calls import Function
    from ..run import Note, Run
    from ..state.entry import ModelEntry
    from ..state.state import State


class LossMethods:
    """The part of a Session that takes gradients."""

    _state: State
    services: Services
    _entry_now: Callable[[str, object], tuple[ModelEntry, tuple[Note, ...]]]
    _commit: Callable[[State, Outcome], None]

    def grad(
        self,
        loss: Function,
        model: object,
        /,
        *args: PyTree,
        mode: str = "train",
        freeze: str | Iterable[str] = (),
        **kwargs: PyTree,
    ) -> Run:
        """Makes one draw, calls `loss(net, *args, **kwargs)`, and takes its gradients by the net's parameters.

        Returns the Run, whose output are `Gradients`: `.loss`, `.metrics`, `.grads`, `.updates`. Nothing that the loss
        writes is kept.

        Args:
          loss: a function of the net and further arguments, which returns a scalar, or (scalar, dict of scalars).
          model: the net: a registered name or an item of `models`.
          mode: `train` or `eval` sets the net's own switch, and a parameter of the loss with a switch's name.
          freeze: patterns of parameters that are taken as constants: `encoder`, `*/bias`.
        """
        if mode not in ("train", "eval"):
            raise FlaxMagicsError(f"`mode` is 'train' or 'eval', not {mode!r}.")
        name = entry_of(self._state.models, model).name
        called = str(getattr(loss, "__name__", "loss"))
        called = called if called.isidentifier() else "loss"  # a lambda
        arguments = ", ".join([name, *["…"] * len(args), *(f"{key}=…" for key in kwargs)])
        patterns = as_names(freeze)
        options = ["%flax_grad", *(["--eval"] if mode == "eval" else []), *(f"--freeze {one}" for one in patterns)]
        call = Call(METHOD, args, kwargs, f"{called}({arguments})", command=" ".join(options))
        return self.run_grad(name, loss, call, mode=mode, freeze=patterns)

    @until_committed
    def run_grad(
        self,
        name: str,
        function: Any,
        call: Call,
        *,
        mode: str,
        freeze: tuple[str, ...] = (),
        module: object = None,
        notes: tuple[Note, ...] = (),
    ) -> Run:
        """`grad` of a parsed call, whose arguments are those after the net; see `Session.run_apply` for `module`."""
        line = f"{call.command} {call.text}"
        stand_outside(surroundings.of_state, line, line)
        from .grad import grad_model

        check(function, call.text, call.command)
        state = self._state
        entry, more = self._entry_now(name, module)
        with entry.model.held_still:
            entry.model.has_same_layout()  # finds it anew if not; the block takes it as found
            loss = Loss.of(entry.model, function, call.text.partition("(")[0], freeze)
            outcome = grad_model(state, entry, loss, call, self.services, mode=mode, said=(*more, *notes))
            self._commit(state, outcome)
        return outcome.run
