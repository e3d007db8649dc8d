"""The in-place entry: enable, refresh, the hook and its state, as vLLM-Omni's TeaCache documents them."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

import teacache_fx
from teacache_fx import (
    StepReason,
    TeaCacheBackend,
    TeaCacheConfig,
    TeaCacheHook,
    TeaCacheState,
    TeaCacheWarning,
    apply_teacache_hook,
    remove_teacache_hook,
)
from tests import toys
from tests.zoo import build, trajectory

CLOSED, OPEN = 1e-9, 1e6  # thresholds at which every step, or only the first, is computed


def _backend(thresh: float, **options: Any) -> TeaCacheBackend:
    options = {"coefficients": [1.0, 0.0], "inner": "eager", "on_decline": "raise", **options}
    return TeaCacheBackend(rel_l1_thresh=thresh, **options)


def _pipeline(name: str = "flux") -> tuple[SimpleNamespace, list[dict[str, Any]]]:
    model, inputs = build(name)
    return SimpleNamespace(transformer=model), trajectory(name, inputs, 4)


def _run(model: nn.Module, steps: list[dict[str, Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**step)[0] for step in steps]


def test_backend_enable_refresh_and_config() -> None:
    pipeline, steps = _pipeline("qwenimage")
    expected = _run(pipeline.transformer, steps)
    backend = _backend(CLOSED)
    assert not backend.is_enabled()
    backend.enable(pipeline)
    assert backend.is_enabled()
    assert backend.config.rel_l1_thresh == CLOSED
    for _ in range(2):
        with pytest.warns(TeaCacheWarning, match="a generation of 4 steps leaves little to skip"):
            backend.refresh(pipeline, num_inference_steps=4)
        for ours, plain in zip(_run(pipeline.transformer, steps), expected, strict=True):
            assert torch.equal(ours, plain)
    (context,) = backend.stats().contexts
    assert [step.reason for step in context.steps if not step.step_index] == [StepReason.FIRST] * 2


def test_refresh_clears_residuals_and_tells_the_length(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, steps = _pipeline()
    backend = _backend(OPEN, num_final_steps=1, num_inference_steps=30)
    backend.enable(pipeline)
    _run(pipeline.transformer, steps[:2])
    (store,) = backend._stores.values()
    assert store.states[0].previous_residual is not None
    for verbose in (False, True):
        with caplog.at_level(logging.INFO, logger="teacache_fx"), pytest.warns(TeaCacheWarning, match="4 steps"):
            backend.refresh(pipeline, 4, verbose=verbose)
        said = [record.message for record in caplog.records if "refreshed" in record.message]
        assert said == ["TeaCache refreshed for FluxTransformer2DModel, steps: 4"] * verbose
    assert store.states[0].previous_residual is None
    _run(pipeline.transformer, steps)
    reasons = [step.reason for step in backend.stats().contexts[0].steps]
    first, skipped = StepReason.FIRST, StepReason.SKIPPED
    assert reasons == [first, skipped, first, skipped, skipped, StepReason.FINAL]


@pytest.mark.filterwarnings("ignore:a generation of 4 steps")
def test_diffusers_says_the_length_too() -> None:
    pipeline, steps = _pipeline()
    backend = _backend(OPEN, num_final_steps=2, num_inference_steps=30)
    backend.enable(pipeline)
    for index, step in enumerate(steps):
        with pipeline.transformer.cache_context("cond", step_index=index, num_inference_steps=4):
            _run(pipeline.transformer, [step])
    reasons = [step.reason for step in backend.stats().contexts[0].steps]
    assert reasons == [StepReason.FIRST, StepReason.SKIPPED, StepReason.FINAL, StepReason.FINAL]
    pipeline.transformer._reset_stateful_cache()


def test_apply_and_remove_the_hook() -> None:
    model, inputs = build("flux")
    signature, steps = inspect.signature(model.forward), trajectory("flux", inputs, 3)
    expected = _run(model, steps)
    apply_teacache_hook(model, _backend(OPEN))
    hook = HookRegistry.check_if_exists_or_initialize(model).get_hook("teacache")
    assert isinstance(hook, TeaCacheHook)
    assert isinstance(hook, ModelHook)
    assert inspect.signature(model.forward) == signature
    assert not torch.equal(_run(model, steps)[2], expected[2])
    remove_teacache_hook(model)
    assert torch.equal(_run(model, steps)[2], expected[2])
    apply_teacache_hook(model, _backend(CLOSED))
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("teacache")
    assert torch.equal(_run(model, steps)[2], expected[2])
    remove_teacache_hook(model)  # nothing is left to remove


@pytest.mark.filterwarnings("ignore:no TeaCache coefficients", "ignore:rel_l1_thresh=")
def test_the_hooks_attributes() -> None:
    model, _ = build("flux")
    config = TeaCacheConfig(rel_l1_thresh=0.25, transformer_type="FluxTransformer2DModel")
    hook = TeaCacheHook(config)
    assert hook.config == config
    assert hook.extractor_fn is None
    assert hook.initialize_hook(model) is model
    coefficients = [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861]
    for x in (0.0, 0.05, 0.2):
        expected = sum(c * x**power for c, power in zip(coefficients, range(4, -1, -1), strict=True))
        assert float(hook.rescale_func(torch.tensor(x))) == pytest.approx(expected, rel=1e-5)
    hook.state_manager.set_context(SimpleNamespace(name="cond"))
    assert hook.state_manager().name == "cond"
    assert hook.reset_state(model) is model
    assert hook.state_manager().name is None


def test_new_forward_runs_one_step() -> None:
    model, inputs = build("flux")
    steps = trajectory("flux", inputs, 2)
    expected = _run(model, steps)[0]
    apply_teacache_hook(model, _backend(OPEN))
    hook = HookRegistry.check_if_exists_or_initialize(model).get_hook("teacache")
    with torch.no_grad():
        assert torch.equal(hook.new_forward(model, **steps[0])[0], expected)
        hook.reset_state(model)
        assert torch.equal(hook.new_forward(model, **steps[0])[0], expected)


def test_the_state() -> None:
    state = TeaCacheState()
    assert state.previous_modulated_input is None
    assert state.previous_residual is None
    assert state.previous_latents is None
    assert (float(state.accumulated_rel_l1_distance), int(state.step_index), int(state.consecutive_skips)) == (0, 0, 0)
    model, inputs = toys.make(), toys.inputs()
    backend = _backend(OPEN)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for step in range(3):
            compiled(**{**inputs, "hidden_states": inputs["hidden_states"] * (1 + 0.01 * step)})
    (store,) = backend._stores.values()
    (state,) = store.states
    distances = [step.accumulated for step in backend.stats().contexts[0].steps]
    assert float(state.accumulated_rel_l1_distance) == pytest.approx(distances[-1])
    assert (int(state.step_index), int(state.consecutive_skips), float(state.previous_timestep)) == (3, 2, 900.0)
    assert state.previous_modulated_input is not None
    assert state.previous_modulated_input.shape == (2, 8, toys.WIDTH)
    assert torch.equal(state.previous_latents, inputs["hidden_states"] * 1.02)  # type: ignore[arg-type]
    state.reset()
    assert state.previous_residuals == ()
    assert int(state.step_index) == 0


def test_wrong_uses_say_what_to_do() -> None:
    pipeline, _ = _pipeline()
    backend = _backend(OPEN)
    with pytest.raises(TypeError, match="pipeline SimpleNamespace has no transformer; pass a pipeline with"):
        backend.enable(SimpleNamespace(unet=nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="num_inference_steps must be an integer, got '50'"):
        backend.refresh(pipeline, "50")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        backend.refresh(pipeline, 0)
    with pytest.raises(TypeError, match="module must be an nn"):
        apply_teacache_hook(pipeline, backend)  # type: ignore[arg-type]
    backend.enable(pipeline)
    with pytest.raises(ValueError, match="TeaCache is applied to this FluxTransformer2DModel already"):
        backend.enable(pipeline)
    backend.disable(pipeline)
    assert not backend.is_enabled()
    pipeline.transformer.compile(backend="eager")
    with pytest.raises(ValueError, match="module is a compiled FluxTransformer2DModel; the hook compiles by itself"):
        backend.enable(pipeline)
    with pytest.raises(TypeError, match="config must be a TeaCacheConfig"):
        TeaCacheHook(0.2)  # type: ignore[arg-type]


def test_unknown_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'TeaCacheHooks'"):
        _ = teacache_fx.TeaCacheHooks
