"""Cuts a captured graph into its blocks and what runs between them, for the canonical text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import fx

from teacache_fx.graph import fake_value, op_name
from teacache_fx.module_paths import BlockOwner, block_of, module_path, numbered_block_of

_MIN_NODES = 5  # of a block; the layers of a small `nn.Sequential` are told better where they stand

Prefix = tuple[str, str, int]  # path of a block, path of its list, index in that


@dataclass(eq=False)
class Segment:
    """A stretch of the graph in one block, or between two blocks.

    Attributes:
        path: of the block's list; outside the blocks that of the block before, empty at the graph's beginning.
        index: of that block in its list.
        block: module path of the block, empty outside the blocks.
        class_name: of the block, empty outside the blocks.
        run: 1, and more where the block has run before.
        nodes: those that compute something, in graph order.
    """

    path: str
    index: int
    block: str = ""
    class_name: str = ""
    run: int = 1
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Path of the block, `transformer_blocks.0`, or `transformer_blocks.0 (run 2)`."""
        return self.block if self.run == 1 else f"{self.block} (run {self.run})"


def segments_of(graph: fx.Graph, dead: set[str]) -> list[Segment]:
    """The graph's nodes without those named in `dead`, in order of execution.

    Not listed are projections of tuples and plain slices, which are written where they are used, and arithmetic on
    sizes. A block is an element of a list of modules, or one of several numbered attributes, and is not small; a block
    that runs twice makes two segments.
    """
    nodes = [node for node in graph.nodes if node.name not in dead and _computes(node)]
    blocks = _blocks(nodes)
    segments = [Segment("", 0)]
    for node in nodes:
        last, owner = segments[-1], blocks.get(node)
        if owner is None and last.block:
            segments.append(Segment(last.path, last.index))
        elif owner is not None and owner[0] != last.block:
            runs = sum(segment.block == owner[0] for segment in segments)
            segments.append(_block_segment(node, owner, runs + 1))
        segments[-1].nodes.append(node)
    return [segment for segment in segments if segment.nodes]


def local_name(node: fx.Node, block: str) -> str:
    """Module path within the block and operation: `norm1.chunk`; `norm1.linear` for the operation of that layer."""
    steps = [*module_path(node).removeprefix(block).strip(".").split("."), op_name(node) or str(node.target)]
    if len(steps) > 1 and steps[-1] == steps[-2]:
        steps.pop()
    return ".".join(filter(None, steps))


def is_inlined(node: fx.Node) -> bool:
    """Whether the node picks from a tuple, or slices a tensor by constants."""
    return op_name(node) in ("getitem", "__getitem__") and node.op == "call_function" and _is_plain(node.args[1])


def is_size(node: fx.Node) -> bool:
    """Whether the node yields a number, such as a size, and no tensor."""
    value = fake_value(node)
    leaves = torch.utils._pytree.tree_leaves(value)
    numbers = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    return bool(leaves) and all(isinstance(leaf, numbers) for leaf in leaves)


def _is_plain(index: object) -> bool:
    if isinstance(index, tuple):
        return all(map(_is_plain, index))
    if isinstance(index, slice):
        return all(map(_is_bound, (index.start, index.stop, index.step)))
    return index is None or index is Ellipsis or _is_bound(index)


def _is_bound(bound: object) -> bool:
    return bound is None or isinstance(bound, int) or (isinstance(bound, fx.Node) and is_size(bound))


def _computes(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "get_attr", "output") and not is_inlined(node) and not is_size(node)


def _blocks(nodes: list[fx.Node]) -> dict[fx.Node, Prefix]:
    """The block of each node that is in one."""
    owners = {node: owner for node in nodes if (owner := _prefix(node)) is not None}
    sizes = Counter(owners.values())
    elements = Counter(path for (_, path, _), size in sizes.items() if size >= _MIN_NODES)
    return {node: owner for node, owner in owners.items() if elements[owner[1]] > 1}


def _prefix(node: fx.Node) -> Prefix | None:
    owner: BlockOwner | None = block_of(node)
    if owner is not None:
        return f"{owner.path}.{owner.index}", owner.path, owner.index
    owner = numbered_block_of(node)
    if owner is None:
        return None
    joined = f"{owner.path}{owner.index}"
    is_joined = f"{module_path(node)}.".startswith(f"{joined}.")
    return joined if is_joined else f"{owner.path}_{owner.index}", owner.path, owner.index


def _block_segment(node: fx.Node, owner: Prefix, run: int) -> Segment:
    found = block_of(node) or numbered_block_of(node)
    return Segment(owner[1], owner[2], owner[0], found.class_name if found is not None else "", run)
