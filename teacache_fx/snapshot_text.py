"""Reads the text of a snapshot: a header, then sections, of which some stand for several blocks that are alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

_TITLE = re.compile(
    r"(?P<path>[\w.]+?)\.?(?P<index>\d+)(?P<run> \(run \d+\))?(?:: (?P<name>\w+))?(?: \(and (?P<others>.*) alike\))?"
)
_CALL = re.compile(r"(?P<name>[^\s(]+)\((?P<arguments>.*)\) -> (?P<kind>.*)")
_OTHERS_SKIPPED = "(of the others every line is |)"
_RANGES = re.compile(r"; in (?:[\d\-, ]|\(run \d+\))+ ")


@dataclass(frozen=True)
class Line:
    """One line of a section.

    Attributes:
        text: without indentation and bar.
        name: of the value, or of the fact.
        arguments: of the call; empty for facts.
        kind: dtype and shape of the value, or the fact.
        is_skipped: whether a skipped step leaves it out.
        is_call: whether it is a call.
    """

    text: str
    name: str
    arguments: tuple[str, ...]
    kind: str
    is_skipped: bool
    is_call: bool


@dataclass
class Section:
    """One part of a model: its plan, its inputs, one block, what is between two blocks.

    Attributes:
        class_name: of a block; empty otherwise.
        lines: in order of execution.
    """

    class_name: str = ""
    lines: list[Line] = field(default_factory=list)


@dataclass
class SnapshotText:
    """A snapshot's text, read.

    Attributes:
        header: what stands above the sections, by key.
        sections: by label; each block has one of its own.
        body: the text below the header.
    """

    header: dict[str, str]
    sections: dict[str, Section]
    body: str


def parse(text: str) -> SnapshotText:
    """Reads the text of a snapshot."""
    head, _, body = text.partition("\n\n")
    first, *rows = head.splitlines() or [""]
    header = {"format": first, **dict(row.split(": ", 1) for row in rows if ": " in row)}
    sections: dict[str, Section] = {}
    for part in body.split("\n\n"):
        title, *lines = part.splitlines() or [""]
        for label, section in _read(title, lines):
            number = 1
            while f"{label}{f' #{number}' if number > 1 else ''}" in sections:
                number += 1
            sections[f"{label}{f' #{number}' if number > 1 else ''}"] = section
    return SnapshotText(header, sections, body)


def _read(title: str, lines: list[str]) -> Iterator[tuple[str, Section]]:
    has_note = any(line.strip() == _OTHERS_SKIPPED for line in lines)
    own = [_line(line) for line in lines if line.strip() != _OTHERS_SKIPPED]
    is_after = title.startswith("after ")
    match = _TITLE.fullmatch(title.removeprefix("after "))
    if match is None:
        yield title, Section("", own)
        return
    others = [replace(line, is_skipped=line.is_call) for line in own] if has_note else own
    for number, (index, run) in enumerate(_members(match)):
        place = f"after {match['path']}" if is_after else f"{match['path']}.{index}{run}"
        yield place, Section(match["name"] or "", own if number == 0 else others)


def _members(match: re.Match[str]) -> Iterator[tuple[int, str]]:
    yield int(match["index"]), match["run"] or ""
    run = ""
    for item in reversed((match["others"] or "").split(", ")):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?( \(run \d+\))?", item)
        if bounds is not None:
            run = bounds[3] or run
            yield from ((index, run) for index in range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))


def _line(line: str) -> Line:
    text, is_skipped = line[4:], line[2:3] == "|"
    call = _CALL.fullmatch(text)
    if call is not None:
        return Line(text, call["name"], tuple(_split(call["arguments"])), call["kind"], is_skipped, is_call=True)
    text = _RANGES.sub("; then ", text)
    name, _, fact = text.partition(": ")
    return Line(text, name, (), fact, is_skipped, is_call=False)


def _split(arguments: str) -> Iterator[str]:
    """The arguments, at the commas that no bracket encloses."""
    depth, begin = 0, 0
    for position, character in enumerate(arguments):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield arguments[begin:position].strip()
            begin = position + 1
    if arguments:
        yield arguments[begin:].strip()
