"""Which registered model is meant: by its name, by its module, or by what its name stands for now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import registry
from .errors import FlaxMagicsError, did_you_mean, written
from .models import is_module_class, spell_construction
from .registry import Entry, RegisteredModel
from .run import Note


def entry_of(models: Mapping[str, Entry], model: Any) -> Entry:
    """The entry of a registered name, of what `Session.models` gives, or of a module that is registered.

    Raises:
      FlaxMagicsError: there is none.
    """
    if isinstance(model, RegisteredModel):
        model = model.name
    if isinstance(model, str):
        if model in models:
            return models[model]
        known = ", ".join(models) or "none yet"
        raise FlaxMagicsError(
            f"no model is registered as `{model}`; registered: {known}.",
            hint=did_you_mean(model, models),
            form=f"%flaxmodel {model} = …" if not models else None,
        )
    for entry in models.values():
        if entry.model.module is model:
            return entry
    line = spell_construction(model, "%flaxmodel") if is_module_class(model) else "%flaxmodel net = …"
    raise FlaxMagicsError("this model is not registered.", **written(line))


def entry_now(models: Mapping[str, Entry], name: str, module: Any) -> tuple[Entry, tuple[Note, ...]]:
    """The entry of a name that stands for `module` now (None: for what it stood for), and what is to be said of that."""
    entry = entry_of(models, name)
    if module is None or module is entry.model.module:
        return entry, ()
    if entry.model.holds_variables:
        # The object in the namespace is the one truth.
        entry, change = registry.register(None, name, module)
        text = f"{name} is another module now, {entry.model.describe()}: registered with what it holds"
        return entry, (Note("rebound", text),)
    entry, change = registry.register(entry, name, module)
    if change.state == "unchanged":
        return entry, ()
    became = {"own": "", "none": "", "kept": ", variables kept", "dropped": ", variables dropped"}[change.variables]
    return entry, (Note("rebound", f"{name} is another module now, {entry.model.describe()}: registered{became}"),)
