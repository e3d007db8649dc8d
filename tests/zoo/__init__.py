"""Tiny, randomly initialised diffusion transformers of diffusers, from descriptions in `zoo.json`.

An entry holds the class, the keyword arguments of its constructor, a nested description of the keyword arguments of
its forward, and the names of those that carry the timestep and the latents.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Entry = dict[str, Any]

ZOO: dict[str, Entry] = json.loads(Path(__file__).with_name("zoo.json").read_text(encoding="utf-8"))

_FAMILIES = ("flux", "sd3", "qwenimage", "wan", "dit", "pixart", "ltx", "hunyuan_video", "cogvideox")
_DEPTHS = ("num_layers", "num_single_layers")


def _two_deep(entry: Entry) -> Entry:
    """Two blocks in each list: what is compared step by step, or compiled by inductor, need not be deeper."""
    return {**entry, "config": {**entry["config"], **{key: 2 for key in _DEPTHS if key in entry["config"]}}}


FAMILIES: dict[str, Entry] = {name: _two_deep(ZOO[name]) for name in _FAMILIES}


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model of `FAMILIES` in eval mode without gradients, and the inputs of one call."""
    return assemble(FAMILIES[name], seed)


def assemble(entry: Entry, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """The model of an entry in eval mode without gradients, and the inputs of one call. Equal seeds, equal numbers."""
    module_name, class_name = entry["class"].rsplit(".", 1)
    torch.manual_seed(seed)
    model = getattr(importlib.import_module(module_name), class_name)(**entry["config"])
    generator = torch.Generator().manual_seed(seed)
    draw_parameters(model, generator)
    return model.eval().requires_grad_(False), {key: _input(spec, generator) for key, spec in entry["inputs"].items()}


def move_latents(entry: Entry, inputs: dict[str, Any], step: float = 0.015) -> dict[str, Any]:
    """The same inputs with latents moved by `step` of their spread. Latents of integers (token ids) stay."""
    generator = torch.Generator().manual_seed(1)

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf + step * leaf.std() * torch.randn(leaf.shape, generator=generator)

    return {**inputs, **{name: pytree.tree_map(move, inputs[name]) for name in entry["latents"]}}


def trajectory(name: str, inputs: dict[str, Any], num_steps: int = 10, step: float = 0.02) -> list[dict[str, Any]]:
    """Inputs of a denoising run of one of `FAMILIES`: the timestep falls, the latents move a little each time."""
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


def draw_parameters(model: nn.Module, generator: torch.Generator) -> None:
    """Gates and projections that start at zero would hide the blocks, so everything is drawn anew.

    Except for the logarithms of decay rates and time steps in state-space layers, which noise would make explode.
    """
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point() and "log" not in name and name != "dt_bias":
                    noise = torch.randn(parameter.shape, generator=generator)
                    mean, std = _distribution(module, name, parameter)
                    parameter.copy_(mean + std * noise)


def _distribution(module: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:
    is_norm = "Norm" in type(module).__name__ and not list(module.children())
    if (is_norm and "weight" in name) or bool((parameter == 1).all()):  # autoencoders have norms under other names
        return 1.0, 0.05
    if isinstance(module, nn.Embedding):
        return 0.0, 0.3
    if parameter.ndim <= 1:
        return 0.0, 0.05
    if isinstance(module, nn.Linear) or "Conv" in type(module).__name__:
        return 0.0, 1 / math.sqrt(math.prod(parameter.shape[1:]))
    return 0.0, 1 / math.sqrt(max(parameter.shape[-1], 8))  # tables and tokens
