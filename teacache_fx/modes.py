"""Takes out of a graph what switches a mode that is so already."""

from __future__ import annotations

import torch
from torch import fx

from teacache_fx.graph import copy_graph_module, op_name


def without_idle_modes(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy without the switches that change nothing; the graph itself if it has none.

    Many models compute their rotary tables under `torch.autocast(enabled=False)`. Where autocast is off anyway, and
    dynamo guards that it stays so, such a switch is only in the way of what moves into a branch.
    """
    idle = [node for node in gm.graph.nodes if _is_idle(node)]
    if not idle or any(_turns_autocast_on(node) for node in gm.graph.nodes):
        return gm
    gm = copy_graph_module(gm)
    for node in reversed([node for node in gm.graph.nodes if _is_idle(node)]):
        gm.graph.erase_node(node)
    return gm


def _is_idle(node: fx.Node) -> bool:
    name = op_name(node)
    if name == "_exit_autocast":
        entered = node.args[0]
        return isinstance(entered, fx.Node) and _is_idle(entered)
    if name == "_enter_autocast":
        device, enabled = str(node.args[0]), node.args[2]
        return enabled is False and not torch.is_autocast_enabled(device)
    return name == "_set_grad_enabled" and node.args[0] is False and not torch.is_grad_enabled()


def _turns_autocast_on(node: fx.Node) -> bool:
    return op_name(node) == "_enter_autocast" and node.args[2] is not False
