"""Lets a rewritten graph take state tensors of varying sizes from the beginning of flat buffers."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from teacache_fx.graph import emit, fake_mode_of, set_fake_value, tensor_of
from teacache_fx.plan import CachePlan

_aten = torch.ops.aten


def take_from_flat(gm: fx.GraphModule, plan: CachePlan, names: Sequence[str], buffers: Sequence[Tensor]) -> None:
    """Edits the graph: these inputs become flat, and are viewed with the sizes that they have in the call.

    Args:
        gm: the rewritten graph.
        plan: of the graph; tells what each tensor is as large as.
        names: of all state tensors, in the order of the signature.
        buffers: flat, for each of them; one that is not flat stays as it is.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    bases = [live.base for live in plan.stack.live_outputs]
    sized = (plan.modulation.modulated_input, *bases, plan.stack.latents)
    with fake_mode_of(gm.graph):
        for name, like, buffer in zip(names, sized, buffers, strict=True):
            if buffer.ndim == 1:
                _take(gm.graph, nodes.get(f"teacache_{name}", nodes[name]), nodes[like], buffer)
    gm.recompile()


def _take(graph: fx.Graph, flat: fx.Node, like: fx.Node, buffer: Tensor) -> None:
    users = list(flat.users)
    first = next(node for node in graph.nodes if node in flat.users)
    set_fake_value(flat, torch.empty(buffer.shape, dtype=buffer.dtype, device=buffer.device))
    ndim = tensor_of(like).ndim
    with graph.inserting_before(first):
        sizes = [emit(graph, _aten.sym_size.int, like, dimension) for dimension in range(ndim)]
        count = sizes[0]
        for size in sizes[1:]:
            count = emit(graph, operator.mul, count, size)
        part = emit(graph, _aten.narrow.default, flat, 0, 0, count)
        shaped = emit(graph, _aten.view.default, part, sizes)
    for user in users:
        user.replace_input_with(flat, shaped)
