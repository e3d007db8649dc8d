"""Floating-point operations of an einsum, from its equation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def einsum_flops(equation: str, shapes: Sequence[Sequence[Any]]) -> Any:
    """Two operations for each multiplication and addition; operands are multiplied from left to right, as torch does.

    A product in which nothing is summed up is pointwise work, and counts nothing. Sizes may be symbolic.

    Args:
        equation: such as `bhqd,bhkd->bhqk`; an ellipsis and a missing right side are understood.
        shapes: of the operands.

    Raises:
        ValueError: the equation does not fit the shapes.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    subscripts = [_labels(part, len(shape)) for part, shape in zip(left.split(","), shapes, strict=True)]
    # An operand with one element along a dimension is broadcast: the others' elements are added up before the product.
    long = [
        {label: size for label, size in zip(labels, shape, strict=True) if not isinstance(size, int) or size != 1}
        for labels, shape in zip(subscripts, shapes, strict=True)
    ]
    sizes = {label: size for part in long for label, size in part.items()}
    every = dict.fromkeys(label for part in subscripts for label in part)
    broadcast = [label for label in every if label.startswith(".")]
    once = [label for label in every if sum(part.count(label) for part in subscripts) == 1]
    kept = set(_labels(right, len(right.replace("...", "")) + len(broadcast)) if arrow else [*broadcast, *once])
    count: Any = 0
    current, *others = map(set, long)
    for position, following in enumerate(others, 1):
        later = kept.union(*long[position + 1 :])
        involved = (current & (following | later)) | (following & (current | later))
        if not involved <= later:
            count = count + 2 * math.prod(sizes[label] for label in involved)
        current = involved & later
    return count


def _labels(subscript: str, ndim: int) -> list[str]:
    """One label for each dimension; those of an ellipsis are counted from the last one, as broadcasting does."""
    before, ellipsis, behind = subscript.partition("...")
    covered = ndim - len(before) - len(behind)
    if covered < 0 or (covered and not ellipsis):
        raise ValueError(f"subscript {subscript!r} is for another number of dimensions than {ndim}")
    return [*before, *(f".{position}" for position in range(covered, 0, -1)), *behind]
