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
SILENT = Option("--quiet", "say nothing", short="-q")

FLAX = Command(
    "%flax",
    "%flax",
    "shows the session at a glance, and all commands",
    "Devices, the root key and its draws, models, last runs, memory and caches. Draws and runs nothing.",
    examples=("%flax", "%flax_apply --help"),
    pitfalls=(
        "Cells are out of order: they ran again, or were edited, since their draws. With %flax_key --seed 0 --fresh in the "
        "first cell, Run All gives what a fresh kernel gives.",
    ),
    takes="",
    bare=True,
)

FLAXMODEL = Command(
    "%%flaxmodel",
    "%%flaxmodel [options] [net = Net(fields…)]     on the first line of a cell\n"
    "%flaxmodel [options] net [= Net(fields…)]      registers what is there already",
    "runs the cell as an ordinary cell, then registers the model(s) it defined",
    "Then %flax_init and %flax_apply know them by name: the cell's own module instances, the assignment written on the "
    "line, or, with neither, the last module class if it can be built from defaults.\n\n"
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
    (
        "The class needs fields, or an NNX constructor rngs: the message has the line to write, %%flaxmodel net = Net(…); "
        "rngs that are left out there are the session's.",
        "Variables are from before an edit: each report says so, and %flax_init net(x) makes new ones.",
        "An editor does not look into cells that begin with %%: leave the class in a cell of its own, and write "
        "%flaxmodel net below it.",
    ),
    takes="assignment",
)

FLAX_INIT = Command(
    "%flax_init",
    "%flax_init [options] net(x)    the call that Flax's init gets, without the key",
    "initialises a model's variables, or initialises them again, and gives them",
    "It opens a draw and uses its params key; if the next draw is this model's %flax_apply, that takes the same draw's "
    "other streams. The call is net(x), not net.init(key, x).",
    (KEYS_OF, BIND, QUIET),
    ("variables = %flax_init net(x)", "%flax_init --keys-of 1 net(x);    # `;` keeps the value from being printed"),
    (
        "It replaces weights that were trained, set or loaded: the report says so, and has the line that brings them back.",
        "A later call lacks the batch axis that this one had: beneath its error stands the line that adds it.",
    ),
)

FLAX_APPLY = Command(
    "%flax_apply",
    "%flax_apply [options] net(x)    any method, any arguments: net.encode(x, mask=m)\n"
    "%%flax_apply [options]          statements, the last of which is the call",
    "runs a model: one draw from the root key, one compiled forward pass, one report",
    "Gives what the model returns. What nobody has registered is registered, and variables that are not there yet are "
    "initialised first. --train and --eval set the model's own switch, whatever its name, and the report says which; "
    "with neither the model runs as written. The call is net(x), not net.apply(variables, x, rngs=…).",
    (
        Option("--train", "run in training mode (dropout on, batch statistics); trains nothing"),
        Option("--eval", "run in evaluation mode (dropout off, running averages)"),
        Option(
            "--samples",
            "K draws at once, outputs stacked: Monte-Carlo dropout; keep nothing that the model writes",
            "K",
            type=int,
            was="--draws",
        ),
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
            "--repeat",
            "run N times with the same keys: median, spread, first outlier, FLOP/s and bytes/s",
            "N",
            type=int,
        ),
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
        "%flax_apply --train net(x);    # `;` keeps the value from being printed",
        "%%flax_apply --train --samples 8\nx2 = x * 2\nys = net(x2)",
    ),
    (
        "Dropout stays off under --train: a layer's switch is fixed in the model, or it has none. The report names the "
        "layer and the edit.",
        "It compiles again and again: each report says what changed, a shape, a dtype or a Python value.",
        "The model looks at a value while it is traced: beneath the error stands the line with --eager.",
        "In a function that JAX traces (jax.grad, jit, vmap, scan) no command draws or runs: call net.apply there, with "
        "variables and keys taken before.",
    ),
)

FLAX_GRAD = Command(
    "%flax_grad",
    "%flax_grad [options] loss(net, batch)  first the model, then the batch\n"
    "%%flax_grad [options]                  statements, the last of which is the call",
    "gives the loss of one batch and its gradients, from one draw",
    "Its report is a table by module of how large they are, which layers get none and why, and the first number that is "
    "not finite. Gives Gradients, with .loss, .metrics, .grads and .updates. Nothing is kept of what the loss writes; "
    "variables that are not there yet are initialised first.\n\n"
    "The loss is a function of yours, plain Flax and JAX, which returns a number, or (number, dict of metrics). In it the "
    "model is called as it is, without variables and rngs, as often as you like; further arguments are passed on as they "
    "are. The model runs in train mode. Where its switch is an argument of the call, the loss has a parameter of that name "
    "and passes it on: def loss(net, batch, train).",
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
        "def loss(net, x):\n  return (net(x) ** 2).mean()\n"
        "%flax_grad loss(net, x);    # `;` keeps the value from being printed",
        "gradients = %flax_grad -q loss(net, x)\ngradients.loss, gradients.metrics, gradients.grads",
        "%flax_grad --freeze */bias loss(net, x);",
    ),
    (
        "A layer has no gradient: beneath the table stands which, and why where that is measured.",
        "The loss leaves the model's switch at its default: the report has the edit that passes it on.",
        "A number is not finite: the report names the module, line and value where that began.",
        "The loss is jitted, or takes gradients itself: leave that out, the command does both.",
    ),
)

FLAX_TRAIN = Command(
    "%flax_train",
    "%flax_train [options] loss(net, data)  first the model, then the data\n"
    "%%flax_train [options]                 statements, the last of which is the call",
    "trains a model with optax, in one draw; interrupted, it goes on with --resume",
    "Step i has the draw's keys with i folded in. Gives the Run, with .losses, .metrics, .eval and .steps. The loss is "
    "that of %flax_grad. Data are a dict or tuple of arrays with one leading axis, which --batch shuffles in each epoch "
    "and cuts, or any iterable of batches. Without --batch each step takes all rows.\n\n"
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
        "run = %flax_train --optimizer optax.adamw(1e-3) --steps 20 loss(net, x)",
        "run = %flax_train --resume --steps 40 loss(net, x)",
        "run = %flax_train -q --batch 2 --epochs 3 --eval x loss(net, x)\nrun.losses, run.eval, run.steps",
    ),
    (
        "It was interrupted, or failed: finished steps are kept, and the report has the line that goes on after them.",
        "A step is not finite: it is not taken and ends the training; the report names its rows, module, line and value.",
        "Data run dry: an iterator can be gone through only once, a list as often as you like.",
        "The loss does not move: %flax_grad loss(net, batch) shows which layers get a gradient.",
    ),
)

FLAX_SUMMARY = Command(
    "%flax_summary",
    "%flax_summary [options] net(x)  any method, any arguments: net.encode(x, mask=m)\n"
    "%flax_summary [options] net     the variables alone, where there are some\n"
    "%%flax_summary [options]        statements, the last of which is the call",
    "shows a call's modules, shapes, parameters, bytes and FLOPs; computes nothing",
    "Gives them as a Summary. Nothing is compiled, drawn or initialised either: shapes are enough, and no rngs are "
    "needed. Equal modules that follow each other are one row, `50 × Block`, with the numbers of one of them.\n\n"
    "FLOPs are those of XLA's cost analysis before it optimises, as nn.tabulate gives them. A loop (nn.scan, "
    "jax.lax.scan) counts as one turn of it.",
    (
        Option("--train", "the call in training mode (dropout on, batch statistics); trains nothing"),
        Option("--eval", "the call in evaluation mode (dropout off, running averages)"),
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
        "%flax_summary net(x);    # `;` keeps the value from being printed",
        "%flax_summary --train --backward --depth 1 net(x);",
        "summary = %flax_summary -q net(x)\nsummary.flops, summary.parameters, summary.totals, summary.modules[0]",
    ),
    (
        "A switch of the model has no value as written: --train or --eval sets it.",
        "Of `net` alone there are no variables yet: write the call, or run %flax_init first.",
    ),
)

FLAX_KEY = Command(
    "%flax_key",
    "%flax_key                     shows the root key\n"
    "%flax_key --seed N [--fresh]  starts it again at draw 1 of seed N\n"
    "%flax_key NAME                draws a key and gives its stream NAME",
    "shows the root key, restarts it, or draws a key from it",
    "The session holds one root key. Every draw splits it: root, params, dropout = jax.random.split(root, 3); the old "
    "root is never used again. A key that this command gives is yours alone.",
    (
        Option("--seed", "start again from this seed", "N", type=int, least=None),
        Option("--fresh", "initialise every model anew at its next use: as first cell, Run All equals a restart"),
        SILENT,
    ),
    ("%flax_key", "latent = %flax_key latent", "%flax_key --seed 0 --fresh"),
    (
        "A seed that was used before gives its keys again, and models keep their variables: both is said, and --fresh "
        "begins everything anew.",
        "One key goes into two runs, and both meet the same numbers: the second says so. Draw another.",
    ),
    takes="stream",
    bare=True,
)

FLAX_VARS = Command(
    "%flax_vars",
    "%flax_vars net          gives the model's variables as they are\n"
    "%flax_vars net = EXPR   gives the model others, of a training loop of yours, say",
    "gives a model's variables, or takes others",
    "Collections by name, as Flax's init gives them; of an NNX module its nnx.State, of which a part may be given, as "
    "nnx.update takes it. Others are checked there and then, and held as they are, not copied. In EXPR the name "
    "flax_magics is known, imported or not.\n\n"
    "Every report says whose weights ran: initialised in draw 1, set in cell [6], loaded from s.safetensors. After an init "
    "or an edit that replaced more than an init's own, flax_magics.session().models['net'].previous has those.",
    (SILENT,),
    (
        "variables = %flax_vars net",
        "%flax_vars net = jax.tree.map(lambda leaf: 0.5 * leaf, variables)",
        "%flax_vars net;    # checks them; `;` keeps the value from being printed",
    ),
    (
        "Tree, shapes or dtypes are not the model's: one message says leaf by leaf what is not, and nothing has changed.",
        "A jitted step has donated the model's arrays: the message has the line that gives it those of your loop.",
    ),
    takes="model",
)

FLAX_SAVE = Command(
    "%flax_save",
    "%flax_save FILE                    writes the session into FILE\n"
    "%flax_save --autosave FILE         and again after whatever changes variables\n"
    "%flax_save --autosave off          ends that",
    "writes the session into one file, once or kept up to date",
    "Models' variables, the root key and its draws, the history, the models' code and the versions: a safetensors file, so "
    "that safetensors.numpy.load_file(FILE) gives the arrays by name. It takes the place of a session, whole or not at all, "
    "and of no other file. %flax_load FILE in a fresh kernel goes on with the draw that would have come.\n\n"
    "With --autosave a thread saves after each run that changed variables. It never holds up the kernel, and one that is "
    "killed leaves the file whole.",
    (
        Option("--autosave", "from now on save there in the background, or off", "FILE", quotes=True, takes="file"),
        SILENT,
    ),
    ("%flax_save session.safetensors", "%flax_save --autosave session.safetensors", "%flax_save --autosave off"),
    (
        "It cannot be written, because there is no folder or no room: the file is replaced whole or not at all.",
        "In a fresh kernel --autosave finds a session in FILE: it says what will replace that, and how to load it first.",
    ),
    takes="file",
)

FLAX_LOAD = Command(
    "%flax_load",
    "%flax_load FILE",
    "goes on from a file that %flax_save wrote; runs no code of it",
    "Restores root key, draws and history, and the variables of each model, for the model that is registered under its "
    "name, now or later. The next draw is the one that would have come. The code in the file is shown.",
    (Option("--quiet", "say nothing but what is other here than where it was saved", short="-q"),),
    ("%flax_load session.safetensors", "%flax_load -q session.safetensors"),
    (
        "Variables are of another tree, shape or dtype than the model's: it is told leaf by leaf, and none is used.",
        "The file is damaged, or none of %flax_save's: one message says what it is, and nothing has changed.",
        "Versions, devices or the model's code are others than where it was saved: that is said, and bits may differ.",
    ),
    takes="file",
)

FLAX_EXPORT = Command(
    "%flax_export",
    "%flax_export [options]         shows the session as a plain Flax script\n%flax_export [options] FILE    writes it",
    "gives the session as a plain Flax script, which needs no flax_magics",
    "The cells that ran, in the order in which they ran, as they are, with plain JAX and Flax in the place of each command: "
    "the split of the root key, init, a jitted apply with its rngs and mutable collections. It prints for each run the "
    "digest that the session had. Magics and shell lines become comments, and so does what uses flax_magics otherwise. Of "
    "a cell that failed, what ran is there, and one line for the rest; those that left nothing are counted at the end. A "
    "file is formatted by ruff or black where one of them is installed.",
    (
        Option("--cell", "put it into the next cell"),
        Option("--plain", "leave the digests out"),
        Option("--force", "replace the file whatever it is", short="-f"),
        Option("--quiet", "say nothing about the file that was written", short="-q"),
    ),
    ("%flax_export", "%flax_export --plain", "%flax_export --force session.py"),
    (
        "Something cannot be exported: that is said in its place in the script, and beneath the report.",
        "The file is not this command's, or was changed since: it stays as it is, and --force replaces it.",
    ),
    takes="file",
    bare=True,
)

FLAX_HISTORY = Command(
    "%flax_history",
    "%flax_history [options] [MODEL]",
    "lists every draw of the session, oldest first",
    "What drew, the streams that were taken with the first word of their keys, input shapes, the output's digest, cell and "
    "time. Runs of one cell that are alike are one row. Marked are draws that were run again or cannot be (no replay), and "
    "draws of cells that were run again or edited since. Below is what was compiled, and why. A command "
    "that failed drew nothing.",
    (
        Option("--last", "the last N runs alone", "N", type=int),
        Option("--all", "all rows, where there are more than 60"),
    ),
    ("%flax_history", "%flax_history --last 5", "%flax_history net"),
    ("A draw's cell was edited or ran again since: what ran then no longer stands there. %flax_replay N runs it.",),
    takes="model",
    bare=True,
)

FLAX_REPLAY = Command(
    "%flax_replay",
    "%flax_replay [options] N     a draw's number, last, seed:N, or the name of a Run",
    "runs a draw again, and says whether every bit is the same",
    "With its keys, its variables and its inputs: identical, or which leaves differ and by how much. What it runs is the "
    "model as it was, also after an edit. Moves nothing: the root key, variables, models and the draws stay as they are. "
    "Gives the Run. A training is repeated with all its steps; --step repeats it up to one step, and shows the gradients "
    "of that.",
    (
        Option("--step", "the gradients in one step of a training, counted from 0", "K", type=int, least=0),
        BIND,
        Option("--quiet", "show nothing; the Run is the value", short="-q"),
    ),
    ("%flax_replay 1", "run = %flax_replay last"),
    (
        "Its inputs or variables are gone: they are kept up to FlaxMagics.replay_bytes, the oldest let go first. The "
        "message has the line that keeps more.",
        "It ran in a session that came from a file: such a run has no inputs here, and is started again from its cell.",
    ),
    takes="draw",
)

FLAX_FREE = Command(
    "%flax_free",
    "%flax_free [--replays]",
    "lets go of what pins device memory and nobody needs; says who holds the rest",
    "That is the frames of the last error (%debug and %tb know it no more), values in Out and _ that hold arrays, models "
    "whose name was deleted, and programs of models that were edited since. Says how many bytes each device holds no "
    "more. What a name of yours reaches stays, and so do models' variables. After a cell that failed for want of device "
    "memory it runs by itself, and keeps all models; %config FlaxMagics.free = False leaves that out.",
    (Option("--replays", "let go of what is held for %flax_replay alone, too"),),
    ("%flax_free", "%flax_free --replays"),
    (
        "Memory is held as before: the report says by whom. `del` a name that you no longer need, and write it again.",
        "After --replays earlier runs cannot be run again: the report counts them.",
    ),
    takes="",
    bare=True,
)

FLAX_DOCTOR = Command(
    "%flax_doctor",
    "%flax_doctor",
    "looks for what is wrong with JAX and Flax here, and has the line that mends it",
    "An accelerator that is not used, versions that do not go together, device memory, settings that cost time or bits, "
    "folders of programs, and among your variables jitted NNX modules, meshes, loaders and keys. Each finding is what it "
    "is, what it costs, and the line that mends it. Changes nothing. What matters at once also stands beneath the first "
    "report of a kernel.",
    examples=("%flax_doctor", "%config FlaxMagics.notes = {'doctor': False}    # not beneath reports"),
    pitfalls=(
        "A setting is read when JAX begins: where the line says so, restart the kernel and write it first.",
        "A check could not be made: it is listed with the reason, and the others stand.",
    ),
    takes="",
    bare=True,
)

FLAX_MESH = Command(
    "%flax_mesh",
    "%flax_mesh                  shows the mesh\n"
    "%flax_mesh data=-1          lays out runs over all devices from now on\n"
    "%flax_mesh data=4,model=2   by axes of so many devices; -1: all that are left\n"
    "%flax_mesh off              goes back to one device",
    "lays out runs over all devices, from now on",
    "%flax_apply and %flax_grad then cut the leading axis of arrays in the call over the axis `data`, and %flax_train that "
    "of each batch. Variables are whole on each device, or cut over the axes that their annotations name: "
    "nn.with_partitioning, or the sharding of an NNX Variable. Dropout masks are those of one device, every bit; sums may "
    "differ in the last ones.\n\n"
    "In a job of several processes (jax.distributed.initialize) the mesh is of the devices of all of them. Each runs the "
    "same cells with the same arrays, and takes its part; parts of your own are made one array by "
    "jax.make_array_from_process_local_data. Where the processes have come apart, a run fails before it begins. Reports "
    "come from process 0.\n\n"
    "The mesh has Auto axes. What you have sharded yourself stands, and so does a mesh of your own (jax.set_mesh): inside "
    "it nothing is laid out. For arrays of your own flax_magics.session().mesh() has .mesh, .batch and .replicated.",
    (SILENT,),
    ("%flax_mesh data=-1", "%flax_mesh", "%flax_mesh off"),
    (
        "The axis `data` does not divide the rows of a call: one message says how many it would. A training's last batch is "
        "whole on each device then, and a note says so.",
        "A process of your job does something else, or does not answer: the run fails in each, with where they stand.",
    ),
    takes="mesh",
    bare=True,
)

COMMANDS = {value.name: value for value in list(globals().values()) if isinstance(value, Command)}


def restart_line(seed: int, *, fresh: bool) -> str:
    """The `%flax_key` line that restarts the root key, for messages and reports."""
    return f"%flax_key --seed {seed}{' --fresh' if fresh else ''}"
