"""Costs of the parts of a step against torch's counter and the sizes of the modules; static and dynamic shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from teacache_fx import TeaCacheBackend, apply_teacache_hook
from teacache_fx.costs import Costs, PartCosts
from teacache_fx.graph import fake_mode_of
from teacache_fx.pipeline import Pipeline
from teacache_fx.plan import CachePlan
from tests import toys
from tests.counting import counted
from tests.passes.capture import CONFIG, on_capture
from tests.zoo import ZOO, assemble

_FLOAT = 4


class PatchDiT(toys.ToyDiT):
    """Latents [batch, channels, height, width], of which each 2 x 2 pixels make a token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(toys.CHANNELS, toys.WIDTH, 2, 2)
        self.pixels = nn.Linear(toys.WIDTH, 4 * toys.CHANNELS)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        rows, columns = hidden_states.shape[2] // 2, hidden_states.shape[3] // 2
        tokens = self.patch(hidden_states).flatten(2).transpose(1, 2)
        text = self.context_embedder(encoder_hidden_states)
        tokens = self.pixels(self.norm_out(self.run_blocks(tokens, text, self.embed_time(timestep))))
        patches = tokens.transpose(1, 2).unflatten(2, (rows, columns))
        return nn.functional.pixel_shuffle(patches, 2)


class HostMlp(nn.Module):
    """Breaks the graph, and so is kept whole; holds a buffer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("table", torch.zeros(5, dtype=torch.float64))

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = 2.0 if sum(hidden_states.flatten().tolist()) > 0 else 0.5
        result: Tensor = scale * self.inner(hidden_states)
        return result


class HostDiT(toys.ToyDiT):
    """Holds an opaque module in each block."""

    def make_block(self) -> nn.Module:
        block = super().make_block()
        block.mlp = HostMlp(block.get_submodule("mlp"))
        return block


def num_bytes(*modules: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for module in modules for t in (*module.parameters(), *module.buffers()))


def plan_of(model: nn.Module, inputs: dict[str, Any]) -> CachePlan:
    torch._dynamo.reset()  # sizes that it has seen to vary would be symbols
    plan: CachePlan
    (plan,) = on_capture(model, inputs, lambda gm: Pipeline(gm).analyse())
    return plan


def dynamic_plan(model: nn.Module, inputs: dict[str, Tensor]) -> CachePlan:
    """The plan under symbolic sizes; holds that neither analysis nor rewriting put a guard on them."""
    plans: list[CachePlan] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        env = fake_mode_of(gm.graph).shape_env
        assert env is not None
        before = [str(guard.expr) for guard in env.guards], dict(env.replacements)
        pipeline = Pipeline(gm)
        plans.append(pipeline.analyse())
        str(plans[0].costs.at())
        pipeline.rewrite(CONFIG)
        assert ([str(guard.expr) for guard in env.guards], dict(env.replacements)) == before
        return gm.forward

    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        torch.compile(model, backend=backend, fullgraph=True, dynamic=True)(**inputs)
    return plans[0]


def images(batch: int, height: int, width: int) -> dict[str, Tensor]:
    return {**toys.inputs(batch), "hidden_states": torch.randn(batch, toys.CHANNELS, height, width)}


@pytest.mark.parametrize("kind", [toys.ToyDiT, toys.SlicedJointDiT, toys.TwoStreamDiT, toys.RotaryInPlaceDiT, PatchDiT])
def test_flops_of_the_parts_make_up_the_model(kind: Callable[..., nn.Module]) -> None:
    model, inputs = toys.make(kind), images(2, 4, 6) if kind is PatchDiT else toys.inputs()
    costs = plan_of(model, inputs).costs
    assert costs.computed.flops == counted(model, **inputs)
    assert 0 < costs.skipped.flops == costs.prologue.flops + costs.epilogue.flops < costs.blocks.flops


@pytest.mark.parametrize("name", ["flux", "sana"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flops_of_the_parts_make_up_a_model_of_diffusers(name: str) -> None:
    model, inputs = assemble(ZOO[name])
    assert plan_of(model, inputs).costs.computed.flops == counted(model, **inputs)


def test_weights_that_each_part_reads() -> None:
    model = toys.make()
    costs = plan_of(model, toys.inputs()).costs
    first = model.get_submodule("blocks.0.modulation")  # of the first block the indicator needs this alone
    embedders = [model.get_submodule(name) for name in ("x_embedder", "time_embed")]
    ends = [model.get_submodule(name) for name in ("norm_out", "proj_out")]
    assert costs.prologue.weight_bytes == num_bytes(*embedders, first)
    assert costs.epilogue.weight_bytes == num_bytes(*ends)
    assert costs.computed.weight_bytes == num_bytes(model)


def test_weights_of_half_precision_and_shared_ones() -> None:
    model = toys.make().to(torch.bfloat16)
    blocks = model.get_submodule("blocks")
    blocks[1].to_out = blocks[0].to_out  # type: ignore[index]
    inputs = {name: value.bfloat16() for name, value in toys.inputs().items()}
    costs = plan_of(model, inputs).costs
    parts = num_bytes(model.get_submodule("context_embedder"), blocks)
    assert costs.blocks.weight_bytes == parts - num_bytes(model.get_submodule("blocks.0.modulation"))


@pytest.mark.parametrize("kind", [toys.ToyDiT, toys.TwoStreamDiT, toys.SlicedJointDiT])
def test_state(kind: Callable[..., nn.Module]) -> None:
    plan = plan_of(toys.make(kind), toys.inputs(batch=2, tokens=8, words=3))
    tokens = {toys.ToyDiT: (8, 8), toys.TwoStreamDiT: (8, 8, 3), toys.SlicedJointDiT: (11, 11)}[kind]  # type: ignore[index]
    latents = 2 * 8 * toys.CHANNELS
    assert plan.costs.state_bytes == _FLOAT * (2 * sum(tokens) * toys.WIDTH + latents)


def test_opaque_modules() -> None:
    model, reference, inputs = toys.make(HostDiT), toys.make(), toys.inputs()
    backend = TeaCacheBackend(rel_l1_thresh=0.2, coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    apply_teacache_hook(model, backend)
    with torch.no_grad():
        model(**inputs)  # finds out what breaks the graph
        model(**inputs)
    (report,) = [report for report in backend.reports if report.is_rewritten]
    assert report.plan is not None
    plain = plan_of(reference, inputs).costs
    buffers = len(reference.get_submodule("blocks")) * 5 * 8  # type: ignore[arg-type]
    assert report.plan.costs.blocks.weight_bytes == plain.blocks.weight_bytes + buffers
    assert report.plan.costs.computed.flops == counted(reference, **inputs)


@pytest.mark.parametrize(("batch", "tokens", "words"), [(2, 8, 3), (3, 16, 5), (5, 7, 4)])
def test_expressions_give_the_numbers_of_other_sizes(batch: int, tokens: int, words: int) -> None:
    model = toys.make(toys.TwoStreamDiT)
    plan = dynamic_plan(model, toys.inputs())
    now = plan.costs.at(batch=batch, tokens=tokens, encoder_hidden_states_1=words)
    inputs = toys.inputs(batch, tokens, words)
    assert now.computed.flops == counted(model, **inputs)
    assert now == plan_of(model, inputs).costs
    first, second = plan.stack.live_outputs
    assert (first.shape, first.proven) == (("batch", "tokens", "32"), ("batch", "tokens"))
    assert (second.shape, second.proven[1]) == (("batch", "encoder_hidden_states_1", "32"), "encoder_hidden_states_1")


def test_expressions_over_height_and_width() -> None:
    model = toys.make(PatchDiT)
    plan = dynamic_plan(model, images(2, 6, 10))  # other than the channels, or dynamo takes them for one size
    assert [size.name for size in plan.costs.sizes][:3] == ["batch", "height", "width"]
    for batch, height, width in ((2, 4, 6), (3, 8, 4), (4, 10, 12)):
        inputs = images(batch, height, width)
        now = plan.costs.at(batch=batch, height=height, width=width)
        assert now.computed.flops == counted(model, **inputs)
        assert now == plan_of(model, inputs).costs
    (live,) = plan.stack.live_outputs
    assert live.shape == ("batch", "floor(height/2)*floor(width/2)", "32")
    assert len(live.proven) == 2


def test_an_unknown_size_is_refused() -> None:
    costs = dynamic_plan(toys.make(), toys.inputs()).costs
    with pytest.raises(
        ValueError, match="unknown size frames; sizes that vary: batch, tokens, encoder_hidden_states_1"
    ):
        costs.at(frames=3)
    with pytest.raises(ValueError, match="none: the shapes are static"):
        costs.at().at(batch=3)


def test_one_compilation_serves_all_sizes() -> None:
    model = toys.make(toys.TwoStreamDiT)
    backend = TeaCacheBackend(rel_l1_thresh=0.2, coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    inputs = toys.inputs()
    for value in inputs.values():
        torch._dynamo.mark_dynamic(value, 0)
    for name in ("hidden_states", "encoder_hidden_states"):
        torch._dynamo.mark_dynamic(inputs[name], 1)
    with torch.no_grad():
        compiled(**inputs)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch, tokens, words in ((2, 8, 3), (3, 16, 5), (5, 7, 7)):
                inputs = toys.inputs(batch, tokens, words)
                torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
    assert len(backend.reports) == 1


def test_shares_without_any_work() -> None:
    idle = Costs(PartCosts(0, 0), PartCosts(0, 0), PartCosts(0, 0), 0)
    assert (idle.skipped_share, idle.skipped_weight_share) == (1.0, 1.0)
    some = Costs(PartCosts(1, 2), PartCosts(7, 4), PartCosts(2, 2), 0)
    assert (some.skipped_share, some.skipped_weight_share) == (0.3, 0.5)
