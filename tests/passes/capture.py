"""Captures toy models as dynamo hands them to a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from teacache_fx.config import ResolvedConfig, TeaCacheConfig

CONFIG: ResolvedConfig = TeaCacheConfig(rel_l1_thresh=0.2, coefficients=(1.0, 0.0)).resolve("ToyDiT")


def on_capture(
    model: nn.Module, inputs: dict[str, Tensor], use: Callable[[fx.GraphModule], Any], grad: bool = False
) -> list[Any]:
    """Runs `use` inside the backend, where tracing contexts are alive, once per captured graph."""
    results: list[Any] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        results.append(use(gm))
        return gm.forward

    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend)(**inputs)
    return results
