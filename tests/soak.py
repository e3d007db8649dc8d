"""Many requests at once on one compiled model, each step compared with the eager reference of that request alone.

python -m tests.soak --steps 20000
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import resource
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teacache_fx import TeaCacheBackend, cache_context, session
from tests import toys
from tests.reference import ReferenceTeaCache, Tap

THRESH, COEFFICIENTS = 0.5, (1.0, 0.0)
TAP = Tap("blocks.0", "blocks.1", query="to_qkv")
BATCHES, TOKENS = (1, 2), (8, 12, 20)
IN_FLIGHT, MAX_CONTEXTS = 5, 32


@dataclass(eq=False)
class Branch:
    """One guidance branch of a request, with the reference that runs beside it."""

    name: str | None
    prompt: Tensor
    reference: ReferenceTeaCache


@dataclass(eq=False)
class Request:
    """A generation under way: how it is called, and where it stands."""

    request_id: str | None
    branches: list[Branch]
    latents: Tensor
    drift: Tensor
    steps_left: int
    timestep: float

    def advance(self, dice: random.Random) -> Tensor:
        """The latents of the next step, in a tensor of their own or in the buffer of the last."""
        moved = self.latents + 0.02 * dice.random() * self.drift
        self.latents = moved if dice.random() < 0.5 else self.latents.copy_(moved)
        self.timestep -= 1 + 4 * dice.random()
        self.steps_left -= 1
        return self.latents


@dataclass
class Soak:
    """The compiled model and what was seen of it."""

    seed: int = 0
    inner: str = "eager"
    num_steps: int = 0
    num_skipped: int = 0
    num_requests: int = 0
    num_aborted: int = 0
    most_states: int = 0
    most_bytes: int = 0
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = toys.make()
        self.references = [toys.make() for _ in range(2)]  # one per thread: hooks on a shared one would mix
        for reference in self.references:
            reference.load_state_dict(self.model.state_dict())
        self.backend = TeaCacheBackend(
            rel_l1_thresh=THRESH,
            coefficients=list(COEFFICIENTS),
            inner=self.inner,
            on_decline="raise",
            max_contexts=MAX_CONTEXTS,
        )
        self.compiled = torch.compile(self.model, backend=self.backend, dynamic=True)
        text = toys.inputs(seed=9)["encoder_hidden_states"]
        self._shared_prompts = {batch: text[:batch] for batch in BATCHES}

    def start_over(self) -> None:
        """Forgets all but the compiled graphs."""
        self.backend.reset_state()
        self.num_steps = self.num_skipped = self.num_requests = self.num_aborted = 0
        self.errors.clear()

    def run(self, steps: int, thread: int = 0) -> None:
        """Starts, steps, aborts and ends requests at random."""
        dice, running = random.Random(self.seed + thread), list[Request]()
        for _ in range(steps):
            if len(running) < IN_FLIGHT and (not running or dice.random() < 0.3):
                running.append(self._request(dice, thread))
            request = dice.choice(running)
            self._step(request, dice)
            if request.steps_left == 0 or dice.random() < 0.03:
                self.num_aborted += request.steps_left > 0
                running.remove(request)
                if request.request_id is not None and dice.random() < 0.5:
                    self.backend.end_session(request.request_id)
            self._weigh()

    def _request(self, dice: random.Random, thread: int) -> Request:
        self.num_requests += 1
        generator = torch.Generator().manual_seed(dice.randrange(1 << 30))
        shape = (dice.choice(BATCHES), dice.choice(TOKENS), toys.CHANNELS)
        in_session = dice.random() < 0.5
        choices: list[tuple[str | None, ...]] = [(None,), ("cond", "uncond"), ("cond", "uncond", "uncond_stg")]
        names = dice.choice(choices)
        if not in_session and len(names) > 1:
            names = (None,) * len(names)  # told apart by the identity of their prompts

        def prompt() -> Tensor:
            if in_session and dice.random() < 0.5:
                return self._shared_prompts[shape[0]]
            return torch.randn(shape[0], 3, toys.TEXT_WIDTH, generator=generator)

        model = self.references[thread]
        return Request(
            f"thread {thread} request {self.num_requests}" if in_session else None,
            [Branch(name, prompt(), ReferenceTeaCache(model, TAP, THRESH, COEFFICIENTS)) for name in names],
            torch.randn(shape, generator=generator),
            torch.randn(shape, generator=generator),
            dice.randrange(2, 25),
            dice.choice((1000.0, 600.0, 300.0)),
        )

    def _step(self, request: Request, dice: random.Random) -> None:
        latents = request.advance(dice)
        for branch in request.branches:
            inputs = {
                "hidden_states": latents,
                "timestep": torch.full((latents.shape[0],), request.timestep),
                "encoder_hidden_states": branch.prompt,
            }
            with torch.no_grad(), contextlib.ExitStack() as stack:
                if request.request_id is not None:
                    stack.enter_context(session(self.model, request.request_id))
                if branch.name is not None:
                    stack.enter_context(cache_context(self.model, branch.name))
                ours, expected = self.compiled(**inputs), branch.reference(**inputs)
            self.num_steps += 1
            self.num_skipped += not branch.reference.computed[-1]
            tied = branch.reference.margins and branch.reference.margins[-1] < 1e-5
            difference = float((ours - expected).abs().max() / expected.abs().max())
            if difference > 1e-5 and not tied:
                self.errors.append(f"step {self.num_steps}: {difference:.1e} in {request.request_id}, {branch.name}")

    def _weigh(self) -> None:
        states = [state for store in self.backend._stores.values() for state in store.states]
        memories = [state.memory for state in states]
        size = sum(t.numel() * t.element_size() for memory in memories if memory for t in memory.tensors)
        self.most_states, self.most_bytes = max(self.most_states, len(states)), max(self.most_bytes, size)

    def __str__(self) -> str:
        return (
            f"{self.num_requests} requests ({self.num_aborted} aborted), {self.num_steps} steps, "
            f"{self.num_skipped} skipped, {len(self.errors)} wrong; at most {self.most_states} states, "
            f"{self.most_bytes / 1024:.0f} KiB"
        )


def soak(steps: int, seed: int = 0, threads: int = 1, inner: str = "eager") -> Soak:
    """Runs it, in one or two threads, on graphs that a first run has captured.

    A generation that a newly captured graph takes over is computed anew at that step, as the reference is not.
    """
    run = Soak(seed, inner)
    for number in range(threads):
        run.run(steps // threads, number)
    run.start_over()
    workers = [threading.Thread(target=run.run, args=(steps // threads, number)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return run


def main() -> None:
    """Prints what was seen, with the process's memory as it goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--inner", default="eager")
    options = parser.parse_args()
    for number in range(options.rounds):
        run = soak(options.steps // options.rounds, seed=number, threads=1 + number % 2, inner=options.inner)
        torch._dynamo.reset()
        gc.collect()
        print(f"round {number}: {run}; process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
        for error in run.errors[:5]:
            print("  " + error)


if __name__ == "__main__":
    main()
