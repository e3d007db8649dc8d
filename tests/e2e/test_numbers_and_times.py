"""Python numbers and further timesteps, which may tell prompts and branches apart though no tensor does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacache_fx import StepReason, TeaCacheBackend
from teacache_fx.graph import written_arguments
from tests import toys
from tests.passes.capture import on_capture
from tests.shapes.parts import Dit, TimestepEmbedder, images

LOOSE = {"rel_l1_thresh": 0.5, "coefficients": [1.0, 0.0], "inner": "eager"}


def _compiled(model: nn.Module, on_decline: str = "raise") -> tuple[Any, TeaCacheBackend]:
    backend = TeaCacheBackend(on_decline=on_decline, **LOOSE)  # type: ignore[arg-type]
    return torch.compile(model, backend=backend, fullgraph=True), backend


def _make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def _decisions(backend: TeaCacheBackend) -> list[list[bool]]:
    return [[step.skipped for step in context.steps] for context in backend.stats().contexts]


class LabelDit(Dit):
    """Conditioned on a python number."""

    def forward(self, x: Tensor, t: Tensor, y: int) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, torch.full((len(x),), y))


@torch.no_grad()
def test_a_number_tells_branches_apart() -> None:
    """Dynamo builds the first two numbers in, and then makes the number an input of the graph."""
    model = _make(LabelDit)
    compiled, backend = _compiled(model)
    for step in range(4):
        for label in (3, 7):
            given = {**images(t=torch.full((2,), 700.0 - step)), "y": label}
            given["x"] = given["x"] + 0.001 * step
            output, expected, other = compiled(**given), model(**given), model(**{**given, "y": 10 - label})
            assert (output - expected).abs().max() < 0.2 * (other - expected).abs().max()
    dynamic = _decisions(backend)[-2:]
    assert [decisions[0] for decisions in dynamic] == [False, False], "each begins with a step of its own"
    assert any(decision for decisions in dynamic for decision in decisions)


class ScaledDit(Dit):
    """Holds a number that scales what its blocks do, as adapters have it."""

    scale = 1.0

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.scale * block(x, c)
        return x


@torch.no_grad()
def test_a_number_that_the_model_holds() -> None:
    model: Any = _make(ScaledDit)
    compiled, _ = _compiled(model, on_decline="ignore")
    for scale in (1.0, 0.3, 0.6, 0.9, 0.1, 0.3):
        model.scale = scale
        assert torch.equal(compiled(**images()), model(**images()))


class StartingDit(Dit):
    """Conditioned on where in the music it begins, which is called a time."""

    def __init__(self) -> None:
        super().__init__()
        self.start_embedder = TimestepEmbedder()

    def forward(self, x: Tensor, timestep: Tensor, time: Tensor) -> Tensor:
        c = self.t_embedder(timestep) + self.start_embedder(time)
        return self.unpatchify(self.final_layer(self.trunk(self.embed(x), c), c))


def _started(step: int, time: Tensor) -> dict[str, Tensor]:
    return {"x": images()["x"] + 0.001 * step, "timestep": torch.full((2,), 900.0 - 2 * step), "time": time}


@torch.no_grad()
def test_a_time_that_tells_branches_apart() -> None:
    model = _make(StartingDit)
    compiled, backend = _compiled(model)
    for step in range(3):
        for time in (torch.tensor([30.0, 90.0]), torch.zeros(2)):
            assert torch.equal(compiled(**_started(step, time)), model(**_started(step, time)))
    (context,) = backend.stats().contexts
    assert [step.reason for step in context.steps][1:] == [StepReason.CONDITIONING_CHANGED] * 5


@torch.no_grad()
@pytest.mark.parametrize("follows", [True, False])
def test_a_second_timestep_leaves_the_cache_alive(follows: bool) -> None:
    compiled, backend = _compiled(_make(StartingDit))
    for step in range(4):
        compiled(**_started(step, torch.full((2,), 400.0 - 2 * step * follows)))
    assert _decisions(backend) == [[False, True, True, True]]


@torch.library.custom_op("teacache_fx_tests::add_to", mutates_args=("total",))
def add_to(value: Tensor, total: Tensor) -> None:
    total.add_(value)


class PacketDiT(toys.ToyDiT):
    """Calls a custom operator, which writes to its second argument, by its packet."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, text, temb)
            torch.ops.teacache_fx_tests.add_to(hidden_states, total)
        return hidden_states + total


def test_writes_of_an_operator_called_by_its_packet() -> None:
    def written(gm: torch.fx.GraphModule) -> list[str]:
        calls = [node for node in gm.graph.nodes if "add_to" in str(node.target)]
        return [argument.name for node in calls for argument in written_arguments(node)]

    (names,) = on_capture(toys.make(PacketDiT), toys.inputs(), written)
    assert names == ["total", "total"]
    model, inputs = toys.make(PacketDiT), toys.inputs()
    compiled = torch.compile(model, backend=TeaCacheBackend(on_decline="ignore", **LOOSE))  # type: ignore[arg-type]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(**inputs), model(**inputs))
