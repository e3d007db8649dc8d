"""What a pipeline's `callback_on_step_end` may do: change latents or prompt, interrupt, raise."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image

from teacache_fx.policy import StepReason
from tests.pipelines import build
from tests.pipelines.running import HUGE, TINY, Run, generate, reasons, tea_backend, timeline
from tests.pipelines.text import embeddings

pytestmark = [
    pytest.mark.filterwarnings("ignore:a generation of .* steps leaves little to skip"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

STEPS = 8
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class _RaisedError(Exception):
    pass


def _add_noise(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    noise = torch.randn(tensors["latents"].shape, generator=torch.Generator().manual_seed(7))
    return {**tensors, "latents": tensors["latents"] + (0.2 if index == 2 else 0) * noise}


def _other_latents(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    noise = torch.randn(tensors["latents"].shape, generator=torch.Generator().manual_seed(7))
    return {**tensors, "latents": noise if index == 2 else tensors["latents"]}


def _other_prompt(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, "prompt_embeds": -tensors["prompt_embeds"]} if index == 2 else tensors


def _prompt_in_place(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if index == 2:
        tensors["prompt_embeds"].neg_()
    return tensors


def _prompt_at_each_step(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, "prompt_embeds": tensors["prompt_embeds"] * (1 + 0.1 * index)}


def _interrupt(pipe: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = index >= 1
    return tensors


def _raise(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if index == 1:
        raise _RaisedError
    return tensors


def _pipeline(rel_l1_thresh: float | None) -> tuple[Any, dict[str, Any], Any]:
    """FLUX with a prompt whose embeddings are the same objects in each generation."""
    pipe, arguments = build("flux")
    arguments = {key: value for key, value in arguments.items() if "prompt" not in key} | embeddings(0, 32, 32)
    backend = tea_backend(rel_l1_thresh or TINY)
    if rel_l1_thresh is not None:
        backend.enable(pipe)
    return pipe, arguments | {"num_inference_steps": STEPS}, backend


TENSORS: dict[str, Any] = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
CHANGES: dict[Callback, tuple[list[str], list[str], StepReason]] = {
    _other_latents: (["x..x...."], ["x..x...."], StepReason.TRAJECTORY_RESTARTED),
    _other_prompt: (["x..", "x...."], ["x......."], StepReason.FIRST),  # the pipeline's caller still holds the old one
    _prompt_in_place: (["x..x...."], ["x......."], StepReason.CONDITIONING_CHANGED),
    _prompt_at_each_step: (["x", "xxxx", "xxx"], ["x......."], StepReason.CONDITIONING_CHANGED),
}
"""Timelines of both branches at a huge threshold, and why the steps after the change are computed."""


def test_what_a_callback_changes_is_seen() -> None:
    compiled, plain = _pipeline(TINY), _pipeline(None)
    for callback in (_add_noise, *CHANGES):
        ours, expected = (
            generate(
                pipe,
                arguments | {"prompt_embeds": arguments["prompt_embeds"].clone()},
                **TENSORS,
                callback_on_step_end=callback,
            )
            for pipe, arguments, _ in (compiled, plain)
        )
        assert torch.equal(ours.pictures, expected.pictures), callback
    assert StepReason.SKIPPED not in reasons(compiled[2])


@pytest.mark.parametrize("callback", CHANGES)
def test_a_step_after_a_change_is_computed(callback: Callback) -> None:
    pipe, arguments, backend = _pipeline(HUGE)
    generate(pipe, arguments, **TENSORS, callback_on_step_end=callback)
    cond, uncond, reason = CHANGES[callback]
    texts = timeline(backend)
    assert sorted(text for name, text in texts if name == "cond") == sorted(cond)
    assert [text for name, text in texts if name == "uncond"] == uncond
    assert reasons(backend) == {StepReason.FIRST, reason, StepReason.SKIPPED}


def _again(pipe: Any, arguments: dict[str, Any], seed: int) -> Run:
    return generate(pipe, arguments, seed)


def _img2img(pipe: Any, arguments: dict[str, Any], seed: int) -> Run:
    """Begins at a lower timestep than the one at which the generation before ended."""
    other = FluxImg2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (16, 16), (200, 40, 90))
    return generate(other, arguments, seed, image=picture, strength=0.5)


@pytest.mark.parametrize("rel_l1_thresh", [TINY, HUGE])
def test_a_generation_after_a_broken_one_begins_anew(rel_l1_thresh: float) -> None:
    plain, plain_arguments, _ = _pipeline(None)
    pipe, arguments, backend = _pipeline(rel_l1_thresh)
    for breaking, following in itertools.product((_interrupt, _raise), (_again, _img2img)):
        expected = following(plain, plain_arguments, 1)
        num_steps = backend.stats().num_steps
        with contextlib.suppress(_RaisedError):
            generate(pipe, arguments, 0, callback_on_step_end=breaking)
        assert backend.stats().num_steps == num_steps + 2 * len(("cond", "uncond"))
        run = following(pipe, arguments, 1)
        assert torch.equal(run.first_output, expected.first_output), (breaking, following)
        assert torch.equal(run.pictures, expected.pictures) == (rel_l1_thresh == TINY), (breaking, following)
    assert (StepReason.SKIPPED in reasons(backend)) == (rel_l1_thresh == HUGE)


def test_the_same_generation_after_a_broken_one() -> None:
    pipe, arguments, _ = _pipeline(None)
    expected = generate(pipe, arguments)
    for rel_l1_thresh in (TINY, HUGE):
        pipe, arguments, _ = _pipeline(rel_l1_thresh)
        with pytest.raises(_RaisedError):
            generate(pipe, arguments, callback_on_step_end=_raise)
        run = generate(pipe, arguments)
        assert torch.equal(run.first_output, expected.first_output)
        assert torch.equal(run.pictures, expected.pictures) == (rel_l1_thresh == TINY)
