"""A timestep that is a python number.

torch.compile builds the first value into the graph, where nothing tells it from any other constant: that step is
declined, and runs. With the second value the number becomes an input, and from then on there is one graph for all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacache_fx import DeclineReason, TeaCacheBackend, TeaCacheWarning
from tests.shapes.parts import DEPTH, TOKENS, WIDTH, Dit, images, sinusoids

SETTINGS: dict[str, Any] = {"rel_l1_thresh": 0.1, "coefficients": [1.0, 0.0], "inner": "eager"}
TIMES = (701, 652, 603, 554, 505, 456)
Number = float | int


class TensorOfNumberDit(Dit):
    def forward(self, x: Tensor, t: Number, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.tensor([t]), y)


class FullOfNumberDit(Dit):
    def forward(self, x: Tensor, t: Number, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.full((len(x),), t, device=x.device), y)


class NumberTimesTensorDit(Dit):
    def forward(self, x: Tensor, t: Number, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t * torch.ones_like(y), y)


class NumberInBlocksDit(FullOfNumberDit):
    """The blocks, too, look at the number."""

    def trunk_at(self, x: Tensor, c: Tensor, t: Number) -> Tensor:
        for block in self.blocks:
            x = block(x, c) * t / 600
        return x

    def forward(self, x: Tensor, t: Number, y: Tensor) -> Tensor:  # type: ignore[override]
        c = self.t_embedder(torch.full((len(x),), t)) + self.y_embedder(y)
        return self.unpatchify(self.final_layer(self.trunk_at(self.embed(x), c, t), c))


class TableDit(Dit):
    """Looks its timestep up: nothing says that neighbours in a table are neighbours in time."""

    def build(self) -> None:
        super().build()
        self.table = nn.Parameter(sinusoids(torch.arange(1000)))

    def forward(self, x: Tensor, t: int, y: Tensor) -> Tensor:  # type: ignore[override]
        c = self.table[t] + self.y_embedder(y)
        return self.unpatchify(self.final_layer(self.trunk(self.embed(x), c), c))


def _make(kind: type[Dit]) -> Dit:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def _steps(kind: type[Number]) -> list[dict[str, Any]]:
    inputs = images()
    drift = 0.02 * torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(3))
    return [{**inputs, "x": inputs["x"] + i * drift, "t": kind(time)} for i, time in enumerate(TIMES)]


def _as_tensors(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**step, "t": torch.tensor([float(step["t"])] * 2)} for step in steps]


def _run(model: nn.Module, backend: TeaCacheBackend, steps: list[dict[str, Any]]) -> list[Tensor]:
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        return [compiled(**step) for step in steps]


@pytest.mark.parametrize("number", [float, int])
@pytest.mark.parametrize("kind", [TensorOfNumberDit, FullOfNumberDit, NumberTimesTensorDit])
def test_changing_number(kind: type[Dit], number: type[Number]) -> None:
    """From its second value on a number does what a tensor does."""
    steps, backend = _steps(number), TeaCacheBackend(**SETTINGS)
    twice = [*steps, *steps[1:]]  # another generation, told by the timestep that turns back
    with pytest.warns(TeaCacheWarning, match="no timestep found.*pass the timestep as a tensor argument") as caught:
        outputs = _run(_make(kind), backend, twice)
    assert len(caught) == 1
    as_tensor = TeaCacheBackend(**SETTINGS, on_decline="raise")
    expected = _run(_make(Dit), as_tensor, _as_tensors(twice)[1:])
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], _make(kind)(**steps[0]), rtol=0, atol=0)
    torch.testing.assert_close(outputs[1:], expected, rtol=1e-5, atol=1e-6)
    assert [report.is_rewritten for report in backend.reports] == [False, True], (
        "one graph for all values but the first"
    )
    assert backend.stats().num_skipped >= 4
    decisions = [[step.reason for step in stats.stats().contexts[0].steps] for stats in (backend, as_tensor)]
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize(
    ("kind", "number", "reason"),
    [
        (NumberInBlocksDit, float, DeclineReason.VARYING_FLOAT),
        (TableDit, int, DeclineReason.NO_TIMESTEP),
    ],
)
def test_declined_number(kind: type[Dit], number: type[Number], reason: DeclineReason) -> None:
    steps, backend = _steps(number), TeaCacheBackend(**SETTINGS)
    with pytest.warns(TeaCacheWarning, match="no timestep found"):
        outputs = _run(_make(kind), backend, steps)
    model = _make(kind)
    with torch.no_grad():
        torch.testing.assert_close(outputs, [model(**step) for step in steps], rtol=1e-6, atol=1e-6)
    assert not any(report.is_rewritten for report in backend.reports)
    assert backend.reports[-1].declined is not None
    assert backend.reports[-1].declined.reason is reason


def test_integer_in_blocks() -> None:
    """Unlike a float, an integer may enter a branch by itself."""
    steps, backend = _steps(int), TeaCacheBackend(**SETTINGS)
    with pytest.warns(TeaCacheWarning, match="no timestep found"):
        outputs = _run(_make(NumberInBlocksDit), backend, steps)
    model, records = _make(NumberInBlocksDit), backend.stats().contexts[0].steps
    computed = [i + 1 for i, step in enumerate(records) if not step.skipped]
    assert 0 < len(computed) < len(records)
    with torch.no_grad():
        expected = [model(**steps[i]) for i in computed]
    torch.testing.assert_close([outputs[i] for i in computed], expected, rtol=1e-6, atol=1e-6)
    plan = backend.reports[-1].plan
    assert plan is not None
    assert (plan.stack.num_blocks, plan.stack.live_outputs[0].shape) == (DEPTH, ("2", str(TOKENS), str(WIDTH)))
