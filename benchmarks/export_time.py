"""What a computed and a skipped step cost in an exported program, against the plain model exported the same way.

A FLUX 1024 wide with 12 blocks and 1024 tokens. The programs run in turn within each round, so that a noisy machine
disturbs all of them alike; medians of the rounds' ratios are printed.

    python -m benchmarks.export_time
    python -m benchmarks.export_time --runtime onnx
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compile_time import flux, flux_inputs
from teacache_fx import TeaCacheConfig, rewrite

# Whatever is not a first step is skipped, so that one program shows both kinds of step.
CONFIG = TeaCacheConfig(rel_l1_thresh=1e9, coefficients=(1.0, 0.0))
Step = Callable[[], Tensor]


def main() -> None:
    """Prints milliseconds per step and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", choices=["aoti", "onnx"], default="aoti", help="AOTInductor or ONNX Runtime")
    parser.add_argument("--dual", type=int, default=4, help="dual-stream blocks")
    parser.add_argument("--single", type=int, default=8, help="single-stream blocks")
    parser.add_argument("--heads", type=int, default=16, help="attention heads of 64 channels")
    parser.add_argument("--tokens", type=int, default=768, help="image tokens")
    parser.add_argument("--words", type=int, default=256, help="text tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", help="of AOTInductor's packages")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    model, _ = flux(options.dual, options.single, options.heads, head_dim=64)
    model.to(**place)
    inputs = flux_inputs(tokens=options.tokens, words=options.words)
    inputs = {name: value.to(**place) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        make = _in_aotinductor if options.runtime == "aoti" else _in_onnx_runtime
        steps = make(model, inputs, Path(folder))
        expected = model(**inputs)[0]
        _print(steps, expected, options.rounds)


def _in_aotinductor(model: nn.Module, inputs: dict[str, Any], folder: Path) -> dict[str, Step]:
    first, later = ({"teacache_reset": torch.tensor(value, device=_device(inputs))} for value in (True, False))
    rewritten = rewrite(model, (), inputs, config=CONFIG)
    plain = _package(model, inputs, folder / "plain.pt2")
    cached = _package(rewritten, {**inputs, **first}, folder / "cached.pt2")
    return {
        "plain package": lambda: plain(**inputs)[0],
        "computed step": lambda: cached(**inputs, **first)[0],
        "skipped step": lambda: cached(**inputs, **later)[0],
    }


def _package(model: nn.Module, inputs: Mapping[str, Any], path: Path) -> Callable[..., Any]:
    program = torch.export.export(model, (), dict(inputs), strict=False)
    started = time.perf_counter()
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    seconds, megabytes = time.perf_counter() - started, path.stat().st_size / 1e6
    print(f"{path.name:<16} {megabytes:8.1f} MB, compiled in {seconds:.0f} s", flush=True)
    loaded: Callable[..., Any] = torch._inductor.aoti_load_package(str(path))
    return loaded


def _in_onnx_runtime(model: nn.Module, inputs: dict[str, Any], folder: Path) -> dict[str, Step]:
    rewritten = rewrite(model, (), inputs, config=CONFIG, state="io")
    first = rewritten.initial_state()
    _, later = rewritten(**inputs, teacache_state=first)
    plain = _session(model, inputs, folder / "plain.onnx")
    cached = _session(rewritten, {**inputs, "teacache_state": first}, folder / "cached.onnx")
    return {
        "plain file": lambda: plain(inputs),
        "computed step": lambda: cached({**inputs, **_named(first)}),
        "skipped step": lambda: cached({**inputs, **_named(later)}),
    }


def _named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"teacache_state_{name}": tensor for name, tensor in state.items()}


def _session(model: nn.Module, inputs: dict[str, Any], path: Path) -> Callable[[Mapping[str, Any]], Tensor]:
    import onnxruntime

    program = torch.onnx.export(model, (), kwargs=inputs, dynamo=True, verbose=False)
    assert program is not None
    program.save(path, external_data=True)
    session = onnxruntime.InferenceSession(path)
    names = [put.name for put in session.get_inputs()]

    def run(values: Mapping[str, Any]) -> Tensor:
        output: Tensor = torch.from_numpy(session.run(None, {name: values[name].numpy() for name in names})[0])
        return output

    return run


def _device(inputs: Mapping[str, Any]) -> torch.device:
    return next(value.device for value in inputs.values() if isinstance(value, Tensor))


def _print(steps: Mapping[str, Step], expected: Tensor, rounds: int) -> None:
    for run in steps.values():
        run()
    errors = {name: float((run() - expected).abs().max() / expected.abs().max()) for name, run in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            started = time.perf_counter()
            run().sum().item()  # waits for the device
            samples[name].append(time.perf_counter() - started)
    plain = next(iter(steps))
    for name, seconds in samples.items():
        against = "computed step" if name == "skipped step" else plain
        ratio = statistics.median(mine / other for mine, other in zip(seconds, samples[against], strict=True))
        milliseconds = 1e3 * statistics.median(seconds)
        print(f"{name:<14} {milliseconds:9.2f} ms   {ratio:7.4f} of {against:<14} error {errors[name]:.1e}")


if __name__ == "__main__":
    main()
