"""Marks that an extractor leaves in a graph while it is captured."""

from __future__ import annotations

import torch
from torch import fx

from teacache_fx.graph import copy_graph_module


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def mark_value(value: torch.Tensor, role: str) -> torch.Tensor:  # noqa: ARG001 - read from the graph
    """Says which role a value of the graph plays; dynamo keeps the call as a node without looking inside."""
    return value


def take_marks(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str]]:
    """A copy without the marks, and the names of the nodes that they marked, by role; the graph itself if it has none.

    Where a role was given twice, the last one counts.
    """
    if not any(node.target is mark_value for node in gm.graph.nodes):
        return gm, {}
    gm = copy_graph_module(gm)
    marked = {}
    for node in [node for node in gm.graph.nodes if node.target is mark_value]:
        value, role = node.args
        marked[role] = value.name
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
    return gm, marked
