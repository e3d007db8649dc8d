"""The backend as users call it: options, dtypes, grad modes, shapes, contexts, bad input."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from teacache_fx import StepReason, TeaCacheBackend, TeaCacheWarning, cache_context
from teacache_fx.passes import PIPELINE
from tests import toys


def _backend(**options: Any) -> TeaCacheBackend:
    return TeaCacheBackend(**{"coefficients": [1.0, 0.0], "inner": "eager", "on_decline": "raise", **options})


def _step(inputs: dict[str, Tensor], index: int, amount: float = 0.01) -> dict[str, Tensor]:
    """Inputs of a later step: less time, latents a little moved."""
    moved = {
        "timestep": inputs["timestep"] - 10.0 * index,
        "hidden_states": inputs["hidden_states"] * (1 + amount * index),
    }
    return {**inputs, **{key: value.to(inputs[key].dtype) for key, value in moved.items()}}


def _reasons(backend: TeaCacheBackend, context: int = 0) -> list[StepReason]:
    return [step.reason for step in backend.stats().contexts[context].steps]


FIRST, SKIPPED, THRESHOLD, RESTARTED = (
    StepReason.FIRST, StepReason.SKIPPED, StepReason.THRESHOLD, StepReason.TRAJECTORY_RESTARTED
)  # fmt: skip


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_both_branches(inner: str, mode: Any) -> None:
    model, inputs = toys.make(), toys.inputs()
    backend = _backend(rel_l1_thresh=1e3, inner=inner)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with mode():
        first, again = compiled(**inputs), compiled(**inputs)
        moved = compiled(**_step(inputs, 1))
        expected = model(**inputs)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moved, again, atol=1e-4), "a skipped step must follow the latents"
    assert _reasons(backend) == [FIRST, SKIPPED, SKIPPED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_dtypes(dtype: torch.dtype, inner: str) -> None:
    model = toys.make().to(dtype)
    inputs = {key: value.to(dtype) for key, value in toys.inputs().items()}
    backend = _backend(rel_l1_thresh=1e3, inner=inner)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        computed, reused, expected = compiled(**inputs), compiled(**inputs), model(**inputs)
    assert computed.dtype == reused.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(computed, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(reused, expected, rtol=tolerance, atol=2 * tolerance)
    assert _reasons(backend) == [FIRST, SKIPPED]


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_autocast(inner: str) -> None:
    model, inputs = toys.make(), toys.inputs()
    backend = _backend(rel_l1_thresh=1e3, inner=inner)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        computed, reused, expected = compiled(**inputs), compiled(**inputs), model(**inputs)
    assert computed.dtype == reused.dtype == expected.dtype
    torch.testing.assert_close(computed, expected, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(reused, expected, rtol=5e-2, atol=5e-2)
    assert _reasons(backend) == [FIRST, SKIPPED]


def test_recompile_keeps_the_state() -> None:
    model, inputs = toys.make(), toys.inputs()
    backend = _backend(rel_l1_thresh=1e3)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(**inputs)
    with torch.inference_mode():  # another graph of the same model
        compiled(**_step(inputs, 1))
    with torch.no_grad():
        compiled(**_step(inputs, 2))
    assert len(backend.reports) == 2
    assert _reasons(backend) == [FIRST, SKIPPED, SKIPPED]


def test_dynamic_shapes_compile_once() -> None:
    model = toys.make()
    backend = _backend(rel_l1_thresh=1e3, inner="inductor")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for tokens in (8, 12, 20):
            inputs = toys.inputs(tokens=tokens)
            torch._dynamo.mark_dynamic(inputs["hidden_states"], 1)
            computed, reused, expected = compiled(**inputs), compiled(**inputs), model(**inputs)
            torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(reused, expected, rtol=1e-5, atol=1e-5)
    assert len(backend.reports) == 1
    assert [_reasons(backend, i) for i in range(3)] == [[FIRST, SKIPPED]] * 3
    assert backend.reports[0].plan.stack.live_outputs[0].shape == ("2", "tokens", "32")  # type: ignore[union-attr]


def test_dynamic_floats_of_the_model() -> None:
    """`dynamic=True` makes an input of each norm's epsilon, which the branches then read."""
    model, inputs = toys.make(), toys.inputs()
    cached = toys.make()
    backend = _backend(rel_l1_thresh=1e3, inner="inductor")
    compiled = torch.compile(cached, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        results, expected = [compiled(**inputs) for _ in range(2)], model(**inputs)
        for result in results:
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        for block in (*cached.blocks, *model.blocks):  # type: ignore[misc]
            block.norm1.eps = 1.0
        torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
    assert _reasons(backend) == [FIRST, SKIPPED]
    assert len(backend.reports) == 2, "another epsilon is another graph"


def test_guidance_branches_are_told_apart_without_names() -> None:
    model, cond, uncond = toys.make(), toys.inputs(seed=0), toys.inputs(seed=1)
    uncond = {**uncond, "hidden_states": cond["hidden_states"]}
    backend = _backend(rel_l1_thresh=1e3)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for index in range(3):
            for branch in (cond, uncond):
                result = compiled(**{**branch, "timestep": branch["timestep"] - index})
                alone = model(**branch)
                if index == 0:
                    assert torch.equal(result, alone)
                torch.testing.assert_close(result, alone, atol=0.2, rtol=0)
    assert [_reasons(backend, i) for i in range(2)] == [[FIRST, SKIPPED, SKIPPED]] * 2


def test_named_contexts() -> None:
    model, inputs = toys.make(), toys.inputs()
    backend = _backend(rel_l1_thresh=1e3)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for index in range(2):
            for name in ("cond", "uncond"):
                with cache_context(model, name):
                    compiled(**_step(inputs, index))
    assert {context.name: len(context.steps) for context in backend.stats().contexts} == {"cond": 2, "uncond": 2}


def test_new_generation_is_computed() -> None:
    model, inputs = toys.make(), toys.inputs()
    backend = _backend(rel_l1_thresh=1e3)
    compiled = torch.compile(model, backend=backend)
    other = {**inputs, "hidden_states": torch.randn_like(inputs["hidden_states"])}
    with torch.no_grad():
        for index in range(3):
            compiled(**_step(inputs, index))
        assert torch.equal(compiled(**other), model(**other))  # the timestep turned back
        compiled(**_step(other, 1))
        backend.reset_state()
        assert torch.equal(compiled(**_step(other, 2)), model(**_step(other, 2)))
    assert _reasons(backend) == [FIRST, SKIPPED, SKIPPED, RESTARTED, SKIPPED, FIRST]


def test_nan_forces_computing_and_does_not_outlive_the_generation() -> None:
    model, inputs = toys.make(), toys.inputs()
    backend = _backend(rel_l1_thresh=1e3)
    compiled = torch.compile(model, backend=backend)
    poisoned = _step(inputs, 1)
    poisoned["hidden_states"][0, 0, 0] = float("nan")
    with torch.no_grad():
        compiled(**inputs)
        assert compiled(**poisoned).isnan().any()
        recovered = compiled(**_step(inputs, 2))
        assert torch.equal(recovered, model(**_step(inputs, 2)))
        assert torch.equal(compiled(**inputs), model(**inputs))
        assert compiled(**_step(inputs, 1)).isfinite().all()
    assert _reasons(backend) == [FIRST, StepReason.NON_FINITE, StepReason.NON_FINITE, RESTARTED, SKIPPED]


def test_stages_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="teacache_fx")
    with torch.no_grad():
        torch.compile(toys.make(), backend=_backend())(**toys.inputs())
    text = caplog.text
    for step in PIPELINE:
        assert f"{step.name}: " in text
    assert "graph after insert-cond" in text
    assert "run_blocks:" in text
    assert "TeaCache inserted" in text


def test_reset_drops_reports_and_statistics() -> None:
    backend = _backend()
    compiled = torch.compile(toys.make(), backend=backend)
    with torch.no_grad():
        compiled(**toys.inputs())
    assert backend.stats().num_steps == 1
    torch._dynamo.reset()
    assert (backend.reports, backend.stats().num_steps) == ([], 0)


def test_module_compile_in_place() -> None:
    model = toys.make()
    backend = _backend(rel_l1_thresh=0.3)
    model.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        model(**toys.inputs())
    assert backend.reports[0].model == "ToyDiT"
    assert "blocks: 2 x Block" in str(backend.reports[0])


def test_models_do_not_share_states() -> None:
    backend = _backend(rel_l1_thresh=1e3)
    inputs = toys.inputs()
    models = [toys.make(num_blocks=2), toys.make(num_blocks=3)]
    with torch.no_grad():
        for model in models:
            assert torch.equal(torch.compile(model, backend=backend)(**inputs), model(**inputs))
    assert [len(context.steps) for context in backend.stats().contexts] == [1, 1]


def test_function_around_a_model() -> None:
    model: nn.Module = toys.make()
    backend = _backend(rel_l1_thresh=1e3)

    @torch.compile(backend=backend)
    def denoise(hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        result: Tensor = model(hidden_states, timestep, encoder_hidden_states)
        return result

    inputs = toys.inputs()
    with torch.no_grad():
        denoise(**inputs)
        torch.testing.assert_close(denoise(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
    assert _reasons(backend) == [FIRST, SKIPPED]


def test_models_that_share_a_compiled_graph_do_not_share_states() -> None:
    first, second = toys.make(), toys.make()
    for parameter in second.get_submodule("blocks").parameters():
        parameter.mul_(1.5)
    backend, inputs = _backend(rel_l1_thresh=1e3), toys.inputs()
    compiled = [torch.compile(model, backend=backend) for model in (first, second)]
    with torch.no_grad():
        for index in range(2):
            for model, function in zip((first, second), compiled, strict=True):
                result = function(**_step(inputs, index))
                if index == 0:
                    assert torch.equal(result, model(**inputs))
        with cache_context(second, "named"):
            compiled[1](**_step(inputs, 2))
    assert len(backend.reports) == 1, "dynamo runs one graph for both: only the weights tell them apart"
    # The second model's context is the same one once it has a name: nothing but the name has changed.
    assert {context.name: [step.reason for step in context.steps] for context in backend.stats().contexts} == {
        "context 0": [FIRST, SKIPPED],
        "named": [FIRST, SKIPPED, SKIPPED],
    }


def test_prompt_changed_in_place_is_another_prompt() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        model, backend = toys.make(), _backend(rel_l1_thresh=1e3)
        compiled = torch.compile(model, backend=backend)
        with mode():
            inputs = toys.inputs()  # made in inference mode they have no version counter
            compiled(**inputs)
            inputs["encoder_hidden_states"].mul_(-1)
            assert torch.equal(compiled(**inputs), model(**inputs))


def test_varying_float_is_declined_and_runs_plain() -> None:
    model = toys.make(toys.GuidedDiT)
    backend = _backend(on_decline="warn")
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        results = [compiled(**toys.inputs(), strength=1.0)]  # the first value is baked in
        with pytest.warns(TeaCacheWarning, match="python float that varies"):
            results.append(compiled(**toys.inputs(), strength=2.0))
        results.append(compiled(**toys.inputs(), strength=3.0))
        for strength, result in zip((1.0, 2.0, 3.0), results, strict=True):
            torch.testing.assert_close(result, model(**toys.inputs(), strength=strength), rtol=1e-5, atol=1e-5)


def test_num_final_steps_without_the_number_of_steps_warns() -> None:
    with torch.no_grad(), pytest.warns(TeaCacheWarning, match="num_final_steps=2 has no effect"):
        torch.compile(toys.make(), backend=_backend(num_final_steps=2))(**toys.inputs())
