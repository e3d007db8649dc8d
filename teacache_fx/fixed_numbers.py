"""Puts numbers into the graph that dynamo passes in but holds fixed.

Under `dynamic=True` dynamo makes an input of each float that a module has, such as the epsilon of a norm, and reads it
by `item()`. Where an operation has to know it, dynamo guards on the value; the reading stays behind, and a cond whose
branch does it cannot be compiled by inductor (torch 2.13).
"""

from __future__ import annotations

import torch
from torch import fx

from teacache_fx.graph import copy_graph_module, fake_value, op_name


def with_fixed_numbers(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which the numbers stand that dynamo guards on; the graph itself if it reads none."""
    if not any(_is_fixed(node) for node in gm.graph.nodes):
        return gm
    gm = copy_graph_module(gm)
    numbers = {node: float(fake_value(node).node.expr) for node in gm.graph.nodes if _is_fixed(node)}
    for node in gm.graph.nodes:
        if not numbers.keys().isdisjoint(node.all_input_nodes):
            node.args, node.kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda source: numbers.get(source, source)
            )
    for node in numbers:
        gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _is_fixed(node: fx.Node) -> bool:
    value = fake_value(node)
    return op_name(node) == "item" and isinstance(value, torch.SymFloat) and bool(value.node.expr.is_number)
