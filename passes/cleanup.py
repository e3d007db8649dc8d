"""Removes what the cond has replaced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from teacache_fx.dataflow import Dataflow
from teacache_fx.passes.base import PassContext


@dataclass(frozen=True)
class Cleanup:
    """Erases the nodes that no output and no effect needs: the blocks outside the branch, views that moved into it.

        x_embedder ─> blocks.0 ─> blocks.1 ─> (dead)          x_embedder ─┐
                 └──> cond ─> norm_out                  ==>               └──> cond ─> norm_out

    Placeholders stay, used or not: they are the graph's calling convention.
    """

    name: str = "cleanup"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        # First what has moved and what was dead before, whatever memory it writes to; a write that nothing read would
        # otherwise look as if the cond, which now stands behind it, needed it.
        moved = {*ctx.plan.partition.blocks, *ctx.plan.partition.dead}
        for node in reversed([node for node in gm.graph.nodes if node.name in moved]):
            gm.graph.erase_node(node)
        flow = Dataflow(gm.graph)
        dead = [node for node in flow.nodes if node not in flow.live and node.op != "placeholder"]
        for node in reversed(dead):
            gm.graph.erase_node(node)
        return bool(moved or dead)
