"""Finds blocks by the repetition of what they do, where no list of modules tells them.

One block module called N times has the same module path each time; blocks written as functions have none. What is left
is that the graph repeats itself: the sequence of (op, shapes) of the matrix products that depend on the latents has a
period. What is done between them is not compared, so that a block with another activation, or a norm between two
blocks, does not hide it.

    conv  linear sdpa linear linear linear  linear sdpa linear linear linear  linear sdpa linear ...  linear
          └─────────── period ────────────┘ └──────── the same again ───────┘
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from teacache_fx.dataflow import Dataflow
from teacache_fx.flops import is_matmul
from teacache_fx.graph import fake_tensors, op_name, printed_shape
from teacache_fx.module_paths import module_class, module_path
from teacache_fx.passes.block_lists import Blocks

_MAX_PERIODS = 8  # candidates tried; each costs one pass over the matrix products
_MIN_MATMULS = 2  # of a block


@dataclass(frozen=True)
class _Run:
    """A stretch of the sequence, from `start` to before `stop`, that repeats after `period` matrix products."""

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
    nodes = [node for node in flow.sort(dependent) if node.op != "output"]
    places = [place for place, node in enumerate(nodes) if is_matmul(node)]
    words = _words([nodes[place] for place in places])
    gaps = _Gaps(places, _crossing(nodes, dependent), len(nodes))
    found: list[Blocks] = []
    todo = [(0, len(words))]
    while todo:
        start, stop = todo.pop()
        run = _longest_run(words, start, stop)
        if run is not None:
            elements = tuple(tuple(nodes[begin:end]) for begin, end in itertools.pairwise(_boundaries(run, gaps)))
            path = _common_path(elements[0])
            one_by_one = all(itertools.starmap(_follows, itertools.pairwise(elements)))
            if one_by_one and not _is_plain(elements[0], dependent):
                found.append(Blocks(path, elements, (module_class(elements[0][0], path),) * len(elements)))
            todo += [(start, run.start), (run.stop, stop)]
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
    return list(itertools.accumulate(steps))


@dataclass(frozen=True)
class _Gaps:
    """Where the graph may be cut between a matrix product and the next one.

    Attributes:
        places: of the matrix products among the nodes.
        crossing: how many values are handed across the boundary before each node, and behind the last one.
        stop: number of nodes.
    """

    places: Sequence[int]
    crossing: Sequence[int]
    stop: int

    def before(self, number: int) -> range:
        """The boundaries before the matrix product of that number, and behind the one before it."""
        first = self.places[number - 1] + 1 if number > 0 else 1  # the very first node is the latents
        return range(first, (self.places[number] if number < len(self.places) else self.stop) + 1)

    def narrowest(self, number: int) -> int:
        """How few values cross at the best of these boundaries."""
        return min(self.crossing[place] for place in self.before(number))


def _boundaries(run: _Run, gaps: _Gaps) -> list[int]:
    """Where the blocks begin, and where the last one ends: where the fewest values are handed on.

    What stands between two blocks is part of the second. The first begins as late and the last ends as early as it can.
    """
    count = (run.stop - run.start) // run.period
    phases = range((run.stop - run.start) % run.period + 1)  # where as many blocks fit in
    start = run.start + min(phases, key=lambda phase: gaps.narrowest(run.start + phase))
    numbers = range(start, start + count * run.period + 1, run.period)
    first = min(reversed(gaps.before(start)), key=gaps.crossing.__getitem__)
    return [first, *(min(gaps.before(number), key=gaps.crossing.__getitem__) for number in numbers[1:])]


def _is_plain(element: Sequence[fx.Node], dependent: set[fx.Node]) -> bool:
    """Whether nothing forks and joins again, as attention and shortcuts do; the layers of an MLP are no blocks."""
    return all(sum(source in dependent for source in set(node.all_input_nodes)) < 2 for node in element)


def _follows(former: Sequence[fx.Node], element: Sequence[fx.Node]) -> bool:
    """Whether what the former does last enters a matrix product of the element; side by side, nothing would."""
    reached = {next(node for node in reversed(former) if is_matmul(node))}
    for node in (*former, *element):
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return any(is_matmul(node) and node in reached for node in element)


def _longest_run(words: Sequence[int], start: int, stop: int) -> _Run | None:
    best: _Run | None = None
    for period in _candidate_periods(words[start:stop]):
        for run in _runs(words, period, start, stop):
            if best is None or run.stop - run.start > best.stop - best.start:
                best = run
    return best


def _candidate_periods(words: Sequence[int]) -> list[int]:
    """The commonest distances between one pair of successive words and the next such pair, shortest first."""
    places: dict[tuple[int, int], int] = {}
    distances: Counter[int] = Counter()
    for place, pair in enumerate(itertools.pairwise(words)):
        if pair in places:
            distances[place - places[pair]] += 1
        places[pair] = place
    commonest = (distance for distance, _ in distances.most_common(_MAX_PERIODS))
    return sorted(distance for distance in commonest if distance >= _MIN_MATMULS)


def _runs(words: Sequence[int], period: int, start: int, stop: int) -> list[_Run]:
    """The maximal stretches in which each word is like the one a period later, and which hold two periods."""
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
