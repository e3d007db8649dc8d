"""Readable names for the sizes that vary between calls: `batch` and `tokens` instead of dynamo's `s27` and `s77`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from teacache_fx.graph import argument_name, fake_value
from teacache_fx.sizes import UNKNOWN_SIZE, Size, captured, captured_symbols, expression

Count: TypeAlias = int | sympy.Expr
"""A number, or an expression over named sizes where shapes are dynamic."""

_DIMENSIONS = {
    2: {0: "batch"},
    3: {0: "batch", 1: "tokens"},
    4: {0: "batch", 2: "height", 3: "width"},
    5: {0: "batch", 1: "frames", 2: "frames", 3: "height", 4: "width"},  # of the two, the channels do not vary
}
_OF_A_TENSOR = {"size", "stride", "storage_offset"}  # dynamo hands these over as inputs of their own


@dataclass(frozen=True)
class SizeName:
    """A size that varies between calls.

    Attributes:
        name: such as `batch`, or `encoder_hidden_states_1` for a size of no common name.
        places: where the caller sets it, such as `hidden_states.shape[0]`; empty if only running the model tells.
        captured: its value at capture, or `UNKNOWN_SIZE`.
    """

    name: str
    places: tuple[str, ...]
    captured: int

    def __str__(self) -> str:
        where = f"{', '.join(self.places)}, {self.captured} at capture"
        return f"{self.name} = {where if self.places else 'known only after running the model'}"


class SizeNames:
    """The names of a graph's symbolic sizes, by what its inputs are called.

    Args:
        placeholders: inputs of the graph.
        latents: the one whose dimensions have names of their own.
    """

    def __init__(self, placeholders: Iterable[fx.Node], latents: fx.Node) -> None:
        self._symbols: dict[Any, sympy.Symbol] = {}  # dynamo's symbol -> the named one
        self._meanings: dict[sympy.Symbol, SizeName] = {}
        found: dict[Any, list[tuple[str, str, torch.SymInt]]] = {}
        for node in sorted(placeholders, key=lambda node: node is not latents):  # stable: the others keep their order
            for name, place, size in _sizes(node, node is latents):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(size.node.expr, []).append((name, place, size))
        for symbol, places in found.items():
            self._add(symbol, places[0][0], tuple(place for _, place, _ in places), captured(places[0][2]))

    def write(self, size: Size) -> Count:
        """The size over named symbols; an int if it is one."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        for symbol, value in captured_symbols(size).items():
            if symbol not in self._symbols:
                self._add(symbol, str(symbol), (), value)
        return arranged(expression(size).xreplace(self._symbols))

    def recorded(self, size: Size) -> str:
        """The size over named symbols as torch has recorded it, not simplified: `((batch**2)//batch)`."""
        self.write(size)  # names its symbols
        return str(size.node.expr.xreplace(self._symbols) if isinstance(size, torch.SymInt) else size)

    def meanings(self, counts: Iterable[Count]) -> tuple[SizeName, ...]:
        """What the names in these expressions mean, those of the latents first."""
        used = {symbol for count in counts if not isinstance(count, int) for symbol in count.free_symbols}
        return tuple(meaning for symbol, meaning in self._meanings.items() if symbol in used)

    def _add(self, symbol: Any, name: str, places: tuple[str, ...], value: int | None) -> None:
        if any(name == taken.name for taken in self._meanings.values()):
            name = f"{name}_{symbol}"
        named = self._symbols[symbol] = sympy.Symbol(name, integer=True, positive=symbol.is_positive)
        self._meanings[named] = SizeName(name, places, UNKNOWN_SIZE if value is None else value)


def _sizes(node: fx.Node, is_latents: bool) -> Iterator[tuple[str, str, Size]]:
    """Name, place and value of each size that an input has or is."""
    value, argument = fake_value(node), argument_name(node)
    if isinstance(value, torch.Tensor):
        common = _DIMENSIONS.get(value.ndim, {}) if is_latents else {}
        for dimension, size in enumerate(value.shape):
            yield common.get(dimension, f"{argument}_{dimension}"), f"{argument}.shape[{dimension}]", size
    elif isinstance(value, torch.SymInt) and argument not in _OF_A_TENSOR:
        yield argument, argument, value


def arranged(term: sympy.Expr) -> Count:
    """Sums of products, with the sizes that all products have in common before a bracket; an int if it is one."""
    term = sympy.expand(term)
    if term.is_Integer:
        return int(term)
    try:
        polynomial = sympy.Poly(term)
    except sympy.PolynomialError:  # not a sum of products
        return term
    least = [min(powers) for powers in zip(*polynomial.monoms(), strict=True)]
    common = sympy.prod(size**power for size, power in zip(polynomial.gens, least, strict=True))
    return common * sympy.expand(term / common)


def add(*counts: Count) -> Count:
    """The sum; an int where all are."""
    total = sum(counts)
    return total if isinstance(total, int) else arranged(total)


def value_at(count: Count, sizes: dict[str, int]) -> int:
    """The number that an expression gives for sizes by name."""
    if isinstance(count, int):
        return count
    return int(count.subs({symbol: sizes[symbol.name] for symbol in count.free_symbols}))
