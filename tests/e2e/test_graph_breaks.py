"""Models that break the graph: before their blocks, and inside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from teacache_fx import (
    DeclineReason,
    StepReason,
    TeaCacheBackend,
    TeaCacheWarning,
    apply_teacache_hook,
    remove_teacache_hook,
)
from tests import toys
from tests.both_branches import ALWAYS_SKIP, measure

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class EarlyBreakDiT(toys.ToyDiT):
    """Breaks the graph between the embeddings and the blocks, which then see no timestep."""

    def run_blocks(self, hidden_states: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().run_blocks(hidden_states, text, temb)


class MaskedEarlyBreakDiT(EarlyBreakDiT):
    """Joins text and latents before the break; the mask behind it has as many dimensions as the picture it returns."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        words = encoder_hidden_states.shape[1]
        mask = torch.zeros(len(hidden_states), 1, 1, words + hidden_states.shape[1])
        hidden_states = torch.cat([self.context_embedder(encoder_hidden_states), self.x_embedder(hidden_states)], 1)
        temb = self.embed_time(timestep)
        torch._dynamo.graph_break()
        for block in self.blocks:
            hidden_states = block(hidden_states + mask.mean(), hidden_states[:, :words], temb)
        sample: Tensor = self.proj_out(self.norm_out(hidden_states))[:, words:]
        return torch.unflatten(sample, 1, (2, -1))


class HostMlp(nn.Module):
    """Looks at its values on the host, as a mixture of experts does that counts its tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = 2.0 if sum(hidden_states.flatten().tolist()) > 0 else 0.5
        result: Tensor = scale * self.inner(hidden_states)
        return result


class HostDiT(toys.ToyDiT):
    """Breaks the graph in each block."""

    def make_block(self) -> nn.Module:
        block = super().make_block()
        block.mlp = HostMlp(block.get_submodule("mlp"))
        return block


def _backend(**settings: object) -> TeaCacheBackend:
    return TeaCacheBackend(rel_l1_thresh=ALWAYS_SKIP, coefficients=[1.0, 0.0], inner="eager", **settings)  # type: ignore[arg-type]


def _moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    latents = inputs["hidden_states"]
    return {**inputs, "hidden_states": latents + 0.02 * torch.randn_like(latents)}


def test_plain_compile_names_the_break() -> None:
    backend = _backend()
    model, inputs = toys.make(EarlyBreakDiT), toys.inputs()
    with torch.no_grad(), pytest.warns(TeaCacheWarning, match=r"broke at .*test_graph_breaks.py:\d+ `torch._dynamo"):
        output = torch.compile(model, backend=backend)(**inputs)
    assert torch.equal(output, model(**inputs))
    declined = backend.reports[0].declined
    assert declined is not None
    assert declined.reason is DeclineReason.GRAPH_BREAK
    assert "capture_scalar_outputs" in str(declined)


@pytest.mark.parametrize("kind", [EarlyBreakDiT, MaskedEarlyBreakDiT])
def test_blocks_behind_a_break_are_cached_through_the_hook(kind: type[toys.ToyDiT]) -> None:
    model, inputs = toys.make(kind), toys.inputs()
    backend = _backend(on_decline="raise")
    reference = toys.make(kind)
    apply_teacache_hook(model, backend)
    both = measure(reference, model, backend, inputs, _moved(inputs))
    assert both.skipped == (False, True, True)
    assert both.computed_error == 0
    assert both.reuse_error <= 1e-5
    assert both.change > 1e-4
    (report,) = [report for report in backend.reports if report.is_rewritten]
    assert report.plan is not None
    assert report.plan.is_fragment


def test_prompts_behind_a_break_are_told_apart() -> None:
    model, reference = toys.make(EarlyBreakDiT), toys.make(EarlyBreakDiT)
    apply_teacache_hook(model, _backend())
    cond, uncond = toys.inputs(seed=0), toys.inputs(seed=0)
    uncond["encoder_hidden_states"] = -cond["encoder_hidden_states"]
    with torch.no_grad():
        for _ in range(3):
            for inputs in (cond, uncond):
                torch.testing.assert_close(model(**inputs), reference(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["prompt in place", "turned back"])
def test_a_new_generation_behind_a_break_is_computed(change: str) -> None:
    model, reference, inputs = toys.make(EarlyBreakDiT), toys.make(EarlyBreakDiT), toys.inputs()
    backend = _backend()
    apply_teacache_hook(model, backend)
    with torch.no_grad():
        for step in range(3):
            model(**{**inputs, "timestep": inputs["timestep"] - 10.0 * step})
        if change == "turned back":
            inputs = {**inputs, "timestep": inputs["timestep"] + 1.0}
        else:
            inputs["encoder_hidden_states"].mul_(-1.0)
        assert torch.equal(model(**inputs), reference(**inputs))
    assert [step.skipped for context in backend.stats().contexts for step in context.steps][-2:] == [True, False]


def test_what_breaks_the_graph_in_each_block_is_kept_whole() -> None:
    model, reference, inputs = toys.make(HostDiT), toys.make(HostDiT), toys.inputs()
    backend = _backend(on_decline="raise")
    apply_teacache_hook(model, backend)
    with torch.no_grad():
        assert torch.equal(model(**inputs), reference(**inputs))  # the first call finds out what breaks the graph
    both = measure(reference, model, backend, inputs, _moved(inputs))
    assert both.skipped == (False, True, True)
    assert both.computed_error == 0
    assert both.change > 1e-4
    (report,) = [report for report in backend.reports if report.is_rewritten]
    assert report.plan is not None
    assert report.plan.stack.num_blocks == 2
    assert report.plan.costs.skipped_share < 0.2
    remove_teacache_hook(model)
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, HostMlp))


def test_samples_behind_a_break_cannot_decide_for_themselves() -> None:
    model, reference, inputs = toys.make(EarlyBreakDiT), toys.make(EarlyBreakDiT), toys.inputs()
    backend = _backend(granularity="sample")
    apply_teacache_hook(model, backend)
    with torch.no_grad(), pytest.warns(TeaCacheWarning, match="samples cannot decide for themselves") as caught:
        outputs = [model(**inputs) for _ in range(3)]
    with torch.no_grad():
        assert all(torch.equal(output, reference(**inputs)) for output in outputs)
    assert len(caught) == 1
    assert "set granularity='batch'" in str(caught[0].message)
    assert not any(report.is_rewritten for report in backend.reports)
    assert backend.stats().contexts == ()


def test_samples_decide_once_what_breaks_is_kept_whole() -> None:
    """A break that can be healed is healed, and then the whole call is one graph."""
    model, inputs = toys.make(HostDiT), toys.inputs()
    backend = _backend(granularity="sample", on_decline="raise")
    apply_teacache_hook(model, backend)
    with torch.no_grad():
        for _ in range(3):
            model(**inputs)
    (report,) = [report for report in backend.reports if report.is_rewritten]
    assert report.plan is not None
    assert not report.plan.is_fragment
    assert [step.sample_reasons for step in backend.stats().contexts[0].steps][1] == (StepReason.SKIPPED,) * 2
