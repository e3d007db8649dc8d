"""What a row of the fault table is, and what rows share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

from tests import toys
from tests.faults.scene import COMPUTED, SKIPPED, Generation, Scene

FRESH = [COMPUTED, SKIPPED, SKIPPED]


def prompt(seed: int = 0) -> Tensor:
    """Text embeddings of a batch of two."""
    return torch.randn(2, 3, toys.TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Fault:
    """One row.

    Attributes:
        point: what it is about.
        situation: what happens, in words.
        outcome: what the cache does.
        guard: name in `GUARDS` of what the row fails without; `None` where nothing must interfere.
        check: plays it and asserts the outcome.
    """

    point: str
    situation: str
    outcome: str
    guard: str | None
    check: Callable[[], None]


FAULTS: list[Fault] = []


def fault(point: str, situation: str, outcome: str, guard: str | None) -> Callable[[Callable[[], None]], None]:
    """Adds a row."""

    def add(check: Callable[[], None]) -> None:
        FAULTS.append(Fault(point, situation, outcome, guard, check))

    return add


def alone(steps: list[dict[str, Tensor]], **options: Any) -> list[Tensor]:
    scene = Scene(**options)
    for inputs in steps:
        scene.run(inputs)
    return scene.outputs


def interleave(scene: Scene, runs: list[tuple[Generation, dict[str, Any]]], rounds: int = 3) -> None:
    """Steps of several runs in turn; each must come out as if it had been alone."""
    histories: list[list[dict[str, Tensor]]] = [[] for _ in runs]
    found: list[list[Tensor]] = [[] for _ in runs]
    outcomes: list[list[bool]] = [[] for _ in runs]
    for _ in range(rounds):
        for place, (generation, context) in enumerate(runs):
            histories[place].append(generation.inputs())
            outcomes[place].append(scene.run(histories[place][-1], **context))
            found[place].append(scene.outputs[-1])
    assert outcomes == [FRESH] * len(runs)
    for history, outputs in zip(histories, found, strict=True):
        for ours, expected in zip(outputs, alone(history, model=scene.model), strict=True):
            assert torch.equal(ours, expected), "a step took what another run has left"


class CachedDiT(toys.ToyDiT, CacheMixin):  # type: ignore[misc]
    """With diffusers' `cache_context` and its reset at the end of a pipeline call."""
