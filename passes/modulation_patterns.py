"""The named ways in which a first block lets the timestep into its tokens.

The matcher finds `modulated_input` by dataflow; these patterns then say what it found, in the terms of the field. They
name, they do not decide: a model with an unknown modulation is still cached, and its report says "unnamed".
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from teacache_fx.dataflow import view_source
from teacache_fx.flops import is_matmul
from teacache_fx.graph import is_user_input, op_name
from teacache_fx.module_paths import module_path

_ADD = {"add", "__add__", "__radd__", operator.add.__name__}
_MUL = {"mul", "__mul__", "__rmul__", operator.mul.__name__}
_NORMS = {"layer_norm", "rms_norm", "group_norm", "native_layer_norm", "fused_rms_norm"}
_CASTS = {"to", "type_as", "float", "half", "bfloat16", "contiguous", "dropout", "clone"}


@dataclass(frozen=True)
class Modulators:
    """What stands between the norm and the indicator.

    Attributes:
        scale, shift: timestep-dependent factor and summand, `None` where there is none.
        table: a learned table is added to the timestep's projection (`scale_shift_table`).
        in_block: the projection of the timestep belongs to the block itself, as in adaLN-zero.
        has_norm: a normalisation was found behind them.
        timed: the indicator depends on the timestep at all.
    """

    scale: fx.Node | None
    shift: fx.Node | None
    table: bool
    in_block: bool
    has_norm: bool
    timed: bool


@dataclass(frozen=True)
class ModulationPattern:
    """A name and the condition under which it holds."""

    name: str
    holds: Callable[[Modulators], bool]


def _both(found: Modulators) -> bool:
    return found.scale is not None and found.shift is not None


PATTERNS: tuple[ModulationPattern, ...] = (
    ModulationPattern("scale_shift_table", lambda found: _both(found) and found.table),
    ModulationPattern("adaLN-zero (scale + shift)", lambda found: _both(found) and found.in_block),
    ModulationPattern("shared modulation sliced per block (scale + shift)", _both),
    ModulationPattern("scale only", lambda found: found.scale is not None),
    ModulationPattern("shift only", lambda found: found.shift is not None),
    ModulationPattern("timestep inside the tokens", lambda found: found.has_norm and found.timed),
    ModulationPattern("no timestep before the first matmul", lambda found: not found.timed),
    ModulationPattern("unnamed", lambda _: True),
)


def name_pattern(indicator: fx.Node, timed: set[fx.Node], dependent: set[fx.Node], block: str) -> str:
    """The first pattern that holds for the indicator.

    Args:
        indicator: the modulated input.
        timed: all that depends on the timestep.
        dependent: all that depends on the latents.
        block: module path of the block that the indicator was found in; empty if it has none.
    """
    found = _modulators(indicator, dependent, timed, block)
    return next(pattern.name for pattern in PATTERNS if pattern.holds(found))


def strip(node: fx.Node) -> fx.Node:
    """Looks through casts, copies and views."""
    while op_name(node) in _CASTS or view_source(node) is not None:
        inputs = node.all_input_nodes
        if not inputs:
            break
        node = view_source(node) or inputs[0]
    return node


def _modulators(indicator: fx.Node, dependent: set[fx.Node], timed: set[fx.Node], block: str) -> Modulators:
    node, shift = _peel(strip(indicator), _ADD, dependent, timed)
    node, scale = _peel(node, _MUL, dependent, timed)
    is_decomposed_norm = op_name(node) in _MUL  # x * rsqrt(mean(x ** 2)): both factors depend on the latents
    has_norm = op_name(node) in _NORMS or is_decomposed_norm
    projection = _projection(shift if shift is not None else scale, block)
    return Modulators(scale, shift, *projection, has_norm, indicator in timed)


def _peel(node: fx.Node, ops: set[str], dependent: set[fx.Node], timed: set[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """Splits `tokens op modulator` into its two sides where the modulator depends on time and not on the latents."""
    if op_name(node) in ops and len(node.all_input_nodes) == 2:
        tokens = [argument for argument in node.all_input_nodes if argument in dependent]
        others = [argument for argument in node.all_input_nodes if argument not in dependent]
        if len(tokens) == 1 and others[0] in timed:
            return strip(tokens[0]), others[0]
    return node, None


def _projection(modulator: fx.Node | None, block: str) -> tuple[bool, bool]:
    """Whether a table is added on the way from the last projection to the modulator, and whether that is in a block."""
    todo, seen, table = [modulator] if modulator is not None else [], set[fx.Node](), False
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_matmul(node):
            return table, bool(block) and f"{module_path(node)}.".startswith(f"{block}.")
        parameters = [n for n in node.all_input_nodes if strip(n).op == "placeholder" and not is_user_input(strip(n))]
        table = table or (op_name(node) in _ADD and bool(parameters))
        todo += node.all_input_nodes
    return table, False
