"""The warnings that say where caching cannot help, and no others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from teacache_fx import TeaCacheBackend, TeaCacheConfig, TeaCacheWarning
from teacache_fx.advice import advice_on_length, advice_on_threshold
from teacache_fx.coefficients import published
from tests import toys


@pytest.mark.parametrize(
    ("thresh", "effect"),
    [
        (0.1, "hardly a step will be skipped"),
        (0.125, ""),
        (0.2, ""),
        (0.8, ""),
        (0.81, "the result may suffer visibly"),
    ],
)
def test_thresholds_out_of_the_published_ladder(thresh: float, effect: str) -> None:
    """FLUX's runs from 0.25 to 0.8."""
    advice = advice_on_threshold(thresh, published("FluxTransformer2DModel"))
    assert bool(advice) == bool(effect)
    if effect:
        assert advice.startswith(f"rel_l1_thresh={thresh:g} is out of the ladder published for FluxTransformer2DModel")
        assert effect in advice
        assert "0.25 (1.5x), 0.4 (1.8x), 0.6 (2.0x), 0.8 (2.25x)" in advice
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TeaCacheConfig(rel_l1_thresh=thresh).resolve("FluxTransformer2DModel")
    assert [str(warning.message) for warning in caught] == [advice] * bool(effect)


def test_no_ladder_no_advice() -> None:
    assert advice_on_threshold(5.0, None) == ""


def test_lengths() -> None:
    assert advice_on_length(20) == ""
    assert advice_on_length(19).startswith("a generation of 19 steps leaves little to skip")
    assert advice_on_length(1).startswith("a generation of 1 step leaves")


def _run(thresh: float, steps: int, generations: int = 1, **options: Any) -> TeaCacheBackend:
    model, inputs = toys.make(), toys.inputs()
    backend = TeaCacheBackend(rel_l1_thresh=thresh, coefficients=[1.0, 0.0], inner="eager", **options)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for _ in range(generations):
            for step in range(steps):
                compiled(**{**inputs, "hidden_states": inputs["hidden_states"] * (1 + 0.01 * step)})
            backend.reset_state()
    return backend


def test_a_generation_without_a_hit_is_told_once() -> None:
    with pytest.warns(TeaCacheWarning, match="not one of 20 steps was skipped: raise rel_l1_thresh") as caught:
        backend = _run(1e-9, 20, generations=3)
    assert len(caught) == 1
    assert len(backend.stats().advice) == 1


def test_a_short_generation_is_told() -> None:
    with pytest.warns(TeaCacheWarning, match="a generation of 6 steps leaves little to skip"):
        _run(1e-9, 6)


@pytest.mark.parametrize("steps", [1, 6, 20])
def test_where_the_cache_helps_nothing_is_said(steps: int) -> None:
    assert _run(1e6, steps).stats().advice == ()


def test_conditioning_that_is_new_at_each_call_is_told() -> None:
    """Of two branches without names, which make theirs anew and keep it alive."""
    model, inputs, kept = toys.make(), toys.inputs(), []
    backend = TeaCacheBackend(rel_l1_thresh=1e6, coefficients=[1.0, 0.0], inner="eager")
    compiled = torch.compile(model, backend=backend)

    def run() -> None:
        for _ in range(20):
            kept.append(inputs["encoder_hidden_states"].clone())
            compiled(**{**inputs, "encoder_hidden_states": kept[-1]})

    with torch.no_grad(), pytest.warns(TeaCacheWarning, match="every call brought conditioning tensors") as caught:
        run()
    assert len(caught) == 1


def test_reset_stats() -> None:
    backend = _run(1e6, 4)
    assert backend.stats().num_steps == 4
    backend.reset_stats()
    assert str(backend.stats()) == "TeaCache: no step has run"
