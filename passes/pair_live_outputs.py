"""Pairs what leaves the block stack with what entered it, so that a residual can be taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from teacache_fx.dataflow import Dataflow, view_source
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.flops import is_matmul
from teacache_fx.graph import fake_tensors, fake_value, op_name, same_shape, tensor_of, written_arguments
from teacache_fx.plan import LiveOutput
from teacache_fx.size_names import SizeNames
from teacache_fx.sizes import fixed

_SPINE = {"add", "__add__", "__radd__", "iadd", "add_", "sub", "cat", "concat", "dropout", "clone", "contiguous", "to"}
_ADDITIONS = {"add", "__add__", "__radd__", "iadd", "add_"}
_LAYOUT = {"getitem", "reshape", "flatten", "contiguous", "clone"}  # these may copy, and so be no views
_SPINE |= {"clip", "clamp", "where", "nan_to_num"}


@dataclass(frozen=True)
class LivePair:
    """A value that leaves the stack and the stack's input that its residual is taken against."""

    value: fx.Node
    base: fx.Node


def pair_live_outputs(
    flow: Dataflow, region: set[fx.Node], dependent: set[fx.Node], first_block: set[fx.Node]
) -> tuple[list[LivePair], set[fx.Node]]:
    """Finds the live outputs of the region and a base for each; the region grows past views until shapes agree.

    A joined [text; image] sequence is sliced behind many stacks: it matches no input, its image part does.

    Raises:
        Declined: NO_MATCHING_INPUT, since without a base the cached value would no longer follow the latents; or
            MUTATION_ACROSS_CUT, if no value leaves the region at all.
    """
    inputs = _region_inputs(flow, region)
    alike = _by_shape(inputs)
    frontier = _Frontier(flow, region)
    region = frontier.region  # grows with it
    while True:
        frontier.add_sums()
        live = flow.sort(frontier.live)
        if not live:
            writers = [node for node in flow.sort(region) if written_arguments(node)]
            detail = "the stack gives nothing back but what it writes in place"
            raise Declined(DeclineReason.MUTATION_ACROSS_CUT, detail, writers[-1].name if writers else None)
        bases = {value: _find_base(value, alike[_shape(value)], region, dependent, first_block) for value in live}
        unpaired = [value for value, base in bases.items() if base is None]
        if not unpaired:
            return [LivePair(value, base) for value, base in bases.items() if base is not None], region
        for value in unpaired:
            users = frontier.users_behind(value)
            if not all(view_source(user) is value or op_name(user) in _LAYOUT for user in users):
                raise _no_base(value, inputs)
            for user in users:
                frontier.add(user)


class _Frontier:
    """A growing region and what leaves it, kept up to date: as many values may leave it as it has blocks.

    Attributes:
        region: its nodes.
        live: the nodes of the region that are taken behind it, each with the number of nodes that take it there.
    """

    def __init__(self, flow: Dataflow, region: set[fx.Node]) -> None:
        self._flow = flow
        self.region = set(region)
        self.live = {node: len(users) for node in region if (users := self.users_behind(node))}
        self._todo = [user for node in self.live for user in self.users_behind(node)]

    def users_behind(self, node: fx.Node) -> list[fx.Node]:
        """Users outside the region that take the value itself; a write's effect on memory is no value."""
        return [user for user in node.users if user in self._flow.live and user not in self.region]

    def add(self, user: fx.Node) -> None:
        """Takes a node behind the region into it."""
        self.region.add(user)
        for source in user.all_input_nodes:
            if source in self.live:
                self.live[source] -= 1
                if self.live[source] == 0:
                    del self.live[source]
        if users := self.users_behind(user):
            self.live[user] = len(users)
            self._todo += users

    def add_sums(self) -> None:
        """Takes in additions of nothing but live outputs, such as a residual that is added outside the last block."""
        while len(self.live) > 1 and self._todo:
            user = self._todo.pop()
            is_sum = op_name(user) in _ADDITIONS and self.region.issuperset(user.all_input_nodes)
            if is_sum and user not in self.region:
                self.add(user)


def _region_inputs(flow: Dataflow, region: set[fx.Node]) -> list[fx.Node]:
    inputs = {argument for node in region for argument in node.all_input_nodes if argument not in region}
    return flow.sort(inputs)


def _by_shape(nodes: Iterable[fx.Node]) -> dict[object, list[fx.Node]]:
    """Nodes that agree in the sizes that never vary; of no others all sizes can be proven equal."""
    alike: dict[object, list[fx.Node]] = defaultdict(list)
    for node in nodes:
        alike[_shape(node)].append(node)
    return alike


def _shape(node: fx.Node) -> object:
    value = fake_value(node)
    return tuple(map(fixed, value.shape)) if isinstance(value, torch.Tensor) else None


def _find_base(
    value: fx.Node, inputs: list[fx.Node], region: set[fx.Node], dependent: set[fx.Node], first_block: set[fx.Node]
) -> fx.Node | None:
    """The one of the inputs of the value's shape that follows the latents; the residual additions settle a tie.

    What enters must still be in what leaves. A value that is made of products of the first block, and of nothing that
    enters, is a sum of what the blocks give beside what they pass on: a residual against that would mean nothing. In
    between a product may come, such as the one that takes in the long skip of a U-ViT.
    """
    candidates = [node for node in inputs if _fits(node, value)]
    without_products = _made_of(value, region, _is_no_product)
    kept = [node for node in candidates if node in without_products]
    candidates = kept if kept or any(map(is_matmul, without_products & first_block)) else candidates
    if len(candidates) > 1:
        spine = _spine_inputs(value, region)
        candidates = [node for node in candidates if node in spine] or candidates
    following = [node for node in candidates if node in dependent]
    if following:
        return following[-1]  # the last one computed is the one that enters the first block
    spine = _spine_inputs(value, region)
    return next((node for node in reversed(candidates) if node in spine), None)


def _fits(base: fx.Node, value: fx.Node) -> bool:
    inside, outside = fake_value(value), fake_value(base)
    if not (isinstance(inside, torch.Tensor) and isinstance(outside, torch.Tensor)):
        return False
    both_float = inside.is_floating_point() and outside.is_floating_point()
    return both_float and inside.device == outside.device and same_shape(inside, outside)


def _is_no_product(node: fx.Node) -> bool:
    return not is_matmul(node)


def _is_spine(node: fx.Node) -> bool:
    return view_source(node) is not None or op_name(node) in _SPINE


def _spine_inputs(value: fx.Node, region: set[fx.Node]) -> set[fx.Node]:
    """Region inputs that reach the value through additions, joins, views and casts alone."""
    return _made_of(value, region, _is_spine) - region


def _made_of(value: fx.Node, region: set[fx.Node], is_open: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """All that lies behind the value, going back through those nodes of the region that are open."""
    seen, todo = set[fx.Node](), [value]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            if node in region and is_open(node):
                todo += node.all_input_nodes
    return seen


def describe_pairs(pairs: Iterable[LivePair], flow: Dataflow, latents: fx.Node) -> tuple[LiveOutput, ...]:
    """The pairs as facts for the plan."""
    names = SizeNames((node for node in flow.nodes if node.op == "placeholder"), latents)
    described = []
    for pair in pairs:
        value, base = tensor_of(pair.value), tensor_of(pair.base)
        shape, dtype = tuple(str(names.write(size)) for size in value.shape), str(value.dtype).split(".")[-1]
        sizes = [pair for pair in zip(value.shape, base.shape, strict=True) if isinstance(pair[0], torch.SymInt)]
        proven = (" = ".join(dict.fromkeys(map(names.recorded, size))) for size in sizes)
        described.append(LiveOutput(pair.value.name, pair.base.name, shape, dtype, tuple(proven)))
    return tuple(described)


def _no_base(value: fx.Node, inputs: list[fx.Node]) -> Declined:
    shape = [str(list(tensor.shape)) for tensor in fake_tensors(value)[:1]]
    entering = sorted({str(list(tensor.shape)) for node in inputs for tensor in fake_tensors(node)[:1]})
    detail = f"a value of shape {''.join(shape) or 'unknown'} leaves the stack; entering are {', '.join(entering[:8])}"
    return Declined(DeclineReason.NO_MATCHING_INPUT, detail, value.name)
