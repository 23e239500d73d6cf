"""Nodes of a tree of classes that a file names and that only the user's own code can make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from flax.core import FrozenDict, freeze


@dataclass(frozen=True)
class Foreign:
    """A node of a class that is not ours to make: its name, and its children in JAX's order."""

    cls: str
    children: tuple[Any, ...]


def class_name(cls: type) -> str:
    """The name by which a class is told from others: `my_module.State`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def names_of(tree: Any) -> list[Any] | None:
    """The names of a box that has nothing else but its value, None for everything else."""
    if type(tree) not in (nn.Partitioned, nn.LogicallyPartitioned):
        return None
    if tree.mesh is not None or getattr(tree, "rules", None) is not None or type(tree.names) is not tuple:
        return None
    names: list[Any] = []
    for name in tree.names:
        if name is None or type(name) is str:
            names.append(name)
        elif type(name) is tuple and all(type(part) is str for part in name):
            names.append(list(name))
        else:
            return None
    return names


def children_of(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The children of a node by name, and how it is put together of them; None in the place of that for a leaf."""
    children, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)
    if len(children) == 1 and children[0][1] is tree:
        return [], None
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), child) for path, child in children], treedef


def foreign_in(tree: Any, path: str = "") -> tuple[str, str] | None:
    """Where in a tree the first Foreign is, and its class; None where there is none."""
    for place, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Foreign):
            return path + jax.tree_util.keystr(place, simple=True, separator="/"), leaf.cls
    return None


class Differs(Exception):
    """A tree has another node in the place of a Foreign: the text says where."""


def graft(tree: Any, like: Any, path: str = "") -> Any:
    """`tree` with every Foreign put together as the node of `like` that is in its place.

    Raises:
      Differs: there is no such node there, or one of another class or with other children.
    """
    if isinstance(tree, Foreign):
        children, treedef = children_of(like)
        if treedef is None or class_name(type(like)) != tree.cls or len(children) != len(tree.children):
            raise Differs(f"{path.removeprefix('/')} is a {tree.cls} in the file")
        pairs = zip(tree.children, children, strict=True)
        return treedef.unflatten([graft(child, inner, f"{path}/{name}") for child, (name, inner) in pairs])
    if type(tree) is dict:
        return {key: graft(value, _get(like, key), f"{path}/{key}") for key, value in tree.items()}
    if type(tree) is FrozenDict:
        frozen: Any = tree
        return freeze({key: graft(value, _get(like, key), f"{path}/{key}") for key, value in frozen.items()})
    if type(tree) in (list, tuple):
        return type(tree)(graft(value, _get(like, i), f"{path}/{i}") for i, value in enumerate(tree))
    if names_of(tree) is not None:
        box: Any = tree
        return box.replace(value=graft(box.value, getattr(like, "value", None), path))
    return tree


def _get(like: Any, key: Any) -> Any:
    """The child of the other tree, None where there is none."""
    try:
        return like[key]
    except (TypeError, KeyError, IndexError, AttributeError):
        return None
