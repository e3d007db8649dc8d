"""What the Python side of a step costs: choosing the state, passing it in, keeping what comes out, statistics on.

The compiled graph is replaced by one that returns at once what it returned before, so that nothing else is measured.
Dynamo's own guards, which every compiled model pays, are not in it.

    python -m benchmarks.call_overhead
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.compile_time import flux
from teacache_fx import TeaCacheBackend, cache_context, graph_backend, session
from teacache_fx.runtime import CachedGraph


def main() -> None:
    """Prints microseconds per call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="calls per round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model, inputs = flux(19, 38, heads=2, head_dim=16)
    graph, arguments = captured(model, inputs)
    with torch.no_grad():
        returned = tuple(graph._compiled(*arguments))
    graph._compiled = lambda *_: returned
    print(f"FLUX of 19 + 38 blocks, {len(list(model.parameters()))} weights, {options.calls} calls in each round")
    for name, contexts in (
        ("unnamed", []),
        ("named", [cache_context(model, "cond")]),
        ("named, in a session", [session(model, "request"), cache_context(model, "cond")]),
    ):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            own = arguments[: -num_state_inputs(graph)]
            seconds = [timed(graph, own, options.calls) for _ in range(options.rounds)]
        print(f"{name:<20} {1e6 * statistics.median(seconds):6.1f} us per call (least {1e6 * min(seconds):.1f})")


def captured(model: nn.Module, inputs: dict[str, Any]) -> tuple[CachedGraph, Sequence[Any]]:
    """The graph that dynamo calls, and the arguments of a call with the state behind them."""
    graphs: list[CachedGraph] = []
    calls: list[Sequence[Any]] = []

    class Recording(CachedGraph):
        def __init__(self, compiled: Callable[..., Any], *rest: Any) -> None:
            def record(*arguments: Any) -> Any:
                calls.append(arguments)
                return compiled(*arguments)

            super().__init__(record, *rest)
            graphs.append(self)

    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    with torch.no_grad(), mock.patch.object(graph_backend, "CachedGraph", Recording):
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    return graphs[0], calls[0]


def num_state_inputs(graph: CachedGraph) -> int:
    """How many state tensors a call is given."""
    return len(graph._state_shapes._fakes)


def timed(graph: CachedGraph, arguments: Sequence[Any], calls: int) -> float:
    """Seconds per call."""
    started = time.perf_counter()
    for _ in range(calls):
        graph(*arguments)
    return (time.perf_counter() - started) / calls


if __name__ == "__main__":
    main()
