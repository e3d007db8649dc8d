"""Each reason to decline, provoked by one trait of a toy model; the graph stays as it was and the model runs plain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from teacache_fx import Declined, DeclineReason, TeaCacheBackend, TeaCacheWarning
from teacache_fx.passes import PIPELINE
from teacache_fx.pipeline import Pipeline
from teacache_fx.render import render
from tests import toys
from tests.passes.capture import CONFIG, on_capture


class Mlp(nn.Module):
    """No blocks: layers of one class in a row are not yet a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(toys.CHANNELS, toys.CHANNELS) for _ in range(4)))

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        scale = (timestep.sin() * encoder_hidden_states.mean())[:, None, None]
        result: Tensor = self.layers(hidden_states * scale)
        return result


DECLINES = {
    "pooled": (toys.PooledDiT, {}, DeclineReason.NO_LATENTS),
    "no timestep": (toys.NoTimestepDiT, {}, DeclineReason.NO_TIMESTEP),
    "one block": (toys.ToyDiT, {"num_blocks": 1}, DeclineReason.NO_REPEATED_BLOCKS),
    "parallel heads": (toys.ParallelHeads, {}, DeclineReason.NO_REPEATED_BLOCKS),
    "mlp": (Mlp, {}, DeclineReason.NO_REPEATED_BLOCKS),
    "narrowing": (toys.NarrowingDiT, {}, DeclineReason.NO_MATCHING_INPUT),
    "learned query": (toys.LearnedQueryDiT, {}, DeclineReason.STALE_OUTPUT),
    "adding": (toys.AddingDiT, {}, DeclineReason.MUTATION_ACROSS_CUT),
    "early overwriting": (toys.EarlyOverwritingDiT, {}, DeclineReason.MUTATION_ACROSS_CUT),
    "heavy head": (toys.HeavyHeadDiT, {}, DeclineReason.LITTLE_TO_SKIP),
    "wiping": (toys.WipesEmbeddingDiT, {}, DeclineReason.MUTATION_ACROSS_CUT),
    "autocast inside": (toys.AutocastInsideDiT, {}, DeclineReason.MODE_ACROSS_CUT),
}


def _inputs(kind: type[nn.Module]) -> dict[str, Tensor]:
    inputs = toys.inputs()
    if kind is toys.NoTimestepDiT:
        del inputs["timestep"]
    return inputs


def _try(gm: fx.GraphModule) -> tuple[Declined, bool]:
    before = render(gm)
    with pytest.raises(Declined) as caught:
        Pipeline(gm).analyse()
    return caught.value, render(gm) == before


@pytest.mark.parametrize("trait", DECLINES)
def test_declines_with_reason_and_leaves_the_graph(trait: str) -> None:
    kind, options, reason = DECLINES[trait]
    ((declined, untouched),) = on_capture(toys.make(kind, **options), _inputs(kind), _try)
    assert declined.reason is reason, declined
    assert untouched
    assert reason.remedy in str(declined)
    if declined.node is not None:
        assert declined.node in str(declined)


@pytest.mark.parametrize("trait", DECLINES)
def test_declined_model_runs_plain_with_one_warning(trait: str) -> None:
    kind, options, reason = DECLINES[trait]
    model, inputs = toys.make(kind, **options), _inputs(kind)
    backend = TeaCacheBackend(inner="eager")
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        with pytest.warns(TeaCacheWarning, match=reason.value) as caught:
            first = compiled(**inputs)
        assert len(caught) == 1
        assert torch.equal(first, model(**inputs))
    assert not backend.reports[0].is_rewritten
    assert reason.value in str(backend.reports[0])


@pytest.mark.parametrize("trait", DECLINES)
def test_on_decline_raise(trait: str) -> None:
    kind, options, reason = DECLINES[trait]
    compiled = torch.compile(toys.make(kind, **options), backend=TeaCacheBackend(inner="eager", on_decline="raise"))
    with torch.no_grad(), pytest.raises(Declined) as caught:
        compiled(**_inputs(kind))
    assert caught.value.reason is reason


def test_gradients_needed() -> None:
    model = toys.ToyDiT()
    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    compiled = torch.compile(model, backend=backend)
    with pytest.raises(Declined, match="gradients needed"):
        compiled(**toys.inputs())
    with torch.no_grad():  # the same compiled model, called as the remedy says
        compiled(**toys.inputs())
    assert backend.reports[-1].is_rewritten


def test_training_goes_on_uncached() -> None:
    model = toys.ToyDiT()
    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    with pytest.warns(TeaCacheWarning, match="gradients needed"):
        compiled(**toys.inputs()).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and bool(gradient.any()) for gradient in expected[:-2])


def test_vmap() -> None:
    model = toys.make()
    stacked = {key: torch.stack([value, 2 * value]) for key, value in toys.inputs().items()}
    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager", on_decline="raise")

    def single(hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        result: Tensor = model(hidden_states, timestep, encoder_hidden_states)
        return result

    def mapped(hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        result: Tensor = torch.vmap(single)(hidden_states, timestep, encoder_hidden_states)
        return result

    with torch.no_grad(), pytest.raises(Declined, match="vmap"):
        torch.compile(mapped, backend=backend)(**stacked)


def test_single_blocks() -> None:
    model = toys.make(num_blocks=3)
    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager")
    for block in model.get_submodule("blocks").children():
        block.compile(backend=backend)
    with torch.no_grad(), pytest.warns(TeaCacheWarning, match="single blocks only"):
        model(**toys.inputs())


def test_unknown_state_shape() -> None:
    model = toys.make(toys.ValueDependentDiT)
    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        pytest.raises(Declined, match="state shape unknown"),
    ):
        torch.compile(model, backend=backend)(**toys.inputs())


def test_model_without_parameters() -> None:
    backend = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    with torch.no_grad(), pytest.raises(Declined, match="Parameterless has no parameters"):
        torch.compile(toys.Parameterless(), backend=backend)(**toys.inputs())


@pytest.mark.parametrize("name", ["find-block-stack", "insert-cond"])
def test_a_bug_of_ours_leaves_the_model_running(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = next(step for step in PIPELINE if step.name == name)

    def fail(*_: object) -> bool:
        raise KeyError("x_embedder\nand much more")

    monkeypatch.setattr(type(broken), "__call__", fail)
    model, backend = toys.make(), TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager")
    message = f"an error within teacache_fx: {name} failed with KeyError: .*x_embedder.*please report"
    with torch.no_grad(), pytest.warns(TeaCacheWarning, match=message):
        output = torch.compile(model, backend=backend)(**toys.inputs())
    assert torch.equal(output, model(**toys.inputs()))
    raising = TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager", on_decline="raise")
    with torch.no_grad(), pytest.raises(Declined) as caught:
        torch.compile(model, backend=raising)(**toys.inputs())
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_graph_that_cannot_be_prepared_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: fx.GraphModule) -> fx.GraphModule:
        raise RuntimeError("no fake values")

    monkeypatch.setattr("teacache_fx.pipeline.with_regions_inlined", fail)
    model, backend = toys.make(), TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager")
    with torch.no_grad(), pytest.warns(TeaCacheWarning, match="preparing the graph failed with RuntimeError: no fake"):
        output = torch.compile(model, backend=backend)(**toys.inputs())
    assert torch.equal(output, model(**toys.inputs()))


def test_rewriting_twice() -> None:
    def rewrite_twice(gm: fx.GraphModule) -> Declined:
        pipeline = Pipeline(gm)
        pipeline.analyse()
        with pytest.raises(Declined) as caught:
            Pipeline(pipeline.rewrite(CONFIG).gm).analyse()
        return caught.value

    (declined,) = on_capture(toys.make(), toys.inputs(), rewrite_twice)
    assert declined.reason is DeclineReason.ALREADY_REWRITTEN
