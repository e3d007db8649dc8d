"""Validation of the settings, and the polynomial that they resolve to."""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from teacache_fx.coefficients import published, published_names
from teacache_fx.config import TeaCacheConfig
from teacache_fx.errors import TeaCacheWarning

COUNTS = ("num_warmup_steps", "num_final_steps", "num_inference_steps", "max_consecutive_skips")
RISING = [2.0, 1.0, 0.0]


def test_defaults_are_those_of_the_design_and_frozen() -> None:
    assert dataclasses.asdict(TeaCacheConfig()) == {
        "rel_l1_thresh": 0.2,
        "coefficients": None,
        "transformer_type": None,
        "accumulation": "abs",
        "num_warmup_steps": 0,
        "num_final_steps": 0,
        "num_inference_steps": None,
        "max_consecutive_skips": None,
        "granularity": "batch",
    }
    assert TeaCacheConfig.field_names() == list(dataclasses.asdict(TeaCacheConfig()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        TeaCacheConfig().rel_l1_thresh = 0.5  # type: ignore[misc]


def test_equal_settings_are_one_key() -> None:
    given: Any = RISING
    one, other = TeaCacheConfig(0.3, given), TeaCacheConfig(0.3, (2, 1, 0))
    assert one == other
    assert len({one, other, TeaCacheConfig(0.4, given)}) == 2


def test_replace_validates_again() -> None:
    config = TeaCacheConfig(coefficients=(1.0, 0.0))
    assert dataclasses.replace(config, rel_l1_thresh=0.5).coefficients == (1.0, 0.0)
    with pytest.raises(ValueError, match="rel_l1_thresh"):
        dataclasses.replace(config, rel_l1_thresh=-0.5)


@pytest.mark.parametrize("value", [1, 0.05, 1e-9, 1e9, np.float32(0.25), np.int64(3), Fraction(1, 4)])
def test_rel_l1_thresh_takes_any_real_number(value: Any) -> None:
    thresh = TeaCacheConfig(rel_l1_thresh=value).rel_l1_thresh
    assert type(thresh) is float
    assert thresh == float(value)


@pytest.mark.parametrize("value", [0, 0.0, -0.0, -1, -1e-9])
def test_rel_l1_thresh_must_be_positive(value: float) -> None:
    with pytest.raises(ValueError, match=f"rel_l1_thresh must be greater than 0, got {float(value)}") as caught:
        TeaCacheConfig(rel_l1_thresh=value)
    assert "Typical values lie between" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_rel_l1_thresh_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match=f"rel_l1_thresh must be finite, got {float(value)}"):
        TeaCacheConfig(rel_l1_thresh=value)


@pytest.mark.parametrize("value", ["0.2", True, False, None, [0.2], 1j, torch.tensor(0.2)])
def test_rel_l1_thresh_must_be_a_number(value: Any) -> None:
    message = f"rel_l1_thresh must be a number, got {value!r} ({type(value).__name__})"
    with pytest.raises(TypeError, match=re.escape(message)):
        TeaCacheConfig(rel_l1_thresh=value)


def test_huge_integers_are_out_of_range() -> None:
    with pytest.raises(ValueError, match="rel_l1_thresh must be finite"):
        TeaCacheConfig(rel_l1_thresh=10**400)


@pytest.mark.parametrize(
    "value",
    [
        [0.5, 0.25],
        np.array([0.5, 0.25], dtype=np.float32),
        [np.float32(0.5), Fraction(1, 4)],
        torch.tensor([0.5, 0.25]),
        torch.tensor([0.5, 0.25], dtype=torch.bfloat16),
        torch.tensor([0.5, 0.25], requires_grad=True),
    ],
)
def test_coefficients_take_any_sequence_of_numbers(value: Any) -> None:
    coefficients = TeaCacheConfig(coefficients=value).coefficients
    assert coefficients == (0.5, 0.25)
    assert [type(number) for number in coefficients] == [float, float]


@pytest.mark.parametrize("degree", range(9))
def test_coefficients_of_any_degree(degree: int) -> None:
    assert TeaCacheConfig(coefficients=(1.0,) * (degree + 1)).coefficients == (1.0,) * (degree + 1)


@pytest.mark.parametrize("value", [(), [], np.array([]), torch.tensor([])])
def test_coefficients_must_not_be_empty(value: Any) -> None:
    with pytest.raises(ValueError, match=r"coefficients must hold at least one number.*\[1.0, 0.0\] is the identity"):
        TeaCacheConfig(coefficients=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("convert", [tuple, np.array, torch.tensor])
def test_coefficients_must_be_finite(convert: Any, value: float) -> None:
    with pytest.raises(ValueError, match=rf"coefficients\[1\] must be finite, got {value}"):
        TeaCacheConfig(coefficients=convert([1.0, value, 0.0]))


@pytest.mark.parametrize("item", ["1.0", True, None, [1.0], 1j])
def test_coefficients_must_hold_numbers(item: Any) -> None:
    message = f"coefficients[1] must be a number, got {item!r} ({type(item).__name__})"
    with pytest.raises(TypeError, match=re.escape(message)):
        TeaCacheConfig(coefficients=(1.0, item))


@pytest.mark.parametrize(
    "value", ["1, 0", 1.0, {1.0: 2.0}, iter([1.0]), np.float64(1), np.array(1.0), torch.tensor(1.0)]
)
def test_coefficients_must_be_a_sequence(value: Any) -> None:
    message = f"coefficients must be a sequence of numbers, highest power first, got {value!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        TeaCacheConfig(coefficients=value)


@pytest.mark.parametrize("value", [np.ones((2, 2)), torch.ones(2, 2)])
def test_coefficients_must_be_flat(value: Any) -> None:
    with pytest.raises(TypeError, match=r"coefficients\[0\] must be a number, got \[1.0, 1.0\]"):
        TeaCacheConfig(coefficients=value)


def test_bytes_are_no_coefficients() -> None:
    with pytest.raises(TypeError, match="coefficients must be a sequence of numbers"):
        TeaCacheConfig(coefficients=b"12")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("coefficients", "fault"),
    [
        ((-1.0, 1.0), "falling throughout"),
        ((1.0, -0.1), "negative on [0, 0.1]"),
        ((-1.0,), "negative on [0, 0.3]"),
        ((1.0, -0.2, 0.02), "not monotone (turns at 0.1)"),
        ((-1.0, 0.2, 0.0), "negative on [0.2, 0.3] and not monotone (turns at 0.1)"),
        ((1.0, -0.3, 0.02), "negative on [0.1, 0.2] and not monotone (turns at 0.15)"),
    ],
)
def test_warns_of_polynomials_that_misbehave(coefficients: tuple[float, ...], fault: str) -> None:
    with pytest.warns(TeaCacheWarning, match=re.escape(f"coefficients={list(coefficients)} is {fault}")) as caught:
        TeaCacheConfig(coefficients=coefficients)
    assert [warning.filename for warning in caught] == [__file__]  # it points to the caller


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (0.5,), (1.0, 0.0, 0.0), (-1.0, 1.0, 0.0), (1.0, 1e-6), RISING])
def test_does_not_warn_of_well_behaved_polynomials(coefficients: Any) -> None:
    TeaCacheConfig(coefficients=coefficients)  # warnings are errors here


@pytest.mark.parametrize("value", [0, b"FluxTransformer2DModel", torch.nn.Linear, ["FluxTransformer2DModel"]])
def test_transformer_type_must_be_text(value: Any) -> None:
    message = f"transformer_type must be the name of a transformer class, got {value!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        TeaCacheConfig(transformer_type=value)


@pytest.mark.parametrize("value", ["ABS", "", "absolute", None, True, 0])
def test_accumulation_must_be_known(value: Any) -> None:
    with pytest.raises(ValueError, match=f"accumulation must be 'abs' or 'signed', got {value!r}"):
        TeaCacheConfig(accumulation=value)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [1.0, 2.5, "3", True, False, math.nan])
def test_counts_must_be_integers(name: str, value: Any) -> None:
    message = f"{name} must be an integer, got {value!r} ({type(value).__name__})"
    with pytest.raises(TypeError, match=re.escape(message)):
        TeaCacheConfig(**{name: value})


@pytest.mark.parametrize(("name", "least"), [(COUNTS[0], 0), (COUNTS[1], 0), (COUNTS[2], 1), (COUNTS[3], 1)])
def test_counts_have_a_lower_bound(name: str, least: int) -> None:
    below: dict[str, Any] = {name: least - 1}
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {least - 1}"):
        TeaCacheConfig(**below)
    assert getattr(TeaCacheConfig(**{**below, name: least}), name) == least


@pytest.mark.parametrize("warmup", [4, 5])
def test_warns_if_nothing_is_left_to_skip(warmup: int) -> None:
    with pytest.warns(TeaCacheWarning, match=f"num_warmup_steps={warmup} covers all num_inference_steps=4") as caught:
        TeaCacheConfig(num_warmup_steps=warmup, num_inference_steps=4)
    assert [warning.filename for warning in caught] == [__file__]
    assert TeaCacheConfig(num_warmup_steps=3, num_inference_steps=4).num_warmup_steps == 3


def test_resolves_a_published_class_and_tells_its_faults() -> None:
    config = TeaCacheConfig()
    resolved = config.resolve("FluxTransformer2DModel")
    assert resolved.config is config
    assert resolved.coefficients == (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
    assert resolved.origin.startswith("published for FluxTransformer2DModel (ali-vilab/TeaCache:")
    assert resolved.caveat == "not monotone (turns at 0.0528)"


def test_resolves_an_unpublished_class_to_the_identity() -> None:
    with pytest.warns(
        TeaCacheWarning, match=r"no TeaCache coefficients are published for Unheard.*\[1.0, 0.0\]"
    ) as caught:
        resolved = TeaCacheConfig().resolve("Unheard")
    assert (resolved.coefficients, resolved.caveat) == ((1.0, 0.0), "")
    assert resolved.origin == "identity (none published)"
    assert [warning.filename for warning in caught] == [__file__]


def test_resolves_to_the_coefficients_given_before_all_else() -> None:
    resolved = TeaCacheConfig(coefficients=(3.0, 0.0), transformer_type="Unheard").resolve("FluxTransformer2DModel")
    assert (resolved.coefficients, resolved.origin) == ((3.0, 0.0), "given by the user")


def test_refuses_an_unknown_transformer_type_and_lists_the_known() -> None:
    with pytest.raises(ValueError, match="transformer_type='Unheard' has no published coefficients") as caught:
        TeaCacheConfig(transformer_type="Unheard").resolve("FluxTransformer2DModel")
    assert "Pass coefficients=[...]" in str(caught.value)
    assert all(name in str(caught.value) for name in published_names())


def test_transformer_type_overrides_the_class() -> None:
    row = published("HunyuanVideoTransformer3DModel")
    assert row is not None
    resolved = TeaCacheConfig(rel_l1_thresh=0.1, transformer_type=row.name).resolve("FluxTransformer2DModel")
    assert resolved.coefficients == row.coefficients


def test_rows_of_another_indicator_are_reached_by_their_name_only() -> None:
    resolved = TeaCacheConfig(transformer_type="CogVideoX-2b").resolve("CogVideoXTransformer3DModel")
    assert resolved.coefficients == (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434)
    with pytest.warns(TeaCacheWarning, match="no TeaCache coefficients are published"):
        assert TeaCacheConfig().resolve("CogVideoXTransformer3DModel").coefficients == (1.0, 0.0)
