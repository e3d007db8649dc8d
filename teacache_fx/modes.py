"""Takes out of a graph what switches a mode that is so already."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from teacache_fx.graph import copy_graph_module, fake_tensors, op_name


def without_idle_modes(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy without the switches that change nothing; the graph itself if it has none.

    Many models compute their rotary tables under `torch.autocast(enabled=False)`, or with `dtype=torch.float32` where
    all is float32 already. Where autocast is off anyway, and dynamo guards that it stays so, such a switch is only in
    the way of what moves into a branch.
    """
    idle = {node.name for node in gm.graph.nodes if _is_idle(node)}
    if not idle or any(op_name(node) == "_enter_autocast" and node.name not in idle for node in gm.graph.nodes):
        return gm
    gm = copy_graph_module(gm)
    for node in reversed(list(gm.graph.nodes)):
        if node.name in idle:
            gm.graph.erase_node(node)
    return gm


def _is_idle(node: fx.Node) -> bool:
    name = op_name(node)
    if name == "_exit_autocast":
        entered = node.args[0]
        return isinstance(entered, fx.Node) and _is_idle(entered)
    if name == "_enter_autocast":
        device, dtype, enabled, *_ = node.args
        if torch.is_autocast_enabled(str(device)):
            return False
        return enabled is False or (dtype == torch.float32 and all(map(_is_float32, _inside(node))))
    return name == "_set_grad_enabled" and node.args[0] is False and not torch.is_grad_enabled()


def _inside(entered: fx.Node) -> Iterator[fx.Node]:
    """What is computed before the mode is left, and what it is computed from."""
    node = entered.next
    while node.op != "output" and entered not in node.args:
        yield node
        yield from node.all_input_nodes
        node = node.next


def _is_float32(node: fx.Node) -> bool:
    return all(not tensor.is_floating_point() or tensor.dtype == torch.float32 for tensor in fake_tensors(node))
