"""The methods of a `Session` that keep a kernel healthy."""

from __future__ import annotations

import gc
import importlib.metadata
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import jax
from msgspec.structs import replace

from ..base.measures import name_devices
from ..base.private import has_devices
from ..base.text import plural
from ..base.threads import until_committed
from ..cells.journal import cells_of_notebook
from ..execution import surroundings
from ..execution.surroundings import stand_outside
from ..run import Note
from ..state.runs import backwards
from .checks import CHECKS
from .findings import (
    LAST_ERROR,
    PROGRAMS,
    REPLAYS,
    Diagnosis,
    Examined,
    Freed,
    Roots,
    bytes_by_device,
    examine,
    holdings,
    live_arrays,
    users_modules,
    users_names,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..compile.cache import Services
    from ..execution.plan_cache import PlanCache
    from ..state.state import ReplayBudget, State

LAST = ("last_type", "last_value", "last_traceback", "last_exc")
"""Attributes of `sys` with the last error that was shown."""


class HealthMethods:
    """The part of a Session that looks after the process around it."""

    _state: State
    services: Services
    _keeping: ReplayBudget
    _plans: PlanCache
    _in_place_of: Callable[[State], AbstractContextManager[None]]

    def doctor(self, *, names: Mapping[str, object] | None = None, shell: Any = None) -> Diagnosis:
        """Looks for what is wrong with JAX and Flax in this process, and says how to mend it. Changes nothing.

        Args:
          names: the user's variables, by default those of the main module.
          shell: IPython's, some of whose settings matter.
        """
        findings, failed = examine(CHECKS, self._examined(names, shell))
        devices = name_devices(jax.local_devices())
        versions = (f"jax {jax.__version__}", f"flax {importlib.metadata.version('flax')}")
        return Diagnosis(findings, failed, len(CHECKS), (*versions, devices))

    def first_findings(self, names: Mapping[str, object], shell: Any) -> tuple[Note, ...]:
        """What the first report of a kernel says: what is wrong and matters now, as far as that is found at once."""
        findings, _ = examine([check for check in CHECKS if check.first], self._examined(names, shell))
        return tuple(finding.note for finding in findings.values() if finding.now)

    def _examined(self, names: Mapping[str, object] | None, shell: Any) -> Examined:
        started = has_devices()  # before anything asks for a device
        disk = self.services.programs.compiler.disk
        return Examined(
            names=_main_names() if names is None else dict(names),
            modules={name: entry.model.module for name, entry in self._state.models.items()},
            sources=_sources,
            disk=None if disk is None else (str(disk.folder), disk.trusted),
            shell=shell,
            started=started,
        )

    def free(self, *, replays: bool = False, names: Mapping[str, object] | None = None) -> Freed:
        """Lets go of what pins device memory and nobody needs, and says who holds the rest.

        That is the last error that Python has shown, with its frames, and programs of models that were edited since.
        Models' variables stay, and whatever a name reaches.

        Args:
          replays: let go of what is held for replays alone, too.
          names: the user's variables, by default those of the main module.
        """
        return self.run_free(replays=replays, names=_main_names() if names is None else names)

    def run_free(
        self,
        *,
        replays: bool,
        names: Mapping[str, object],
        dropped: Iterable[str] = (),
        let_go: Iterable[str] = (),
        before: Mapping[str, int] | None = None,
        stops: Iterable[object] = (),
    ) -> Freed:
        """`free` of a notebook.

        Args:
          dropped: models to let go of.
          let_go: what was let go of already, in words.
          before: device → bytes that it held before that.
          stops: objects that are not looked into.
        """
        stand_outside(surroundings.of_state, "%flax_free", "%flax_free")
        before = bytes_by_device(live_arrays()) if before is None else before
        said = list(let_go)
        last = [vars(sys).pop(name, None) for name in LAST]
        if last.count(None) < len(LAST) and LAST_ERROR not in said:
            said.insert(0, LAST_ERROR)
        del last  # or its frames would count as held
        for name in dropped:
            self._drop(name)
            said.append(f"the model {name}, whose name is gone")
        old = self.services.programs.let_go(self._state.models)
        if old:
            said.append(plural(old, "old program"))
        copies = 0 if self._state.placement is None else self._state.placement.forget()
        if copies:
            said.append(f"{plural(copies, 'array')} copied to the mesh")
        lost = self._keeping.empty() if replays else 0
        self._keeping.settle()
        # Frames and their errors hold each other.
        gc.collect()
        live = live_arrays()
        held = bytes_by_device(live)
        stopped = {id(self), id(names), *map(id, stops)}
        return Freed(
            freed={device: size - held.get(device, 0) for device, size in before.items() if size > held.get(device, 0)},
            held=held,
            let_go=tuple(said),
            holdings=holdings(live, [*users_names(names), *self._holders()], stopped, users_modules(names)),
            lost=lost,
        )

    @until_committed
    def _drop(self, name: str) -> None:
        """Lets go of a registered model. Its runs stay in the history."""
        before = self._state
        models = {other: entry for other, entry in before.models.items() if other != name}
        opened = None if before.opened is not None and before.opened[0] == name else before.opened
        with self._in_place_of(before):
            self._state = replace(before, models=models, opened=opened)
        self._plans.forget(name)
        replaced = before.models[name].replaced
        if replaced is not None:  # nobody can ask for it any more
            self._keeping.drop(replaced)

    def _holders(self) -> Roots:
        """What the session holds, by words for it."""
        state = self._state
        for name, entry in state.models.items():
            yield f"the model {name}", (entry.variables, entry.model, entry.built, entry.last_init)
            yield f"--resume of {name}", (entry.training, entry.optimizer)
        yield "what %flax_load has read", state.waiting
        kept = [(stored.origin, stored.inputs) for stored in backwards(state.runs)]
        yield REPLAYS, (kept, [entry.replaced for entry in state.models.values()])
        yield PROGRAMS, (self.services.programs, self._plans)


def _main_names() -> dict[str, object]:
    main = sys.modules.get("__main__")
    return {} if main is None else dict(vars(main))


def _sources() -> Iterable[str]:
    """The Python code of the cells that ran, or of the script."""
    cells = cells_of_notebook()
    if cells is not None:
        return [cells.transform(cell.text) for cell in cells.executed]
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if file is None:
        return []
    with open(file, encoding="utf-8") as script:
        return [script.read()]
