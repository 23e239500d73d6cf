"""One apply, from a call to its result: its variables, its plan, its run. The session is not changed here."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
from flax import errors as flax_errors
from jax.sharding import AxisType, NamedSharding
from msgspec import Struct
from msgspec.structs import replace

from ..base.measures import Limits, Timing, name_devices
from ..base.private import is_in_mesh
from ..base.types import Record
from ..compile.cache import BuiltProgram, PendingProgram, Services
from ..compile.compiler import devices_in, dtype_of, is_out_of_memory, limits, out_of_memory
from ..compile.initialise import made_of, merged
from ..compile.placement import Placement, Shardings, agree, auto_mesh
from ..compile.trace import TraceRequest
from ..errors import FlaxMagicsError, written
from ..line.expression import Line, without_option
from ..models.base import ARGUMENTS, ForeignOutput, MissingVariables, Variables
from ..models.calls import Arguments
from ..models.linen import lacking_stream
from ..rng.keys import Draw, DrawBatch
from ..run import InitStats
from ..state.entry import ModelEntry
from ..state.weights import FOR_THIS_RUN, WeightSource, Written, check_alive
from .call import BoundCall, Call, initialising, prepare, prepare_init, request_of, with_drawn_key, with_keys
from .plan import Plan, RunResult, StartedProgram, begin_program, finish_program, needs_by_shapes

if TYPE_CHECKING:
    from ..line.options import ApplyOptions


class ApplyRequest(Struct, frozen=True, dict=True):
    """An apply that was asked for.

    Attributes:
      entry: the model as it is before the run.
      params_taken: an init has used this draw's `params` key already.
      others: the line that gives the model other weights, which a name of the notebook holds; None where none does.
      placement: the mesh to run on; None for where the arrays are.
    """

    entry: ModelEntry
    call: Call
    options: ApplyOptions
    draw: Draw | DrawBatch
    services: Services
    params_taken: bool
    others: str | None = None
    placement: Placement | None = None

    @cached_property
    def bound(self) -> BoundCall:
        """The call bound to the model in its mode, `--key`'s keys added. Raises FlaxMagicsError for a mistake in it."""
        call = with_keys(self.entry, self.call, self.options, self.draw)
        return prepare(self.entry.name, self.entry.model, call, self.options.mode)

    @property
    def op_by_op(self) -> bool:
        """Whether to run without compiling: with `--eager`, or under `jax.disable_jit`."""
        return self.options.eager or bool(getattr(jax.config, "jax_disable_jit", False))

    @property
    def of_loss(self) -> bool:
        """Whether it is the call of a loss, whose first argument alone is a batch."""
        return hasattr(self.entry.model, "graded")

    @property
    def line(self) -> Line:
        """The command and its call as they were written, from which advice makes other lines."""
        signature = self.bound.signature
        if self.of_loss:  # is written with its net, and bound without
            net = inspect.Parameter("_the_net", inspect.Parameter.POSITIONAL_ONLY)
            signature = signature.replace(parameters=[net, *signature.parameters.values()])
        return Line(self.call.command, self.call.text, signature)


class RunVariables(Struct, frozen=True):
    """Variables to run with, and how they came about in this draw.

    Attributes:
      entry: the model with these variables, unless they were given for this run alone.
      made: what was initialised for this run, None where nothing was.
      seconds: how long that took.
      weights: where the variables came from, in words.
      taken: the draw's `params` key went into variables, so the run's own stream `params` must have another key.
      moved: they lie on a mesh now, and the module that holds them itself is to hold these.
    """

    entry: ModelEntry
    values: Variables
    made: InitStats | None = None
    seconds: float = 0.0
    weights: str = ""
    taken: bool = False
    moved: bool = False


class Execution(Struct, frozen=True):
    """An apply that has run, with everything that was worked out for it."""

    request: ApplyRequest
    variables: RunVariables
    plan: Plan
    built: BuiltProgram
    result: RunResult
    limits: Limits | None
    shardings: Shardings = {}

    @property
    def arguments(self) -> Arguments:
        """The call's arguments, as the program took them."""
        return self.built.request.arguments

    @property
    def mode(self) -> str:
        """The mode that the model ran in, see `BoundCall.mode_of`."""
        return self.request.bound.mode_of(self.result.trace)

    @property
    def timing(self) -> Timing:
        """Times of the run, of each phase of building its program, and of initialising."""
        phases = {name: getattr(self.built.timing, name) for name in ("trace", "lower", "compile", "beside")}
        return replace(self.result.timing, init=self.variables.seconds, **phases)


def execute(request: ApplyRequest) -> Execution:
    """Initialises where needed, finds or builds the program, runs it, and waits for the device.

    Raises:
      FlaxMagicsError: a mistake in the call, or memory ran out. What the model raises is passed on.
    """
    call, options, draw, services = request.call, request.options, request.draw, request.services
    if options.repeat < 1:
        raise FlaxMagicsError(f"--repeat takes a number of runs, 1 or more, not {options.repeat}.")
    if options.roofline and options.eager:
        message = "--roofline holds a compiled program against the machine; --eager compiles none."
        raise FlaxMagicsError(message, **written(f"{without_option(call.command, '--eager')} {call.text}"))
    with plain_errors(request.bound.call, request.placement):
        variables, built = held_variables(request), None
        if variables is None:
            variables, built = _initialise(request)
        # At most twice: the method may need variables that the first init did not make, which are then added.
        while True:
            try:
                plan, built = _make_plan(request, variables, built)
                result = plan.run(draw, built.request.variables, built.request.arguments.dynamic, services)
                break
            except MissingVariables as error:
                variables, built = with_added(request, variables, error), None
    _check_keys(request, result)
    if draw.size is not None:
        _check_samples(request, draw.size, result)
    reached = _limits(result, built, services) if options.roofline else None
    shardings = built.request.shardings
    return Execution(request, variables, plan, built, result, reached, shardings)


def held_variables(request: ApplyRequest) -> RunVariables | None:
    """The variables to run with: given ones or held ones. None where they have to be initialised in this draw.

    Raises:
      FlaxMagicsError: the given ones are no variables, held ones were deleted, or `--key params` asks for the key that
        initialises.
    """
    entry, options, call = request.entry, request.options, request.bound.call
    held = None if options.variables is not None else entry.held
    if "params" in options.key and (request.params_taken or (held is None and options.variables is None)):
        message = f"--key params: in this draw that key initialises `{entry.name}`."
        raise FlaxMagicsError(message, **written(with_drawn_key(call, "params")))
    if options.variables is not None:
        line = Written(f"{options.line.replace('…', '{}')} {call.text}")
        values = entry.read_given(options.variables, line)
        check_alive(f"these variables of `{entry.name}`", values)
        return placed(request, RunVariables(entry, values, weights=FOR_THIS_RUN, taken=request.params_taken))
    if held is None:
        return None
    entry.check_alive(call.text, request.others)
    source = entry.source_now()
    entry = entry if source is entry.source else replace(entry, source=source)
    weights = "" if source is None else source.describe(request.draw.first.seed)
    taken = request.params_taken or "params" in options.key
    return placed(request, RunVariables(entry, held, weights=weights, taken=taken))


def placed(request: ApplyRequest, variables: RunVariables) -> RunVariables:
    """The variables on the mesh of the run, where there is one, and the entry that holds them there from now on."""
    if request.placement is None:
        return variables
    values = request.placement.of_variables(variables.values, variables.entry.model.annotations())
    leaves = zip(*map(jax.tree_util.tree_leaves, (values, variables.values)), strict=True)
    if all(after is before for after, before in leaves):
        return variables
    if request.options.variables is not None:
        return replace(variables, values=values)
    entry = variables.entry
    source = entry.source and entry.source.over(values, in_module=entry.model.api == "nnx")
    entry, moved = replace(entry, source=source), entry.variables is None
    entry = entry if moved else replace(entry, variables=values)
    return replace(variables, entry=entry, values=values, moved=moved)


def _initialise(request: ApplyRequest) -> tuple[RunVariables, BuiltProgram | None]:
    """Initialises the variables while the run's program compiles, for which their shapes are enough.

    The program is None where it must be made afterwards: the init cannot tell shapes in advance, or the call needs
    variables that it does not make. Of the time, tracing both counts as trace, the rest as init.
    """
    entry, draw, services = request.entry.linen, request.draw, request.services
    services.on_phase(f"initialising {entry.name}")
    model, init_call = prepare_init(entry.name, entry.model, request.bound.call)
    since = services.clock()
    # If edits dropped the variables that used this draw's `params` key, the new init gets another key.
    init = initialising(model, init_call, draw.first, services.programs.units, taken=request.params_taken)
    program: StartedProgram | None = None
    if init.expected is not None and not request.op_by_op:
        # This thread traces the run while others compile the units of the init that take longest.
        init.begin()
        # With variables missing, the program is made once they were added.
        with contextlib.suppress(MissingVariables):
            wanted = wanted_of(request, entry, init.expected)
            program = begin_program(wanted, services, since)
        # What is left to wait for from here on counts as init.
        if isinstance(program, PendingProgram):
            since = services.clock()
        # The run's program takes longest to compile, so it is queued before the many small units.
        init.begin(rest=True)
        services.on_phase(f"initialising {entry.name}")
    values, record = init.finish()
    seconds = services.clock() - since
    source = WeightSource.initialised(draw.first, values)
    entry, weights = entry.with_variables(values, source, record), source.describe(draw.first.seed)
    variables = placed(request, RunVariables(entry, values, made_of(values), seconds, weights, taken=True))
    return variables, None if program is None else finish_program(program, services, variables.values)


def with_added(request: ApplyRequest, variables: RunVariables, error: MissingVariables) -> RunVariables:
    """Adds the variables that a method needs and the first init did not make, using the first init's key.

    Raises the model's own error where nothing is added: the variables are the user's, or were completed before.
    """
    entry, call, clock = variables.entry.linen, request.bound.call, request.services.clock
    if request.options.variables is not None or (variables.made is not None and variables.made.added):
        raise error.__cause__ or error
    first = request.draw.first
    key = entry.init.key if entry.init is not None else first.stream("params", taken=variables.taken)
    model, init_call = prepare_init(entry.name, entry.model, call)
    begin = clock()
    fresh = jax.block_until_ready(model.init(key, call.method, call.args, init_call.kwargs))
    seconds = clock() - begin
    values, added = merged(variables.values, fresh)
    if not jax.tree_util.tree_leaves(added):
        raise error.__cause__ or error
    entry = replace(entry, variables=values, source=entry.source and entry.source.over(values))
    made = made_of(added, added=True)
    return placed(request, replace(variables, entry=entry, values=values, made=made, seconds=seconds, taken=True))


def wanted_of(request: ApplyRequest, entry: ModelEntry, variables: Variables) -> TraceRequest:
    """The request to trace the call, its arguments and variables, which may be shapes, on the mesh of the run."""
    bound, placement = request.bound, request.placement
    wanted = request_of(entry, bound, request.draw, variables, request.options)
    if placement is None:
        return wanted
    of_loss = request.of_loss
    arguments, shardings = placement.of_arguments(wanted.arguments, request.line, of_loss=of_loss)
    variables = placement.of_variables(variables, entry.model.annotations())
    return replace(wanted, arguments=arguments, variables=variables, placement=placement, shardings=shardings)


def _make_plan(request: ApplyRequest, variables: RunVariables, built: BuiltProgram | None) -> tuple[Plan, BuiltProgram]:
    """The plan of the call, and its program: `built` if that is there, else one that is found or compiled now."""
    bound, services, options = request.bound, request.services, request.options
    traced = None
    if built is None:
        wanted = wanted_of(request, variables.entry, variables.values)
        if request.op_by_op:
            traced = needs_by_shapes(wanted)
            inputs = wanted.variables, wanted.arguments.leaves
            agree(services, wanted.placement, wanted.draw, wanted.name, tree=inputs)
            built = BuiltProgram(None, traced.request, None, "eager")
        else:
            built = finish_program(begin_program(wanted, services), services)
    body = built.program or traced
    assert body is not None
    return Plan(request.entry.name, bound.model, bound.call.text, options, variables.taken, body), built


class plain_errors(Record, contextlib.AbstractContextManager["plain_errors"]):
    """Turns errors of Flax, JAX and XLA that can only have one reason into a short message; passes other errors."""

    call: Call
    placement: Placement | None = None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, flax_errors.InvalidRngError):
            raise _kept_out(error) from None
        if isinstance(error, ForeignOutput):
            raise _foreign(error, self.call) from None
        if isinstance(error, (RuntimeError, ValueError)) and "deleted" in str(error):
            for place, value in (*enumerate(self.call.args, 1), *self.call.kwargs.items()):
                check_alive(f"the values of argument {place} of {self.call.text}", value)
        if isinstance(error, ValueError) and "incompatible devices" in str(error) and is_in_mesh():
            raise _of_own_mesh(self.call) from None
        if error is not None and is_out_of_memory(error):
            raise out_of_memory(error, self.call.text, None) from None
        processes = None if self.placement is None else self.placement.processes
        # What a collective says of a process that has ended is a port of its host.
        if processes is not None and isinstance(error, Exception) and not isinstance(error, FlaxMagicsError):
            ended = processes.why_failed(self.call.text)
            if ended is not None:
                raise ended from None
        sharded = None if error is None else _of_explicit_axes(error, self.call)
        if sharded is not None:
            raise sharded from None


def _kept_out(error: flax_errors.InvalidRngError) -> FlaxMagicsError:
    """The error of a missing stream: a run passes all streams, so only a lifted transform can keep one out."""
    first, stream = str(error).split(" (https")[0].rstrip("."), lacking_stream(error) or "…"
    message = f"{first}: a lifted transform (nn.scan, nn.vmap, …) around it does not pass that stream on."
    return FlaxMagicsError(message, edit=f"split_rngs={{'{stream}': True, …}}")


def _foreign(error: ForeignOutput, call: Call) -> FlaxMagicsError:
    """Op by op a call may give what it likes, one draw at a time."""
    samples = re.search(r"--samples[\s=]+([0-9]+)", call.command)
    command = call.command
    for option, value in (("--samples", "[0-9]+"), ("--roofline", ""), ("--eager", "")):
        command = without_option(command, option, value)
    line = f"{command} --eager {call.text}"
    if samples is not None:
        line = f"for _ in range({samples[1]}):\n    {line}"
    message = (
        f"{call.text} gives `{error}`, which is no tree of arrays: no compiled program can give it, op by op it can."
    )
    return FlaxMagicsError(message, **written(line))


def _of_own_mesh(call: Call) -> FlaxMagicsError:
    """The error for a mesh that the user has set over other devices than those of a model's variables, or of an argument."""
    message = (
        f"{call.text} cannot run in the mesh that is set here: it has other devices than the model's variables, or than an"
        " argument."
    )
    hint = "variables that a session's mesh has laid out: %flax_mesh off; arrays of your own: jax.device_put"
    return FlaxMagicsError(message, hint=hint)


def _of_explicit_axes(error: BaseException, call: Call) -> FlaxMagicsError | None:
    """The error for what Explicit axes are the reason of; None where `error` comes of something else.

    `jax.make_mesh` gives Explicit axes unless it is told otherwise. Under them an array's type says how it is sharded, and
    several of Flax's layers (Embed, Dropout, RNN) leave open how their results are.
    """
    around = jax.sharding.get_abstract_mesh()
    arguments = list(_sharded(call))
    mesh: Any = arguments[0][1].mesh if arguments else around
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    # Messages write the types as `float32[16@data,4]`.
    typed = any(f"@{name}" in str(error) for name in mesh.axis_names)
    if not typed and type(error).__name__ != "ShardingTypeError":
        return None
    lines = [
        "import jax",
        "from jax.sharding import AxisType, NamedSharding, PartitionSpec as P",
        auto_mesh("mesh", mesh),
    ]
    lines += ["jax.set_mesh(mesh)"] * (not around.empty)
    for name, sharding in arguments:
        if name.isidentifier():
            spec = ", ".join(map(repr, sharding.spec))
            lines.append(f"{name} = jax.device_put({name}, NamedSharding(mesh, P({spec})))")
    return FlaxMagicsError(
        f"{call.text} cannot run on a mesh of Explicit axes: a layer leaves open how its result is sharded"
        f" ({type(error).__name__}). Under Auto axes XLA works it out: put the arrays on such a mesh.",
        **written("\n".join(lines)),
    )


def _sharded(call: Call) -> Iterator[tuple[str, NamedSharding]]:
    """The arguments with an array on Explicit axes: what is written there, where that is the array itself; its sharding."""
    tree = ast.parse(call.text, mode="eval").body if call.is_text else None
    values = [*call.args, *call.kwargs.values()]
    nodes = [*tree.args, *(keyword.value for keyword in tree.keywords)] if isinstance(tree, ast.Call) else []
    texts = map(ast.unparse, nodes) if len(nodes) == len(values) else [""] * len(values)
    for text, value in zip(texts, values, strict=True):
        for leaf in jax.tree_util.tree_leaves(value):
            sharding = getattr(leaf, "sharding", None)
            if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types:
                yield text if leaf is value else "", sharding
                break


def _check_keys(request: ApplyRequest, result: RunResult) -> None:
    """Raises FlaxMagicsError where `--key` passes the key of a stream that the model also draws from itself."""
    both = sorted(set(request.options.key) & result.needs.streams)
    if both:
        name = request.entry.name
        message = f"{name} draws from the stream `{both[0]}` itself: passed as an argument its key would be used twice."
        raise FlaxMagicsError(message, **written(with_drawn_key(request.bound.call, both[0])))


def _check_samples(request: ApplyRequest, size: int, result: RunResult) -> None:
    """Raises FlaxMagicsError where an `rngs` object of the user's went into `size` samples."""
    # An `rngs` object of the user's, whose counts the run has moved.
    if ARGUMENTS in result.updates:
        line = request.line
        one_by_one = f"for _ in range({size}):\n    {line.without_option('--samples', '[0-9]+')}"
        message = f"{line.call} passes rngs of its own: they would give all {size} samples the same keys."
        raise FlaxMagicsError(message, **written(str(line.with_argument("rngs", None) or one_by_one)))


def _limits(result: RunResult, built: BuiltProgram, services: Services) -> Limits:
    """Measures what one of the devices reaches (FLOP/s, bytes/s), in the dtype that most of the variables have."""
    device = min(devices_in((result.output, result.updates)), key=lambda device: device.id)
    services.on_phase(f"measuring what {name_devices({device})} reaches")
    return limits(device, dtype_of(built.request.variables, built.request.arguments.dynamic), services.clock)
