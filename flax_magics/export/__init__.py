"""A session as a plain Flax script: `%flax_export`.

The cells that ran, in the order in which they ran, each command replaced by the lines that a person would have written for
what it did: the split of the root key, `init`, a jitted `apply` with its rngs, what is kept. What cannot be written is said
in its place.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from .. import current
from ..journal import Executed
from ..models import variable_name
from ..run import Run
from .file import write
from .layout import Item, digest_function, import_lines, joined
from .ledger import Ledger
from .matching import Execution, Step, match
from .names import Free, binds, mentioned
from .ours import Ours
from .page import Model
from .reading import Source, Transform, indent_of, read_cell, reread
from .scope import Scope
from .scribe import Scribe
from .script import Script
from .scripted import executions_of
from .story import Story
from .unread import drop_unread


@dataclass(frozen=True)
class Exported:
    """A script.

    Attributes:
      text: the whole of it.
      cells: how many executions of cells left something in it.
      runs: how many there were.
      unexported: what could not be exported, each with its reason.
    """

    text: str
    cells: int
    runs: int
    unexported: tuple[str, ...] = ()


def export_cells(
    session: Any,
    cells: Sequence[Executed],
    transform: Transform,
    restarts: Sequence[int] = (),
    seed: int = 0,
    *,
    digests: bool = True,
) -> Exported:
    """The script of a notebook's session.

    Args:
      cells: as `Journal.cells` gives them; the last may be the one that asks for the export.
      transform: makes Python of a cell: `shell.transform_cell`.
      restarts: see `Journal`.
      digests: print a digest for each run.
      seed: what the root key started from, before any restart.
    """
    sources = [read_cell(cell.text, transform) for cell in cells]
    begun = _Begun.of(session, sources, cells, digests)
    rewritten: list[Source] = []
    for source in sources:
        same = next((known for known in rewritten if known.only_defines and known.raw == source.raw), None)
        rewritten.append(same or begun.rewritten(source))
    executions = match(list(zip(cells, rewritten, strict=True)), session.runs)
    _cut(executions)
    return begun.export(executions, restarts, seed)


def export_script(session: Any, *, digests: bool = True) -> Exported:
    """The script of a session that no cells made: see `executions_of`."""
    executions = executions_of(session)
    begun = _Begun.of(session, [e.source for e in executions], [e.cell for e in executions], digests)
    begun.title = "The models and runs of a session"
    return begun.export(executions, (), session.runs[0].seed if session.runs else session.seed)


@dataclass(eq=False)
class _Begun:
    """What is known of a script before its first line: names and models."""

    runs: Sequence[Run]
    used: set[str]
    trees: Sequence[ast.AST]
    scribe: Scribe
    models: Mapping[str, Model]
    ours: Ours
    title: str = "The cells of a notebook in the order in which they ran"

    @classmethod
    def of(cls, session: Any, sources: Sequence[Source], cells: Sequence[Executed], digests: bool) -> _Begun:
        runs: list[Run] = session.runs
        texts = [cell.text for cell in cells]
        spans = [range(cell.first, cell.end) for cell in cells]
        everything = "\n".join(source.text for source in sources)
        trees = [source.tree for source in sources]
        inits = _init_targets(sources, spans, runs)
        used = mentioned(trees) - set(inits.values())
        free = Free(used | set(session.models))
        quotes = Counter(letter for text in texts for letter in text if letter in "'\"")
        scribe = Scribe(free, indent_of(everything), "'" if quotes["'"] > quotes['"'] else '"', digests)
        return cls(runs, used, trees, scribe, _models(session.models, runs, free, inits), Ours())

    def rewritten(self, source: Source) -> Source:
        """A cell with what it asks of the session as the script has it."""
        if source.opaque:
            return source
        text = self.ours.replaced(source.text, source.tree, self.models, self.scribe.root)
        return source if text == source.text else reread(source, text)

    def export(self, executions: Sequence[Execution], restarts: Sequence[int], seed: int) -> Exported:
        """The script of these executions."""
        story = Story.of(self.runs, executions, restarts)
        ever = {name for execution in executions for step in execution.steps for name in binds(step.statement)}
        own = {self.scribe.root, *(name for model in self.models.values() for name in (model.name, model.variables))}
        left_out: list[str] = []
        ledger = Ledger(story, self.scribe, seed, left_out)
        script = Script(story, self.models, self.scribe, self.ours, Scope(own, ever), ledger, unexported=left_out)
        for execution in executions:
            script.execution(execution)
        lines = _whole(script, self.used, self.trees, self.title)
        written = sum(any(item.lines for item in block) for block in script.blocks)
        return Exported("\n".join(lines) + "\n", written, len(self.runs), tuple(left_out))


def of_session(
    session: Any, file: str | os.PathLike[str] | None = None, *, plain: bool = False, force: bool = False
) -> Exported:
    """What `Session.export` gives: of the notebook's cells where `session` is that of a notebook."""
    notebook = current.notebook_of(session)
    if notebook is None:
        script = export_script(session, digests=not plain)
    else:
        script = export_cells(session, *notebook(), digests=not plain)
    if file is not None:
        write(file, script.text, force=force)
    return script


def _cut(executions: Sequence[Any]) -> None:
    """Takes off the command that asks for the export, and what follows it in its cell."""
    if not executions:
        return
    steps = executions[-1].steps
    asked = [i for i, step in enumerate(steps) if _asks(step)]
    if asked:
        del steps[asked[-1] :]


def _asks(step: Step) -> bool:
    return step.site.name == "flax_export" if step.site is not None else ".export(" in ast.unparse(step.statement)


def _init_targets(sources: Sequence[Source], spans: Sequence[range], runs: Sequence[Run]) -> dict[str, str]:
    """Models whose variables can have the name that the session's code gives them: nobody could tell the two apart.

    Args:
      spans: the runs of each cell, by index.
    """
    targets: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    every: Counter[str] = Counter()
    last_read: dict[str, int] = {}
    for place, source in enumerate(sources):
        for name in _bound(source.tree):
            every[name] += 1
        last_read |= dict.fromkeys(_read(source), place)
        for site in source.sites.values():
            name = site.target.removesuffix("=").strip()
            if site.name == "flax_init" and site.call is not None and name.isidentifier() and not site.path:
                targets.setdefault(site.call.target, set()).add(name)
                counts[name] += 1
    last_read |= dict.fromkeys((name for source in sources for name in _read_later(source.tree)), len(sources))
    changed: dict[str, int] = {}
    for place, (source, span) in enumerate(zip(sources, spans, strict=True)):
        models = {runs[index].model or "" for index in span if _changes(runs[index])}
        for model in targets if _assigns_variables(source.tree) else models:
            changed.setdefault(model, place)
    return {
        model: min(names)
        for model, names in targets.items()
        if len(names) == 1
        and counts[min(names)] == every[min(names)]
        and last_read.get(min(names), -1) < changed.get(model, len(sources) + 1)
    }


def _changes(run: Run) -> bool:
    return bool(run.changed) or (run.command == "apply" and run.made is not None)


def _bound(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg


def _read(source: Source) -> Iterator[str]:
    """Names that a cell reads, those on the lines of its commands too."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
    for site in source.sites.values():
        yield from re.findall(r"(?<!-)\b\w+", site.line)
    for gone in source.foreign.values():
        yield from re.findall(r"\w+", gone.code)


def _read_later(tree: ast.AST) -> Iterator[str]:
    """Names in functions, which may run at any time."""
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            for node in ast.walk(function):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    yield node.id


def _assigns_variables(tree: ast.AST) -> bool:
    """Whether `session().models['net'].variables = …` may stand there."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == "variables" and isinstance(node.ctx, ast.Store)
        for node in ast.walk(tree)
    )


def _models(
    registered: Mapping[str, Any], runs: Sequence[Run], free: Free, inits: Mapping[str, str]
) -> dict[str, Model]:
    out: dict[str, Model] = {}
    entries = {name: model._entry() for name, model in registered.items()}
    linen = [name for name, entry in entries.items() if not entry.model.holds_variables]
    for name, entry in entries.items():
        module = entry.model.module
        own = type(module).__name__ == name
        instance = free.take(variable_name(name)) if own else name
        if entry.model.holds_variables:
            built = entry.built.recipe.text if entry.built is not None else ""
            out[name] = Model(instance, module, True, "", built)
            continue
        variables = inits.get(name) if not own else None
        if variables is None:
            long = f"{instance}_variables"
            variables = free.take(*(("variables", long) if len(linen) == 1 else (long,)))
        free.used.add(variables)
        added = any(run.model == name and run.made is not None and run.made.added for run in runs)
        first_key = free.take(f"{instance}_init_key") if added else ""
        out[name] = Model(instance, module, False, variables, first_key=first_key, loaded=entry.variables)
    return out


_MODULES = {
    "jax": "import jax",
    "jnp": "import jax.numpy as jnp",
    "load_file": "from safetensors.flax import load_file",
    "nnx": "from flax import nnx",
    "traverse_util": "from flax import traverse_util",
    "dataclasses": "import dataclasses",
    "functools": "import functools",
}


def _whole(script: Script, used: set[str], trees: Sequence[ast.AST], title: str) -> list[str]:
    """The script from its first line to its last."""
    scribe = script.scribe
    ours = [_MODULES[name] for name in sorted(scribe.needs)]
    head: list[Item] = []
    if scribe.labels:
        taken = "np" in used and not any(_binds_numpy(statement) for statement in script.imports)
        ours += ["import hashlib", "import jax", "import numpy" if taken else "import numpy as np"]
        width = min(max(map(len, scribe.labels)), 48)
        head.append(Item(digest_function(scribe, width, _leaves(script), "numpy" if taken else "np"), apart=True))
    drop_unread(script.blocks, {model.name for model in script.models.values() if not model.holds})
    body = joined(script.blocks)
    text = "\n".join(body)
    read = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    read |= {
        node.value.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    apart = script.first_jax is not None and script.first_jax >= 0
    mine = [ast.parse(line).body[0] for line in ours if not (apart and line in script.plain)]
    needed = [one for statement in script.imports for one in _single(statement) if _is_needed(one, read, trees)]
    at = script.first_jax or 0
    if not apart:
        imports = import_lines([*needed, *mine], scribe.unit)  # type: ignore[list-item]
        blocks = [[Item(imports)], head, *script.blocks]
    else:
        imports = import_lines(needed, scribe.unit)
        here = import_lines(mine, scribe.unit)  # type: ignore[arg-type]
        blocks = [[Item(imports)], *script.blocks[: at + 1], [Item(here)], head, *script.blocks[at + 1 :]]
    return [*_docstring(script, title), "", *joined([block for block in blocks if any(item.lines for item in block)])]


def _binds_numpy(statement: ast.Import | ast.ImportFrom) -> bool:
    names = statement.names if isinstance(statement, ast.Import) else []
    return any((alias.name, alias.asname) == ("numpy", "np") for alias in names)


def _leaves(script: Script) -> set[str]:
    """What the results have besides arrays: see `digest_function`."""
    found: set[str] = set()
    for run in script.story.runs:
        model = script.models.get(run.model or "")
        if run.command == "key" or (run.command == "init" and model is not None and model.holds):
            found.add("keys")
        found |= run.spelling.returns if run.spelling is not None else set()
    return found


_QUIET = frozenset({*sys.stdlib_module_names, "flax", "jax", "matplotlib", "numpy", "optax", "pandas", "scipy", "tqdm"})
"""What has no effect but to be there when it is imported."""


def _single(statement: ast.Import | ast.ImportFrom) -> Iterator[ast.Import | ast.ImportFrom]:
    """One import for each name."""
    for alias in statement.names:
        if isinstance(statement, ast.Import):
            yield ast.Import([alias])
        else:
            yield ast.ImportFrom(statement.module, [alias], statement.level)


def _is_needed(statement: ast.Import | ast.ImportFrom, read: set[str], trees: Sequence[ast.AST]) -> bool:
    """Whether an import of the session's has a use in the script, or may have one by itself."""
    if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
        return True
    names = binds(statement)
    if not names or names & read:
        return True
    module = statement.module if isinstance(statement, ast.ImportFrom) else statement.names[0].name
    if (module or "").partition(".")[0] in _QUIET:
        return False
    return not any(isinstance(node, ast.Name) and node.id in names for tree in trees for node in ast.walk(tree))


def _docstring(script: Script, title: str) -> Iterator[str]:
    versions = f"jax {jax.__version__} and flax {importlib.metadata.version('flax')}"
    yield f'"""{title}, as plain JAX and Flax.'
    yield ""
    yield f"Written by %flax_export, with {versions}."
    if script.scribe.labels:
        yield f"On the same versions and machine {script.scribe.digest} prints the digests of the session."
    yield '"""'
