"""What differs between two snapshots, in a few lines. Works on their texts alone, and imports no torch."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from teacache_fx.snapshot_text import Line, Section, SnapshotText, parse

MOST_LINES = 20
_LONG_FACT = 100  # characters; of a longer list only what has changed is told
_MOST_SHAPES = 3  # told one by one; more of the same change are counted


@dataclass(frozen=True)
class Difference:
    """How one snapshot differs from another. False if it does not.

    Attributes:
        lines: all changes, a heading above those of each part of the model.
        caution: what else may explain them, such as another torch version; empty if nothing does.
    """

    lines: tuple[str, ...]
    caution: str = ""

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __str__(self) -> str:
        """The first lines, and how many more there are."""
        more = len(self.lines) - MOST_LINES
        shown = self.lines if more <= 1 else (*self.lines[:MOST_LINES], f"... and {more} more lines")
        return "\n".join(filter(None, (self.caution, *shown)))


def compare(old: str, new: str) -> Difference:
    """Compares the texts of two snapshots. That they were taken with different torch versions is no difference.

    Args:
        old: as expected.
        new: as it is now.
    """
    before, after = parse(old), parse(new)
    lines = [
        f"{key}: {before.header.get(key, 'none')} -> {after.header.get(key, 'none')}"
        for key in dict.fromkeys([*before.header, *after.header])
        if key != "torch" and before.header.get(key) != after.header.get(key)
    ]
    lines += _sections(before, after)
    if not lines and before.body != after.body:
        lines = ["the same lines in another order or grouping"]
    return Difference(tuple(lines), _caution(before, after) if lines else "")


def _caution(before: SnapshotText, after: SnapshotText) -> str:
    torches = before.header.get("torch"), after.header.get("torch")
    if torches[0] == torches[1]:
        return ""
    return (
        f"the golden holds for torch {torches[0]}, and this is torch {torches[1]}: what follows may come from the "
        "capture and not from the model"
    )


def _sections(before: SnapshotText, after: SnapshotText) -> Iterator[str]:
    """The changes, those that several parts have in common once."""
    declined = [text.sections.get("declined") for text in (before, after)]
    if (declined[0] is None) is not (declined[1] is None):
        yield from (f"declined now: {line.text}" for line in declined[1].lines) if declined[1] else ()
        yield from (f"was declined: {line.text}" for line in declined[0].lines) if declined[0] else ()
        return
    parts: dict[tuple[str, ...], list[str]] = {}
    for label in dict.fromkeys([*before.sections, *after.sections]):
        if label in before.sections and label in after.sections:
            changes = tuple(_changes(before.sections[label], after.sections[label]))
        else:
            is_new = label in after.sections
            size = len((after if is_new else before).sections[label].lines)
            changes = (f"  {'+' if is_new else '-'} {'new' if is_new else 'gone'}, {size} lines",)
        if changes:
            parts.setdefault(changes, []).append(label)
    for changes, labels in parts.items():
        yield _heading(labels)
        yield from changes


def _heading(labels: list[str]) -> str:
    """`transformer_blocks.0 (and 18 more alike)`."""
    return labels[0] if len(labels) == 1 else f"{labels[0]} (and {len(labels) - 1} more alike)"


def _changes(old: Section, new: Section) -> list[str]:
    changes: list[str] = []
    shapes: list[tuple[str, str, str]] = []
    if old.class_name != new.class_name:
        changes.append(f"  ~ class {old.class_name} -> {new.class_name}")
    for left, right, above in _pairs(old.lines, new.lines):
        if left is None and right is not None:
            changes.append(f"  + {right.text}" + (f", after {above.name}" if above else ""))
        elif right is None and left is not None:
            changes.append(f"  - {left.text}")
        elif left is not None and right is not None:
            if left.kind != right.kind and left.is_call:
                shapes.append((left.kind, right.kind, right.name))
            changes += _edits(left, right)
    return changes + _shape_changes(shapes)


def _pairs(old: list[Line], new: list[Line]) -> Iterator[tuple[Line | None, Line | None, Line | None]]:
    """Lines that differ, each with its counterpart, if any, and the line above it.

    Equal lines hold the alignment; between them, lines of the same name belong together.
    """
    for left, right in _stretches(old, new):
        old_part, new_part = old[left], new[right]
        names = [line.name for line in old_part], [line.name for line in new_part]
        matcher = difflib.SequenceMatcher(None, *names, autojunk=False)
        for tag, i, i_end, j, j_end in matcher.get_opcodes():
            if tag == "equal":
                yield from ((one, two, None) for one, two in zip(old_part[i:i_end], new_part[j:j_end], strict=True))
                continue
            yield from ((line, None, None) for line in old_part[i:i_end])
            for position in range(right.start + j, right.start + j_end):
                yield None, new[position], new[position - 1] if position else None


def _stretches(old: list[Line], new: list[Line]) -> Iterator[tuple[slice, slice]]:
    matcher = difflib.SequenceMatcher(None, [line.text for line in old], [line.text for line in new], autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag != "equal":
            yield slice(i, i_end), slice(j, j_end)
            continue
        for one, two in zip(old[i:i_end], new[j:j_end], strict=True):
            if one.is_skipped != two.is_skipped:
                yield slice(old.index(one), old.index(one) + 1), slice(new.index(two), new.index(two) + 1)


def _edits(left: Line, right: Line) -> Iterator[str]:
    if left.is_skipped != right.is_skipped:
        change = "is now left out of a skipped step" if right.is_skipped else "now runs on every step"
        yield f"  ~ {right.name} {change}"
    if not left.is_call:
        if left.text != right.text and max(len(left.kind), len(right.kind)) > _LONG_FACT:
            yield f"  ~ {right.name}: {_instead(left.kind.split(', '), right.kind.split(', '))}"
        elif left.text != right.text:
            yield f"  ~ {left.name}: {left.kind} -> {right.kind}"
    elif left.kind == right.kind and left.arguments != right.arguments:
        yield f"  ~ {right.name} takes {_instead(left.arguments, right.arguments)}"


def _instead(old: Sequence[str], new: Sequence[str]) -> str:
    gone = [item for item in old if item not in new]
    come = [item for item in new if item not in old]
    if not gone and not come:
        return "the same in another order"
    return f"{', '.join(come) or 'nothing'} instead of {', '.join(gone) or 'nothing'}"


def _shape_changes(shapes: list[tuple[str, str, str]]) -> list[str]:
    counts = Counter((old, new) for old, new, _ in shapes)
    lines = []
    for (old, new), count in counts.items():
        names = [name for before, after, name in shapes if (before, after) == (old, new)]
        where = ", ".join(names) if count <= _MOST_SHAPES else f"{count} operations, the first {names[0]}"
        lines.append(f"  ~ {old} -> {new} of {where}")
    return lines


def unified(old: str, new: str, old_name: str, new_name: str) -> str:
    """All that differs, as `diff -u` shows it.

    Args:
        old: as expected.
        new: as it is now.
        old_name: what to call the first.
        new_name: what to call the second.
    """
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), old_name, new_name)
    return re.sub(r"(?m)^(@@.*@@)$", r"\1", "".join(lines))
