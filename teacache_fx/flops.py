"""Floating-point operations of the nodes that dominate a transformer: matrix products, convolutions, attention.

A multiplication and an addition count as two operations, as in `torch.utils.flop_counter`, from which the counts of
convolutions and attention are taken; pointwise work is left out, as there. The counts are products of sizes, so under
dynamic shapes they are symbolic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from teacache_fx.einsum import einsum_flops
from teacache_fx.graph import fake_tensors, op_name
from teacache_fx.opaque import opaque_module
from teacache_fx.sizes import UNKNOWN_SIZE, Size, captured


def is_matmul(node: fx.Node) -> bool:
    """Whether the node multiplies matrices: linear, matmul, convolution, attention, einsum."""
    return op_name(node) in _FORMULAS


def flops(node: fx.Node) -> Any:
    """Floating-point operations of one node: an int, or symbolic; 0 for what is not a matrix product."""
    return _count(node, lambda size: size)


def captured_flops(nodes: Iterable[fx.Node]) -> int:
    """The same of several nodes as a number, with sizes as at capture, or 64; reckoned without symbols, since it is
    only compared with others of its kind.
    """
    return sum(_count(node, _captured) for node in nodes)


def _captured(size: Size) -> int:
    number = captured(size)
    return UNKNOWN_SIZE if number is None else number


def _count(node: fx.Node, size: Callable[[Any], Any]) -> Any:
    formula = _FORMULAS.get(op_name(node))
    if formula is None or not fake_tensors(node):
        return 0
    try:
        return formula(_Call(node, size))
    except (IndexError, KeyError, TypeError, ValueError):  # called in a way that torch allows and we do not know
        return 0


class _Call:
    """Sizes of what a node takes and gives, each as `size` makes it."""

    def __init__(self, node: fx.Node, size: Callable[[Any], Any]) -> None:
        self.node, self._size = node, size
        self.out = tuple(map(size, fake_tensors(node)[0].shape))

    def argument(self, position: int, name: str = "") -> Any:
        """An argument as the node has it.

        Raises:
            KeyError: there is none.
        """
        return self.node.args[position] if position < len(self.node.args) else self.node.kwargs[name]

    def shape(self, position: int, name: str = "") -> tuple[Any, ...]:
        """Sizes of a tensor argument."""
        return self.shape_of(self.argument(position, name))

    def shape_of(self, argument: Any) -> tuple[Any, ...]:
        """Sizes of the tensor that a node yields.

        Raises:
            TypeError: the argument is no node.
            IndexError: it yields no tensor.
        """
        if not isinstance(argument, fx.Node):
            raise TypeError(f"a tensor must be a node, got {type(argument).__name__}")
        return tuple(map(self._size, fake_tensors(argument)[0].shape))


def _matmul(call: _Call) -> Any:
    return 2 * math.prod(call.out) * call.shape(0, "input")[-1]


def _reflected_matmul(call: _Call) -> Any:
    return 2 * math.prod(call.out) * call.shape(1)[-1]


def _added_matmul(call: _Call) -> Any:
    name = {"addmm": "mat1", "baddbmm": "batch1", "addmv": "mat"}.get(op_name(call.node), "")
    return 2 * math.prod(call.out) * call.shape(1, name)[-1]


def _added_batches(call: _Call) -> Any:
    batch, _, contracted = call.shape(1, "batch1")
    return 2 * math.prod(call.out) * batch * contracted


def _tensordot(call: _Call) -> Any:
    """`dims` is a number or two lists; aten takes the two lists as two arguments."""
    left = call.shape(0, "a")
    dims: Any = call.node.kwargs.get("dims", call.node.args[2] if len(call.node.args) > 2 else 2)
    if not isinstance(dims, int):
        dims = dims[0] if isinstance(dims[0], (list, tuple)) else dims
    contracted = left[len(left) - dims :] if isinstance(dims, int) else [left[dim] for dim in dims]
    return 2 * math.prod(call.out) * math.prod(contracted)


def _einsum(call: _Call) -> Any:
    operands: list[Any] = list(call.node.args)
    equation = operands.pop(0)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    return einsum_flops(str(equation), [call.shape_of(operand) for operand in operands])


def _convolution(call: _Call) -> Any:
    weight = call.shape(1, "weight")
    if op_name(call.node) == "convolution" and call.node.args[6]:
        return _transposed_convolution(call)
    return 2 * math.prod(call.out) * math.prod(weight[1:])


def _transposed_convolution(call: _Call) -> Any:
    return 2 * math.prod(call.shape(0, "input")) * math.prod(call.shape(1, "weight")[1:])


def _attention(call: _Call) -> Any:
    """Scores take 2 * width for each query and key, and the weighted sum likewise; masks and blocks save nothing."""
    width, tokens = call.shape(0, "query")[-1], call.shape(1, "key")[-2]
    return 2 * math.prod(call.out[:-1]) * (width + call.out[-1]) * tokens


def _multi_head_attention(call: _Call) -> Any:
    """Of `torch.nn.functional.multi_head_attention_forward`: tokens first, then an optional batch, then width."""
    query, key, value = call.shape(0, "query"), call.shape(1, "key"), call.shape(2, "value")
    width, queries = query[-1], math.prod(query[:-1])
    projections = 2 * width * (queries * (width + call.out[-1]) + math.prod(key) + math.prod(value))
    return projections + 4 * queries * key[0] * width


def _encoder_layer(call: _Call) -> Any:
    """Of `torch._transformer_encoder_layer_fwd`, which `torch.nn.TransformerEncoderLayer` becomes: batch first."""
    source = call.shape(0)
    weights = sum(math.prod(call.shape(position)) for position in (3, 5, 14, 16))
    return 2 * math.prod(source[:-1]) * (weights + 2 * source[-2] * source[-1])


def _opaque_module(call: _Call) -> Any:
    """As counted when the model was called to find out what breaks its graph."""
    module = opaque_module(int(call.argument(1)))
    return module.flops if module is not None else 0


_FORMULAS: dict[str, Callable[[_Call], Any]] = {
    **dict.fromkeys(("linear", "matmul", "__matmul__", "linalg_matmul", "bmm", "mm", "mv", "dot", "vdot"), _matmul),
    **dict.fromkeys(("inner", "_int_mm", "_scaled_mm", "_grouped_mm", "grouped_mm"), _matmul),
    "__rmatmul__": _reflected_matmul,
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_", "addmv", "addmv_"), _added_matmul),
    **dict.fromkeys(("addbmm", "addbmm_"), _added_batches),
    "tensordot": _tensordot,
    "einsum": _einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_conv_forward"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed_convolution),
    **dict.fromkeys(("scaled_dot_product_attention", "flex_attention"), _attention),
    "multi_head_attention_forward": _multi_head_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "call_module": _opaque_module,
}
