"""Tiny, randomly initialised diffusion transformers of diffusers, from descriptions in `families.json`.

An entry holds the class, the keyword arguments of its constructor, a nested description of the keyword arguments of
its forward, and the name of the one that carries the timestep.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8"))


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model in eval mode without gradients, and the inputs of one call."""
    entry = FAMILIES[name]
    module_name, class_name = entry["class"].rsplit(".", 1)
    torch.manual_seed(seed)
    model = getattr(importlib.import_module(module_name), class_name)(**entry["config"])
    generator = torch.Generator().manual_seed(seed)
    _draw_parameters(model, generator)
    return model.eval().requires_grad_(False), {key: _input(spec, generator) for key, spec in entry["inputs"].items()}


def trajectory(name: str, inputs: dict[str, Any], num_steps: int = 10, step: float = 0.02) -> list[dict[str, Any]]:
    """Inputs of a denoising run: the timestep falls, the latents move a little each time, the rest stays the same."""
    timestep = FAMILIES[name]["timestep"]
    scale = 1000.0 if float(inputs[timestep].max()) > 1 else 1.0
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(inputs["hidden_states"].shape, generator=generator)
    return [
        {
            **inputs,
            "hidden_states": inputs["hidden_states"] + step * i * i / num_steps * noise,
            timestep: torch.full_like(inputs[timestep], scale * (0.9 - 0.7 * i / num_steps)),
        }
        for i in range(num_steps)
    ]


def _input(spec: dict[str, Any], generator: torch.Generator) -> Any:
    if "py" in spec:
        return spec["py"]
    for kind in (list, tuple):
        if kind.__name__ in spec:
            return kind(_input(item, generator) for item in spec[kind.__name__])
    if "dict" in spec:
        return {key: _input(item, generator) for key, item in spec["dict"].items()}
    dtype = getattr(torch, spec["tensor"])
    if "values" in spec:
        return torch.tensor(spec["values"], dtype=dtype).reshape(spec["shape"])
    return torch.randn(spec["shape"], generator=generator, dtype=dtype) * spec.get("std", 1.0)


def _draw_parameters(model: nn.Module, generator: torch.Generator) -> None:
    """Gates and projections that start at zero would hide the blocks, so everything is drawn anew."""

    def normal(parameter: Tensor, std: float) -> Tensor:
        return torch.randn(parameter.shape, generator=generator) * std

    with torch.no_grad():
        for module in model.modules():
            is_norm = "Norm" in type(module).__name__ and not list(module.children())
            for name, parameter in module.named_parameters(recurse=False):
                if is_norm and "weight" in name:
                    parameter.copy_(1 + normal(parameter, 0.05))
                elif parameter.ndim <= 1:
                    parameter.copy_(normal(parameter, 0.05))
                else:
                    parameter.copy_(normal(parameter, 1 / math.sqrt(math.prod(parameter.shape[1:]))))
