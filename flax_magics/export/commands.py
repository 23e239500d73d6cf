"""The lines that stand in the place of a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import FlaxMagicsError
from ..run import Run
from ..spelling import Spelling
from . import linen_lines, nnx_lines
from .functions import Wanted
from .linen_lines import Called
from .nnx_lines import Held
from .reading import MODELS, Site
from .scribe import Scribe, indented, label_of
from .story import Story
from .values import Value, lines_of, merged


class CannotSay(Exception):
    """A command for which there are no lines; the message says why."""


@dataclass(eq=False)
class Model:
    """A registered model in the script.

    Attributes:
      name: the variable that holds the module: not its registered name where that is the class's own.
      module: the module as it is registered now, None where that is no more.
      holds: whether it holds its variables (NNX).
      variables: the variable that holds its variables (linen).
      construction: how the session built it, without `rngs` (NNX).
    """

    name: str
    module: Any
    holds: bool
    variables: str
    construction: str = ""
    first_key: str = ""
    """The variable that keeps the key of its first init, where a method adds variables later."""


@dataclass(eq=False)
class Commands:
    """Writes commands.

    Attributes:
      define: makes sure that a function is in the script where it will be used, and gives its name.
      assigned: names that the lines written last assign, and that a function must declare.
    """

    scribe: Scribe
    story: Story
    models: Mapping[str, Model]
    define: Callable[[Wanted, Site], str]
    assigned: set[str] = field(default_factory=set)
    states: Mapping[str, str] = field(default_factory=dict)
    """What became of the models that the cell registered: `new`, `unchanged`, `changed`."""

    def lines(self, site: Site, indices: Sequence[int]) -> list[str]:
        """The lines for `site`, whose runs are `indices`.

        Raises:
          CannotSay: it cannot be written.
        """
        self.assigned = set()
        options = site.given.options
        if site.name == "flax_key":
            return self._key(site, indices)
        if site.name == "flaxmodel":
            return self._register(site, indices)
        if not site.draws:
            if site.target:
                raise CannotSay(f"its value is a report of %{site.name}")
            return []
        if not indices:
            raise CannotSay("it never ran")
        run = self.story.runs[indices[-1]]
        model = self.models.get(run.model or "")
        if model is None:
            raise CannotSay(f"the model `{run.model}` is not known any more")
        if options.get("draw") is not None and options.get("draws") is not None:
            raise CannotSay("--draw and --draws together have no lines yet")
        if site.name == "flax_init":
            return self._build_again(site, model, indices) if model.holds else self._init(site, model, indices)
        return self._held(site, model, indices) if model.holds else self._apply(site, model, indices)

    # -- keys

    def _key(self, site: Site, indices: Sequence[int]) -> list[str]:
        scribe, options = self.scribe, site.given.options
        if options["seed"] is not None:
            self.assigned = {scribe.root}
            return [scribe.start(options["seed"])]
        name = site.given.rest
        if not name:
            return []
        self.assigned = {scribe.root}
        target = site.target.removesuffix("=").strip()
        plain = site.target.endswith("=") and target.isidentifier()
        show = scribe.show(f"key {name}", target if plain else scribe.key(name))
        if name in ("params", "dropout"):
            bind = [f"{site.target} {scribe.key(name)}"] if site.target else []
            return [*scribe.draw(), *bind, *show]
        if plain:
            return [f"{target} = {scribe.fold(name)}  # stream {scribe.text(name)}", *scribe.draw(), *show]
        bind = [f"{site.target} {scribe.key(name)}"] if site.target else []
        return [*scribe.draw((name,)), *bind, *show]

    def _draw_of(
        self, site: Site, indices: Sequence[int], spelling: Spelling
    ) -> tuple[list[str], Callable[[str], str], str]:
        """The lines that make the keys of a run; the variable of each stream's; and that of the `params` for an init."""
        scribe, options = self.scribe, site.given.options
        streams = (*spelling.streams, *options["key"])
        if options["draw"] is not None:
            return self._replayed(indices, streams, spelling.taken)
        self.assigned.add(scribe.root)

        def key(stream: str) -> str:
            return scribe.key(stream, taken=spelling.taken)

        if options["draws"] is not None:
            return self._series(options["draws"], streams, indices)
        if self.story.shares_in_place(site):
            self.assigned |= {scribe.params, scribe.dropout, *(key(stream) for stream in streams)}
            return [], key, scribe.params
        return scribe.draw(streams, taken=spelling.taken), key, scribe.params

    def _series(
        self, draws: int, streams: Sequence[str], indices: Sequence[int]
    ) -> tuple[list[str], Callable[[str], str], str]:
        """As many draws as one run takes: their keys in lists."""
        scribe = self.scribe
        made = any(self.story.runs[index].made for index in indices)
        wanted = dict.fromkeys([*streams, *(("params",) if made else ())])
        names = {stream: scribe.variable(f"{stream}_keys") for stream in wanted}
        if not names:
            return scribe.advance(draws), scribe.key, scribe.params
        empty = ", ".join(["[]"] * len(names))
        body = [*scribe.draw(streams), *(f"{many}.append({scribe.key(stream)})" for stream, many in names.items())]
        lines = [f"{', '.join(names.values())} = {empty}", f"for _ in range({draws}):", *indented(body, scribe.unit)]
        return lines, lambda stream: names[stream], f"{names.get('params', '')}[0]"

    def _replayed(
        self, indices: Sequence[int], streams: Sequence[str], taken: bool
    ) -> tuple[list[str], Callable[[str], str], str]:
        """The keys of an earlier draw, made again from its seed."""
        scribe = self.scribe
        found = {(self.story.runs[index].seed, self.story.runs[index].draw) for index in indices}
        if len(found) > 1:
            raise CannotSay("--draw stood for another draw each time")
        ((seed, number),) = found
        scribe.needs.add("jax")
        root = scribe.variable("replayed_root_key")
        names = {name: scribe.variable(f"replayed_{name}_key") for name in ("params", "dropout", *streams)}
        lines = [f"{root} = jax.random.key({seed})  # draw {number} again"]
        step = f"{root} = jax.random.split({root}, 3)[0]"
        if number == 2:
            lines.append(step)
        elif number > 2:
            lines += [f"for _ in range({number - 1}):", scribe.unit + step]
        for stream in streams:
            if stream not in ("params", "dropout") or (taken and stream == "params"):
                names[stream] = scribe.variable(f"replayed_{stream}_key")
                lines.append(f"{names[stream]} = {scribe.fold(stream, root)}  # stream {scribe.text(stream)}")
        lines.append(f"_, {names['params']}, {names['dropout']} = jax.random.split({root}, 3)")
        return lines, lambda stream: names[stream], names["params"]

    # -- models

    def _register(self, site: Site, indices: Sequence[int]) -> list[str]:
        """`%flaxmodel net = Net(8)`, and what a cell registers by itself."""
        scribe = self.scribe
        name, _, written = (part.strip() for part in site.given.rest.partition("="))
        lines: list[str] = []
        for registered in self.states if name == MODELS else (name,):
            model = self.models.get(registered)
            if model is not None and model.name != registered and not model.holds:
                self.assigned.add(model.name)
                lines.append(f"{model.name} = {registered}()")
        for index in indices:
            run = self.story.runs[index]
            model = self.models[run.model or name]
            _, _, built = run.by_hand.partition(" = ")
            built = built.replace("params=params_key", f"params={scribe.params}")
            built = built.replace("dropout=dropout_key", f"dropout={scribe.dropout}")
            streams, taken = self.story.folded_later(site)
            stays = self.story.stays(site)
            self.assigned |= {scribe.root, model.name}
            scribe.needs.add("nnx")
            lines += [*scribe.draw(streams, taken=taken, stay=stays), f"{model.name} = {built}"]
            lines += scribe.show(label_of(f"{model.name} = {run.call}"), f"nnx.state({model.name})")
        if lines or name == MODELS or not written:
            return lines
        known = self.models.get(name)
        if known is not None and known.construction and "rngs" not in written:
            if self.states.get(name) == "unchanged":
                return []
            # An edit that kept the values: what it is built with does not matter.
            scribe.needs.add("nnx")
            written = with_rngs(written, "nnx.Rngs(0)")
        self.assigned.add(name)
        return [f"{name} = {written}"]

    # -- inits

    def _init(self, site: Site, model: Model, indices: Sequence[int]) -> list[str]:
        scribe, run = self.scribe, self.story.runs[indices[-1]]
        assert site.call is not None
        spelling = run.spelling or Spelling()
        called = self._called(site, model, replace(spelling, init_arguments=spelling.arguments), lambda s: s)
        if site.given.options["draw"] is not None:
            lines, _, params = self._replayed(indices, (), False)
        else:
            streams, taken = self.story.folded_later(site)
            lines, params = scribe.draw(streams, taken=taken, stay=self.story.stays(site)), scribe.params
            self.assigned |= {scribe.root, params, scribe.dropout}
        before, items = linen_lines.init_items(scribe, called, params)
        target = site.target.removesuffix("=").strip()
        plain = site.target.endswith("=") and target.isidentifier()
        left = f"{target} = " if plain and target != model.variables else ""
        lines += scribe.fit(f"{left}{model.variables} = {before}", items, ")")
        if site.target and not plain:
            lines.append(f"{site.target} {model.variables}")
        self.assigned.add(model.variables)
        lines += self._keep_first(model, params)
        return [*lines, *scribe.show(label_of(f"{model.name}.init({', '.join(items[1:])})"), model.variables)]

    def _keep_first(self, model: Model, params: str) -> list[str]:
        if not model.first_key:
            return []
        self.assigned.add(model.first_key)
        return [f"{model.first_key} = {params}"]

    def _build_again(self, site: Site, model: Model, indices: Sequence[int]) -> list[str]:
        scribe, run = self.scribe, self.story.runs[indices[-1]]
        _, _, built = run.by_hand.partition(" = ")
        if site.given.options["draw"] is not None:
            lines, _, params = self._replayed(indices, ("dropout",), False)
            dropout = scribe.variable("replayed_dropout_key")
        else:
            streams, taken = self.story.folded_later(site)
            lines = scribe.draw(streams, taken=taken, stay=self.story.stays(site))
            params, dropout = scribe.params, scribe.dropout
            self.assigned |= {scribe.root, params, dropout}
        lines += self._rebuilt(model, built, params, dropout)
        target = [f"{site.target} nnx.state({model.name})"] if site.target else []
        assert site.call is not None
        label = label_of(f"init {site.call.call}")
        return [*lines, *target, *scribe.show(label, f"nnx.state({model.name})")]

    def _rebuilt(self, model: Model, built: str, params: str, dropout: str) -> list[str]:
        """A module's own objects get the values of one that is built anew."""
        scribe = self.scribe
        scribe.needs.add("nnx")
        built = built.replace("params=params_key", f"params={params}").replace("dropout=dropout_key", f"dropout={dropout}")
        return scribe.fit("nnx.update(", [model.name, f"nnx.state({built})"], ")")

    # -- applies

    def _called(self, site: Site, model: Model, spelling: Spelling, key: Callable[[str], str]) -> Called:
        assert site.call is not None
        options = site.given.options
        given = options.get("variables")
        arguments = tuple(options.get("key") or ())
        return Called(
            model.name,
            model.module,
            site.call,
            spelling,
            given or model.variables,
            {stream: key(stream) for stream in (*spelling.streams, *arguments)},
            arguments,
            tuple(sorted({*spelling.mutable, *(options.get("mutable") or ())})),
        )

    def _apply(self, site: Site, model: Model, indices: Sequence[int]) -> list[str]:
        scribe, options = self.scribe, site.given.options
        runs = [self.story.runs[index] for index in indices]
        spelling = _common(runs)
        lines, key, params = self._draw_of(site, indices, spelling)
        draws = options["draws"]
        called = self._called(site, model, spelling, key)
        lines += self._made(site, model, called, runs, params)
        if options["eager"]:
            before, items = linen_lines.apply_items(
                scribe, called, linen_lines.as_written(called.call.arguments), called.variables
            )
            value = Value(before, tuple(items), ")")
        else:
            wanted, passed = linen_lines.function(scribe, called, site.mode, self._several(), draws)
            keys = list(called.keys.values())
            if draws is not None:
                scribe.needs.add("jnp")
                keys = [f"jnp.stack({name})" for name in keys]
            starred = any(name.startswith("*") for name in passed.parameters)
            items = [called.variables, *keys, *passed.outside] if starred else [called.variables, *passed.outside, *keys]
            value = Value(f"{self.define(wanted, site)}(", tuple(items), ")")
        keeps = options["variables"] is None and options["draw"] is None and draws is None
        kept = tuple(name for name in spelling.kept if name in called.mutable) if keeps else ()
        asked = options["mutable"]
        after = merged(scribe, model.variables, kept, called.mutable)
        if kept:
            self.assigned.add(model.variables)
        label = label_of(site.call.call if site.call else "", site.mode)
        if not called.mutable:
            return [*lines, *lines_of(scribe, site.target, label, value)]
        if asked and not kept and set(asked) == set(spelling.mutable):
            return [*lines, *lines_of(scribe, site.target, label, value)]
        pair = scribe.variable("updates", "new_values") if kept or asked else "_"
        given = ""
        if asked:
            there = [name for name in asked if name in spelling.mutable]
            picked = ", ".join(f"{scribe.text(name)}: {pair}[{scribe.text(name)}]" for name in there)
            given = "({output}, {{" + picked + "}})"
        return [*lines, *lines_of(scribe, site.target, label, value, after=after, pair=pair, given=given)]

    def _made(self, site: Site, model: Model, called: Called, runs: Sequence[Run], params: str) -> list[str]:
        """The init that is part of a run, or what a method adds to the variables."""
        scribe = self.scribe
        made = [run for run in runs if run.made is not None and not run.made.added]
        added = [run for run in runs if run.made is not None and run.made.added]
        lines: list[str] = []
        if made:
            self.assigned.add(model.variables)
            first = replace(called, spelling=made[0].spelling or called.spelling)
            before, items = linen_lines.init_items(scribe, first, params)
            if site.path and (len(made) < len(runs) or len(runs) == 1):
                inner = [*scribe.fit(f"{model.variables} = {before}", items, ")", 2), *self._keep_first(model, params)]
                lines += [f"if {model.variables} is None:", *indented(inner, scribe.unit)]
            else:
                lines += [*scribe.fit(f"{model.variables} = {before}", items, ")"), *self._keep_first(model, params)]
        if added:
            if site.path and len(added) < len(runs):
                raise CannotSay("its first run added variables to those that were there, and the others did not")
            self.assigned.add(model.variables)
            scribe.needs.add("traverse_util")
            fresh = scribe.variable("more_variables")
            first = replace(called, spelling=added[0].spelling or called.spelling)
            before, items = linen_lines.init_items(scribe, first, model.first_key or params)
            old, new = (f"traverse_util.flatten_dict({name})" for name in (model.variables, fresh))
            lines += scribe.fit(f"{fresh} = {before}", items, ")")
            lines += [f"{model.variables} = traverse_util.unflatten_dict({{**{new}, **{old}}})"]
        return lines

    def _several(self) -> bool:
        return len({run.model for run in self.story.runs if run.command == "apply"}) > 1

    # -- NNX

    def _held(self, site: Site, model: Model, indices: Sequence[int]) -> list[str]:
        scribe, options = self.scribe, site.given.options
        assert site.call is not None
        runs = [self.story.runs[index] for index in indices]
        spelling = _common(runs)
        lines, key, params = self._draw_of(site, indices, spelling)
        rebuilt = [run for run in runs if run.made is not None]
        if rebuilt:
            if len(rebuilt) < len(runs):
                raise CannotSay("its first run built the module anew, and the others did not")
            lines += self._rebuilt(model, with_rngs(model.construction, _RNGS), params, key("dropout"))
        draws = options["draws"]
        names = (*spelling.streams, *options["key"])
        keys = {stream: key(stream) if draws is None else f"{stream}_key" for stream in names}
        held = Held(model.name, site.call, spelling, keys, tuple(options["key"]))
        modes = nnx_lines.modes(spelling, model.name)
        keeps = options["variables"] is None and options["draw"] is None
        name = model.name
        if modes is None or not keeps or draws is not None:
            name = scribe.variable(f"{model.name}_copy")
            lines.append(f"{name} = nnx.clone({model.name})")
            scribe.needs.add("nnx")
            if options["variables"] is not None:
                lines.append(f"nnx.update({name}, {options['variables']})")
            one_way = nnx_lines.mode_set(spelling.fields, name)
            if one_way is None:
                raise CannotSay("its switches are set to different values")
            modes = (one_way, "")
        if draws is not None:
            return [*lines, *filter(None, modes[:1]), *self._held_series(site, held, name, key, draws)]
        lines += [*nnx_lines.reseeded(scribe, held, name), *filter(None, modes[:1])]
        rngs = nnx_lines.rngs(scribe, held)
        extra = [*(keys[name] for name in held.arguments), *([rngs] if rngs else [])]
        if options["eager"]:
            items = [*linen_lines.as_written(site.call.arguments)]
            items += [f"{argument}={value}" for argument, value in spelling.arguments]
            items += [f"{argument}={keys[argument]}" for argument in held.arguments]
            items += [f"rngs={rngs}"] if rngs else []
            value = Value(".".join((name, *site.call.method)) + "(", tuple(items), ")")
        else:
            wanted, passed = nnx_lines.function(scribe, held, site.mode, self._several())
            outside = list(passed.outside)
            starred = [text for text in outside if text.startswith("*")]
            plain = [text for text in outside if not text.startswith("*")]
            value = Value(f"{self.define(wanted, site)}(", (name, *plain, *extra, *starred), ")")
        after = [line for line in modes[1:] if line]
        if spelling.sown:
            after.append(f"nnx.pop({name}, nnx.Intermediate)")
        if name != model.name and keeps:
            after.append(f"nnx.update({model.name}, nnx.state({name}))")
        if options["mutable"]:
            raise CannotSay("--mutable of an NNX model has no lines yet")
        return [*lines, *lines_of(scribe, site.target, label_of(site.call.call, site.mode), value, after=after)]

    def _held_series(
        self, site: Site, held: Held, name: str, key: Callable[[str], str], draws: int
    ) -> list[str]:
        """Many draws of an NNX model: the module taken apart, and put together once for each draw."""
        scribe = self.scribe
        assert site.call is not None
        scribe.needs |= {"jax", "jnp"}
        graphdef, state, one = (scribe.variable(n) for n in ("graphdef", "state", "one_draw"))
        wanted, passed = nnx_lines.function(scribe, held, site.mode, self._several())
        streams = list(dict.fromkeys((*held.spelling.streams, *held.arguments)))
        keys = [held.keys[stream] for stream in streams]
        body = [f"{held.model} = nnx.merge({graphdef}, {state})", *nnx_lines.reseeded(scribe, held, held.model)]
        rngs = nnx_lines.rngs(scribe, held)
        body += [line.replace("rngs=rngs", f"rngs={rngs}") if rngs else line for line in wanted.body]
        axes = ", ".join(["None"] * (1 + len(passed.outside)) + ["0"] * len(keys))
        given = [state, *passed.outside, *(f"jnp.stack({key(stream)})" for stream in streams)]
        size = f", axis_size={draws}" if not keys else ""
        value = Value(f"jax.jit(jax.vmap({one}, in_axes=({axes}){size}))(", tuple(given), ")")
        return [
            f"{graphdef}, {state} = nnx.split({name})",
            "",
            f"def {one}({', '.join([state, *passed.parameters, *keys])}):",
            *indented(body, scribe.unit),
            "",
            *lines_of(scribe, site.target, label_of(site.call.call, site.mode), value),
        ]


_RNGS = "nnx.Rngs(params=params_key, dropout=dropout_key)"


def with_rngs(construction: str, rngs: str) -> str:
    """`Net(8, 3)` with the argument that it lacks."""
    inside = construction.rstrip().removesuffix(")").rstrip().rstrip(",")
    return f"{inside}{'' if inside.endswith('(') else ', '}rngs={rngs})"


def _common(runs: Sequence[Run]) -> Spelling:
    """What the runs of one place have in common; where a later one asked for more, that."""
    spellings = [run.spelling for run in runs if run.spelling is not None]
    if not spellings:
        raise CannotSay("the session does not know how it was run")
    last = spellings[-1]
    streams = tuple(sorted({stream for each in spellings for stream in each.streams}))
    mutable = tuple(sorted({name for each in spellings for name in each.mutable}))
    kept = tuple(sorted({name for each in spellings for name in each.kept}))
    taken = {each.taken for each in spellings}
    if len(taken) > 1:
        raise CannotSay("its first run, which made the variables, had another `params` key than the others")
    return replace(last, streams=streams, mutable=mutable, kept=kept)
