"""Gradients by module: how large they are beside the weights, and how much of them is zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ..base.digest import is_spread
from ..base.measures import LayerGradient
from ..base.types import Leaf, PyTree
from ..models.base import Variables
from ..models.calls import Path
from .loss import Gradients, Loss


def parameter_paths(loss: Loss, variables: Variables) -> Iterator[Path]:
    """The path of each parameter, its own name last."""
    return (path for path, _ in _parameters(loss, variables))


def frozen_modules(loss: Loss, variables: Variables) -> set[Path]:
    """The modules of which some parameters are frozen."""
    trained = {path for path, _ in loss.rows(loss.as_users(loss.parameters(variables)))}
    return {path[:-1] for path in parameter_paths(loss, variables) if path not in trained}


def _parameters(loss: Loss, variables: Variables) -> Iterator[tuple[Path, Leaf]]:
    kinds = loss.trainable()
    trainable = {name: tree for name, tree in variables.items() if name in kinds}
    for name, path, leaf, _ in loss.iter_variables(trainable):
        if name in kinds:
            yield path, leaf


def _gradients(gradients: Gradients, loss: Loss) -> dict[Path, list[Leaf]]:
    """The gradient of each parameter that has one, by path; several arrays for a box that holds several."""
    by_path: dict[Path, list[Leaf]] = {}
    for path, leaf in loss.rows(gradients.grads):
        by_path.setdefault(path, []).extend(jax.tree_util.tree_leaves(leaf))
    return by_path


def of(gradients: Gradients, loss: Loss, variables: Variables) -> tuple[LayerGradient, ...]:
    """One row for each module that holds parameters, in the order of the variables."""
    classes, measured = loss.module_classes(), _gradients(gradients, loss)
    rows: dict[Path, list[LayerGradient]] = {}
    for path, weight in _parameters(loss, variables):
        owner, parts = path[:-1], measured.get(path)
        gradient = parts.pop(0) if parts else None
        rows.setdefault(owner, []).append(_measured(weight, gradient))
    return tuple(LayerGradient.of_all(parts, path, classes.get(path, "")) for path, parts in rows.items())


def _measured(weight: Leaf, gradient: PyTree) -> LayerGradient:
    """The row of one parameter alone."""
    size = int(np.size(weight))
    if gradient is None:
        return LayerGradient((), "", size, frozen=size)
    if is_spread(gradient) or is_spread(weight):
        return LayerGradient((), "", size)
    values = _wide(gradient)
    return LayerGradient(
        (),
        "",
        size,
        0,
        float(np.vdot(values, values).real),
        float(np.vdot(_wide(weight), _wide(weight)).real),
        int(values.size - np.count_nonzero(values)),
        int(values.size - np.count_nonzero(np.isfinite(values))),
    )


def _wide(array: Leaf) -> np.ndarray[Any, Any]:
    """The array in double precision on the host: squares of float32 would overflow from 1e19 on."""
    values = np.asarray(array)
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64).ravel()
