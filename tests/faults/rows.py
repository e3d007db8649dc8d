"""The rows of the fault table: what happens to a cache in use, and what must come out."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

from tests import toys
from tests.faults.scene import COMPUTED, SKIPPED, Generation, Scene, noise

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


def _alone(steps: list[dict[str, Tensor]], **options: Any) -> list[Tensor]:
    scene = Scene(**options)
    for inputs in steps:
        scene.run(inputs)
    return scene.outputs


def _interleave(scene: Scene, runs: list[tuple[Generation, dict[str, Any]]], rounds: int = 3) -> None:
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
        for ours, expected in zip(outputs, _alone(history, model=scene.model), strict=True):
            assert torch.equal(ours, expected), "a step took what another run has left"


@fault(
    "branches", "two guidance branches without names, in turn; embeddings of equal shape",
    "each has a state of its own", "identity of the conditioning",
)  # fmt: skip
def _() -> None:
    _interleave(Scene(), [(Generation(0, prompt(0)), {}), (Generation(0, prompt(1)), {})])


@fault(
    "branches", "three named branches whose conditioning is made anew at each step",
    "each is found by its name", "name of the branch",
)  # fmt: skip
def _() -> None:
    scene, seeds = Scene(), {"cond": 0, "uncond": 1, "uncond_stg": 2}
    runs = {name: Generation(0, prompt()) for name in seeds}
    for expected in FRESH:
        for name, seed in seeds.items():
            inputs = runs[name].inputs()
            assert scene.run({**inputs, "encoder_hidden_states": prompt(seed)}, name) == expected


class PerturbedDiT(toys.ToyDiT):
    """A flag, built into the graph, makes another branch of the same prompt."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, perturbed: bool = False
    ) -> Tensor:
        """As the toy; perturbed, the blocks see another text."""
        return super().forward(hidden_states, timestep, encoder_hidden_states * (-1.0 if perturbed else 1.0))


@fault(
    "branches", "one prompt object for two branches that differ in a flag of forward (perturbed attention)",
    "each graph has a state of its own", "fingerprint of the graph",
)  # fmt: skip
def _() -> None:
    scene, run = Scene(model=toys.make(PerturbedDiT)), Generation(0, prompt())
    for expected in FRESH:
        inputs = run.inputs()
        assert scene.run(inputs) == expected
        assert scene.run({**inputs, "perturbed": True}) == expected


@fault(
    "requests", "two requests with prompts of equal content, in turn",
    "two prompt objects, two states", "identity of the conditioning",
)  # fmt: skip
def _() -> None:
    _interleave(Scene(), [(Generation(0, prompt()), {}), (Generation(1, prompt()), {})])


@fault(
    "generations", "a picture is taken up again with more noise: the timestep turns back, the latents hardly move",
    "a new trajectory is computed", "timestep turned back",
)  # fmt: skip
def _() -> None:
    scene, run = Scene(), Generation(0, prompt())
    assert scene.play(run, 3) == FRESH
    run.start, run.step = 950.0, 0
    assert scene.play(run, 3) == FRESH


@fault(
    "generations", "interrupted; then the same prompt with another seed from the next timestep on (img2img)",
    "the latents jump: computed", "latents jumped",
)  # fmt: skip
def _() -> None:
    scene, embeddings = Scene(), prompt()
    assert scene.play(Generation(0, embeddings), 3) == FRESH
    assert scene.play(Generation(1, embeddings, start=840.0), 3) == FRESH


@fault(
    "generations", "interrupted after one step; then another seed at the same timestep",
    "the latents jump: computed", "latents jumped",
)  # fmt: skip
def _() -> None:
    scene, embeddings = Scene(), prompt()
    assert scene.play(Generation(0, embeddings), 1) == [COMPUTED]
    assert scene.play(Generation(1, embeddings), 3) == FRESH


@fault(
    "generations", "interrupted; the next generation's latents are written into the same buffer",
    "the latents were copied, so the jump is seen", "copy of the latents",
)  # fmt: skip
def _() -> None:
    scene, run, buffer = Scene(), Generation(0, prompt()), torch.empty(2, 8, 4)
    for seed in (0, 1):
        run.latents = noise(seed, buffer)
        for expected in FRESH:
            inputs = run.inputs()
            inputs["hidden_states"] = buffer.copy_(inputs["hidden_states"])
            assert scene.run(inputs) == expected


@fault(
    "generations", "one prompt object, two generations in turn, no session",
    "each turn is a jump: always computed", "latents jumped",
)  # fmt: skip
def _() -> None:
    scene, embeddings = Scene(), prompt()
    runs = [Generation(seed, embeddings) for seed in (0, 1)]
    assert all(scene.run(run.inputs()) for _ in range(3) for run in runs)


@fault("generations", "Heun: each timestep comes twice", "no hindrance: steps are skipped", None)
def _() -> None:
    scene, run = Scene(), Generation(0, prompt())
    for step, expected in enumerate([COMPUTED, *[SKIPPED] * 8]):
        inputs = run.inputs()
        inputs["timestep"] = torch.full((2,), 900.0 - 20.0 * ((step + 1) // 2))
        assert scene.run(inputs) == expected


@fault("generations", "the timestep runs upwards", "no hindrance; the next generation is computed", None)
def _() -> None:
    scene, embeddings = Scene(), prompt()
    for seed in (0, 1):
        assert scene.play(Generation(seed, embeddings, start=0.0, stride=-20.0), 3) == FRESH


class CachedDiT(toys.ToyDiT, CacheMixin):  # type: ignore[misc]
    """With diffusers' `cache_context` and its reset at the end of a pipeline call."""


@fault(
    "generations", "diffusers' reset at the end of a pipeline call; then the very same steps again",
    "computed, and the memory was freed", "reset at the end",
)  # fmt: skip
def _() -> None:
    model: Any = toys.make(CachedDiT)
    scene, run = Scene(model=model), Generation(0, prompt())
    inputs = run.inputs()
    assert scene.run(inputs) == COMPUTED
    model._reset_stateful_cache()
    assert not scene.states[0].memory
    assert scene.run(inputs) == COMPUTED


@fault(
    "prompts", "a prompt's embeddings are refilled in place (inference tensors, which count no versions)",
    "other contents: computed", "hash of the conditioning",
)  # fmt: skip
def _() -> None:
    with torch.inference_mode():
        scene, run = Scene(), Generation(0, prompt())
        assert scene.play(run, 3) == FRESH
        run.prompt.copy_(prompt(1))
        assert scene.play(run, 3) == FRESH


@fault(
    "prompts", "one name, another prompt, the latents go on (prompt travel)",
    "other contents: computed", "hash of the conditioning",
)  # fmt: skip
def _() -> None:
    scene, run = Scene(), Generation(0, prompt())
    assert scene.play(run, 3, name="cond") == FRESH
    run.prompt = prompt(1)
    assert scene.play(run, 3, name="cond") == FRESH


@fault(
    "prompts", "one branch, no name, its conditioning is made anew at each step (Sana casts it inside its loop)",
    "its state is handed on", "handed on",
)  # fmt: skip
def _() -> None:
    scene, run = Scene(), Generation(0, prompt())
    for expected in FRESH:
        run.prompt = prompt()
        assert scene.run(run.inputs()) == expected


@fault("prompts", "a prompt is let go", "its state is freed at once", "freed with the prompt")
def _() -> None:
    scene, run = Scene(), Generation(0, prompt())
    scene.play(run, 2)
    residual = scene.states[0].previous_residual
    assert residual is not None
    reference = weakref.ref(residual)
    del residual, run
    scene.outputs.clear()
    gc.collect()
    assert reference() is None


@fault("numbers", "NaN in the latents of one step", "computed then and after it", "not finite")
def _() -> None:
    scene, run = Scene(options={"rel_l1_thresh": 1e30}), Generation(0, prompt())
    assert scene.play(run, 3) == FRESH
    inputs = run.inputs()
    scene.run({**inputs, "hidden_states": torch.full_like(inputs["hidden_states"], torch.nan)}, compare=False)
    assert not scene.backend.stats().contexts[0].steps[-1].skipped
    assert scene.play(run, 2) == [COMPUTED, SKIPPED]


@fault(
    "shapes", "one prompt, two resolutions, in turn", "each has a state of its own", "shapes and graph"
)  # fmt: skip
def _() -> None:
    scene, embeddings = Scene(dynamic=True), prompt()
    runs = [(Generation(0, embeddings), (2, 8, 4)), (Generation(1, embeddings), (2, 12, 4))]
    for expected in FRESH:
        for run, shape in runs:
            assert scene.run(run.inputs(shape)) == expected


@fault("shapes", "no_grad, then inference_mode: two graphs of one model", "no hindrance: the state goes on", None)
def _() -> None:
    scene, run = Scene(), Generation(0, prompt())
    assert scene.play(run, 2) == FRESH[:2]
    with torch.inference_mode():
        assert scene.play(run, 2) == [SKIPPED, SKIPPED]


@fault(
    "samples", "granularity='sample': one sample of a batch needs the blocks, its neighbour does not",
    "each comes out as if it had been alone", "each sample its own",
)  # fmt: skip
def _() -> None:
    model, settings = toys.make(), {"rel_l1_thresh": 0.05, "granularity": "sample"}
    embeddings, start, drift = prompt(), noise(0, torch.empty(2, 8, 4)), noise(1, torch.empty(2, 8, 4))
    speed = torch.tensor([0.002, 0.05]).view(2, 1, 1)
    steps = [
        {"hidden_states": start + i * speed * drift, "timestep": torch.full((2,), 500 - 0.1 * i),
         "encoder_hidden_states": embeddings}
        for i in range(6)
    ]  # fmt: skip
    together = Scene(model=model, options=settings)
    for inputs in steps:
        together.run(inputs, compare=False)
    assert together.backend.stats().num_in_vain > 0
    for row in range(2):
        own = embeddings[row : row + 1].clone()
        rows = [
            {"hidden_states": inputs["hidden_states"][row : row + 1], "timestep": inputs["timestep"][row : row + 1],
             "encoder_hidden_states": own}
            for inputs in steps
        ]  # fmt: skip
        alone = Scene(model=model, options=settings)
        for inputs, ours in zip(rows, together.outputs, strict=True):
            alone.run(inputs, compare=False)
            torch.testing.assert_close(ours[row : row + 1], alone.outputs[-1], rtol=1e-5, atol=1e-6)


@fault("requests", "sessions: one prompt object, two seeds, in turn", "each has a state of its own", "request")
def _() -> None:
    embeddings = prompt()
    _interleave(Scene(), [(Generation(seed, embeddings), {"request": f"r{seed}"}) for seed in (0, 1)])


@fault(
    "threads", "two threads say diffusers' cache_context of one transformer at the same time",
    "each thread is heard by itself", "one context per thread",
)  # fmt: skip
def _() -> None:
    model: Any = toys.make(CachedDiT)
    scene, runs = Scene(model=model), {name: Generation(0, prompt(seed)) for seed, name in enumerate(("one", "two"))}
    scene.run(runs["one"].inputs())  # from now on names are heard

    def speak_over() -> None:
        with model.cache_context("two"):
            entered.set()
            finished.wait()

    entered, finished = threading.Event(), threading.Event()
    with model.cache_context("one"):
        other = threading.Thread(target=speak_over)
        other.start()
        entered.wait()
        scene.run(runs["one"].inputs())
        finished.set()
        other.join()
    assert [state.label for state in scene.states] == ["one"]


@fault(
    "models", "two models of one structure (a fine-tune, Wan 2.2's pair), one backend, one prompt, one compiled graph",
    "each has a state of its own", "weights of the model",
)  # fmt: skip
def _() -> None:
    first, second = toys.make(), toys.make()
    for parameter in second.get_submodule("blocks").parameters():
        parameter.mul_(1.5)
    scene, run = Scene(model=first), Generation(0, prompt())
    for expected in FRESH:
        inputs = run.inputs()
        for model in (first, second):
            scene.model, scene.compiled = model, torch.compile(model, backend=scene.backend)
            assert scene.run(inputs) == expected


@fault("memory", "more prompts at a time than max_contexts", "the least recently used one goes", "limit of contexts")
def _() -> None:
    scene = Scene(options={"max_contexts": 3})
    runs = [Generation(seed, prompt(seed)) for seed in range(5)]
    for run in runs:
        scene.run(run.inputs())
    assert len(scene.states) == 3
    assert scene.run(runs[4].inputs()) == SKIPPED
    assert scene.run(runs[0].inputs()) == COMPUTED
