"""How the time of the passes grows with the graph: twice as many blocks should take about twice as long.

Five models that ask different things of the passes, each captured with 2^k blocks until the graph is large enough. The
width is small, since it does not change the graph. Times are CPU seconds, the least of several rounds, without garbage
collection: a full one walks over all that dynamo has made, 0.7 s at 23,000 nodes, and comes or does not come. Capturing
takes far longer than what is measured here.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --dynamic    # the same under symbolic shapes
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from benchmarks.deep_models import CHANNELS, MODELS, TOKENS
from teacache_fx.config import TeaCacheConfig
from teacache_fx.pipeline import Pipeline


@dataclass(frozen=True)
class Timing:
    """CPU seconds for one graph."""

    num_blocks: int
    num_nodes: int
    capture: float
    analysis: float
    rewriting: float


def capture(model: nn.Module, use: Callable[[fx.GraphModule], Any], dynamic: bool = False) -> None:
    """Calls `use` with the graph of one step, as dynamo hands it to a backend."""

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        use(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        compiled(torch.randn(2, TOKENS, CHANNELS), torch.full((2,), 0.9))


def timed(kind: Callable[[int], nn.Module], num_blocks: int, rounds: int, dynamic: bool = False) -> Timing:
    """Captures the model once and rewrites the graph several times."""
    config = TeaCacheConfig(coefficients=(1.0, 0.0)).resolve("")
    found: list[Timing] = []

    def measure(gm: fx.GraphModule) -> None:
        captured = time.process_time() - started
        times = []
        for _ in range(rounds):
            gc.collect()
            gc.disable()
            began = time.process_time()
            pipeline = Pipeline(gm)
            plan = pipeline.analyse()
            analysed = time.process_time()
            pipeline.rewrite(config)
            times.append((analysed - began, time.process_time() - analysed))
            gc.enable()
        assert plan.stack.num_blocks == num_blocks
        analysis, rewriting = map(min, zip(*times, strict=True))
        found.append(Timing(num_blocks, len(gm.graph.nodes), captured, analysis, rewriting))

    torch.manual_seed(0)
    model = kind(num_blocks).eval().requires_grad_(False)
    started = time.process_time()
    capture(model, measure, dynamic)
    return found[0]


def doubled(
    kind: Callable[[int], nn.Module], least: int, most: int, rounds: int, dynamic: bool = False
) -> Iterator[Timing]:
    """Timings from about `least` nodes to at least `most`."""
    per_block = timed(kind, 8, 1).num_nodes // 8
    num_blocks = 1 << (least // per_block).bit_length()
    for doublings in itertools.count():
        timing = timed(kind, num_blocks << doublings, rounds, dynamic)
        yield timing
        if timing.num_nodes >= most:
            return


def main() -> None:
    """Prints a table; the ratios are to the line above, which has half as many blocks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--least", type=int, default=2500, help="nodes of the smallest graph")
    parser.add_argument("--most", type=int, default=20000, help="nodes that the largest graph has at least")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    parser.add_argument("--dynamic", action="store_true", help="batch and tokens are symbols")
    options = parser.parse_args()
    print(
        f"{'model':<12}{'blocks':>7}{'nodes':>8}{'capture':>10}{'analysis':>10}{'ratio':>7}{'rewriting':>11}{'ratio':>7}"
    )
    for name in options.models:
        former: Timing | None = None
        for now in doubled(MODELS[name], options.least, options.most, options.rounds, options.dynamic):
            ratios = (now.analysis / former.analysis, now.rewriting / former.rewriting) if former else ("", "")
            first, second = (f"{ratio:.2f}" if ratio else "" for ratio in ratios)
            print(
                f"{name:<12}{now.num_blocks:>7}{now.num_nodes:>8}{now.capture:>8.1f} s{now.analysis:>8.3f} s{first:>7}"
                f"{now.rewriting:>9.3f} s{second:>7}",
                flush=True,
            )
            former = now


if __name__ == "__main__":
    main()
