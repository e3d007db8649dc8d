"""Which nodes belong to which element of which list of blocks, told by the modules that they were captured in."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import fx

from teacache_fx.dataflow import Dataflow
from teacache_fx.flops import captured_flops, is_matmul
from teacache_fx.graph import fake_tensors, op_name, printed_shape
from teacache_fx.module_paths import BlockOwner, block_of
from teacache_fx.plan import BlockList

Owners = Callable[[fx.Node], BlockOwner | None]


@dataclass(frozen=True)
class Blocks:
    """One list of blocks.

    Attributes:
        path: of the list, or of the one module that is called again and again; empty where no module tells.
        elements: the nodes of each block in graph order, in order of execution.
        classes: class name of each block; empty strings where no module tells.
    """

    path: str
    elements: tuple[tuple[fx.Node, ...], ...]
    classes: tuple[str, ...]

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes of all blocks."""
        return [node for element in self.elements for node in element]

    @property
    def last_matmul(self) -> fx.Node:
        """The last matrix product of the last block."""
        return next(node for node in reversed(self.elements[-1]) if is_matmul(node))

    @property
    def work(self) -> int:
        """FLOPs of all blocks, at the captured sizes."""
        return captured_flops(self.nodes)

    def describe(self) -> BlockList:
        """The list as a fact for the plan."""
        kinds = {tuple(map(op_name, element)) for element in self.elements}
        return BlockList(self.path, len(self.elements), tuple(dict.fromkeys(self.classes)), len(kinds))


def blocks_by_module(nodes: Iterable[fx.Node], owners: Owners = block_of) -> list[Blocks]:
    """The lists with at least two elements that hold matrix products.

    Args:
        nodes: in graph order.
        owners: tells the list element that a node belongs to.
    """
    lists: dict[str, dict[int, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
    classes: dict[tuple[str, int], str] = {}
    for node in nodes:
        if node.op != "placeholder" and (owner := owners(node)):
            lists[owner.path][owner.index].append(node)
            classes.setdefault((owner.path, owner.index), owner.class_name)
    found = []
    for path, elements in lists.items():
        working = {index: tuple(inside) for index, inside in elements.items() if any(map(is_matmul, inside))}
        if len(working) >= 2:
            found.append(Blocks(path, tuple(working.values()), tuple(classes[path, index] for index in working)))
    return found


def is_repeated(blocks: Blocks) -> bool:
    """At least two elements are of one class and are more than a single layer, however often that is called."""
    pairs = zip(blocks.classes, blocks.elements, strict=True)
    composite = [name for name, element in pairs if _num_layers(element) >= 2]
    return len(composite) > len(set(composite))


def _num_layers(nodes: Iterable[fx.Node]) -> int:
    """Matrix products with different right-hand sides, which are the weights of linear layers and convolutions."""
    inputs = [node.all_input_nodes for node in nodes if is_matmul(node)]
    return len({sources[min(1, len(sources) - 1)] for sources in inputs})


def are_stages(blocks: Blocks) -> bool:
    """No two elements do any matrix product on the same shapes, as the stages of a U-Net, of whatever classes."""
    composite = [element for element in blocks.elements if _num_layers(element) >= 2]
    return len(composite) >= 2 and not any(itertools.starmap(have_shapes_in_common, itertools.pairwise(composite)))


def have_shapes_in_common(left: Iterable[fx.Node], right: Iterable[fx.Node]) -> bool:
    """Whether they do a matrix product on the same shapes."""
    return bool(_signatures(left).keys() & _signatures(right).keys())


def is_chain(blocks: Blocks, flow: Dataflow) -> bool:
    """The last element depends on the first; parallel heads and experts do not."""
    behind_first = flow.forward(blocks.elements[0])
    return any(node in behind_first for node in blocks.elements[-1] if is_matmul(node))


def hands_over(blocks: Blocks) -> bool:
    """Each element takes a value straight from the one before it, with nothing between them."""
    return all(
        any(source in former for node in element for source in node.all_input_nodes)
        for former, element in itertools.pairwise(map(set, blocks.elements))
    )


def keeps_shapes(blocks: Blocks) -> bool:
    """Two elements of one class do at least half of their matrix products on the same shapes.

    The blocks of a transformer do; the stages of a U-Net or a ResNet change resolution and width. Spatial and temporal
    blocks may take turns, and then most of them are like the last but one.
    """
    of_class: dict[str, list[Counter[tuple[object, ...]]]] = defaultdict(list)
    for name, element in zip(blocks.classes, blocks.elements, strict=True):
        of_class[name].append(_signatures(element))
    neighbours = (pair for shapes in of_class.values() for pair in itertools.pairwise(shapes))
    if any(itertools.starmap(_are_alike, neighbours)):
        return True
    turns = [pair for shapes in of_class.values() for pair in zip(shapes, shapes[2:], strict=False)]
    return sum(itertools.starmap(_are_alike, turns)) > len(turns) / 2


def _are_alike(left: Counter[tuple[object, ...]], right: Counter[tuple[object, ...]]) -> bool:
    return 2 * (left & right).total() >= min(left.total(), right.total())


def _signatures(nodes: Iterable[fx.Node]) -> Counter[tuple[object, ...]]:
    """The matrix products by op and shapes."""
    return Counter(_signature(node) for node in nodes if is_matmul(node))


def _signature(node: fx.Node) -> tuple[object, ...]:
    tensors = [tensor for source in (node, *node.all_input_nodes) for tensor in fake_tensors(source)[:1]]
    return op_name(node), *map(printed_shape, tensors)
