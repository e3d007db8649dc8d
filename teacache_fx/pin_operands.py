"""A pass for inductor that keeps it to the strides that the branches of a cond are compiled for.

Inductor compiles a branch for the strides that its operands have in the graph, but chooses the layout of the operands
themselves freely: a pointwise result that is computed from transposed data is stored transposed, and the branch then
refuses it at run time ("expected size ..., stride ... in op: input"; seen with torch 2.13 on the CPU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.inductor_prims import force_stride_order


class PinOperands(CustomGraphPass):
    """Fixes the layout of every intermediate operand of a cond to its strides in the graph.

    Args:
        user_pass: what `post_grad_custom_post_pass` was set to; it runs first.
    """

    def __init__(self, user_pass: Any = None) -> None:
        self._user_pass = user_pass

    def __call__(self, graph: fx.Graph) -> None:
        """Runs on the post-grad graph."""
        if self._user_pass is not None:
            self._user_pass(graph)
        for cond in graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
            *head, operands = cond.args
            with graph.inserting_before(cond):
                cond.args = (*head, tuple(self._pin(graph, operand) for operand in operands))

    def uuid(self) -> Any:
        """Key for the compile caches; `None`, which turns them off, where the user's pass has none."""
        if self._user_pass is None:
            return "teacache-fx-pin-operands-1"
        users = self._user_pass.uuid() if isinstance(self._user_pass, CustomGraphPass) else None
        return None if users is None else ("teacache-fx-pin-operands-1", users)

    @staticmethod
    def _pin(graph: fx.Graph, operand: Any) -> Any:
        value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
        if not isinstance(value, torch.Tensor) or operand.op != "call_function":
            return operand
        strides = [_as_argument(graph, operand, dimension, stride) for dimension, stride in enumerate(value.stride())]
        pinned = graph.call_function(force_stride_order, (operand, strides))
        pinned.meta["val"] = value
        return pinned


def _as_argument(graph: fx.Graph, operand: fx.Node, dimension: int, stride: Any) -> Any:
    """A stride as an argument of a node: a symbolic one has to be asked from the tensor in the graph."""
    if not isinstance(stride, torch.SymInt):
        return stride
    node = graph.call_function(torch.ops.aten.sym_stride.int, (operand, dimension))
    node.meta["val"] = stride
    return node
