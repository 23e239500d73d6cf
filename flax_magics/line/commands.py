"""The commands as data: usage, help, options, examples. What help, completion and `%flax` are made of."""

from __future__ import annotations

from .options import Command, Option

QUIET = Option("--quiet", "show nothing but a sharp bit that was not said yet", short="-q")
BIND = Option("--out", "bind the Run to NAME as well", "NAME", short="-o", is_name=True)
KEYS_OF = Option(
    "--keys-of",
    "use the keys of an earlier draw, making no new one: its number, last, seed:N, or the name of a Run",
    "N",
    was="--draw",
    takes="draw",
)
REPEAT = Option(
    "--repeat",
    "run N times with the same keys: median, spread and the first outlier; FLOP/s and bytes/s",
    "N",
    type=int,
)
TRAIN = Option("--train", "set the model's own switch to training, and say which")
EVAL = Option("--eval", "set it to evaluation")
SILENT = Option("--quiet", "say nothing", short="-q")

FLAX = Command(
    "%flax",
    "%flax",
    "The session at a glance: devices, the root key and its draws, models, last runs, memory and caches, and the list "
    "of commands.",
    examples=("%flax",),
    takes="",
    bare=True,
)

FLAXMODEL = Command(
    "%%flaxmodel",
    "%%flaxmodel [options] [net = Net(fields…)]     on the first line of a cell\n"
    "%flaxmodel [options] net [= Net(fields…)]      registers what is there already",
    "Runs the cell as an ordinary cell, then registers the model(s) that it defined, so that %flax_init and %flax_apply "
    "know them by name: the cell's own module instances, the assignment written on the line, or, with neither, the last "
    "module class if it can be built from defaults.\n\n"
    "Running an unchanged cell again keeps the model, its variables and its compiled programs. After an edit the "
    "variables stay if the whole tree still fits; otherwise the next run initialises.",
    (
        Option(
            "--check", "check a call at once, by shapes alone: parameters, output, streams, switch", "CALL", quotes=True
        ),
        Option("--quiet", "say nothing about what was registered", short="-q"),
    ),
    (
        "%%flaxmodel net = Net()\nclass Net(nn.Module):\n  @nn.compact\n  def __call__(self, x):\n    return nn.Dense(3)(x)",
        "%flaxmodel net = Net()",
        "%flaxmodel net",
    ),
    takes="assignment",
)

FLAX_INIT = Command(
    "%flax_init",
    "%flax_init [options] net(x)",
    "Initialises the model's variables, or initialises them again, and gives them. It opens a draw and uses its params "
    "key; if the next draw is this model's %flax_apply, that takes the same draw's other streams. The call is the one "
    "that Flax's init gets, without the key: net(x), not net.init(key, x).",
    (KEYS_OF, QUIET, BIND),
    ("%flax_init net(x)", "variables = %flax_init net(x)"),
)

FLAX_APPLY = Command(
    "%flax_apply",
    "%flax_apply [options] net(x)    any method, any arguments: net.encode(x, mask=m)\n"
    "%%flax_apply [options]          statements, the last of which is the call",
    "One draw from the root key, one compiled forward pass, one report; gives what the model returns. What nobody has "
    "registered is registered, and variables that are not there yet are initialised first. With neither --train nor "
    "--eval the model runs as written.\n\n"
    "The call is the model's: net(x), not net.apply(variables, x, rngs=…). In a function that JAX traces (jax.grad, jit, "
    "vmap, scan) no command draws or runs: call net.apply there, with variables and keys taken before.",
    (
        TRAIN,
        EVAL,
        Option(
            "--mutable",
            "hand a collection back: gives (output, updates)",
            "NAME",
            "-m",
            many=True,
            is_name=True,
            takes="collection",
        ),
        Option("--variables", "run with other variables, and keep nothing", "EXPR", takes="variables"),
        Option(
            "--key", "pass the draw's stream ARG as that argument", "ARG", many=True, is_name=True, takes="argument"
        ),
        KEYS_OF,
        Option(
            "--samples",
            "K draws at once, outputs stacked: Monte-Carlo dropout; keep nothing that the model writes",
            "K",
            type=int,
            was="--draws",
        ),
        REPEAT,
        Option(
            "--roofline",
            "hold those against what this machine reaches in a large matmul and a large copy; without --repeat, 20 runs",
        ),
        Option("--eager", "run op by op, without compiling: the model may give any object"),
        BIND,
        QUIET,
    ),
    (
        "y = %flax_apply net(x)",
        "%flax_apply --train net(x)",
        "ys = %flax_apply --train --samples 8 net(x)",
        "%flax_apply --repeat 20 -o run net(x)",
        "%flax_apply --roofline net(x)",
        "%%flax_apply --train\nx2 = x * 2\ny = net(x2)",
    ),
)

FLAX_GRAD = Command(
    "%flax_grad",
    "%flax_grad [options] loss(net, batch)    the model comes first; further arguments are passed as they are\n"
    "%%flax_grad [options]                    statements, the last of which is the call",
    "The loss of one batch and its gradients, from one draw: a table by module of how large they are, which layers get "
    "none and why, and the first number that is not finite. Gives Gradients, with .loss, .metrics, .grads and .updates. "
    "Nothing is kept of what the loss writes; variables that are not there yet are initialised first.\n\n"
    "The loss is a function of yours, plain Flax and JAX, which returns a number, or (number, dict of metrics). In it the "
    "model is called as it is, without variables and rngs, as often as you like; it is not jitted, and no jax.grad stands "
    "in it. The model runs in train mode. Where its switch is an argument of the call, the loss has a parameter of that "
    "name and passes it on: def loss(net, batch, train).",
    (
        Option("--eval", "take the gradients in evaluation mode"),
        Option(
            "--freeze",
            "take these parameters as constants: a module, or a path with * and ?; of NNX also a type of variables",
            "PATTERN",
            many=True,
            quotes=True,
        ),
        BIND,
        QUIET,
    ),
    (
        "def loss(net, x):\n  return (net(x) ** 2).mean()\n%flax_grad loss(net, x)",
        "gradients = %flax_grad -q loss(net, x)",
        "gradients.loss, gradients.metrics, gradients.grads",
        "%flax_grad --freeze */bias loss(net, x)",
    ),
)

FLAX_TRAIN = Command(
    "%flax_train",
    "%flax_train [options] loss(net, data)    first the model, then the data; further arguments are passed as they are\n"
    "%%flax_train [options]                   statements, the last of which is the call",
    "Trains a model with optax, in one draw: step i has the draw's keys with i folded in. Gives the Run, with .losses, "
    ".metrics, .eval and .steps. Finished steps are kept whatever ends the training, and --resume goes on after the last "
    "one. A step that is not finite is not taken: it ends the training, and is told by module, line and value.\n\n"
    "The loss is that of %flax_grad. Data are a dict or tuple of arrays with one leading axis, which --batch shuffles in "
    "each epoch and cuts, or any iterable of batches. Without --batch each step takes all rows.\n\n"
    "The optimizer is optax's, and so is all that belongs to it. Clipping: optax.chain(optax.clip_by_global_norm(1.0), "
    "optax.adamw(1e-3)). A schedule: optax.adamw(optax.cosine_decay_schedule(1e-3, 1000)). Accumulation: "
    "optax.MultiSteps(optax.adamw(1e-3), 4). An average of the updates: optax.chain(optax.adamw(1e-3), optax.ema(0.99)).",
    (
        Option("--optimizer", "an optax transformation; later trainings of the model may leave it out", "EXPR"),
        Option("--batch", "rows in a batch", "N", type=int),
        Option("--epochs", "how often to go through the data", "N", type=int),
        Option("--steps", "how many steps, instead", "N", type=int),
        Option(
            "--eval", "look at these data too, in evaluation mode: each epoch, or ten times in so many steps", "DATA"
        ),
        Option(
            "--freeze",
            "leave these parameters as they are: a module, or a path with * and ?; of NNX also a type of variables",
            "PATTERN",
            many=True,
            quotes=True,
        ),
        Option("--resume", "go on after the last finished step; --epochs or --steps set a new total"),
        BIND,
        QUIET,
    ),
    (
        "import optax\ndef loss(net, x):\n  return (net(x) ** 2).mean()\n"
        "%flax_train --optimizer optax.adamw(1e-3) --steps 20 loss(net, x)",
        "%flax_train --resume --steps 40 loss(net, x)",
        "run = %flax_train -q --batch 2 --epochs 3 --eval x loss(net, x)",
        "run.losses, run.eval, run.steps",
    ),
)

FLAX_SUMMARY = Command(
    "%flax_summary",
    "%flax_summary [options] net(x)    any method, any arguments: net.encode(x, mask=m)\n"
    "%flax_summary [options] net       the variables alone, where there are some\n"
    "%%flax_summary [options]          statements, the last of which is the call",
    "The modules of a call with their shapes, dtypes, parameters, bytes, FLOPs and random streams; gives them as a "
    "Summary. Nothing is computed, compiled, drawn or initialised: shapes are enough, and no rngs are needed. Equal "
    "modules that follow each other are one row, `50 × Block`, with the numbers of one of them.\n\n"
    "FLOPs are those of XLA's cost analysis before it optimises, as nn.tabulate gives them. A loop (nn.scan, "
    "jax.lax.scan) counts as one turn of it.",
    (
        TRAIN,
        EVAL,
        Option("--backward", "count forward and backward together too: the vjp of variables and floating inputs"),
        Option("--depth", "show so many levels of submodules; the rest is counted in", "N", type=int, least=0),
        Option(
            "--tree",
            "show the variables as well, as treescope's tree with pictures of the arrays: reads their values, and its "
            "HTML needs scripts",
        ),
        Option("--quiet", "show nothing; the Summary is the value", short="-q"),
    ),
    (
        "%flax_summary net(x)",
        "%flax_summary --train --backward net(x)",
        "%flax_summary --depth 1 net(x)",
        "summary = %flax_summary -q net(x)",
        "summary.flops, summary.parameters, summary.totals, summary.modules[0]",
    ),
)

FLAX_KEY = Command(
    "%flax_key",
    "%flax_key                     shows the root key\n"
    "%flax_key --seed N [--fresh]  starts it again at draw 1 of seed N\n"
    "%flax_key NAME                draws a key and gives its stream NAME",
    "The session holds one root key. Every draw splits it: root, params, dropout = jax.random.split(root, 3); the old "
    "root is never used again. A key that this command gives is yours alone.",
    (
        Option("--seed", "start again from this seed", "N", type=int, least=None),
        Option("--fresh", "initialise every model anew at its next use: as first cell, Run All equals a restart"),
        SILENT,
    ),
    ("%flax_key", "latent = %flax_key latent", "%flax_key --seed 0 --fresh"),
    takes="stream",
    bare=True,
)

FLAX_VARS = Command(
    "%flax_vars",
    "%flax_vars net             gives the model's variables as they are\n"
    "%flax_vars net = EXPR      gives the model others: those of a training loop of your own, say",
    "Collections by name, as Flax's init gives them; of an NNX module its nnx.State, of which a part may be given, as "
    "nnx.update takes it. Others are checked there and then: tree, shapes and dtypes are those that the model has, or one "
    "message says leaf by leaf what is not, and nothing has changed. They are held as they are, not copied. In EXPR the "
    "name flax_magics is known, imported or not.\n\n"
    "Every report says whose weights ran: initialised in draw 1, set in cell [6], loaded from s.safetensors. After an init "
    "or an edit that replaced more than an init's own, flax_magics.session().models['net'].previous has those.",
    (SILENT,),
    (
        "variables = %flax_vars net",
        "%flax_vars net = {**variables, 'params': jax.tree.map(lambda p: 0.5 * p, variables['params'])}",
        "%flax_vars net;",
    ),
    takes="model",
)

FLAX_SAVE = Command(
    "%flax_save",
    "%flax_save FILE                    writes the session into FILE\n"
    "%flax_save --autosave FILE         and again after whatever changes variables\n"
    "%flax_save --autosave off          ends that",
    "Models' variables, the root key and its draws, the history, the models' code and the versions, in one file: a "
    "safetensors file, so that safetensors.numpy.load_file(FILE) gives the arrays by name. It takes the place of a "
    "session, whole or not at all, and of no other file. %flax_load FILE in a fresh kernel goes on with the draw that "
    "would have come.\n\n"
    "With --autosave a thread saves after each run that changed variables. It never holds up the kernel, and one that is "
    "killed leaves the file whole.",
    (
        Option("--autosave", "from now on save there in the background, or off", "FILE", quotes=True, takes="file"),
        SILENT,
    ),
    ("%flax_save session.safetensors", "%flax_save --autosave session.safetensors", "%flax_save --autosave off"),
    takes="file",
)

FLAX_LOAD = Command(
    "%flax_load",
    "%flax_load FILE",
    "Restores what %flax_save wrote: root key, draws and history, and the variables of each model, for the model that is "
    "registered under its name, now or later. The next draw is the one that would have come. No code in the file is run: "
    "it is shown. Variables of another tree, shape or dtype than the model's are told leaf by leaf, and none is used.",
    (Option("--quiet", "say nothing but what is other here than where it was saved", short="-q"),),
    ("%flax_load session.safetensors",),
    takes="file",
)

FLAX_EXPORT = Command(
    "%flax_export",
    "%flax_export [options]         shows the session as a plain Flax script\n%flax_export [options] FILE    writes it",
    "The cells that ran, in the order in which they ran, as they are, with plain JAX and Flax in the place of each command: "
    "the split of the root key, init, a jitted apply with its rngs and mutable collections. It needs no flax_magics, and "
    "prints for each run the digest that the session had. Magics and shell lines become comments, and so does what uses "
    "flax_magics otherwise; what cannot be exported is said in its place. Of a cell that failed, what ran "
    "is there, and one line for the rest; those that left nothing are counted at the end.\n\n"
    "A file is formatted by ruff or black where one of them is installed. It is replaced only if this command wrote it and "
    "nobody has changed it since.",
    (
        Option("--cell", "put it into the next cell"),
        Option("--plain", "leave the digests out"),
        Option("--force", "replace the file whatever it is", short="-f"),
        Option("--quiet", "say nothing about the file that was written", short="-q"),
    ),
    ("%flax_export", "%flax_export --plain", "%flax_export --force session.py"),
    takes="file",
    bare=True,
)

FLAX_HISTORY = Command(
    "%flax_history",
    "%flax_history [options] [MODEL]",
    "Every draw of the session, oldest first: what drew, the streams that were taken with the first word of their keys, "
    "input shapes, the output's digest, cell and time. Runs of one cell that are alike are one row. Marked are draws that "
    "were run again or cannot be (no replay), and draws of cells that were run again or edited since. A command that "
    "failed drew nothing.",
    (
        Option("--last", "the last N runs alone", "N", type=int),
        Option("--all", "all rows, where there are more than 60"),
    ),
    ("%flax_history", "%flax_history --last 5"),
    takes="model",
    bare=True,
)

FLAX_REPLAY = Command(
    "%flax_replay",
    "%flax_replay [options] N     a draw's number, last, seed:N, or the name of a Run",
    "Runs a draw again, with its keys, its variables and its inputs, and says whether every bit is the same: identical, or "
    "which leaves differ and by how much. Moves nothing: the root key, variables, models and the draws stay as they are. "
    "Gives the Run.\n\n"
    "What it runs is the model as it was, also after an edit. Inputs and overwritten variables are kept up to "
    "FlaxMagics.replay_bytes, the oldest let go first; what is gone is said. A training is repeated with all its steps; "
    "--step repeats it up to one step, and shows the gradients of that.",
    (
        Option("--step", "the gradients in one step of a training, counted from 0", "K", type=int, least=0),
        BIND,
        Option("--quiet", "show nothing; the Run is the value", short="-q"),
    ),
    ("%flax_replay 1", "run = %flax_replay last"),
    takes="draw",
)

FLAX_FREE = Command(
    "%flax_free",
    "%flax_free [--replays]",
    "Lets go of what pins device memory and nobody needs: the frames of the last error (%debug and %tb know it no more), "
    "values in Out and _ that hold arrays, models whose name was deleted, and programs of models that were edited since. "
    "Says how many bytes each device holds no more, and who holds the rest: your variables by name, models, replays.\n\n"
    "What a name of yours reaches stays, and so do models' variables. After a cell that failed for want of device memory "
    "it runs by itself, and keeps all models; %config FlaxMagics.free = False leaves that out.",
    (Option("--replays", "let go of what is held for %flax_replay alone, too"),),
    ("%flax_free", "%flax_free --replays"),
    takes="",
    bare=True,
)

FLAX_DOCTOR = Command(
    "%flax_doctor",
    "%flax_doctor",
    "Looks for what is wrong with JAX and Flax here: an accelerator that is not used, versions that do not go together, "
    "device memory, settings that cost time or bits, folders of programs, and among your variables jitted NNX modules, "
    "meshes, loaders and keys. Each finding is what it is, what it costs, and the line that mends it. Changes nothing.\n\n"
    "What matters at once also stands beneath the first report of a kernel, where %config FlaxMagics.notes does not "
    "leave it out: {'doctor': False}.",
    examples=("%flax_doctor",),
    takes="",
    bare=True,
)

FLAX_MESH = Command(
    "%flax_mesh",
    "%flax_mesh                      shows the mesh\n"
    "%flax_mesh data=-1              lays out runs over all devices from now on\n"
    "%flax_mesh data=4,model=2       the same, by axes of so many devices; -1 is for all that are left\n"
    "%flax_mesh off                  goes back to one device",
    "From then on %flax_apply and %flax_grad cut the leading axis of arrays in the call over the axis `data`, and "
    "%flax_train that of each batch. Variables are whole on each device, or cut over the axes that their annotations name: "
    "nn.with_partitioning, or the sharding of an NNX Variable. Dropout masks are those of one device, every bit; sums may "
    "differ in the last ones.\n\n"
    "The mesh has Auto axes. What you have sharded yourself stands, and so does a mesh of your own (jax.set_mesh): inside "
    "it nothing is laid out. For arrays of your own flax_magics.session().mesh() has .mesh, .batch and .replicated.",
    (SILENT,),
    ("%flax_mesh data=-1", "%flax_mesh", "%flax_mesh off"),
    takes="mesh",
    bare=True,
)

COMMANDS = {value.name: value for value in list(globals().values()) if isinstance(value, Command)}


def restart_line(seed: int, *, fresh: bool) -> str:
    """The `%flax_key` line that restarts the root key, for messages and reports."""
    return f"%flax_key --seed {seed}{' --fresh' if fresh else ''}"


MEANINGS = (
    ("%flax", "the session at a glance"),
    ("%%flaxmodel [net = Net(…)]", "runs the cell, then registers the model(s) it defined"),
    ("%flaxmodel net [= Net(…)]", "registers what is already there"),
    ("%flax_init net(x)", "initialises, or initialises again; gives the variables"),
    ("%flax_apply net(x)", "one draw, one compiled forward pass, one report"),
    ("%flax_grad loss(net, batch)", "loss and gradients of one batch; a table by module"),
    ("%flax_train … loss(net, data)", "trains with optax; interrupted, it goes on with --resume"),
    ("%flax_summary net(x)", "modules, shapes, parameters, bytes, FLOPs; computes nothing"),
    ("%flax_vars net [= EXPR]", "gives the model's variables, or takes others"),
    ("%flax_key [--seed N | NAME]", "shows, restarts or draws from the root key"),
    ("%flax_save FILE", "the session into one file, once or kept up to date"),
    ("%flax_load FILE", "goes on where that was saved"),
    ("%flax_export [FILE]", "the session as a plain Flax script"),
    ("%flax_mesh data=-1", "from now on, runs are laid out over all devices"),
    ("%flax_history", "every draw so far: keys, inputs, digest, cell, time"),
    ("%flax_replay N", "runs a draw again, and says whether every bit is the same"),
    ("%flax_free", "lets go of what pins device memory; who holds the rest"),
    ("%flax_doctor", "what is wrong with JAX here, and the line that mends it"),
)
"""The commands with their meanings, as `%flax` lists them."""

KINDS = (
    *("dropout", "norm", "mode", "nan", "stream", "root key", "key again", "same key", "unused key", "mutable"),
    *(
        "samples",
        "zero params",
        "nan params",
        "scalar",
        "programs",
        "masks",
        "replaced",
        "weights",
        "outdated",
        "file",
        "rebound",
        "name",
        "switch",
        "freeze",
        "gradient",
        "constant",
        "still",
        "stopped",
        "resume",
        "doctor",
        "mesh",
    ),
)
"""Kinds of notes on likely mistakes; `%config FlaxMagics.notes` turns them off by these names.

dropout: every dropout is off in training, or on in evaluation.
norm: BatchNorm is in the other mode than was asked.
mode: training or evaluation was asked, and the model has no switch.
nan: the output holds NaN.
stream: a stream that is not Flax's own is asked for.
root key: a key that the session splits is passed to a run.
key again: a key that went into an earlier run is passed again.
same key: one key is given to two arguments of a call.
unused key: a key is passed that the model does not use.
mutable: a collection is asked for by a name that the model does not have.
samples: all samples of a run are the same, because no key went into them.
zero params: all params are zero after init.
nan params: params hold NaN after init.
scalar: a Python number stands where an array was.
programs: new programs keep being compiled for other shapes, dtypes or values of an argument.
masks: with the keys of an earlier draw, a layer drew other numbers than in that draw's run.
replaced: an init or an edit replaced weights that were set, loaded, trained or updated.
weights: a name that held the model's weights holds others now, and the run used the model's.
outdated: variables are from before an edit.
file: a name stands for another module than was registered, and variables from a file wait for it.
rebound: the name stands for another module than was registered.
name: the name of a model was deleted, or holds something that is no module, and the model that is registered under it ran.
switch: a loss leaves a switch of its net's call at its default.
freeze: a pattern of --freeze matches no parameter.
gradient: a layer has no gradient, and why.
constant: another net in the call of a loss gets no gradient.
still: the loss of a training has not moved in its last 50 steps.
stopped: a training has ended before its last step, and the line that goes on with it.
resume: a training goes on with other data, weights or code than it had, or with an iterable that may give other batches.
doctor: in the first report of a kernel, what is wrong with JAX there; see %flax_doctor.
mesh: the last batch of each epoch cannot be cut over the axis `data`.
"""
