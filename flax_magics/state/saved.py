"""A model as a file has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..compile.initialise import InitRecord
from ..models.calls import Path


@dataclass(frozen=True)
class SavedInit:
    """How a linen model's variables came to be, as `Initialised` has it; `program` is a digest."""

    key: Any
    method: Path
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    program: str | None


@dataclass(frozen=True)
class SavedModel:
    """A model's variables, and what is needed to hold them against a model that is registered under its name.

    Attributes:
      holds_variables: an NNX module, not a linen one.
      text: how it was built, in one line.
      source: the code of its classes, empty where that was not to be had.
      variables: of a linen model its collections, None before an init; of an NNX one (type, path, value) of each
        variable.
      made: how a linen model's variables came to be; None where no init of the model is known.
      assigned: the user put other variables in their place.
      keys: what the session built an NNX module with; None where the user's code did.
      file: where it was read.
    """

    name: str
    holds_variables: bool
    text: str
    source: str
    variables: Any
    updates: Mapping[str, int] = field(default_factory=dict)
    outdated: bool = False
    stale: bool = False
    made: InitRecord | SavedInit | None = None
    assigned: bool = False
    keys: Mapping[str, Any] | None = None
    parameters: int = 0
    bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    file: str = ""

    @property
    def ready(self) -> bool:
        """Whether there are variables."""
        return self.variables is not None
