"""Rows of the fault table: guidance branches and generations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import toys
from tests.faults.row import FRESH, CachedDiT, fault, interleave, prompt
from tests.faults.scene import COMPUTED, SKIPPED, Generation, Scene, noise


@fault(
    "branches", "two guidance branches without names, in turn; embeddings of equal shape",
    "each has a state of its own", "identity of the conditioning",
)  # fmt: skip
def _() -> None:
    interleave(Scene(), [(Generation(0, prompt(0)), {}), (Generation(0, prompt(1)), {})])


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
    interleave(Scene(), [(Generation(0, prompt()), {}), (Generation(1, prompt()), {})])


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
