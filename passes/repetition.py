"""Finds blocks by the repetition of their op sequence, where no list of modules tells them.

One block module called N times has the same module path each time; blocks written as functions have none. What is left
is that the graph repeats itself: the sequence of (op, shape) of the nodes that depend on the latents has a period.

    embed  norm linear sdpa linear add norm linear gelu linear add  norm linear sdpa linear add norm linear ...  head
           └────────────────────── period ──────────────────────┘ └───────────── the same again ─────────────┘
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from teacache_fx.dataflow import Dataflow
from teacache_fx.flops import is_matmul
from teacache_fx.graph import fake_tensors, op_name, printed_shape
from teacache_fx.module_paths import module_class, module_path
from teacache_fx.passes.block_lists import Blocks

_MAX_PERIODS = 8  # candidates tried; each costs one pass over the nodes
_MIN_MATMULS = 2  # of a block; the layers of an MLP are no blocks


@dataclass(frozen=True)
class _Run:
    """A stretch of the sequence, from `start` to before `stop`, that repeats after `period` nodes."""

    start: int
    stop: int
    period: int


def blocks_by_repetition(flow: Dataflow, dependent: set[fx.Node]) -> list[Blocks]:
    """The lists of blocks in order of execution, each a stretch of the graph that repeats itself at least once.

    Time and memory grow linearly with the graph.

    Args:
        flow: of the graph.
        dependent: live nodes that depend on the latents.
    """
    nodes = [node for node in flow.sort(dependent) if node.op not in ("placeholder", "output")]
    words = _words(nodes)
    crossing = _crossing(nodes, dependent)
    matmuls = [position for position, node in enumerate(nodes) if is_matmul(node)]
    found: list[Blocks] = []
    todo = [(0, len(nodes))]
    while todo:
        start, stop = todo.pop()
        run = _longest_run(words, [position for position in matmuls if start <= position < stop], start, stop)
        if run is None:
            continue
        first = min(range(run.start, run.start + run.period), key=crossing.__getitem__)
        count = (run.stop - first) // run.period
        end = first + count * run.period
        elements = tuple(tuple(nodes[i : i + run.period]) for i in range(first, end, run.period))
        if count >= 2:
            path = _common_path(elements[0])
            found.append(Blocks(path, elements, (module_class(elements[0][0], path),) * count))
        todo += [(start, min(run.start, first)), (max(run.stop, end), stop)]
    return sorted(found, key=lambda blocks: flow.order[blocks.elements[0][0]])


def _words(nodes: Sequence[fx.Node]) -> list[int]:
    """A number for each node, equal for equal ops on equal shapes."""
    numbers: dict[object, int] = {}
    words = []
    for node in nodes:
        tensors = [tensor for source in (node, *node.all_input_nodes) for tensor in fake_tensors(source)[:1]]
        word = op_name(node), tuple((printed_shape(tensor), tensor.dtype) for tensor in tensors)
        words.append(numbers.setdefault(word, len(numbers)))
    return words


def _crossing(nodes: Sequence[fx.Node], dependent: set[fx.Node]) -> list[int]:
    """How many values are handed across the boundary before each node: one, in most models, between two blocks."""
    order = {node: position for position, node in enumerate(nodes)}
    steps = [0] * (len(nodes) + 1)
    for position, node in enumerate(nodes):
        users = [order.get(user, len(nodes)) for user in node.users if user in dependent]
        if users:
            steps[position + 1] += 1
            if max(users) < len(nodes):
                steps[max(users) + 1] -= 1
    crossing, current = [], 0
    for step in steps:
        current += step
        crossing.append(current)
    return crossing


def _longest_run(words: Sequence[int], matmuls: Sequence[int], start: int, stop: int) -> _Run | None:
    best: _Run | None = None
    for period in _candidate_periods(words, matmuls):
        for run in _runs(words, period, start, stop):
            inside = bisect_left(matmuls, run.start + period) - bisect_left(matmuls, run.start)
            is_longer = best is None or run.stop - run.start > best.stop - best.start
            if inside >= _MIN_MATMULS and is_longer:
                best = run
    return best


def _candidate_periods(words: Sequence[int], matmuls: Sequence[int]) -> list[int]:
    """The commonest distances between one pair of successive matmuls and the next such pair, shortest first."""
    places: dict[tuple[int, int, int], int] = {}
    distances: Counter[int] = Counter()
    for position, following in itertools.pairwise(matmuls):
        pair = words[position], words[following], following - position
        if pair in places:
            distances[position - places[pair]] += 1
        places[pair] = position
    return sorted(distance for distance, _ in distances.most_common(_MAX_PERIODS))


def _runs(words: Sequence[int], period: int, start: int, stop: int) -> list[_Run]:
    """The maximal stretches in which each node is like the one a period later, and which hold two periods."""
    runs, begin = [], start
    for position in range(start, stop - period + 1):
        if position < stop - period and words[position] == words[position + period]:
            continue
        if position - begin >= period:
            runs.append(_Run(begin, position + period, period))
        begin = position + 1
    return runs


def _common_path(nodes: Sequence[fx.Node]) -> str:
    """Path of the innermost module that holds them all, such as the one block that is called again and again."""
    paths = [module_path(node).split(".") for node in nodes]
    common = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return ".".join(common)
