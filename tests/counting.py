"""FLOPs by torch's counter, and the graphs to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from teacache_fx.exported import graph_of
from teacache_fx.flops import flops


def counted(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of a call by torch's counter. Of attention it knows the plain form, and no kernel of the CPU."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*args, **kwargs)
    return int(counter.get_total_flops())


def flops_of(graph: fx.Graph) -> int:
    """FLOPs of all nodes by our formulas."""
    return sum(int(flops(node)) for node in graph.nodes)


def captured(function: Callable[..., Any], *inputs: Any) -> fx.Graph:
    """The graph that dynamo hands to a backend."""
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm.graph)
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return graphs[0]


class Calling(nn.Module):
    """What export asks for: a module around a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def exported(function: Callable[..., Any], *inputs: Any) -> fx.Graph:
    """The graph of an exported program."""
    with torch.no_grad():
        return graph_of(torch.export.export(Calling(function), inputs, strict=False)).graph
