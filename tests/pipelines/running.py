"""Runs a pipeline with and without TeaCache, and says what each did."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from teacache_fx import TeaCacheBackend
from teacache_fx.policy import StepReason
from tests.pipelines import PIPELINES, build

TINY, HUGE = 1e-9, 1e6


class Run(NamedTuple):
    """Pictures of one call of a pipeline, and what its scheduler was given at the first step."""

    pictures: Tensor
    first_output: Tensor


def generate(pipe: Any, arguments: dict[str, Any], seed: int = 0, **changes: Any) -> Run:
    """One call of a pipeline; `generator` and other arguments may be changed."""
    step, outputs = type(pipe.scheduler).step, []

    @functools.wraps(step)  # pipelines look at the signature, and some copy the scheduler
    def record(scheduler: Any, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs.append(model_output.clone())
        return step(scheduler, model_output, *args, **kwargs)

    arguments = {**arguments, "generator": torch.Generator().manual_seed(seed), **changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.scheduler), "step", record)
        pictures = pipe(**arguments, return_dict=False)[0]
    return Run(torch.as_tensor(pictures), outputs[0])


@functools.cache
def uncached(name: str, seed: int = 0) -> Run:
    """What a pipeline makes by itself."""
    pipe, arguments = build(name)
    return generate(pipe, arguments, seed)


def tea_backend(rel_l1_thresh: float, **fields: Any) -> TeaCacheBackend:
    """Without a polynomial, and quick to compile."""
    fields = {"inner": "eager", "on_decline": "raise", **fields}
    return TeaCacheBackend(coefficients=[1.0, 0.0], rel_l1_thresh=rel_l1_thresh, **fields)


def by_enable(pipe: Any, backend: TeaCacheBackend) -> None:
    backend.enable(pipe)


def by_compile(pipe: Any, backend: TeaCacheBackend) -> None:
    pipe.transformer.compile(backend=backend)


WAYS_IN: tuple[Callable[[Any, TeaCacheBackend], None], ...] = (by_enable, by_compile)


def enabled(name: str, rel_l1_thresh: float, **fields: Any) -> tuple[Any, dict[str, Any], TeaCacheBackend]:
    """A pipeline with TeaCache, its arguments, and the backend."""
    pipe, arguments = build(name)
    backend = tea_backend(rel_l1_thresh, **fields)
    backend.enable(pipe)
    return pipe, arguments, backend


def timeline(backend: TeaCacheBackend) -> list[tuple[str, str]]:
    """Each context's name, and a letter for each of its steps: `x` computed, `.` skipped."""
    return [
        (context.name, "".join(".x"[bool(step.reason)] for step in context.steps))
        for context in backend.stats().contexts
    ]


def reasons(backend: TeaCacheBackend) -> set[StepReason]:
    """Why steps were computed, of all contexts; `SKIPPED` if some were not."""
    return {step.reason for context in backend.stats().contexts for step in context.steps}


def branch_names(name: str) -> list[str]:
    """The names that the contexts of a pipeline's branches have, in the order of their first calls.

    Where prompts of two lengths make dynamo capture once more, the first branch has a second context.
    """
    spec = PIPELINES[name]
    names = [branch or f"context {i}" for i, branch in enumerate(spec.branches)] * len(spec.transformers)
    return sorted(names + names[:1] * spec.recaptures)


def memories(backend: TeaCacheBackend) -> list[bool]:
    """For each state whether it holds tensors."""
    return [state.memory is not None for store in backend._stores.values() for state in store.states]
