"""Which module a node was captured in, and which element of a list of modules that is."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import fx

_ATTRIBUTE_STEP = re.compile(r"\.__dict__\['_modules'\]\['(\w+)'\]|\._modules\['(\w+)'\]|\['(\w+)'\]|\[(\d+)\]")
_FIRST_STEP = re.compile(r"\.__dict__\['_modules'\]|\._modules\[")
_ELEMENT = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_NUMBERED = re.compile(r"(?:^|\.)([A-Za-z_]\w*?)_?(\d+)(?:\.|$)")


class BlockOwner(NamedTuple):
    """An element of a list of modules: path of the list, index in it, class name of the element."""

    path: str
    index: int  # type: ignore[assignment]  # hides a method of tuples that nobody asks for
    class_name: str


def module_path(node: fx.Node) -> str:
    """Dotted path of the module that the node was captured in, from the root; empty at the root."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(list(stack.values())[-1][0]) if stack else ""


def module_class(node: fx.Node, path: str) -> str:
    """Class name of the module at the path, in which the node was captured; empty if it was not captured there."""
    for raw, owner in (node.meta.get("nn_module_stack") or {}).values():
        if path and clean_path(raw) == path:
            return owner.__name__ if isinstance(owner, type) else str(owner).rsplit(".", 1)[-1]
    return ""


def block_of(node: fx.Node) -> BlockOwner | None:
    """The outermost list element that the node belongs to: `blocks`, 3 for a node in `blocks.3.norm1`."""
    path = module_path(node)
    match = _ELEMENT.search(path)
    if match is None or match.start() == 0:
        return None
    return BlockOwner(path[: match.start()], int(match.group(1)), module_class(node, path[: match.end(1)]))


def numbered_block_of(node: fx.Node) -> BlockOwner | None:
    """The outermost numbered attribute that the node belongs to: `layer`, 3 for a node in `layer_3.norm`."""
    path = module_path(node)
    match = _NUMBERED.search(path)
    if match is None:
        return None
    return BlockOwner(path[: match.end(1)], int(match.group(2)), module_class(node, path[: match.end(2)]))


def clean_path(raw: str) -> str:
    """Turns dynamo's `L['self'].__dict__['_modules']['blocks'].0.norm` into `blocks.0.norm`.

    Beneath other wrappers of a forward the model is `L['module']`, or `L['fn'].args[0]`.
    """
    first = _FIRST_STEP.search(raw)
    path = raw[first.start() :] if first else re.sub(r"^L\['(?:self|module)'\]|^self", "", raw)
    path = _ATTRIBUTE_STEP.sub(lambda step: "." + next(part for part in step.groups() if part), path)
    return path.strip(".")
