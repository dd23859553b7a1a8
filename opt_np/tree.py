"""Parameter trees: nested dicts and lists of arrays, and their flat form with dotted names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Tree = Any  # a dict or list of Trees, or a leaf (an array)


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Nested to flat: {"layers.0.self_attn.q_proj.weight": array, …}, in the tree's order."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, child in items:
        flat |= flatten(child, f"{prefix}.{key}" if prefix else str(key))
    return flat


def unflatten(flat: dict[str, Any]) -> Tree:
    """Flat to nested; a level whose keys are all integers becomes a list. Inverse of `flatten`."""
    root: dict[str, Any] = {}
    for name, leaf in flat.items():
        node = root
        *path, last = name.split(".")
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return _lists(root)


def _lists(node: Tree) -> Tree:
    if not isinstance(node, dict):
        return node
    children = {key: _lists(child) for key, child in node.items()}
    if children and all(key.isdigit() for key in children):
        return [children[str(i)] for i in range(len(children))]
    return children


def map_leaves(fn: Callable[[Any], Any], tree: Tree) -> Tree:
    """The same tree with fn(leaf) in place of each leaf."""
    if isinstance(tree, dict):
        return {key: map_leaves(fn, child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [map_leaves(fn, child) for child in tree]
    return fn(tree)
