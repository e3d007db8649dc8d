"""Rows of the fault table: prompts, numbers, shapes, samples, requests, threads, models and memory."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from tests import toys
from tests.faults.row import FRESH, CachedDiT, fault, interleave, prompt
from tests.faults.scene import COMPUTED, SKIPPED, Generation, Scene, noise


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


class LabelledDiT(toys.ToyDiT):
    """Conditioned on a python number too."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, label: int
    ) -> Tensor:
        return super().forward(hidden_states, timestep, encoder_hidden_states * label)


class StartedDiT(toys.ToyDiT):
    """Conditioned on a time too, that of where a piece of music begins."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, time: Tensor
    ) -> Tensor:
        start = self.embed_time(time).mean(-1)[:, None, None]
        return super().forward(hidden_states + start, timestep, encoder_hidden_states)


@fault(
    "branches", "two branches that differ in a python number alone, which dynamo has made an input of the graph",
    "each has a state of its own", "numbers",
)  # fmt: skip
def _() -> None:
    scene, run = Scene(toys.make(LabelledDiT)), Generation(0, prompt())
    for label in (1, 2):  # built in; an input from then on
        scene.run({**run.inputs(), "label": label})
    for expected in FRESH:
        inputs = run.inputs()
        assert [scene.run({**inputs, "label": label}) for label in (5, 7)] == [expected] * 2


@fault(
    "branches", "two branches that differ in a second timestep alone, without names",
    "it has changed while the first stood still: always computed", "further timesteps",
)  # fmt: skip
def _() -> None:
    scene, run = Scene(toys.make(StartedDiT)), Generation(0, prompt())
    for _ in range(3):
        inputs = run.inputs()
        assert all(scene.run({**inputs, "time": torch.full((2,), start)}) for start in (30.0, 0.0))


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
    interleave(Scene(), [(Generation(seed, embeddings), {"request": f"r{seed}"}) for seed in (0, 1)])


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
