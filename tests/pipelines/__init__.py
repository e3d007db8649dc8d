"""Diffusers' own pipelines with tiny, randomly drawn components, built offline.

Real schedulers, real autoencoders, and real text encoders where a tokenizer is a few lines; elsewhere the prompt is
given as embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.pipelines import images, videos
from tests.pipelines.spec import Spec
from tests.zoo import draw_parameters

__all__ = ["PIPELINES", "Spec", "build"]

PIPELINES: dict[str, Spec] = images.SPECS | videos.SPECS


def build(name: str, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the keyword arguments of one call: all but `generator`. Equal seeds, equal weights and prompts."""
    spec = PIPELINES[name]
    torch.manual_seed(seed)
    pipe = spec.assemble()
    generator = torch.Generator().manual_seed(seed)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            draw_parameters(component, generator)
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": 4, "output_type": "pt", **spec.settings, **spec.prompt(seed)}
