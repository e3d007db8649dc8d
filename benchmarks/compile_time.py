"""How much compile time TeaCache adds: capture to rewritten graph, against inductor, on a FLUX of 19 + 38 blocks.

The number of nodes is FLUX.1's; the width is small, since it changes neither the passes' work nor inductor's much.

    python -m benchmarks.compile_time
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from teacache_fx import TeaCacheBackend


def flux(num_layers: int, num_single_layers: int, heads: int, head_dim: int) -> tuple[nn.Module, dict[str, Any]]:
    """A FLUX transformer with random weights and the inputs of one call at 64 image and 16 text tokens."""
    torch.manual_seed(0)
    axes = (head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=axes,
    )
    return model.eval().requires_grad_(False), flux_inputs()


def flux_inputs(batch: int = 1, tokens: int = 64, words: int = 16, time_left: float = 0.9) -> dict[str, Any]:
    """Inputs of one call; only the timestep and the latents differ between steps."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": randn(batch, tokens, 16),
        "encoder_hidden_states": randn(batch, words, 32),
        "pooled_projections": randn(batch, 32),
        "timestep": torch.full((batch,), time_left),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(words, 3),
        "return_dict": False,
    }


def main() -> None:
    """Compiles once with cold caches and prints where the time went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dual", type=int, default=19, help="dual-stream blocks")
    parser.add_argument("--single", type=int, default=38, help="single-stream blocks")
    options = parser.parse_args()
    model, inputs = flux(options.dual, options.single, heads=2, head_dim=16)
    backend = TeaCacheBackend(rel_l1_thresh=0.4, on_decline="raise")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    started = time.perf_counter()
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        compiled(**inputs)
    total = time.perf_counter() - started
    (report,) = backend.reports
    timings = dict(report.timings)
    inner = timings.pop("inner compiler")
    rewriting = sum(timings.values())
    for name, seconds in timings.items():
        print(f"{name:<20} {seconds:8.3f} s")
    print(f"{'all passes':<20} {rewriting:8.3f} s   {report.num_nodes} nodes")
    print(f"{'inductor':<20} {inner:8.3f} s")
    print(f"{'capture and guards':<20} {total - inner - rewriting:8.3f} s")
    print(f"passes / inductor: {rewriting / inner:.2%}")


if __name__ == "__main__":
    main()
