"""Sizes that vary between calls: how to write them in plain sympy, and what is certain about them.

Under dynamic shapes a size is an expression over dynamo's symbols. Torch compares two of them nearly as they are
written, and so does not know that `(batch**2) // batch` is `batch`. Here torch's own functions are put into those of
sympy, which simplifies them. What is proven holds for all sizes that the graph may be called with: the range of each
symbol is known, no guard is added, and the captured sizes are never taken for a proof.

All use of torch's symbolic functions stands in this file. Tried on torch 2.13.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy import functions
from torch.utils._sympy.value_ranges import bound_sympy

Size: TypeAlias = int | torch.SymInt

UNKNOWN_SIZE = 64
"""Taken for a size that only running the model tells, where a number is wanted."""

_UNLIMITED = 1 << 48  # torch writes "no limit" as one of its largest integers
_MOST_CASES = 64  # of one proof


def expression(size: Size) -> sympy.Expr:
    """The size in plain sympy (floor, ceiling, Max and so on) over dynamo's symbols, expanded."""
    if not isinstance(size, torch.SymInt):
        return sympy.Integer(size)
    node = size.node
    # Simplified by what the graph's guards say of divisibility, since that turns a rounded quotient into an exact one.
    return sympy.expand(_plain(node.shape_env.simplify(node.expr)))


def captured(size: Size) -> int | None:
    """The size at capture, without a guard on it; `None` for what is known only after running the model."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = getattr(size.node, "hint", None)
    return hint if isinstance(hint, int) else None


def limits(size: Size) -> tuple[int, int | None]:
    """The smallest and the largest value of a size, from the limits of its symbols; `None` for no upper limit."""
    if not isinstance(size, torch.SymInt):
        return int(size), int(size)
    bounds = bound_sympy(size.node.expr, size.node.shape_env.var_to_range)
    is_limited = bounds.upper.is_Integer and bounds.upper < _UNLIMITED
    return int(bounds.lower) if bounds.lower.is_Integer else 0, int(bounds.upper) if is_limited else None


def fixed(size: Size) -> int | None:
    """The size if it is plain that it is the same in every call, else `None`."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.expr) if size.node.expr.is_Integer else None


def captured_symbols(size: torch.SymInt) -> dict[sympy.Symbol, int | None]:
    """The symbols that a size is made of, each with its value at capture, `None` if only running the model tells."""
    values = getattr(size.node.shape_env, "backed_var_to_val", {})  # it had another name before torch 2.12
    symbols = sorted(size.node.expr.free_symbols, key=str)
    return {symbol: int(values[symbol]) if symbol in values else None for symbol in symbols}


def proven_equal(left: Size, right: Size) -> bool:
    """Whether two sizes are equal in every call; unlike `==` it puts no guard on a symbolic size."""
    if statically_known_true(left == right):
        return True
    if not isinstance(left, torch.SymInt) and not isinstance(right, torch.SymInt):
        return False
    if captured(left) != captured(right):
        return False  # different now, hence not equal always
    return _is_zero(_from_bounds(left, right))


def proven_less(left: Size, right: Size) -> bool:
    """Whether the left size is less than the right one in every call; puts no guard on a symbolic size."""
    return _from_bounds(right, left).is_positive is True


def _from_bounds(left: Size, right: Size) -> sympy.Expr:
    """The difference of two sizes, each symbol counted from the least value that it may have.

    A size of at least 2 is then 2 plus something that is not negative, which sympy can decide the sign of sums by.
    """
    difference = expression(left) - expression(right)
    symbolic = (size for size in (left, right) if isinstance(size, torch.SymInt))
    ranges: dict[Any, Any] = next((size.node.shape_env.var_to_range for size in symbolic), {})
    shifts = {}
    for symbol in difference.free_symbols:
        least = ranges[symbol].lower if symbol in ranges else None
        if least is not None and least.is_Integer:
            shifts[symbol] = sympy.Symbol(symbol.name, integer=True, nonnegative=True) + least
    return sympy.expand(_plain(difference.xreplace(shifts)))


@functools.lru_cache(maxsize=1024)
def _is_zero(difference: sympy.Expr) -> bool:
    return difference.is_zero is True or all(case.is_zero is True for case in _cases(difference))


def _cases(term: sympy.Expr) -> Iterator[sympy.Expr]:
    """The term for each way in which its symbols can leave a rest in the divisions that are rounded.

    Whether `(h + 1) // 2` is `h // 2 + h % 2` is settled by `h = 2 k` and `h = 2 k + 1`: nothing is left to round.
    """
    rounded = [part.args[0] for part in term.atoms(sympy.floor, sympy.ceiling)]
    modulus = math.lcm(*(int(number.q) for part in rounded for number in part.atoms(sympy.Rational)))
    symbols = sorted(set().union(*(part.free_symbols for part in rounded)), key=str)
    if modulus ** len(symbols) > _MOST_CASES:
        yield term
        return
    for rests in itertools.product(range(modulus), repeat=len(symbols)):
        wholes = [sympy.Dummy(integer=True, nonnegative=symbol.is_nonnegative) for symbol in symbols]
        values = {symbol: modulus * k + rest for symbol, k, rest in zip(symbols, wholes, rests, strict=True)}
        yield sympy.expand(_plain(term.xreplace(values)))


def _plain(term: sympy.Expr) -> sympy.Expr:
    if not term.args:
        return term
    return _PLAIN.get(term.func, term.func)(*map(_plain, term.args))


def _floor(base: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    return sympy.floor(_quotient(base, divisor))


def _quotient(base: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
    return sympy.expand(sympy.cancel(base / divisor))


def _rounded(to_int: Any, rounding: Any) -> Callable[[sympy.Expr], sympy.Expr]:
    """Rounding of a true division of integers, which floating point gets right below 2**53."""

    def apply(number: sympy.Expr) -> sympy.Expr:
        if isinstance(number, functions.IntTrueDiv) and all(part.is_nonnegative for part in number.args):
            return rounding(_quotient(*number.args))
        return to_int(number)

    return apply


_PLAIN: dict[Any, Callable[..., sympy.Expr]] = {
    functions.FloorDiv: _floor,
    functions.CleanDiv: _quotient,  # known to leave no rest
    functions.PythonMod: lambda base, divisor: base - divisor * _floor(base, divisor),
    functions.Mod: lambda base, divisor: base - divisor * _floor(base, divisor),
    functions.Max: sympy.Max,
    functions.Min: sympy.Min,
    functions.Identity: lambda term: term,
    functions.PowByNatural: sympy.Pow,
    functions.CeilToInt: _rounded(functions.CeilToInt, sympy.ceiling),
    functions.FloorToInt: _rounded(functions.FloorToInt, sympy.floor),
    functions.TruncToInt: _rounded(functions.TruncToInt, sympy.floor),
    sympy.floor: lambda number: sympy.floor(sympy.expand(number)),
    sympy.ceiling: lambda number: sympy.ceiling(sympy.expand(number)),
}
