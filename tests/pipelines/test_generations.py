"""Generations that the timestep alone does not tell apart: no residual may cross from one picture into the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from teacache_fx import TeaCacheBackend
from tests.pipelines import PIPELINES, build
from tests.pipelines.text import embeddings

pytestmark = pytest.mark.filterwarnings("ignore:a generation of .* steps leaves little to skip")

KEPT: dict[str, tuple[int, int]] = {"flux": (32, 32), "wan2.1": (16, 0), "wan2.2": (16, 0), "hunyuan_video": (16, 8)}
"""Widths of the prompt embeddings and of the pooled ones; the same objects are passed to each generation."""


def _pipeline(name: str, compiled: bool) -> tuple[Any, dict[str, Any]]:
    pipe, arguments = build(name)
    dim, pooled = KEPT[name]
    arguments = {key: value for key, value in arguments.items() if key not in ("prompt", "negative_prompt")}
    arguments |= embeddings(0, dim, pooled, torch.int64 if name == "hunyuan_video" else None)
    backend = TeaCacheBackend(rel_l1_thresh=1e6, coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    for transformer in PIPELINES[name].transformers if compiled else ():
        getattr(pipe, transformer).compile(backend=backend)
    return pipe, arguments


def _generate(pipe: Any, arguments: dict[str, Any], seed: int, **changes: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    picture = pipe(**arguments | changes, generator=generator, return_dict=False)[0]
    assert isinstance(picture, Tensor)
    return picture


@pytest.mark.parametrize("name", KEPT)
def test_generations_of_one_step_are_all_computed(name: str) -> None:
    num_steps = len(PIPELINES[name].transformers)  # one for each
    results = []
    for compiled in (False, True):
        pipe, arguments = _pipeline(name, compiled)
        results.append([_generate(pipe, arguments, seed, num_inference_steps=num_steps) for seed in range(3)])
    assert [torch.equal(ours, uncached) for uncached, ours in zip(*results, strict=True)] == [True] * 3


@pytest.mark.parametrize("name", KEPT)
def test_generation_after_an_interrupted_one_begins_anew(name: str) -> None:
    def interrupt(pipe: Any, _: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    pipe, arguments = _pipeline(name, compiled=True)
    alone = _generate(pipe, arguments, seed=1)
    torch._dynamo.reset()
    pipe, arguments = _pipeline(name, compiled=True)
    _generate(pipe, arguments, seed=0, callback_on_step_end=interrupt)
    assert torch.equal(_generate(pipe, arguments, seed=1), alone)
