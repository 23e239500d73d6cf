"""Outputs of a traced program that are its inputs, handed through unchanged.

A transform that works on a copy of a module (`nnx.remat`, `nnx.jit`, `nnx.scan`) gives back every variable of it, those
that it only read too. In the program these are outputs of an equation; looking into the equation tells that they are what
went in.
"""

from __future__ import annotations

from typing import Any

CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}
)
"""Equations that run the one program they hold, on their own inputs, once."""


def forwarded(jaxpr: Any, *, repeated: bool = False) -> tuple[int | None, ...]:
    """For each output of a jaxpr the number of the input that it is, None for one that was worked out.

    Args:
      repeated: an input repeated along a new first axis counts, as what is the same in every row of a `vmap`.
    """
    inputs = {var: i for i, var in enumerate(jaxpr.invars)}
    makers = {var: (equation, i) for equation in jaxpr.eqns for i, var in enumerate(equation.outvars)}
    known: dict[int, tuple[int | None, ...]] = {}

    def origin(var: Any) -> int | None:
        while True:
            if hasattr(var, "val"):  # a literal
                return None
            if var in inputs:
                return inputs[var]
            if var not in makers:
                return None
            equation, i = makers[var]
            if id(equation) not in known:
                known[id(equation)] = _through(equation, repeated)
            through = known[id(equation)][i]
            if through is None:
                return None
            var = equation.invars[through]

    return tuple(map(origin, jaxpr.outvars))


def _through(equation: Any, repeated: bool) -> tuple[int | None, ...]:
    """The same for one equation."""
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        inner = _open(params.get("jaxpr", params.get("call_jaxpr")))
        if inner is not None and len(inner.invars) == len(equation.invars):
            return forwarded(inner, repeated=repeated)
    elif name == "scan":
        return _scan(equation)
    elif name == "while":
        before = params["cond_nconsts"]
        consts = params["body_nconsts"]
        body = forwarded(_open(params["body_jaxpr"]))
        return tuple(before + consts + i if through == consts + i else None for i, through in enumerate(body))
    elif name == "cond":
        branches = zip(*(forwarded(_open(branch)) for branch in params["branches"]), strict=True)
        return tuple(
            1 + ways[0] if ways[0] is not None and len(set(ways)) == 1 else None for ways in map(tuple, branches)
        )
    elif name == "optimization_barrier":
        return tuple(range(len(equation.invars)))
    elif name == "broadcast_in_dim" and repeated:
        shape = equation.invars[0].aval.shape
        along = tuple(params["broadcast_dimensions"]) == tuple(range(1, len(shape) + 1))
        if along and tuple(params["shape"][1:]) == tuple(shape):
            return (0,)
    return (None,) * len(equation.outvars)


def _scan(equation: Any) -> tuple[int | None, ...]:
    """A carry that every step hands on, and rows that every step gives back."""
    params = equation.params
    if "num_consts" in params:
        consts, carries = params["num_consts"], params["num_carry"]
    else:  # newer versions of JAX keep the three groups as trees
        consts, carries, _ = (len(list(group)) for group in params["ft_in"].unpack())
    steps = forwarded(_open(params["jaxpr"]))
    if len(steps) != len(equation.outvars):
        return (None,) * len(equation.outvars)
    out: list[int | None] = []
    for i, through in enumerate(steps):
        same = through == consts + i if i < carries else through is not None and through >= consts + carries
        out.append(through if same else None)
    return tuple(out)


def _open(jaxpr: Any) -> Any:
    """A jaxpr without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)
