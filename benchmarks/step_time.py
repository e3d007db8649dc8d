"""What a computed and a skipped step cost against plain torch.compile, on a FLUX of realistic proportions.

All variants run in turn within each round, so that a noisy machine disturbs all of them alike; medians are printed.

    python -m benchmarks.step_time
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.compile_time import flux, flux_inputs
from teacache_fx import TeaCacheBackend


def main() -> None:
    """Prints milliseconds per step and their ratios to plain torch.compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dual", type=int, default=3, help="dual-stream blocks")
    parser.add_argument("--single", type=int, default=6, help="single-stream blocks")
    parser.add_argument("--heads", type=int, default=8, help="attention heads of 64 channels")
    parser.add_argument("--tokens", type=int, default=512, help="image tokens")
    parser.add_argument("--words", type=int, default=128, help="text tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    model, _ = flux(options.dual, options.single, options.heads, head_dim=64)
    model.to(**place)
    inputs = flux_inputs(tokens=options.tokens, words=options.words)
    inputs = {name: value.to(**place) if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def compiled(backend: object) -> Callable[[], Tensor]:
        function: Callable[..., Any] = torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[call-overload]
        return lambda: function(**inputs)[0]

    always = TeaCacheBackend(rel_l1_thresh=1e-9, coefficients=[1.0], inner="inductor", on_decline="raise")
    never = TeaCacheBackend(rel_l1_thresh=1e9, coefficients=[1.0, 0.0], inner="inductor", on_decline="raise")
    with torch.no_grad():
        variants: dict[str, Callable[[], Tensor]] = {"eager": lambda: model(**inputs)[0]}
        for name, backend in (("plain compile", "inductor"), ("computed step", always), ("skipped step", never)):
            variants[name] = compiled(backend)
            for _ in range(2):
                variants[name]()
        results = {name: run() for name, run in variants.items()}
        seconds = measure(variants, options.rounds)
    for name, result in results.items():
        difference = float((result - results["eager"]).abs().max() / results["eager"].abs().max())
        ratio = seconds[name] / seconds["plain compile"]
        print(f"{name:<14} {1e3 * seconds[name]:9.2f} ms   {ratio:7.3f} of plain compile   error {difference:.1e}")


def measure(variants: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant, all measured in every round."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            run().sum().item()  # waits for the device
            samples[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in samples.items()}


if __name__ == "__main__":
    main()
