"""Several pictures at a time, kinds of output, and prompts of another dtype than the transformer."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teacache_fx.policy import StepReason
from tests.pipelines import PIPELINES, build
from tests.pipelines.running import HUGE, TINY, WAYS_IN, enabled, generate, reasons, tea_backend, timeline

pytestmark = [
    pytest.mark.filterwarnings("ignore:a generation of .* steps leaves little to skip"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


def _two_prompts(name: str) -> dict[str, Any]:
    one, other = (PIPELINES[name].prompt(seed) for seed in range(2))
    both = {key: [one[key], other[key]] for key in one}
    return {key: torch.cat(pair) if isinstance(pair[0], Tensor) else pair for key, pair in both.items()}


def _generators(*seeds: int) -> dict[str, Any]:
    return {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}


BATCHES = {"num_images_per_prompt": lambda _: {"num_images_per_prompt": 2}, "two prompts": _two_prompts}


@pytest.mark.parametrize(
    ("name", "batch"), [("flux", "num_images_per_prompt"), ("flux", "two prompts"), ("sd3", "two prompts")]
)
def test_two_pictures_at_a_time(name: str, batch: str) -> None:
    plain, arguments = build(name)
    arguments = arguments | BATCHES[batch](name)
    pipe, _, backend = enabled(name, TINY)
    for seed in range(2):
        expected = generate(plain, arguments, **_generators(seed, 7)).pictures
        assert len(expected) == 2
        assert torch.equal(generate(pipe, arguments, **_generators(seed, 7)).pictures, expected)
    assert StepReason.SKIPPED not in reasons(backend)


def test_other_sizes_of_a_batch_and_kinds_of_output_in_turn() -> None:
    plain, arguments = build("flux")
    pipe, _, backend = enabled("flux", HUGE)
    kinds = ("pil", "np", "pt", "latent", "pil")
    for kind, number in zip(kinds, (1, 2, 1, 2, 2), strict=True):
        changes = {"output_type": kind, "num_images_per_prompt": number}
        ours, expected = (
            model(**arguments | changes, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
            for model in (pipe, plain)
        )
        assert type(ours) is type(expected)
        assert len(ours) == number
        assert np.asarray(ours[0]).shape == np.asarray(expected[0]).shape
    texts = timeline(backend)
    assert all(set(text[0::4]) == {"x"} and set(text) - set(text[0::4]) == {"."} for _, text in texts), texts


@pytest.mark.parametrize("name", ["sd3", "pixart_sigma", "ltx", "cogvideox"])
def test_each_sample_as_if_alone(name: str) -> None:
    """The decisions for each row of a batch are those of a run of its own, and so is the picture but for rounding."""
    thresholds = _distances(name)
    batch = _run(name, thresholds, (0, 1))
    alone = [_run(name, thresholds, (seed,)) for seed in range(2)]
    for i, (pictures, decisions) in enumerate(alone):
        torch.testing.assert_close(batch[0][i : i + 1], pictures, rtol=1e-3, atol=1e-3)
        for of_batch, of_one in zip(batch[1], decisions, strict=True):
            rows = len(of_one[0])  # two where both guidance branches are in the batch: one, then the other
            ours = [tuple(step[row * 2 + i] for row in range(rows)) for step in of_batch]
            assert ours == of_one
    assert {reason for steps in batch[1] for step in steps for reason in step} > {StepReason.SKIPPED}


@functools.cache
def _distances(name: str) -> float:
    """A threshold in the middle of what two steps add up to."""
    pipe, arguments, backend = enabled(name, TINY)
    generate(pipe, arguments, num_inference_steps=6)
    found = sorted(step.rel_l1 for context in backend.stats().contexts for step in context.steps[1:])
    return 1.5 * found[len(found) // 2]


def _run(name: str, rel_l1_thresh: float, seeds: tuple[int, ...]) -> tuple[Tensor, list[list[tuple[StepReason, ...]]]]:
    """Pictures, and the reasons of each row for each step of each branch."""
    torch._dynamo.reset()
    pipe, arguments, backend = enabled(name, rel_l1_thresh, granularity="sample")
    prompts = _two_prompts(name) if len(seeds) == 2 else PIPELINES[name].prompt(seeds[0])
    pictures = generate(pipe, {**arguments, **prompts}, num_inference_steps=6, **_generators(*seeds)).pictures
    return pictures, [[step.sample_reasons for step in context.steps] for context in backend.stats().contexts]


@pytest.mark.parametrize(("switch_on", "rel_l1_thresh"), list(zip(WAYS_IN, (HUGE, TINY), strict=True)))
def test_a_prompt_that_the_pipeline_casts_in_its_loop(switch_on: Any, rel_l1_thresh: float) -> None:
    """Sana casts the embeddings to the transformer's dtype at each step: every time another tensor."""
    plain, arguments = build("sana")
    for key in ("prompt_embeds", "negative_prompt_embeds"):
        arguments[key] = arguments[key].bfloat16()
    pipe, _ = build("sana")
    backend = tea_backend(rel_l1_thresh)
    switch_on(pipe, backend)
    for seed in range(3):
        expected, run = generate(plain, arguments, seed), generate(pipe, arguments, seed)
        assert torch.equal(run.first_output, expected.first_output)
        assert torch.equal(run.pictures, expected.pictures) == (rel_l1_thresh == TINY)
    assert [text for _, text in timeline(backend)] == [("xxxx" if rel_l1_thresh == TINY else "x...") * 3]


def test_few_steps_of_a_second_order_sampler_are_one_trajectory() -> None:
    """Long and short moves of the latents alternate."""
    pipe, arguments, backend = enabled("pixart_sigma", HUGE)
    lengths = (4, 5, 6, 8)
    for seed, num_steps in enumerate(lengths):
        generate(pipe, arguments, seed, num_inference_steps=num_steps)
    assert [text for _, text in timeline(backend)] == ["x" + "." * (num_steps - 1) for num_steps in lengths]
