"""Published TeaCache polynomials, and what sympy can say about a polynomial before it is used."""

from __future__ import annotations

import functools
import json
import math
import operator
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import Any

import sympy

WORKING_RANGE = (0.0, 0.3)
"""Values of the relative L1 distance that occur between neighbouring denoising steps."""

IDENTITY = (1.0, 0.0)
"""Coefficients of poly(x) = x: the relative L1 distance is accumulated as it is."""


@dataclass(frozen=True)
class PublishedPolynomial:
    """One row of `data/coefficients.json`.

    Attributes:
        name: key of the row; `TeaCacheConfig.transformer_type` takes it.
        coefficients: highest power first.
        source: repository, file and line that the numbers come from.
        indicator: the tensor that the authors measured the distance on.
        rel_l1_thresh: thresholds that the authors recommend, each with the speed-up that they report.
    """

    name: str
    coefficients: tuple[float, ...]
    source: str
    indicator: str
    rel_l1_thresh: dict[str, str]


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = resources.files("teacache_fx").joinpath("data/coefficients.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)
    return table


def published_names() -> list[str]:
    """Names that `published` knows, in the order of the table."""
    return list(_table())


def published(transformer_type: str) -> PublishedPolynomial | None:
    """The polynomial published for a row name or a transformer class name; `None` where there is none.

    A class name finds a row only if its numbers were fitted on the first block's modulated input, which is what this
    package measures; rows fitted on another indicator are found by their row name alone.
    """
    for name, row in _table().items():
        if transformer_type in (name, row["transformer_class"]):
            coefficients = tuple(map(float, row["coefficients"]))
            return PublishedPolynomial(name, coefficients, row["source"], row["indicator"], row["rel_l1_thresh"])
    return None


@dataclass(frozen=True)
class PolynomialFacts:
    """Where a polynomial misbehaves on a range of relative distances.

    Attributes:
        negative: intervals on which it is below zero.
        turning_points: where it changes between rising and falling; none if it is monotone.
        falling: it falls throughout, so that a larger change always counts for less.
    """

    negative: tuple[tuple[float, float], ...]
    turning_points: tuple[float, ...]
    falling: bool = False

    def __str__(self) -> str:
        faults = []
        if self.negative:
            faults.append("negative on " + ", ".join(f"[{low:.3g}, {high:.3g}]" for low, high in self.negative))
        if self.turning_points:
            faults.append("not monotone (turns at " + ", ".join(f"{x:.3g}" for x in self.turning_points) + ")")
        if self.falling:
            faults.append("falling throughout")
        return " and ".join(faults)


@functools.cache
def polynomial_facts(coefficients: tuple[float, ...], span: tuple[float, float] = WORKING_RANGE) -> PolynomialFacts:
    """Finds with exact rational arithmetic where the polynomial is negative and where it turns within `span`."""
    x = sympy.Symbol("x")
    poly = sympy.Poly([sympy.Rational(c) for c in coefficients], x)
    negative = tuple(
        (low, high) for low, high in _pieces(_sign_changes(poly, span), span) if _value(poly, (low + high) / 2) < 0
    )
    turning_points = tuple(_sign_changes(poly.diff(x), span))
    falling = not turning_points and _value(poly, span[1]) < _value(poly, span[0])
    return PolynomialFacts(negative, turning_points, falling)


def horner(coefficients: tuple[float, ...]) -> sympy.Expr:
    """The polynomial in Horner form over the symbol `x`, coefficients as exact rationals of the given floats."""
    return sympy.horner(sympy.Poly([sympy.Rational(c) for c in coefficients], sympy.Symbol("x")).as_expr())


def _sign_changes(poly: sympy.Poly, span: tuple[float, float]) -> list[float]:
    if poly.degree() < 1:
        return []
    roots = sorted({root for root in map(float, sympy.real_roots(poly)) if span[0] < root < span[1]})
    pieces = _pieces(roots, span)
    signs = [math.copysign(1, _value(poly, (low + high) / 2)) for low, high in pieces]
    return [root for root, (left, right) in zip(roots, pairwise(signs), strict=True) if left != right]


def _pieces(cuts: list[float], span: tuple[float, float]) -> list[tuple[float, float]]:
    edges = [span[0], *cuts, span[1]]
    return list(pairwise(edges))


def _value(poly: sympy.Poly, x: float) -> float:
    return float(poly.eval(sympy.Rational(x)))


def evaluate(expression: sympy.Expr, x: Any) -> Any:
    """Evaluates an expression of sums, products and whole powers at `x`, keeping its order of operations.

    `x` may be a number or a tensor: on a tensor this is what puts the Horner form into the graph.
    """
    if expression.is_Symbol:
        return x
    if expression.is_Number:
        return float(expression)
    if expression.is_Pow:  # a gap between the terms
        return evaluate(expression.base, x) ** int(expression.exp)
    terms = [evaluate(argument, x) for argument in sorted(expression.args, key=lambda term: bool(term.is_Number))]
    return functools.reduce(operator.mul if expression.is_Mul else operator.add, terms)
