"""Which statement of which cell made which run."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..journal import Executed, Place
from ..run import Run
from .reading import Site, Source


@dataclass(eq=False)
class Step:
    """One statement at the top of a cell as it was executed.

    Attributes:
      made: the session's runs by index, with the place in the code that made each; None for one that no place explains.
      failed: the cell ended in it.
    """

    statement: ast.stmt
    site: Site | None
    made: list[tuple[int, Site | None]] = field(default_factory=list)
    failed: bool = False


@dataclass(eq=False)
class Execution:
    """One execution of a cell: its steps as far as they ran; `loose` runs follow the last of them."""

    cell: Executed
    source: Source
    steps: list[Step]
    loose: list[int] = field(default_factory=list)


def match(cells: Sequence[tuple[Executed, Source]], runs: Sequence[Run]) -> list[Execution]:
    """The executions in order, each with its runs.

    A statement that is a command made one run; a loop, and a call of a function with a command in it, any number: as many
    as there are but for those that later commands of the cell need. Of lines that are alike, the one counts whose number
    the run has.
    """
    functions: list[Site] = []
    out = []
    for cell, source in cells:
        steps = [Step(statement, source.sites.get(statement)) for statement in source.tree.body]
        ran = _as_far_as_it_ran(cell, source, steps)
        queue = list(range(cell.first, min(cell.end, len(runs))))
        where = {place.run: place for place in cell.places}
        for i, step in enumerate(ran):
            later = [site for s in ran[i + 1 :] for site in _inside(source, s) if _single(site)]
            if step.failed:
                continue
            if step.site is not None:
                _take_one(step, step.site, queue, runs)
                continue
            inside = _inside(source, step)
            if not isinstance(step.statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                _take_many(step, [*inside, *reversed(functions)], later, queue, runs, where)
            functions += [s for s in inside if s.in_function is not None]
        out.append(Execution(cell, source, ran, queue))
    return out


def _as_far_as_it_ran(cell: Executed, source: Source, steps: list[Step]) -> list[Step]:
    if cell.error is None or not steps:
        return steps
    if cell.line is None:
        return []
    line = cell.line - source.offset
    if line < 1:  # the command of the cell's first line failed, once the body had run
        steps[-1].failed = True
        return steps
    ran = [step for step in steps if begin(step.statement) <= line]
    if ran:
        ran[-1].failed = True
    return ran


def begin(statement: ast.stmt) -> int:
    """The first line of a statement, its decorators included."""
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def _single(site: Site) -> bool:
    return site.draws or site.name == "flaxmodel"


def _take_one(step: Step, site: Site, queue: list[int], runs: Sequence[Run]) -> None:
    """The run of a command: the next, and what nobody explains before it."""
    if site.name == "flaxmodel":
        while queue and site.matches(runs[queue[0]]):
            step.made.append((queue.pop(0), site))
        return
    if not site.draws:
        return
    found = next((i for i, index in enumerate(queue) if site.matches(runs[index])), None)
    if found is None:
        return
    step.made += [(index, None) for index in queue[:found]]
    step.made.append((queue[found], site))
    del queue[: found + 1]


def _inside(source: Source, step: Step) -> list[Site]:
    """The places of commands in a statement, functions that it only defines left out."""
    if step.site is not None:
        return [step.site]
    return [site for site in source.sites.values() if step.statement in site.path]


def _repeats(site: Site) -> bool:
    """Whether a place can make more than one run in one execution of its statement."""
    return any(
        isinstance(node, (ast.For, ast.AsyncFor, ast.While, ast.FunctionDef, ast.AsyncFunctionDef))
        for node in site.path
    )


def _take_many(
    step: Step, sites: list[Site], later: list[Site], queue: list[int], runs: Sequence[Run], where: Mapping[int, Place]
) -> None:
    used: set[Site] = set()
    while queue:
        run, place = runs[queue[0]], where.get(queue[0])
        # The first of them: a function that is defined again takes the place of the one before.
        exact = next((site for site in sites if place and site.is_at(place) and site.matches(run)), None)
        if exact is not None:
            used.add(exact)
            step.made.append((queue.pop(0), exact))
            continue
        fitting = [site for site in sites if site.matches(run) and (site not in used or _repeats(site))]
        if not fitting:
            return
        # Where lines are alike, each of them has run before one has run again.
        site = next((site for site in fitting if site not in used), fitting[0])
        used.add(site)
        needed = sum(1 for other in later if other.matches(run))
        if needed and sum(1 for index in queue if site.matches(runs[index])) <= needed:
            return
        step.made.append((queue.pop(0), site))
