"""How the time of the passes grows with the graph: twice as many blocks should take about twice as long.

Five models that ask different things of the passes, each captured with 2^k blocks until the graph is large enough. The
width is small, since it does not change the graph. Times are CPU seconds, the least of several rounds; capturing takes
far longer than everything that is measured here.

    python -m benchmarks.scaling
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention, silu

from teacache_fx.config import TeaCacheConfig
from teacache_fx.pipeline import Pipeline

WIDTH, HEADS, CHANNELS, TOKENS = 32, 2, 4, 8
ROWS = {"modulation": 6, "qkv": 3, "proj": 1, "up": 2, "down": 1}
"""Width of what each weight of a block gives, in multiples of the model's."""

Weights: TypeAlias = nn.ParameterDict | dict[str, Tensor]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The affine change that the timestep makes to normalised tokens."""
    return layer_norm(x, (WIDTH,)) * (1 + scale) + shift


def attend(x: Tensor, weights: Weights) -> Tensor:
    """Self-attention over [batch, tokens, width]."""
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in linear(x, weights["qkv"]).chunk(3, -1))
    return linear(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), weights["proj"])


def run_block(x: Tensor, temb: Tensor, weights: Weights) -> Tensor:
    """adaLN-zero."""
    modulation = linear(silu(temb), weights["modulation"]).unsqueeze(1).chunk(6, -1)
    x = x + modulation[2] * attend(modulate(x, *modulation[:2]), weights)
    hidden = gelu(linear(modulate(x, *modulation[3:5]), weights["up"]))
    return x + modulation[5] * linear(hidden, weights["down"])


def run_block_in_place(x: Tensor, temb: Tensor, weights: Weights) -> Tensor:
    """Rotates by writing the halves of a new tensor, and adds to the one tensor that all blocks share."""
    rotated = torch.empty_like(x)
    rotated[..., 0::2] = -x[..., 1::2]
    rotated[..., 1::2] = x[..., 0::2]
    x += run_block(x + rotated, temb, weights)
    x += x.mean(1, keepdim=True)
    return x


class Block(nn.Module):
    """A block that owns its weights."""

    def __init__(self, run: Callable[[Tensor, Tensor, Weights], Tensor]) -> None:
        super().__init__()
        inner = {"down": ROWS["up"]}
        self.weights = nn.ParameterDict(
            {name: _weight(rows * WIDTH, inner.get(name, 1) * WIDTH) for name, rows in ROWS.items()}
        )
        self.run = run

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Tokens [batch, tokens, width] and the embedded timestep [batch, width]."""
        return self.run(x, temb, self.weights)


class Listed(nn.Module):
    """Blocks in a `ModuleList`: latents [batch, tokens, channels] in and out."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.x_embedder, self.proj_out = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time_embed = nn.Linear(2, WIDTH)
        self.build(num_blocks)

    def build(self, num_blocks: int, run: Callable[[Tensor, Tensor, Weights], Tensor] = run_block) -> None:
        """Makes the blocks."""
        self.blocks = nn.ModuleList(Block(run) for _ in range(num_blocks))

    def run_blocks(self, x: Tensor, temb: Tensor) -> Tensor:
        """The block stack."""
        for block in self.blocks:
            x = block(x, temb)
        return x

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """One denoising step."""
        temb = self.time_embed(torch.stack([timestep.sin(), timestep.cos()], -1))
        sample: Tensor = self.proj_out(self.run_blocks(self.x_embedder(hidden_states), temb))
        return sample


class Functional(Listed):
    """Blocks without modules, over weights that are stacked: only that the operations repeat tells them."""

    def build(self, num_blocks: int, run: Callable[[Tensor, Tensor, Weights], Tensor] = run_block) -> None:
        """Makes the weights of all blocks."""
        weights = [Block(run).weights for _ in range(num_blocks)]
        self.stacked = nn.ParameterDict({name: torch.stack([w[name].data for w in weights]) for name in ROWS})

    def run_blocks(self, x: Tensor, temb: Tensor) -> Tensor:
        """The block stack."""
        for weights in zip(*(self.stacked[name] for name in ROWS), strict=True):
            x = run_block(x, temb, dict(zip(ROWS, weights, strict=True)))
        return x


class InPlace(Listed):
    """All blocks write to one tensor and to others of their own."""

    def build(self, num_blocks: int, run: Callable[[Tensor, Tensor, Weights], Tensor] = run_block_in_place) -> None:
        """Makes the blocks."""
        super().build(num_blocks, run)


class Collected(Listed):
    """What each block gives is collected and added up behind the last one, as in a U-ViT or under deep supervision."""

    def run_blocks(self, x: Tensor, temb: Tensor) -> Tensor:
        """The block stack."""
        collected = [x]
        for block in self.blocks:
            collected.append(block(collected[-1], temb))
        return sum(collected[2:], collected[1])


class Sliced(Listed):
    """One projection of the timestep for all blocks, of which each takes a slice; and a table that they all fill."""

    def build(self, num_blocks: int, run: Callable[[Tensor, Tensor, Weights], Tensor] = run_block) -> None:
        """Makes the blocks and what they share."""
        super().build(num_blocks, run)
        self.shared = nn.Linear(WIDTH, num_blocks * WIDTH)

    def run_blocks(self, x: Tensor, temb: Tensor) -> Tensor:
        """The block stack."""
        table = torch.zeros(len(x), len(self.blocks), WIDTH)
        for i, (block, part) in enumerate(zip(self.blocks, self.shared(temb).chunk(len(self.blocks), -1), strict=True)):
            x = block(x, part)
            table[:, i] = x.mean(1)
        return x + table.mean(1, keepdim=True)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "modules": Listed,
    "functional": Functional,
    "in place": InPlace,
    "collected": Collected,
    "sliced": Sliced,
}


@dataclass(frozen=True)
class Timing:
    """CPU seconds for one graph."""

    num_blocks: int
    num_nodes: int
    capture: float
    analysis: float
    rewriting: float


def capture(model: nn.Module, use: Callable[[fx.GraphModule], Any]) -> None:
    """Calls `use` with the graph of one step, as dynamo hands it to a backend."""

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        use(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, TOKENS, CHANNELS), torch.full((2,), 0.9))


def timed(kind: Callable[[int], nn.Module], num_blocks: int, rounds: int) -> Timing:
    """Captures the model once and rewrites the graph several times."""
    config = TeaCacheConfig(coefficients=(1.0, 0.0)).resolve("")
    found: list[Timing] = []

    def measure(gm: fx.GraphModule) -> None:
        captured = time.process_time() - started
        times = []
        for _ in range(rounds):
            gc.collect()
            began = time.process_time()
            pipeline = Pipeline(gm)
            plan = pipeline.analyse()
            analysed = time.process_time()
            pipeline.rewrite(config)
            times.append((analysed - began, time.process_time() - analysed))
        assert plan.stack.num_blocks == num_blocks
        analysis, rewriting = map(min, zip(*times, strict=True))
        found.append(Timing(num_blocks, len(gm.graph.nodes), captured, analysis, rewriting))

    torch.manual_seed(0)
    model = kind(num_blocks).eval().requires_grad_(False)
    started = time.process_time()
    capture(model, measure)
    return found[0]


def doubled(kind: Callable[[int], nn.Module], least: int, most: int, rounds: int) -> Iterator[Timing]:
    """Timings from about `least` nodes to at least `most`."""
    per_block = timed(kind, 8, 1).num_nodes // 8
    num_blocks = 1 << (least // per_block).bit_length()
    for doublings in itertools.count():
        timing = timed(kind, num_blocks << doublings, rounds)
        yield timing
        if timing.num_nodes >= most:
            return


def _weight(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)


def main() -> None:
    """Prints a table; the ratios are to the line above, which has half as many blocks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--least", type=int, default=2500, help="nodes of the smallest graph")
    parser.add_argument("--most", type=int, default=20000, help="nodes that the largest graph has at least")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    options = parser.parse_args()
    print(
        f"{'model':<12}{'blocks':>7}{'nodes':>8}{'capture':>10}{'analysis':>10}{'ratio':>7}{'rewriting':>11}{'ratio':>7}"
    )
    for name in options.models:
        former: Timing | None = None
        for now in doubled(MODELS[name], options.least, options.most, options.rounds):
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
