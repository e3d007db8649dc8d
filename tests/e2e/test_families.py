"""Rewritten transformers of diffusers against the independent eager reference, step by step."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacache_fx import TeaCacheBackend
from tests.reference import TAPS, ReferenceTeaCache
from tests.zoo import FAMILIES, build, trajectory

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Torchinductor does not support code generation"
)


def _sample(output: Any) -> Tensor:
    tensor = output[0]
    assert isinstance(tensor, Tensor)
    return tensor


def _threshold(model: nn.Module, name: str, steps: list[dict[str, Any]]) -> float:
    """One at which some steps are skipped and some computed, clear of ties."""
    probe = ReferenceTeaCache(model, TAPS[name], thresh=float("inf"))
    for inputs in steps:
        probe(**inputs)
    return 1.7 * statistics.median(probe.rel_l1[1:])


QUICK = ("flux", "pixart", "wan")  # compiled in each run


@pytest.mark.parametrize(
    ("name", "inner"),
    [(name, "eager") for name in FAMILIES]
    + [pytest.param(name, "inductor", marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES],
)
def test_same_decisions_and_outputs_as_reference(name: str, inner: str) -> None:
    model, inputs = build(name)
    steps = trajectory(name, inputs)
    with torch.no_grad():
        thresh = _threshold(model, name, steps)
        reference = ReferenceTeaCache(model, TAPS[name], thresh)
        backend = TeaCacheBackend(rel_l1_thresh=thresh, coefficients=[1.0, 0.0], inner=inner, on_decline="raise")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        pairs = [(_sample(compiled(**step)), _sample(reference(**step)), _sample(model(**step))) for step in steps]

    assert {True, False} == set(reference.computed), "the sequence must take both branches"
    assert min(reference.margins) > 1e-4 * thresh, "a tie would make the decision a matter of rounding"
    (context,) = backend.stats().contexts
    assert [not step.skipped for step in context.steps] == reference.computed
    torch.testing.assert_close(
        torch.tensor([step.rel_l1 for step in context.steps]), torch.tensor(reference.rel_l1), rtol=1e-3, atol=0,
        equal_nan=True,
    )  # fmt: skip
    for (ours, expected, unmodified), computed in zip(pairs, reference.computed, strict=True):
        scale = float(expected.abs().max())
        assert float((ours - expected).abs().max()) <= 1e-5 * scale
        if computed and inner == "eager":
            assert torch.equal(ours, unmodified)
        if not computed:
            assert float((expected - unmodified).abs().max()) > 1e-4 * scale, (
                "a skip that changes nothing tests nothing"
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_skipped_step_pays_little(name: str) -> None:
    model, inputs = build(name)
    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    (report,) = backend.reports
    assert report.plan is not None
    assert report.plan.costs.skipped_share < 0.3  # these toys are two blocks deep: the prologue weighs heavily
    names = [block_list.path for block_list in report.plan.stack.lists]
    assert TAPS[name].first.rsplit(".", 1)[0] == names[0]
    assert TAPS[name].last.rsplit(".", 1)[0] == names[-1]
    assert "refiner" not in " ".join(names)
