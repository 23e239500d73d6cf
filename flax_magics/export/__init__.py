"""A session as a plain Flax script: `%flax_export`.

The cells that ran, in the order in which they ran, each command replaced by the lines that a person would have written for
what it did: the split of the root key, `init`, a jitted `apply` with its rngs, what is kept. What cannot be written is said
in its place.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from ..cells.journal import ExecutedCell
from ..cells.names import Free, mentioned, reads
from ..models.adopt import variable_name
from ..run import Run
from .cells import CellRun, CellSource, ExecutedStatement, Transform, match, read_cell
from .context import RunGroups, ScriptModel
from .file import Exported, write
from .script import RootKeyTracker, Script, assigned_by
from .scripted import cell_runs_of
from .writer import Lines, LineWriter, joined


def export_cells(
    session: Any,
    cells: Sequence[ExecutedCell],
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
    cell_runs = match([(cell, read_cell(cell.text, transform)) for cell in cells], session.runs)
    if cell_runs:
        statements = cell_runs[-1].statements
        asked = [i for i, statement in enumerate(statements) if _asks(statement)]
        del statements[asked[-1] if asked else len(statements) :]
    return _export(
        session, cell_runs, restarts, seed, "The cells of a notebook in the order in which they ran", digests
    )


def export_script(session: Any, *, digests: bool = True) -> Exported:
    """The script of a session that no cells made: see `cell_runs_of`."""
    seed = session.runs[0].seed if session.runs else session.seed
    return _export(session, cell_runs_of(session), (), seed, "The models and runs of a session", digests)


def of_session(
    session: Any,
    cells: Callable[[], tuple[Any, ...]] | None,
    file: str | os.PathLike[str] | None = None,
    *,
    plain: bool = False,
    force: bool = False,
) -> Exported:
    """What `Session.export` gives.

    Args:
      cells: gives the cells that ran and what else `export_cells` wants, where `session` is that of a notebook.
    """
    if cells is None:
        script = export_script(session, digests=not plain)
    else:
        script = export_cells(session, *cells(), digests=not plain)
    if file is not None:
        write(file, script.text, force=force)
    return script


def _asks(statement: ExecutedStatement) -> bool:
    """Whether it is the command that asks for the export: it, and what follows it in its cell, is no part of it."""
    if statement.site is not None:
        return statement.site.name == "flax_export"
    return ".export(" in ast.unparse(statement.statement)


def _export(
    session: Any, cell_runs: Sequence[CellRun], restarts: Sequence[int], seed: int, title: str, digests: bool
) -> Exported:
    runs: list[Run] = session.runs
    sources = [cell_run.source for cell_run in cell_runs]
    free = Free(mentioned(source.tree for source in sources) | set(session.models))
    writer = LineWriter.like([cell_run.cell.text for cell_run in cell_runs], free, digests=digests)
    groups = RunGroups.of(runs, cell_runs, restarts)
    unexported: list[str] = []
    models = _models(session.models, runs, free, sources)
    script = Script(groups, models, writer, RootKeyTracker(groups, writer, seed, unexported), unexported)
    for cell_run in cell_runs:
        script.cell(cell_run)
    written = sum(any(map(any, (lines.text for lines in block))) for block in script.blocks)
    _add_head(script, sources)
    if script.failed:
        many = (
            "1 cell that failed and left nothing is"
            if script.failed == 1
            else (f"{script.failed} cells that failed and left nothing are")
        )
        script.blocks.append([Lines([f"# {many} left out."])])
    lines = [*_docstring(script, title), "", *joined(script.blocks)]
    return Exported("\n".join(lines) + "\n", written, len(runs), tuple(unexported))


def _models(
    registered: Mapping[str, Any], runs: Sequence[Run], free: Free, sources: Sequence[CellSource]
) -> dict[str, ScriptModel]:
    out: dict[str, ScriptModel] = {}
    entries = {name: model._entry() for name, model in registered.items()}
    linen = [name for name, entry in entries.items() if not entry.model.holds_variables]
    for name, entry in entries.items():
        module = entry.model.module
        own = type(module).__name__ == name
        instance = free.take(variable_name(name)) if own else name
        if entry.model.holds_variables:
            built = entry.built.recipe.text if entry.built is not None else ""
            out[name] = ScriptModel(instance, module, True, "", built)
            continue
        variables = _name_of_init(name, runs, sources)
        if not variables:
            long = f"{instance}_variables"
            variables = free.take(*(("variables", long) if len(linen) == 1 else (long,)))
        added = any(run.model == name and run.made is not None and run.made.added for run in runs)
        first_key = free.take(f"{instance}_init_key") if added else ""
        out[name] = ScriptModel(instance, module, False, variables, first_key=first_key, loaded=entry.variables)
    return out


def _name_of_init(model: str, runs: Sequence[Run], sources: Sequence[CellSource]) -> str:
    """The user's own name for a model's variables, where it always has what the session has; empty where it may not."""
    inits = [site for source in sources for site in source.sites.values() if site.name == "flax_init" and site.call]
    targets = [site.target.removesuffix("=").strip() for site in inits if site.call and site.call.target == model]
    if len(set(targets)) != 1 or not targets[0].isidentifier() or any(site.path for site in inits):
        return ""
    bound = [
        node
        for source in sources
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Name) and node.id == targets[0] and not isinstance(node.ctx, ast.Load))
        or getattr(node, "name", getattr(node, "arg", None)) == targets[0]
        or (isinstance(node, ast.Attribute) and node.attr == "variables" and not isinstance(node.ctx, ast.Load))
    ]
    changed = any(run.changed or run.made is not None for run in runs if run.kind.forward and run.model == model)
    changed = changed or any(model in assigned_by(site) for source in sources for site in source.sites.values())
    return "" if changed or len(bound) != len(targets) else targets[0]


def _add_head(script: Script, sources: Sequence[CellSource]) -> None:
    """Puts our imports and the function that prints digests above the first line of ours.

    They stand below the cell that imports JAX: what is set before that (`os.environ`) stays before it.
    """
    writer, blocks = script.writer, script.blocks
    places = [(i, j) for i, block in enumerate(blocks) for j, lines in enumerate(block) if lines.ours]
    first = places[0] if places else (len(blocks), 0)
    imports = [i for i, source in enumerate(sources) if any(map(_is_of_jax, ast.walk(source.tree)))]
    if imports and imports[0] < first[0]:
        first = imports[0] + 1, 0
    if not places:
        return
    above = "\n".join(line for block in blocks[: first[0]] for lines in block for line in lines.text)
    above += "\n" + "\n".join(line for lines in blocks[first[0]][: first[1]] for line in lines.text)
    there = {ast.unparse(statement) for statement in ast.parse(above).body}
    writer.needs |= {"jax"} if writer.labels else set()
    lines = sorted({writer.IMPORTS[name] for name in writer.needs} - there)
    head = [Lines(lines)] if lines else []
    if writer.labels:
        head.append(Lines(writer.fitted(writer.digest_function(_leaves(script))), apart=True))
    if first[1]:
        blocks[first[0]][first[1] : first[1]] = [Lines(part.text, apart=True) for part in head]
    else:
        blocks.insert(first[0], head)


def _is_of_jax(node: ast.AST) -> bool:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return any(name.partition(".")[0] in ("jax", "flax") for name in names)


def _leaves(script: Script) -> set[str]:
    """What the results have besides arrays: see `LineWriter.digest_function`."""
    found: set[str] = set()
    for run in script.groups.runs:
        model = script.models.get(run.model or "")
        if not run.kind.model or (run.kind.opens and model is not None and model.holds):
            found.add("keys")
        found |= run.spelling.returns if run.spelling is not None else set()
    return found


def _docstring(script: Script, title: str) -> Iterator[str]:
    versions = f"jax {jax.__version__} and flax {importlib.metadata.version('flax')}"
    yield f'"""{title}, as plain JAX and Flax.'
    yield ""
    yield f"Written by %flax_export, with {versions}."
    if script.writer.labels:
        yield f"On the same versions and machine {script.writer.digest} prints the digests of the session."
    yield '"""'
    if script.futures:
        yield ""
        yield f"from __future__ import {', '.join(sorted(set(script.futures)))}"
    statements = [s for block in script.blocks for lines in block for s in ast.parse("\n".join(lines.text)).body]
    if "display" not in script.names.bound and any("display" in reads(statement) for statement in statements):
        yield from ("", "display = print  # as a notebook has it")
