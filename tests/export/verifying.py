"""What the tests of verify_export share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import teacache_fx
from teacache_fx import TeaCacheConfig
from teacache_fx.rewritten_model import RewrittenModel
from teacache_fx.verification import verify_export
from teacache_fx.verified_steps import Verification
from tests import toys

TORCH_WARNS = pytest.mark.filterwarnings(  # where torch copies programs, and where it writes ONNX
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning",
    "ignore::DeprecationWarning:onnxscript",
    "ignore:overflow encountered in cast:RuntimeWarning",
    "ignore:# The axis name. batch will not be used:UserWarning",
)
CONFIG = TeaCacheConfig(0.2, (1.0, 0.0))


class Forgetful(nn.Module):
    """Runs the form "io", but begins each step with the state before the first: its cache never lives."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.rewritten = teacache_fx.rewrite(model, (), inputs, config=CONFIG, state="io")
        self.state = self.rewritten.initial_state()

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.rewritten(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            teacache_state=self.state,
        )[0]
        return output


def export(
    model: nn.Module | None = None,
    config: TeaCacheConfig = CONFIG,
    own: dict[str, Tensor] | None = None,
    **options: Any,
) -> ExportedProgram:
    """The toy with TeaCache, exported."""
    kwargs = toys.inputs()
    rewritten = teacache_fx.rewrite(model or toys.make(), (), kwargs, config=config, **options)
    if options.get("state") == "io":
        own = {"teacache_state": rewritten.initial_state()}  # type: ignore[dict-item]
    return torch.export.export(rewritten, (), {**kwargs, **(own or {})}, strict=False)


def verify(program: Any, **options: Any) -> Verification:
    """Against the toy, with the settings that were exported."""
    return verify_export(program, toys.make(), (), toys.inputs(), **{"config": CONFIG, **options})


def onnx_file(model: nn.Module, kwargs: dict[str, Any], folder: Path, dynamic_shapes: Any = None) -> Path:
    """The model in ONNX; skips the test where a package for that is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    path = folder / "toy.onnx"
    names = model.output_names if isinstance(model, RewrittenModel) else None
    program = torch.onnx.export(
        model, (), kwargs=kwargs, dynamic_shapes=dynamic_shapes, output_names=names, dynamo=True, verbose=False
    )
    assert program is not None
    program.save(path)
    return path


def decisions(verification: Verification) -> str:
    return "".join(step.expected[0] for step in verification.steps)
