"""`%flax_mesh`: the same session on one device and on several of this host's, in processes that have eight."""

from __future__ import annotations

import jax
import pytest
from by_hand import SUPPORT
from flax import linen as nn
from processes import printed_by
from sessions import session_of

from flax_magics import FlaxMagicsError
from flax_magics.base.measures import collectives_in
from flax_magics.line.options import mesh_axes

HEAD = f"""
    import sys
    sys.path.insert(0, {SUPPORT!r})
    import jax, jax.numpy as jnp, numpy as np, optax
    from by_hand import bits
    from flax import linen as nn, nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from flax_magics import FlaxMagicsError, Session

    class Net(nn.Module):
        norm: bool = True
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dense(16, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))(x)
            if self.norm:
                x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(8)(nn.Dropout(0.5, deterministic=not train)(nn.tanh(x)))

    class Own(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.norm = nnx.Linear(4, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
            self.dropout, self.out = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        def __call__(self, x):
            return self.out(self.dropout(nnx.tanh(self.norm(self.linear(x)))))

    def own():
        return Own(nnx.Rngs(0))

    def session_of(make, devices=1, **axes):
        session = Session()
        session.register("net", make())
        session.mesh(axes or dict(data=devices))
        return session

    def fails(run, *args, **kwargs):
        try:
            run(*args, **kwargs)
        except FlaxMagicsError as error:
            return str(error)
        raise AssertionError("it did not fail")

    def ulp(array, other):
        # Of the largest value: what nearly cancels has many of its own.
        array, other = np.asarray(array), np.asarray(other)
        return np.abs(array - other).max() / np.spacing(np.abs(other).max())

    x = np.asarray(jax.random.normal(jax.random.key(5), (16, 4)))
"""

APPLIES = f"""{HEAD}
    def layouts(tree):
        return {{leaf.sharding.spec for leaf in jax.tree.leaves(tree)}}

    for make in (Net, own):
        one = session_of(make)
        expected = [one.apply("net", x, mode="train").output for _ in range(3)]
        evaluated, many = one.apply("net", x, mode="eval").output, one.apply("net", x, mode="train", samples=2).output
        assert one.runs[0].mesh is None and one.runs[0].device == "cpu:0"
        for devices in (2, 4, 8):
            session = session_of(make, devices)
            runs = [session.apply("net", x, mode="train") for _ in expected]
            for n, (run, output) in enumerate(zip(runs, expected)):
                # The masks to the last bit; sums may be made in another order.
                assert bits(run.output == 0) == bits(output == 0)
                assert ulp(run.output, output) <= 4, ulp(run.output, output)
                assert (run.program, run.mesh.name) == ("reused" if n else "compiled", f"data={{devices}}"), run.reason
                assert run.output.sharding.spec == P("data") and len(run.output.sharding.device_set) == devices
                assert session.replay(run).agreement.identical
            assert ulp(session.apply("net", x, mode="eval").output, evaluated) <= 4
            samples = session.apply("net", x, mode="train", samples=2).output
            assert bits(samples == 0) == bits(many == 0)
            assert session.apply("net", x, eager=True).output.sharding.spec == P("data")

        # Back to one device: the programs of one device, and weights that are bound to none.
        session.mesh("off")
        run = session.apply("net", x, mode="train")
        assert (run.device, run.mesh, session.mesh()) == ("cpu:0", None, None)
        assert run.reason == "now without %flax_mesh data=8", run.reason
        # Another mesh takes what that before it had laid out.
        session.mesh("data=4,model=2")
        run = session.apply("net", x, mode="train")
        assert layouts(session.models["net"].collections()) == ({{P(), P(None, "model")}} if make is Net else {{P()}})
        assert session.apply("net", x, mode="train").program == "reused"
        if make is Net:
            assert [(lies.name, lies.how) for lies in run.mesh.inputs] == [("x", "cut over data")]
            assert sorted(lies.how for lies in run.mesh.variables) == ["cut over model", "whole on each"]
            assert dict((kind, times) for kind, times, _ in run.mesh.collectives)["all-reduce"] >= 2

    session = session_of(lambda: Net(False), 8)
    state = session._state
    assert fails(session.apply, "net", x[:6]).startswith(
        "net(…) cannot be sharded: the leading axis of `x` is 6, and data=8 does not divide it.\\n  8 rows can"
    )
    assert session._state is state
    assert session.apply("net", jax.device_put(x[:6], session.mesh().replicated)).mesh.inputs[0].how == "whole on each"
    other = jax.make_mesh((4,), ("z",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    theirs = jax.device_put(x, NamedSharding(other, P("z")))
    assert fails(session.apply, "net", theirs).startswith(
        "`x` lies on cpu:0-3 as z=4, and the session's mesh is data=8 on cpu:0-7: one program has one mesh."
    )
    # What lies on the session's mesh stands as it is, and in a mesh of the user's own nothing is laid out.
    many = session_of(lambda: Net(False), data=4, model=2)
    mine = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    mine = jax.device_put(x, NamedSharding(mine, P("model")))
    assert many.apply("net", mine).mesh.inputs[0].how == "cut over model"
    assert "%flax_mesh data=4,model=2 makes its mesh" in fails(session.apply, "net", mine)
    plain = session_of(lambda: nn.Dense(8), 8)
    plain.apply("net", x)
    with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))):
        assert plain.apply("net", x).mesh is None
        assert fails(plain.mesh, data=-1).startswith("a mesh of your own is set here, and it stands")
    assert fails(session.mesh, data=3, model=5) == (
        "data=3,model=5 takes 15 devices, and there are 8 devices (cpu:0-7).\\n  write: %flax_mesh data=-1,model=1"
    )
    narrow = Session()
    narrow.register("net", nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones_init(), (None, "model"))))
    narrow.apply("net", x)
    state = narrow._state
    assert fails(narrow.mesh, data=4, model=2).startswith("`kernel` is [4, 3] and annotated (None, 'model')")
    assert narrow._state is state
    # Annotations of an NNX Variable, and logical ones of linen by Flax's own rules.
    class Annotated(nnx.Module):
        def __init__(self, rngs):
            make = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.linear = nnx.Linear(4, 8, kernel_init=make, rngs=rngs)
        def __call__(self, x):
            return self.linear(x)

    if hasattr(nnx, "use_eager_sharding"):  # else it asks for a mesh while it is built
        nnx.use_eager_sharding(False)
    net = Annotated(nnx.Rngs(0))
    annotated = session_of(lambda: net, data=4, model=2)
    assert annotated.apply("net", x).mesh.variables[1].how == "cut over model"
    assert net.linear.kernel[...].sharding.spec == P(None, "model")
    annotated.mesh("off")
    assert len(net.linear.kernel[...].sharding.device_set) == 1
    make = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("in", "mlp"))
    with nn.logical_axis_rules((("mlp", "model"), ("in", None))):
        logical = session_of(lambda: nn.Dense(8, kernel_init=make), data=4, model=2)
        assert logical.apply("net", x).mesh.variables[1].how == "cut over model"
    # A batch, keys and what is no batch; a loss shards its batch alone.
    def loss(net, batch, weights):
        return (net(batch) ** 2).mean() * weights.sum()
    gradients = session.grad(loss, "net", x, jnp.ones(3))
    lies = [(one.name, one.how) for one in gradients.mesh.inputs]
    assert lies == [("batch", "cut over data"), ("weights", "whole on each")]
    assert session.replay(gradients).agreement.identical
    # A line that ran before moves its input once.
    kept = jnp.asarray(x)
    for _ in range(3):
        session.apply("net", kept)
    assert [one() is kept for one, _ in session.mesh()._recent.values()].count(True) == 1
    print("done")
"""

TRAININGS = f"""{HEAD}
    def loss(net, batch, train=True):
        return ((net(batch["x"], train=train) - batch["y"]) ** 2).mean()

    def own_loss(net, batch):
        return ((net(batch["x"]) - batch["y"]) ** 2).mean()

    key = jax.random.key(6)
    data = {{"x": np.asarray(jax.random.normal(key, (60, 4))), "y": np.asarray(jax.random.normal(key, (60, 8)))}}
    last = "the last batch of each epoch has 12 rows, which data=8 does not divide: it is whole on each device"

    def weights(session):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(session.models["net"].collections())]

    for make, of, optimizer, close in (
        (lambda: Net(False), loss, optax.sgd(0.05), 1e-5),
        (lambda: Net(False), loss, optax.adam(1e-2), 1e-2),
        (own, own_loss, optax.sgd(0.05), 1e-5),
    ):
        expected = None
        for devices in (1, 2, 4, 8):
            session = session_of(make, devices)
            run = session.train(of, "net", data, optimizer=optimizer, batch=16, steps=100, eval=data)
            assert ([note.text for note in run.notes] == [last]) is (devices == 8), run.notes
            if expected is None:
                expected = run.losses, weights(session), run.eval[-1].loss
                continue
            np.testing.assert_allclose(run.losses, expected[0], rtol=1e-5)
            apart = sum(((a - b) ** 2).sum() for a, b in zip(weights(session), expected[1]))
            assert apart**0.5 <= close * sum((b**2).sum() for b in expected[1]) ** 0.5
            np.testing.assert_allclose(run.eval[-1].loss, expected[2], rtol=1e-3)
        assert run.device == "cpu:0-7" and run.mesh.collectives
        assert session.replay(run).agreement.identical
        assert session.replay(run, step=3).agreement.identical

    # The last of them goes on: with its mesh as if it had never stopped, on other devices it says so.
    run = session.train(own_loss, "net", data, resume=True, steps=110)
    whole = session_of(own, 8).train(own_loss, "net", data, optimizer=optax.sgd(0.05), batch=16, steps=110)
    assert bits(run.losses) == bits(whole.losses)
    session.mesh("off")
    run = session.train(own_loss, "net", data, resume=True, steps=120)
    assert [note.text for note in run.notes if note.kind == "resume"] == [
        "after 110 steps it runs on one device, and before on the mesh data=8"
    ]
    session.mesh(data=8)
    for batch, advice in ((12, "--batch 8 "), (None, "--batch 56 ")):
        assert advice in fails(session.train, own_loss, "net", data, optimizer=optax.sgd(0.1), batch=batch, steps=3)
    lists = [{{"x": data["x"][:n], "y": data["y"][:n]}} for n in (16, 12)]
    assert session.train(own_loss, "net", lists, optimizer=optax.sgd(0.1), epochs=2).steps == 4

    # Saved on eight devices, loaded without a mesh and with one: the draws that would have come.
    import tempfile
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        session.save(file.name)
        expected = session.apply("net", x, mode="train").output
        for devices in (1, 4, 8):
            loaded = Session()
            loaded.register("net", own())
            if devices > 1:
                loaded.mesh(data=devices)
            notes = [note.text for note in loaded.load(file.name).notes]
            here = "without a mesh" if devices == 1 else f"on the mesh data={{devices}}"
            claim = "keys and dropout masks are the same in every bit, sums may differ in the last ones"
            assert notes == ([] if devices == 8 else [f"saved on the mesh data=8, and here runs are {{here}}: {{claim}}"])
            assert loaded.runs[-1].mesh.name == "data=8" and loaded.runs[-1].mesh.collectives is None
            run = loaded.apply("net", x, mode="train")
            assert bits(run.output == 0) == bits(expected == 0)
            assert ulp(run.output, expected) <= 4
            assert loaded.replay(run).agreement.identical
    print("done")
"""


CELLS = [
    "%load_ext flax_magics",
    "import jax, jax.numpy as jnp, optax\nfrom flax import linen as nn, nnx",
    # Else Flax asks for a mesh while an annotated module is built.
    "if hasattr(nnx, 'use_eager_sharding'):\n  nnx.use_eager_sharding(False)",
    "x = jax.random.normal(jax.random.key(3), (16, 4))",
    """%%flaxmodel net = Net()
class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    make = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'model'))
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8, kernel_init=make)(x))
    return nn.Dropout(0.5, deterministic=not train)(x)""",
    """%%flaxmodel own = Own()
class Own(nnx.Module):
  def __init__(self, *, rngs):
    self.linear, self.norm = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
  def __call__(self, x):
    return self.dropout(self.norm(self.linear(x)))""",
    """%%flaxmodel cut = Cut()
class Cut(nnx.Module):
  def __init__(self, *, rngs):
    make = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, 'model'))
    self.linear = nnx.Linear(4, 8, kernel_init=make, rngs=rngs)
  def __call__(self, x):
    return self.linear(x)""",
    "def loss(net, x, weights, train=True):\n  return (net(x, train=train) ** 2).mean() * weights.sum()",
    "def own_loss(net, x):\n  return (net(x) ** 2).mean()",
    "y = %flax_apply net(x)",
    "%flax_mesh data=-1",
    "y = %flax_apply --train net(x)\nz = %flax_apply --train own(x)",
    "y = %flax_apply --eager --train net(x)\nz = %flax_apply --eager --train own(x)",
    "rows = x[:14]\n%flax_train -q --optimizer optax.adam(1e-2) --batch 8 --epochs 2 --eval x own_loss(own, rows)",
    "%flax_mesh off\n%flax_mesh data=-1\n%flax_train -q --resume --epochs 3 own_loss(own, rows)",
    "%flax_mesh data=2,model=2",
    "for _ in range(2):\n  y = %flax_apply --train net(x)",
    "gradients = %flax_grad loss(net, x, jnp.ones(3))",
    "%flax_train -q --optimizer optax.adam(1e-2) --steps 2 loss(net, x, jnp.ones(3))",
    "y = %flax_apply --eager net(x)\nz = %flax_apply cut(x)",
    "%flax_train -q --optimizer optax.adam(1e-2) --steps 2 own_loss(cut, x)",
    "%flax_apply own(x);",
    "%flax_mesh off",
    "%flax_apply --train net(x);\n%flax_apply own(x);",
]
EXPORT = f"""
    import contextlib, io
    from IPython.core.interactiveshell import InteractiveShell
    import flax_magics

    for cell in {CELLS!r}:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            result = InteractiveShell.instance().run_cell(cell, store_history=True)
        assert result.success, printed.getvalue()
    script = flax_magics.session().run_export(plain=False)
    assert script.unexported == (), script.unexported
    assert "jax.device_put(variables, nn.get_sharding(variables, mesh" in script.text
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(script.text, "script.py", "exec"), {{"__name__": "__main__"}})
    lines = [line for line in printed.getvalue().splitlines() if not line.startswith("namespace(")]
    runs = flax_magics.session().runs
    assert len(lines) == len(runs) == 18
    # Of the two constructions nobody holds what they gave.
    assert all(run.digest == line.split()[-1] for line, run in zip(lines[2:], runs[2:])), lines

    def shown(cell):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            InteractiveShell.instance().run_cell(cell).raise_error()
        return printed.getvalue()

    shown("%flax_train -q --resume --epochs 4 own_loss(own, rows)")
    first, *later = flax_magics.session().run_export(plain=False).unexported
    assert first.endswith("a training that goes on on other devices than it was begun on has no lines yet"), first
    assert all(reason.endswith("its variables come from a line that is left out") for reason in later), later
    # What is shown of a mesh: by itself, in the details of a report, in the line of one that says nothing new, in %flax.
    drawing = "          model 0  model 1\\n  data 0  cpu:0    cpu:1\\n  data 1  cpu:2    cpu:3\\n"
    line = "mesh · data=2,model=2 · cpu:0-3 · the leading axis of arrays is cut into 2 parts\\n"
    assert shown("%flax_mesh data=2,model=2") == line + drawing
    details = shown("%config FlaxMagics.report = 'details'\\ny = %flax_apply --train net(x)")
    indented = "".join("  " + row + "\\n" for row in drawing.splitlines())
    assert "\\n  mesh data=2,model=2\\n" + indented in details, details
    assert "\\n  inputs  x cut over data, 128 B a device\\n" in details, details
    assert "\\n  vars    whole on each, 160 B a device    cut over model, 64 B a device\\n" in details, details
    assert "\\n  out     cut over data and model, 128 B a device\\n  sent    " in details, details
    assert " × all-reduce, " in details, details
    again = shown("%config FlaxMagics.report = 'auto'\\ny = %flax_apply --train net(x)").splitlines()
    assert again[0].startswith("net · train · cpu:0-3 · draw 20 · data=2,model=2 · reused · run "), again
    status = shown("%flax")
    assert "\\nmesh\\n  data=2,model=2   cpu:0-3\\n  net              whole on each, 160 B a device\\n" in status, status
    print("done")
"""


HELD = """
    import contextlib, io, jax
    from IPython.core.interactiveshell import InteractiveShell

    def shown(cell, fails=False):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            result = InteractiveShell.instance().run_cell(cell, store_history=True)
        assert result.success is not fails, printed.getvalue()
        return printed.getvalue()

    shown(
        "%load_ext flax_magics\\n%colors NoColor\\n"
        "import jax, jax.numpy as jnp, numpy as np\\nfrom flax import linen as nn\\n"
        "net, x = nn.Dense(8, use_bias=False), jnp.ones((16_000, 64))\\n"
        "def loss(net, batch, weights):\\n  return (net(batch['x']) ** 2).mean() * weights.sum()"
    )
    # Of a loss the advice takes the argument that is meant, and not that before it.
    shown("%flax_mesh -q data=-1")
    text = shown("%flax_grad loss(net, {'x': x[:6]}, jnp.ones(3))", fails=True)
    write = "  write: import flax_magics, jax\\n         %flax_grad "
    argument = "jax.device_put({'x': x[:6]}, flax_magics.session().mesh().replicated)"
    assert f"{write}loss(net, {argument}, jnp.ones(3))\\n" in text, text
    # What the session has copied to the mesh goes; parts of an array, and what NumPy was shown, are no further ones.
    shown("y = %flax_apply -q net(x)")
    shown("print(y[:1], np.asarray(y).sum(), [shard.data.sum() for shard in y.addressable_shards])")
    text = shown("%flax_free --replays")
    assert text == (
        "free · cpu:0-7 512 KB each freed · held: cpu:0 4.2 MB, cpu:1-7 66.0 KB each\\n"
        "  let go  the last error, with its frames    1 array copied to the mesh\\n"
        "  held    4.1 MB   x\\n"
        "          512 KB   y\\n"
        "          16.4 KB  the model net\\n"
        "! 1 run can be replayed no more: what they needed was let go of\\n"
    ), text
    assert "\\n  arrays alive in this process   4.6 MB\\n" in shown("%flax")
    shown("del x, y\\n%flax_free")
    alive = [(array.shape, len(array.sharding.device_set)) for array in jax.live_arrays()]
    assert [one for one in alive if one[1] == 8] == [((64, 8), 8)], alive
    # Inside a mesh of one's own it is not this one that lays out runs.
    own = "a mesh of your own is set here, and it stands"
    shown("y = %flax_apply -q net(jnp.ones((8, 64)))")
    auto = "axis_types=(jax.sharding.AxisType.Auto,)"
    shown(f"jax.set_mesh(jax.make_mesh((4,), ('z',), {auto}, devices=jax.devices()[:4]));")
    text = shown("%flax_apply -q net(jnp.ones((8, 64)))", fails=True)
    assert text.startswith("FlaxMagicsError: net(jnp.ones((8, 64))) cannot run in the mesh that is set here: "), text
    assert shown("%flax_mesh").startswith(f"mesh · data=8 · cpu:0-7 ·\\n    not used now: {own}\\n")
    assert shown("%flax_mesh off") == f"mesh · none: {own}\\n"
    assert shown("y = %flax_apply -q net(jnp.ones((8, 64)))\\nprint(y.sharding.mesh.axis_names)") == "('z',)\\n"
    print("done")
"""


def test_bytes_on_several_devices_count_once_and_advice_names_the_batch():
    assert printed_by(HELD, "-W", "ignore", devices=8).endswith("done\n")


@pytest.mark.usefixtures("optimised")
def test_an_export_puts_arrays_on_the_mesh_and_gives_the_same_bits_and_what_is_shown_of_it():
    assert printed_by(EXPORT, "-W", "ignore", devices=8).endswith("done\n")


@pytest.mark.usefixtures("optimised")
def test_applies_and_gradients_on_one_to_eight_devices():
    assert printed_by(APPLIES, devices=8) == "done\n"


@pytest.mark.usefixtures("optimised")
def test_trainings_and_files_on_one_to_eight_devices():
    assert printed_by(TRAININGS, devices=8) == "done\n"


def test_a_mesh_of_one_device_is_the_session_without_one():
    session, x = session_of(nn.Dense(3)), jax.numpy.ones((5, 2))
    without = session.apply("net", x)
    assert session.mesh("data=-1").axes == f"data={jax.device_count()}"
    run = session.apply("net", x)
    assert (run.program, run.mesh, run.device) == ("reused", None, without.device)
    assert session.mesh(data=1) is session.mesh()


def test_a_restart_and_a_load_keep_the_mesh(tmp_path):
    session = session_of(nn.Dense(3))
    placement = session.mesh(data=1)
    session.restart(7, fresh=True)
    assert session.mesh() is placement
    session.save(tmp_path / "s.safetensors")
    assert session.load(tmp_path / "s.safetensors").notes == ()
    assert session.mesh() is placement
    session.mesh("off")
    (note,) = session.load(tmp_path / "s.safetensors").notes
    assert note.text.startswith("saved on the mesh data=1, and here runs are without a mesh: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data", "`data` is no axis"),
        ("data=-1 model=x", "`model=x` is no axis"),
        ("data=2,data=4", "the axis `data` has two sizes"),
        ("data=-1,model=-1", "data=-1,model=-1: only one axis can be -1"),
        ("data=0", "data=0: an axis has a number of devices"),
        ("", "a mesh has at least one axis"),
        (jax.make_mesh((1,), ("data",)), "a session makes its mesh itself, by axes and sizes"),
    ],
)
def test_axes_that_are_none(text, said):
    with pytest.raises(FlaxMagicsError) as error:
        session_of(nn.Dense(3)).mesh(text)
    assert str(error.value).startswith(said)


def test_axes_are_read_with_commas_or_blanks():
    assert mesh_axes("data=4,model=2") == mesh_axes("data=4 model=2") == {"data": 4, "model": 2}


def test_collectives_are_counted_with_the_bytes_of_their_results():
    text = """
      %all-reduce = f32[4,8]{1,0} all-reduce(%fusion.1), channel_id=1, to_apply=%add.clone
      %all-reduce.3 = (f32[], bf16[16,4]{1,0}) all-reduce-start(%reduce, %dot.3), channel_id=2
      %done = (f32[], bf16[16,4]{1,0}) all-reduce-done(%all-reduce.3)
      %wrapped_reduce = f32[] fusion(%all-reduce, %constant), kind=kLoop
      ROOT %gather = pred[8]{0} all-gather(%p), dimensions={0}
    """
    assert collectives_in(text) == (("all-gather", 1, 8), ("all-reduce", 2, 128 + 4 + 128))


def test_the_command_shows_sets_and_leaves_a_mesh(notebook):
    assert notebook("%flax_mesh") == "mesh · none: runs are on one device"
    assert notebook("%flax_mesh data=1") == "mesh · data=1 · cpu:0 · one device, as without it"
    assert notebook("%flax_mesh -q off") == ""
    assert notebook.session.mesh() is None
    said = notebook.fails("jax.jit(lambda x: get_ipython().run_line_magic('flax_mesh', 'off') or x)(x)")
    assert said.startswith("FlaxMagicsError: %flax_mesh off stands in a function that JAX traces")
