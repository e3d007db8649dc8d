"""The published polynomials, and what is said about a polynomial, against numpy."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacache_fx.coefficients import (
    IDENTITY,
    WORKING_RANGE,
    PolynomialFacts,
    PublishedPolynomial,
    evaluate,
    horner,
    polynomial_facts,
    published,
    published_names,
)

Floats = npt.NDArray[np.float64]
GRID: Floats = np.linspace(*WORKING_RANGE, 30_001)
THOROUGH = settings(max_examples=100, deadline=None, derandomize=True)
NUMBERS = st.floats(-1000, 1000).filter(lambda number: abs(number) > 1e-3)
ROOTS = st.lists(st.floats(-0.1, 0.4).map(lambda root: round(root, 3)), min_size=0, max_size=4)


def row(name: str) -> PublishedPolynomial:
    """A row of the table."""
    found = published(name)
    assert found is not None
    return found


DISTINCT = sorted({row(name).coefficients for name in published_names()})
FULL = [coefficients for coefficients in DISTINCT if all(coefficients[:-1])]
SPARSE = [coefficients for coefficients in DISTINCT if coefficients not in FULL]


def magnitude(coefficients: tuple[float, ...], x: Any) -> Any:
    """Size of the terms that cancel in poly(x): rounding errors are in proportion to it."""
    return np.polyval(np.abs(coefficients), np.abs(x))


def clear_signs(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """Sign of the polynomial on the grid, 0 where rounding leaves it open."""
    values = np.polyval(coefficients, x)
    signs: Floats = np.where(np.abs(values) > 1e-11 * magnitude(coefficients, x), np.sign(values), 0)
    return signs


def between(low: float, high: float) -> npt.NDArray[np.bool_]:
    """Which points of the grid lie strictly between the two."""
    inside: npt.NDArray[np.bool_] = np.greater(GRID, low) & np.less(GRID, high)
    return inside


def check_facts(coefficients: tuple[float, ...]) -> PolynomialFacts:
    """Holds what sympy finds against the polynomial's and its derivative's signs on a fine grid."""
    facts = polynomial_facts(coefficients)
    inside = np.zeros(GRID.shape, dtype=bool)
    for low, high in facts.negative:
        assert WORKING_RANGE[0] <= low <= high <= WORKING_RANGE[1]
        inside |= between(low, high)
    outside = ~inside
    signs = clear_signs(coefficients, GRID)
    assert not (inside & (signs > 0)).any()
    assert not (outside & (signs < 0) & ~np.isin(GRID, facts.negative)).any()

    assert list(facts.turning_points) == sorted(facts.turning_points)
    slope = tuple(float(number) for number in np.polyder(np.array(coefficients)))
    rising = [
        {float(sign) for sign in clear_signs(slope, GRID[between(low, high)])} - {0.0}
        for low, high in pairwise((WORKING_RANGE[0], *facts.turning_points, WORKING_RANGE[1]))
    ]
    assert all(len(signs) <= 1 for signs in rising)
    assert all(left != right for left, right in pairwise(rising) if left and right)
    return facts


def test_the_table_is_well_formed() -> None:
    names = published_names()
    assert len(names) == len(set(names)) == 43
    for name in names:
        found = row(name)
        assert found.name == name
        assert found.source.strip()
        assert found.indicator.strip()
        assert len(found.coefficients) >= 2
        assert all(type(number) is float and math.isfinite(number) for number in found.coefficients)
        assert all(
            float(thresh) > 0 and speedup for thresh, speedup in found.rel_l1_thresh.items() if thresh[0].isdigit()
        )


def test_a_class_finds_only_rows_fitted_on_the_modulated_input() -> None:
    assert row("LatteTransformer3DModel").name == "LatteT2V / LatteTransformer3DModel"
    assert {row(name).indicator for name in published_names()} > {"first_block_modulated_input", "time_embedding"}
    by_class = ["WanTransformer3DModel", "CogVideoXTransformer3DModel", "HiDreamImageTransformer2DModel", "", "None"]
    assert [published(name) for name in by_class] == [None] * len(by_class)


@pytest.mark.parametrize("coefficients", DISTINCT, ids=lambda coefficients: f"{coefficients[0]:g}")
def test_facts_of_the_published_polynomials(coefficients: tuple[float, ...]) -> None:
    facts = check_facts(coefficients)
    values = np.polyval(coefficients, GRID)
    assert bool(facts.negative) == bool((values < 0).any())
    steps = np.diff(values)
    assert bool(facts.turning_points) == bool((steps > 0).any() and (steps < 0).any())


def test_how_many_published_polynomials_misbehave() -> None:
    curves = [np.polyval(coefficients, GRID) for coefficients in DISTINCT]
    assert len(curves) == 37
    assert sum(bool((curve < 0).any()) for curve in curves) == 17
    falls = [bool((np.diff(curve) < 0).any()) for curve in curves]
    rises = [bool((np.diff(curve) > 0).any()) for curve in curves]
    assert sum(falls) == 28
    assert sum(fall and not rise for fall, rise in zip(falls, rises, strict=True)) == 2  # so 26 turn somewhere
    facts = [polynomial_facts(coefficients) for coefficients in DISTINCT]
    assert (sum(bool(f.negative) for f in facts), sum(bool(f.turning_points) for f in facts)) == (17, 26)


@THOROUGH
@given(ROOTS, NUMBERS)
def test_facts_of_polynomials_with_roots_in_the_range(roots: list[float], scale: float) -> None:
    check_facts(tuple(float(number) for number in scale * np.atleast_1d(np.poly(roots))))


@THOROUGH
@given(st.lists(st.floats(-100, 100).map(lambda number: round(number, 6)), min_size=1, max_size=6))
def test_facts_of_any_polynomial(coefficients: list[float]) -> None:
    check_facts(tuple(coefficients))


@pytest.mark.parametrize(
    ("coefficients", "negative", "turning_points"),
    [
        ((0.0,), [], []),
        ((-1.0,), [(0, 0.3)], []),
        (IDENTITY, [], []),
        ((0.0, 0.0, 1.0, -0.1), [(0, 0.1)], []),  # leading zeros
        ((1.0, -0.2, 0.01), [], [0.1]),  # touches zero at 0.1
        ((1.0, -0.3, 0.03, -0.001), [(0, 0.1)], []),  # triple root: crosses zero, level there, but keeps rising
        ((1.0, 0.0, 0.0), [], []),  # turns at 0, the edge
        ((1.0, -0.6, 0.09), [], []),  # turns at 0.3, the other edge
        ((1.0, -0.6, 0.11, -0.006), [(0, 0.1), (0.2, 0.3)], [0.2 - 0.1 / math.sqrt(3), 0.2 + 0.1 / math.sqrt(3)]),
    ],
)
def test_facts_in_special_cases(
    coefficients: tuple[float, ...], negative: list[tuple[float, float]], turning_points: list[float]
) -> None:
    # Decimals are not exact in binary: at an edge or a multiple root, a hair's breadth may be found on the wrong side.
    facts = polynomial_facts(coefficients)
    wide = [piece for piece in facts.negative if piece[1] - piece[0] > 1e-4]
    inner = [x for x in facts.turning_points if 1e-4 < x < 0.3 - 1e-4]
    assert np.array(wide).ravel() == pytest.approx(np.array(negative).ravel(), abs=1e-4)
    assert inner == pytest.approx(turning_points, abs=1e-4)


def test_facts_at_multiple_roots_that_are_exact() -> None:
    assert polynomial_facts((-1.0, 0.25, -0.015625)) == PolynomialFacts(((0.0, 0.3),), (0.125,))  # -(x - 1/8)²
    assert polynomial_facts((1.0, -0.375, 0.046875, -0.001953125)) == PolynomialFacts(((0.0, 0.125),), ())  # (x - 1/8)³


def test_facts_of_another_range() -> None:
    facts = polynomial_facts((1.0, -2.0, 0.75), (0.0, 2.0))
    assert facts == PolynomialFacts(((0.5, 1.5),), (1.0,))
    assert str(facts) == "negative on [0.5, 1.5] and not monotone (turns at 1)"
    assert polynomial_facts((1.0, -2.0, 0.75), (0.0, 0.5)) == PolynomialFacts((), (), falling=True)


def test_a_root_next_to_the_edge_leaves_no_empty_piece() -> None:
    coefficients = tuple(float(number) for number in -np.poly([0.3, 0.188]))
    assert np.array(polynomial_facts(coefficients).negative).ravel() == pytest.approx([0.0, 0.188])


def test_facts_of_huge_coefficients() -> None:
    assert polynomial_facts((1e308, 1e308, 1.0)) == PolynomialFacts((), ())


def check_evaluation(coefficients: tuple[float, ...], x: float) -> None:
    """Holds the Horner form against numpy.polyval on a float and on a float32 tensor."""
    expression = horner(coefficients)
    assert evaluate(expression, x) == pytest.approx(
        np.polyval(coefficients, x), rel=1e-12, abs=1e-12 * magnitude(coefficients, x)
    )
    narrow = np.float32(x)
    value = torch.as_tensor(evaluate(expression, torch.tensor(narrow)))
    assert value.dtype is torch.float32
    assert value.shape == ()
    wide = float(narrow)
    assert float(value) == pytest.approx(np.polyval(coefficients, wide), abs=2e-6 * magnitude(coefficients, wide))


@THOROUGH
@given(st.lists(NUMBERS, min_size=1, max_size=7), st.floats(-2, 2))
def test_horner_form_of_full_polynomials(coefficients: list[float], x: float) -> None:
    check_evaluation(tuple(coefficients), x)


@pytest.mark.parametrize("coefficients", FULL, ids=lambda coefficients: f"{coefficients[0]:g}")
@pytest.mark.parametrize("x", [0.0, 0.03, 0.3, 2.0])
def test_horner_form_of_the_published_polynomials(coefficients: tuple[float, ...], x: float) -> None:
    check_evaluation(coefficients, x)


@pytest.mark.parametrize("coefficients", [(0.5,), (-3.0,), (0.0,), IDENTITY, (0.0, 2.0, 1.0), (-1.0, 0.0), (5.0, -5.0)])
def test_horner_form_of_short_polynomials(coefficients: tuple[float, ...]) -> None:
    check_evaluation(coefficients, 0.375)


@pytest.mark.parametrize("coefficients", [*SPARSE, (2.0, 0.0, 0.0), (1.0, 0.0, 0.5), (3.0, 0.0, 1.0, 0.0, 0.0)])
def test_horner_form_with_zeros_between(coefficients: tuple[float, ...]) -> None:
    check_evaluation(coefficients, 0.375)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_horner_form_is_elementwise(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    value = evaluate(horner((3.0, -2.0, 0.5)), x)
    torch.testing.assert_close(value, 3 * x * x - 2 * x + 0.5)


def test_horner_form_takes_one_product_per_degree() -> None:
    expression = horner((498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861))
    assert sympy.count_ops(expression.xreplace({n: sympy.Symbol("c") for n in expression.atoms(sympy.Number)})) == 8
