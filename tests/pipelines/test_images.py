"""TeaCache under diffusers' own pipelines: the same picture where it must be, and skipped steps where they may be."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from teacache_fx import Declined, TeaCacheBackend
from teacache_fx.stats import StepStats
from tests.pipelines import PIPELINES, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:a generation of .* steps leaves little to skip"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

GENERATIONS: tuple[dict[str, int], ...] = (
    {},
    {"seed": 1},
    {"seed": 1, "prompt": 1},
    {"seed": 1, "prompt": 1, "more_steps": 2},
)
"""Changed from one generation to the next: seed of the noise, then prompt, then number of steps."""

TINY, HUGE = 1e-9, 1e6
CACHED = [name for name, spec in PIPELINES.items() if spec.declined is None]
DECLINED = [name for name, spec in PIPELINES.items() if spec.declined is not None]


class _Run(NamedTuple):
    """What the generations returned, and the steps of each branch of each generation of each transformer."""

    results: list[tuple[Tensor, ...]]
    trajectories: list[list[StepStats]]


def _generate(name: str, pipe: Any, arguments: dict[str, Any], change: dict[str, int]) -> tuple[Tensor, ...]:
    """What the pipeline returns: pictures or frames in [0, 1], sound where there is any."""
    prompt = PIPELINES[name].prompt(change.get("prompt", 0))
    steps = {"num_inference_steps": arguments["num_inference_steps"] + change.get("more_steps", 0)}
    generator = torch.Generator().manual_seed(change.get("seed", 0))
    return tuple(pipe(**{**arguments, **prompt, **steps}, generator=generator, return_dict=False))


@functools.cache
def _uncached(name: str) -> tuple[list[tuple[Tensor, ...]], list[tuple[int, ...]]]:
    """For each generation what the pipeline returns by itself, and the number of calls of each transformer."""
    pipe, arguments = build(name)
    calls: Counter[str] = Counter()
    for transformer in PIPELINES[name].transformers:
        count = functools.partial(_count, calls, transformer)
        getattr(pipe, transformer).register_forward_pre_hook(count)
    results, numbers = [], []
    for change in GENERATIONS:
        calls.clear()
        results.append(_generate(name, pipe, arguments, change))
        numbers.append(tuple(calls[transformer] for transformer in PIPELINES[name].transformers))
    return results, numbers


def _count(calls: Counter[str], transformer: str, *_: Any) -> None:
    calls[transformer] += 1


@functools.cache
def _compiled(name: str, rel_l1_thresh: float, num_generations: int = len(GENERATIONS)) -> _Run:
    """Generations one after the other under TeaCache."""
    pipe, arguments = build(name)
    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager", on_decline="raise", rel_l1_thresh=rel_l1_thresh)
    for transformer in PIPELINES[name].transformers:
        getattr(pipe, transformer).compile(backend=backend)
    results = [_generate(name, pipe, arguments, change) for change in GENERATIONS[:num_generations]]
    trajectories = [
        list(steps)
        for context in backend.stats().contexts
        for _, steps in itertools.groupby(context.steps, lambda step: step.generation)
    ]
    return _Run(results, trajectories)


def _check_lengths(name: str, run: _Run) -> None:
    """One trajectory per branch, generation and transformer; a recapture splits one in two."""
    spec = PIPELINES[name]
    expected: Counter[int] = Counter()
    for calls in itertools.chain(*_uncached(name)[1]):
        assert calls % len(spec.branches) == 0
        expected[calls // len(spec.branches)] += len(spec.branches)
    lengths = Counter(map(len, run.trajectories))
    assert ((expected - lengths).total(), (lengths - expected).total()) == (spec.recaptures, 2 * spec.recaptures)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_makes_a_picture(name: str) -> None:
    results, _ = _uncached(name)
    for picture, *_ in results:
        assert float(picture.std()) > 0.05
        clipped = (picture == 0) | (picture == 1)
        assert float(clipped.float().mean()) < 0.5, "what is clipped cannot differ"
    for (one, *_), (other, *_) in itertools.pairwise(results):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("name", CACHED)
def test_tiny_threshold_changes_nothing(name: str) -> None:
    run = _compiled(name, TINY)
    for change, ours, uncached in zip(GENERATIONS, run.results, _uncached(name)[0], strict=True):
        # The very same kernels run in the same order under inner="eager", so not a bit may differ.
        assert all(map(torch.equal, ours, uncached)), f"another picture than without TeaCache: {change}"
    _check_lengths(name, run)
    assert not any(step.skipped for steps in run.trajectories for step in steps)


@pytest.mark.parametrize("name", CACHED)
def test_huge_threshold_computes_first_steps_only(name: str) -> None:
    run = _compiled(name, HUGE)
    _check_lengths(name, run)
    for steps in run.trajectories:
        assert [step.skipped for step in steps] == [False] + [True] * (len(steps) - 1)
    for ours, uncached in zip(run.results, _uncached(name)[0], strict=True):
        assert all(bool(tensor.isfinite().all()) for tensor in ours)
        assert not torch.equal(ours[0], uncached[0]), "a skip that changes nothing tests nothing"


@pytest.mark.parametrize("name", CACHED)
def test_some_steps_are_skipped_and_some_computed(name: str) -> None:
    distances = [step.rel_l1 for steps in _compiled(name, TINY).trajectories for step in steps[1:]]
    assert distances
    assert max(distances) < 2, "the indicator does not move smoothly"
    run = _compiled(name, 1.2 * statistics.median(distances), num_generations=1)
    assert not any(steps[0].skipped for steps in run.trajectories)
    assert {step.skipped for steps in run.trajectories for step in steps[1:]} == {True, False}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_with_its_reason(name: str) -> None:
    with pytest.raises(Declined) as declined:
        _compiled(name, TINY)
    assert declined.value.reason is PIPELINES[name].declined
