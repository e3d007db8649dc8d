"""What is proven of sizes that vary: what is true is; what is not is never claimed; and nothing is guarded on."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from teacache_fx.size_names import arranged, value_at
from teacache_fx.sizes import UNKNOWN_SIZE, captured, captured_symbols, expression, fixed, proven_equal, proven_less

Rule: TypeAlias = Callable[[tuple[Any, Any]], Any]

ALIKE = 8
"""Captured for every size: sizes that are equal now must not be taken for equal always."""

EQUAL = [
    ("b", "b"),
    ("b * t", "t * b"),
    ("(b + 1) * (t + 1)", "b * t + b + t + 1"),
    ("b**2 // b", "b"),
    ("6 * b // 2", "3 * b"),
    ("b * t // t", "b"),
    ("(b + 4) // 2", "b // 2 + 2"),
    ("(b + 1) // 2 + b // 2", "b"),
    ("4 * (b // 4) + b % 4", "b"),
    ("b // 2 // 2", "b // 4"),
    ("largest(b, t)", "largest(t, b)"),
    ("largest(b, 1)", "b"),  # dynamo makes a symbol of no size that is 0 or 1
    ("least(b, 1)", "1"),
]
UNEQUAL = [
    ("b", "t"),
    ("b", "8"),
    ("2 * (b // 2)", "b"),
    ("b // 2 * (t // 2)", "b * t // 4"),
    ("(b + 1) // 2", "b // 2"),
    ("largest(b, t)", "least(b, t)"),
    ("largest(b, 4)", "b"),
    ("b % 4", "0"),
]
LESS = [
    ("-1", "b"),
    ("1", "b"),
    ("b", "b + 1"),
    ("b", "b + t"),
    ("b", "b * t"),
    ("-b", "0"),
    ("3", "4"),
]
NOT_LESS = [
    ("b", "b"),
    ("2", "b"),
    ("b - 1", "t"),
    ("b", "9"),
    ("0", "b - t + 1"),
    ("b // 3", "b // 2"),
    ("4", "4"),
]


def symbols(env: ShapeEnv, *names: str) -> list[Any]:
    """Sizes of at least 2, as dynamo makes them for dynamic dimensions."""
    sources = [ConstantSource(name) for name in names]
    made = [env.create_symbol(ALIKE, source, dynamic_dim=DimDynamic.DYNAMIC) for source in sources]
    return [env.create_symintnode(s, hint=ALIKE, source=source) for s, source in zip(made, sources, strict=True)]


def proven(relation: Callable[[Any, Any], bool], left: str, right: str) -> bool:
    env = ShapeEnv()
    b, t = symbols(env, "b", "t")
    known = {"b": b, "t": t, "largest": torch.sym_max, "least": torch.sym_min}
    result = relation(eval(left, known), eval(right, known))
    assert not env.guards
    return result


@pytest.mark.parametrize(("left", "right"), EQUAL)
def test_equal(left: str, right: str) -> None:
    assert proven(proven_equal, left, right)
    assert not proven(proven_less, left, right)


@pytest.mark.parametrize(("left", "right"), UNEQUAL)
def test_not_claimed_equal(left: str, right: str) -> None:
    assert not proven(proven_equal, left, right)


@pytest.mark.parametrize(("left", "right"), LESS)
def test_less(left: str, right: str) -> None:
    assert proven(proven_less, left, right)
    assert not proven(proven_equal, left, right)


@pytest.mark.parametrize(("left", "right"), NOT_LESS)
def test_not_claimed_less(left: str, right: str) -> None:
    assert not proven(proven_less, left, right)


OF_TWO = (operator.add, operator.mul, operator.sub, torch.sym_max, torch.sym_min)
BY_NUMBER = (operator.floordiv, operator.mod, operator.mul, operator.add)


def rules() -> st.SearchStrategy[Rule]:
    """Sizes that are made of two others."""
    leaves = st.sampled_from([operator.itemgetter(0), operator.itemgetter(1)])

    def extend(inner: st.SearchStrategy[Rule]) -> st.SearchStrategy[Rule]:
        both = st.builds(_combined, st.sampled_from(OF_TWO), inner, inner)
        return both | st.builds(_with_number, st.sampled_from(BY_NUMBER), inner, st.integers(1, 4))

    return st.recursive(leaves, extend, max_leaves=4)


def _combined(operation: Callable[..., Any], left: Rule, right: Rule) -> Rule:
    return lambda sizes: operation(left(sizes), right(sizes))


def _with_number(operation: Callable[..., Any], inner: Rule, number: int) -> Rule:
    return lambda sizes: operation(inner(sizes), number)


@given(rules(), rules())
@settings(max_examples=100, deadline=None)
def test_what_is_proven_holds_and_what_is_written_is_right(left: Rule, right: Rule) -> None:
    env = ShapeEnv()
    b, t = symbols(env, "b", "t")
    sizes = left((b, t)), right((b, t))
    is_equal, is_less = proven_equal(*sizes), proven_less(*sizes)
    written = expression(sizes[0])
    names = [symbol.node.expr for symbol in (b, t)]
    assert not env.guards
    for values in itertools.product(range(2, 7), range(2, 7)):
        one, other = left(values), right(values)
        assert not is_equal or one == other
        assert not is_less or one < other
        assert written.subs(dict(zip(names, values, strict=True))) == one


def test_sizes_that_only_running_tells() -> None:
    env = ShapeEnv()
    unknown, another = env.create_unbacked_symint(), env.create_unbacked_symint()
    assert captured(unknown) is None
    assert fixed(unknown) is None
    assert list(captured_symbols(unknown).values()) == [None]
    assert proven_equal(unknown, unknown)
    assert proven_equal(2 * unknown + another, another + unknown + unknown)
    assert not proven_equal(unknown, another)
    assert not proven_equal(unknown, UNKNOWN_SIZE)
    assert not proven_less(-1, unknown), "it may be negative"
    torch._check(unknown >= 3)  # type: ignore[no-untyped-call]
    assert proven_less(2, unknown)
    assert not proven_less(3, unknown)
    (size,) = symbols(env, "b")
    assert proven_less(size, size + unknown)
    assert not env.guards


def test_a_size_that_is_the_same_in_every_call() -> None:
    (size,) = symbols(ShapeEnv(), "b")
    assert fixed(7) == 7
    assert fixed(size) is None
    assert fixed(size - size + 4) == 4


def test_expressions_are_written_with_common_sizes_first() -> None:
    batch, tokens = sympy.symbols("batch tokens", positive=True, integer=True)
    term = arranged(2 * batch * tokens**2 + 4 * batch * tokens)
    assert str(term) == "batch*tokens*(2*tokens + 4)"
    assert value_at(term, {"batch": 3, "tokens": 5}) == 3 * 5 * 14
    assert arranged(sympy.Integer(3)) == 3
    assert type(arranged(batch - batch + 2)) is int
    rounded = batch * sympy.floor(tokens / 2)
    assert value_at(arranged(rounded), {"batch": 3, "tokens": 5}) == 6
