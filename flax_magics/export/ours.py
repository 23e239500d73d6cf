"""What a session's own code asks of flax_magics, and what stands for it in a script that has none."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..expression import end_of, start_of


@dataclass
class Ours:
    """Names of the session's code that stand for this package, its function `session`, and the session itself."""

    modules: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    sessions: set[str] = field(default_factory=set)

    @property
    def names(self) -> set[str]:
        """All of them."""
        return self.modules | self.functions | self.sessions

    def learn(self, statement: ast.stmt) -> bool:
        """Whether `statement` does nothing but give one of these a name."""
        match statement:
            case ast.Import(names):
                found = [alias for alias in names if alias.name.partition(".")[0] == "flax_magics"]
                self.modules |= {(alias.asname or alias.name).partition(".")[0] for alias in found}
                return bool(found) and len(found) == len(names)
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] == "flax_magics":
                for alias in names:
                    where = self.functions if alias.name == "session" else self.modules
                    where.add(alias.asname or alias.name)
                return True
            case ast.Assign([ast.Name(name)], value) if self.is_session(value):
                self.sessions.add(name)
                return True
        return False

    def is_session(self, node: ast.expr) -> bool:
        """Whether it gives the session."""
        match node:
            case ast.Name(name):
                return name in self.sessions
            case ast.Call(ast.Name(name), [], []):
                return name in self.functions
            case ast.Call(ast.Attribute(ast.Name(name), "session"), [], []):
                return name in self.modules
        return False

    def replaced(self, text: str, tree: ast.Module, models: Mapping[str, Any], root: str) -> str:
        """`text` with `session.models['net'].variables` and its like as the script has them.

        Args:
          models: what each registered name stands for: see `Model`.
          root: the variable that holds the root key.
        """
        for statement in tree.body:
            self.learn(statement)
        edits = sorted(self._edits(tree, models, root), key=lambda edit: start_of(text, edit[0]), reverse=True)
        for node, new in edits:
            start, end = start_of(text, node), end_of(text, node)
            if "\n" not in text[start:end]:
                text = text[:start] + new + text[end:]
        return text

    def _edits(self, tree: ast.AST, models: Mapping[str, Any], root: str) -> Iterator[tuple[Any, str]]:
        for node in ast.walk(tree):
            match node:
                case ast.Assign([ast.Attribute(holder, "variables")], value):
                    model = self._model(holder, models)
                    if model is not None and model.holds:
                        yield node, f"nnx.update({model.name}, {ast.unparse(value)})"
                case ast.Attribute(holder, "variables" | "module" as what, context):
                    model = self._model(holder, models)
                    if model is None or (model.holds and isinstance(context, ast.Store)):
                        continue
                    held = f"nnx.state({model.name})" if model.holds else model.variables
                    yield node, held if what == "variables" else model.name
                case ast.Attribute(holder, "root_key", ast.Load()) if self.is_session(holder):
                    yield node, root

    def _model(self, node: ast.expr, models: Mapping[str, Any]) -> Any:
        match node:
            case ast.Subscript(ast.Attribute(holder, "models"), ast.Constant(str(name))) if self.is_session(holder):
                return models.get(name)
        return None
