"""One compiled model at a threshold so high that only the guards make it compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from teacache_fx import TeaCacheBackend, TeaCacheState, cache_context, session
from tests import toys

COMPUTED, SKIPPED = True, False


def noise(seed: int, like: Tensor) -> Tensor:
    """Latents of a new generation."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Generation:
    """A denoising run: the latents move a little from step to step, the timestep as it is told.

    Attributes:
        seed: of the latents.
        prompt: the conditioning object, passed at each step.
        start, stride: timesteps are start - stride * step.
        step: steps done.
    """

    seed: int
    prompt: Tensor
    start: float = 900.0
    stride: float = 20.0
    step: int = 0
    latents: Tensor | None = None

    def inputs(self, shape: tuple[int, ...] = (2, 8, 4)) -> dict[str, Tensor]:
        """Those of the next step."""
        if self.latents is None:
            self.latents = noise(self.seed, torch.empty(shape))
        time = torch.full((shape[0],), self.start - self.stride * self.step)
        self.step += 1
        self.latents = self.latents * 0.99
        return {"hidden_states": self.latents, "timestep": time, "encoder_hidden_states": self.prompt}


@dataclass
class Scene:
    """Runs steps through the cache and checks what comes out.

    Attributes:
        model: what is compiled.
        options: of the backend, on top of those of every scene.
        dynamic: of torch.compile.
        outputs: of each step.
    """

    model: nn.Module = field(default_factory=toys.make)
    options: dict[str, Any] = field(default_factory=dict)
    dynamic: bool | None = None
    outputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch._dynamo.reset()
        options = {"rel_l1_thresh": 1e6, "coefficients": [1.0, 0.0], "inner": "eager", "on_decline": "raise"}
        self.backend = TeaCacheBackend(**{**options, **self.options})
        self.compiled = torch.compile(self.model, backend=self.backend, dynamic=self.dynamic)

    def run(
        self, inputs: dict[str, Any], name: str | None = None, request: str | None = None, compare: bool = True
    ) -> bool:
        """One step; says whether it was computed: then the output is the model's, to the bit."""
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if request is not None:
                stack.enter_context(session(self.model, request))
            if name is not None:
                stack.enter_context(cache_context(self.model, name))
            before = self.num_skipped
            output = self.compiled(**inputs)
            computed = self.num_skipped == before
            if compare:
                assert torch.equal(output, self.model(**inputs)) == computed, "the statistics say otherwise"
        self.outputs.append(output)
        return computed

    def play(self, generation: Generation, steps: int, **context: Any) -> list[bool]:
        """Several steps of a generation."""
        return [self.run(generation.inputs(), **context) for _ in range(steps)]

    @property
    def states(self) -> list[TeaCacheState]:
        """All that the cache remembers."""
        return [state for store in self.backend._stores.values() for state in store.states]

    @property
    def num_skipped(self) -> int:
        """Steps skipped so far."""
        return self.backend.stats().num_skipped


@contextlib.contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Puts something else in the place of a function: a guard removed."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)
