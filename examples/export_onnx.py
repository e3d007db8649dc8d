"""Export the tiny model with TeaCache in it to ONNX, and sample with ONNX Runtime.

    python -m examples.export_onnx

Writes `transformer.onnx`, `pictures.png` and `table.md`, the time of computed and of skipped steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from examples.exported_sampling import COND, UNCOND, Job, Samples, arguments, config_of, denoise, load_job, save
from teacache_fx import rewrite


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = arguments(__doc__ or "", argv, Path("out/export_onnx"))
    pipe, job = load_job(args)
    transformer = pipe.transformer
    path = args.output / "transformer.onnx"
    state = export(transformer, job, path, args.rel_l1_thresh)
    eager = denoise("eager, no cache", job, lambda _, inputs: (transformer(**inputs, return_dict=False)[0], False))
    save([eager, sample(path, job, state)], job, args.output)


def export(transformer: Any, job: Job, path: Path, rel_l1_thresh: float) -> dict[str, Tensor]:
    """Writes the file; returns the state before the first step."""
    inputs: dict[str, Any] = {**job.first_inputs(), "return_dict": False}
    rewritten = rewrite(transformer, (), inputs, config=config_of(rel_l1_thresh), state="io")
    state = rewritten.initial_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            rewritten,
            (),
            kwargs={**inputs, "teacache_state": state},
            output_names=rewritten.output_names,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return state


def sample(path: Path, job: Job, state: dict[str, Tensor]) -> Samples:
    """Samples with ONNX Runtime. What a call returns as new state is given to the next one of the same branch."""
    session = onnxruntime.InferenceSession(path)
    outputs = [put.name for put in session.get_outputs()]
    first = {f"teacache_state_{name}": tensor.numpy() for name, tensor in state.items()}
    states = {COND: first, UNCOND: first}

    def predict(branch: int, inputs: dict[str, Tensor]) -> tuple[Tensor, bool]:
        feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
        velocity, *following = session.run(outputs, {**feeds, **states[branch]})
        named = zip(outputs[1:], following, strict=True)
        states[branch] = {name.replace("teacache_next_state_", "teacache_state_"): array for name, array in named}
        return torch.from_numpy(velocity), bool(states[branch]["teacache_state_consecutive_skips"] > 0)

    return denoise("ONNX Runtime, TeaCache", job, predict)


if __name__ == "__main__":
    main()
