"""The canonical text of a graph: blocks that are alike are written once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from teacache_fx.canonical import Words
from teacache_fx.graph import fake_value
from teacache_fx.segments import Segment, segments_of

SKIPPED = "|"
"""Stands before what a skipped step leaves out."""


@dataclass(frozen=True)
class _Body:
    """The lines of one segment.

    Attributes:
        segment: of the graph.
        kinds: what the segment takes from elsewhere, by the names it has there.
        origins: where that comes from, likewise.
        calls: one line for each node.
        skipped: whether a skipped step leaves the node out.
    """

    segment: Segment
    kinds: dict[str, str]
    origins: dict[str, str]
    calls: list[str]
    skipped: list[bool]

    def is_like(self, first: _Body) -> bool:
        """Whether to say "like the first one" is enough."""
        same = (self.segment.path, self.segment.class_name, self.kinds, self.calls)
        others = (first.segment.path, first.segment.class_name, first.kinds, first.calls)
        return same == others and (self.skipped == first.skipped or all(self.skipped))


@dataclass
class _Group:
    """Segments that are alike."""

    first: _Body
    others: list[_Body] = field(default_factory=list)


def canonical_graph(graph: fx.Graph, skipped: Iterable[str] = (), dead: Iterable[str] = ()) -> tuple[list[str], Words]:
    """The text of a graph, line by line, and the words to speak about it.

    Args:
        graph: as captured.
        skipped: names of the nodes that a skipped step leaves out.
        dead: names of the nodes that nobody needs; they are left out of the text.
    """
    segments = segments_of(graph, set(dead))
    words = Words(segments)
    lines = ["inputs", *sorted(_inputs(graph, words))]
    groups: list[_Group] = []
    left_out = set(skipped)
    for segment in segments:
        body = _body(segment, words, left_out)
        group = next((group for group in groups if body.is_like(group.first)), None)
        if group is not None:
            group.others.append(body)
        else:
            groups.append(_Group(body))
    for group in groups:
        lines += ["", *_section(group)]
    return lines, words


def _inputs(graph: fx.Graph, words: Words) -> list[str]:
    placeholders = (node for node in graph.nodes if node.op == "placeholder" and node.users)
    return [
        f"    {words.at_end(node)}: {words.kind(fake_value(node))}" for node in placeholders if words.is_input(node)
    ]


def _body(segment: Segment, words: Words, skipped: set[str]) -> _Body:
    taken = words.taken.get(segment, {})
    return _Body(
        segment,
        {name: words.kind_of(source) for source, name in taken.items()},
        {name: words.origin(source, segment) for source, name in taken.items()},
        [words.call(node) for node in segment.nodes],
        [node.name in skipped for node in segment.nodes],
    )


def _section(group: _Group) -> list[str]:
    segment = group.first.segment
    title = _title(segment)
    if group.others:
        title += f" (and {_where(group.others)} alike)"
    return [title, *_lines(group)]


def _title(segment: Segment) -> str:
    if segment.block:
        return ": ".join(filter(None, (segment.label, segment.class_name)))
    return f"after {segment.path}.{segment.index}" if segment.path else "at the beginning"


def _lines(group: _Group) -> list[str]:
    body = group.first
    lines = []
    for name, kind in body.kinds.items():
        lines.append(f"    {name}: {kind} is {_origins([body, *group.others], name)}")
    if any(other.skipped != body.skipped for other in group.others):
        lines.append(f"    (of the others every line is {SKIPPED})")
    pairs = zip(body.skipped, body.calls, strict=True)
    return [*lines, *(f"  {SKIPPED if is_skipped else ' '} {call}" for is_skipped, call in pairs)]


def _origins(bodies: list[_Body], name: str) -> str:
    """`/x_embedder.linear; in 1-18 /transformer_blocks.(i-1).add`."""
    by_text: dict[str, list[_Body]] = {}
    for body in bodies:
        by_text.setdefault(body.origins[name], []).append(body)
    (first, _), *others = by_text.items()
    return "; ".join([first, *(f"in {_where(same)} {text}" for text, same in others)])


def _where(bodies: list[_Body]) -> str:
    """`1-18`; `1-18, 0-18 (run 2)` for blocks that run twice."""
    runs: dict[int, list[int]] = {}
    for body in bodies:
        runs.setdefault(body.segment.run, []).append(body.segment.index)
    return ", ".join(_indices(indices) + (f" (run {run})" if run > 1 else "") for run, indices in runs.items())


def _indices(indices: list[int]) -> str:
    """`1-18, 20` for the numbers 1 to 18 and 20."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
