"""Floating-point operations of the nodes that dominate a transformer: matrix products, convolutions, attention.

A multiplication and an addition count as two operations, as in `torch.utils.flop_counter`; pointwise work is left out,
as there. The counts are products of sizes, so under dynamic shapes they are symbolic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from teacache_fx.graph import fake_tensors, op_name
from teacache_fx.opaque import opaque_flops

_PRODUCTS = {"matmul", "__matmul__", "bmm", "mm", "addmm", "baddbmm"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution", "_conv_forward"}
_TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_ATTENTION = {"scaled_dot_product_attention", "flex_attention"}
_HEAVY = _PRODUCTS | _CONVOLUTIONS | _TRANSPOSED | _ATTENTION | {"linear", "einsum"}


def is_matmul(node: fx.Node) -> bool:
    """Whether the node multiplies matrices: linear, matmul, convolution, attention, einsum."""
    return op_name(node) in _HEAVY


def flops(node: fx.Node) -> Any:
    """Floating-point operations of one node: an int, or symbolic; 0 for what is not a matrix product."""
    name = op_name(node)
    if name == "call_module":
        return opaque_flops(int(node.args[1]))  # type: ignore[arg-type]  # a handle
    if not is_matmul(node):
        return 0
    shapes = [argument.shape for source in node.all_input_nodes for argument in fake_tensors(source)[:1]]
    outputs = fake_tensors(node)
    if not outputs or len(shapes) < 2:
        return 0
    out = math.prod(outputs[0].shape)
    if name in _ATTENTION:
        return _attention_flops(shapes[0], shapes[1], out)
    if name in _TRANSPOSED:
        return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if name in _CONVOLUTIONS:
        return 2 * out * math.prod(shapes[1][1:])
    contracted = shapes[1][-1] if name in ("addmm", "baddbmm") else shapes[0][-1]
    return 2 * out * contracted


def _attention_flops(query: torch.Size, key: torch.Size, out: Any) -> Any:
    """Scores take 2 * [query] * tokens, and the weighted sum 2 * [out] * tokens."""
    tokens = key[-2]
    return 2 * (math.prod(query) + out) * tokens


def approximate(count: Any) -> float:
    """A number for a count that may be symbolic, without putting a guard on it: sizes are as at capture, or 64."""
    if not isinstance(count, torch.SymInt):
        return float(count)
    hint = getattr(count.node, "hint", None)
    if isinstance(hint, int):
        return float(hint)
    return float(count.node.expr.subs(dict.fromkeys(count.node.expr.free_symbols, 64)))


def total_flops(nodes: Iterable[fx.Node]) -> Any:
    """Sum over the nodes."""
    return sum(flops(node) for node in nodes)
