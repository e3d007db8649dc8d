"""The work of analysis and rewriting grows linearly with the number of blocks: calls are counted, nothing is timed."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Iterable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from benchmarks.deep_models import MODELS
from benchmarks.scaling import capture
from teacache_fx.dataflow import Dataflow
from teacache_fx.graph import op_name, storages, written_arguments
from teacache_fx.pipeline import Pipeline
from tests import toys
from tests.passes.capture import CONFIG, on_capture

SIZES = (4, 8, 16)
MARGIN = 1.02
"""Of what a doubling may add beyond twice what the doubling before it has added; a square would be 2."""


def calls_of(function: Callable[[], object]) -> int:
    """How many functions are called, those of C included."""
    count = 0

    def notice(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(notice)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def rewritten(gm: fx.GraphModule) -> int:
    pipeline = Pipeline(gm)
    num_blocks = pipeline.analyse().stack.num_blocks
    pipeline.rewrite(CONFIG)
    return num_blocks


def is_linear(counts: list[int]) -> bool:
    small, middle, large = counts
    return large - middle <= 2 * MARGIN * (middle - small)


@pytest.mark.parametrize("name", MODELS)
def test_work(name: str) -> None:
    calls: list[int] = []
    edges: list[int] = []  # what is done inside one call, such as copying a list of them, is not counted as calls

    def count(gm: fx.GraphModule) -> None:
        assert rewritten(gm) == num_blocks  # also fills what is remembered from one graph to the next
        calls.append(calls_of(lambda: rewritten(gm)))
        edges.append(sum(map(len, Dataflow(gm.graph).predecessors.values())))

    for num_blocks in SIZES:
        capture(MODELS[name](num_blocks).eval().requires_grad_(False), count)
    assert is_linear(calls), calls
    assert is_linear(edges), edges


def test_a_square_would_be_noticed() -> None:
    assert not is_linear([size**2 for size in SIZES])
    assert not is_linear([100 * size + size**2 for size in SIZES])


def _all_edges(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Each node's arguments and all earlier writers to what it reads, as the data flow means it."""
    needed: dict[fx.Node, set[fx.Node]] = {}
    writers: list[tuple[fx.Node, set[int]]] = []
    for node in graph.nodes:
        read = {storage for argument in node.all_input_nodes for storage in storages(argument)}
        needed[node] = {*node.all_input_nodes, *(writer for writer, written in writers if written & read)}
        written = {storage for argument in written_arguments(node) for storage in storages(argument)}
        if written:
            writers.append((node, written))
    return needed


def _reach(starts: Iterable[fx.Node], edges: dict[fx.Node, set[fx.Node]], stop: Collection[fx.Node]) -> set[fx.Node]:
    reached, todo = set[fx.Node](), list(starts)
    while todo:
        node = todo.pop()
        if node not in reached and node not in stop:
            reached.add(node)
            todo += edges[node]
    return reached


class ManyWritesDiT(toys.ToyDiT):
    """Writes to several tensors in turn, to views of them, and reads some again."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        table, sums = torch.zeros(len(self.blocks), *hidden_states.shape), torch.zeros_like(hidden_states)
        for i, block in enumerate(self.blocks):
            table[i].copy_(hidden_states)
            hidden_states += block(hidden_states, text, temb)
            sums.add_(hidden_states)
            hidden_states[:, i % 4].mul_(0.5)
            table[i, :, 0] = sums.mean(1)
        return hidden_states + table.sum(0) + sums


def _compare(gm: fx.GraphModule) -> None:
    backward, flow = _all_edges(gm.graph), Dataflow(gm.graph)
    forward: dict[fx.Node, set[fx.Node]] = {node: set() for node in gm.graph.nodes}
    for node, needed in backward.items():
        for source in needed:
            forward[source].add(node)
    writers = [node for node in flow.nodes if written_arguments(node)]
    assert len(writers) >= 4
    generator = random.Random(0)
    for _ in range(300):
        starts = generator.sample(flow.nodes, 2)
        stop = {*generator.sample(flow.nodes, 4), *generator.sample(writers, generator.randrange(len(writers)))}
        assert flow.backward(starts, stop) == _reach(starts, backward, stop)
        assert flow.forward(starts, stop) == _reach(starts, forward, stop)
        assert flow.backward(starts) == _reach(starts, backward, ())
        assert flow.forward(starts) == _reach(starts, forward, ())


@pytest.mark.parametrize("kind", [ManyWritesDiT, toys.RotaryInPlaceDiT, toys.AccumulatingDiT, toys.EarlyOverwritingDiT])
def test_chains_of_writers_lead_where_all_edges_lead(kind: Callable[..., nn.Module]) -> None:
    on_capture(toys.make(kind, num_blocks=4), toys.inputs(), _compare)


class DiamondsBehindDiT(toys.SlicedJointDiT):
    """Behind the blocks each value is taken twice, again and again: as many ways as there are grains of rice."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        tokens = toys.ToyDiT.run_blocks(self, torch.cat([text, hidden_states], 1), text, temb)
        for _ in range(64):
            tokens = tokens * tokens.sigmoid()
        return tokens[:, text.shape[1] :]


def test_each_way_behind_the_blocks_is_gone_once() -> None:
    def count(gm: fx.GraphModule) -> Any:
        assert sum(op_name(node) == "sigmoid" for node in gm.graph.nodes) == 64
        return rewritten(gm)

    assert on_capture(toys.make(DiamondsBehindDiT), toys.inputs(), count) == [2]
