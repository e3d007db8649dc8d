"""Options, bad input, and `explain`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import teacache_fx
from teacache_fx import TeaCacheBackend, TeaCacheWarning, teacache_backend
from tests import toys


def test_options_and_entry_point() -> None:
    model, inputs = toys.make(), toys.inputs()
    options: dict[str, Any] = {
        "rel_l1_thresh": 1e3,
        "coefficients": [1.0, 0.0],
        "inner": "inductor",
        "epilogue_fusion": False,
    }
    options["mode"] = "max-autotune-no-cudagraphs"
    compiled = torch.compile(model, backend="teacache", options=options)
    with torch.no_grad():
        compiled(**inputs)
        torch.testing.assert_close(compiled(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)
    assert teacache_backend.reports[-1].config is not None
    assert teacache_backend.reports[-1].config.config.rel_l1_thresh == 1e3
    assert teacache_backend.stats().num_skipped == 1


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ({"rel_l1_tresh": 0.2}, None, "unknown option 'rel_l1_tresh'; TeaCache's are rel_l1_thresh, coefficients"),
        ({"rel_l1_thresh": -1.0}, None, "rel_l1_thresh must be greater than 0, got -1.0"),
        ({"inner": "tvm"}, None, "inner must be one of inductor, aot_eager, eager, got 'tvm'"),
        ({"on_decline": "explode"}, None, "on_decline must be one of warn, raise, ignore, got 'explode'"),
        ({"inner": "eager", "max_autotune": True}, None, "is for inductor, but inner='eager'"),
        ({}, "fastest", "mode must be one of"),
        ({"transformer_type": "Nothing"}, None, "transformer_type='Nothing' has no published coefficients"),
    ],
)
def test_bad_options(options: dict[str, Any], mode: str | None, message: str) -> None:
    compiled = torch.compile(toys.make(), backend="teacache", options=options or None, mode=mode)
    with torch.no_grad(), pytest.raises(ValueError, match=message.replace("[", r"\[")):
        compiled(**toys.inputs())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rel_l1_tresh": 0.2}, TypeError, "unknown option 'rel_l1_tresh'; valid are rel_l1_thresh"),
        ({"config": {"rel_l1_thresh": 0.2}}, TypeError, "config must be a TeaCacheConfig"),
        ({"inner": "tvm"}, ValueError, "inner must be one of"),
        ({"on_decline": None}, ValueError, "on_decline must be one of"),
        ({"rel_l1_thresh": 0.0}, ValueError, "rel_l1_thresh must be greater than 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TeaCacheBackend(**arguments)


def test_unpublished_model_warns_once_per_compile() -> None:
    backend = TeaCacheBackend(inner="eager")
    with torch.no_grad(), pytest.warns(TeaCacheWarning, match="no TeaCache coefficients are published for ToyDiT"):
        torch.compile(toys.make(), backend=backend)(**toys.inputs())


def test_explain_compiles_nothing() -> None:
    report = teacache_fx.explain(toys.make(), **toys.inputs())
    assert report.is_rewritten
    assert report.plan is not None
    assert report.plan.modulation.timestep == "l_timestep_"
    assert "5.6% of them" in str(report)
    declined = teacache_fx.explain(toys.make(toys.PooledDiT), **toys.inputs())
    assert declined.declined is not None
    assert "runs uncached" in str(declined)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (toys.Parameterless(), toys.inputs(), ValueError, "Parameterless has no parameters"),
        (toys.make(), {}, ValueError, "is called with no tensor"),
        (len, toys.inputs(), TypeError, "model must be an nn.Module"),
    ],
)
def test_explain_bad_input(model: Any, inputs: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        teacache_fx.explain(model, **inputs)


def test_explain_of_a_model_compiled_in_place() -> None:
    model = toys.make()
    model.compile(backend=TeaCacheBackend(coefficients=[1.0, 0.0], inner="eager"))
    with torch.no_grad():
        model(**toys.inputs())
    assert teacache_fx.explain(model, **toys.inputs()).is_rewritten
    assert teacache_fx.explain(torch.compile(toys.make()), **toys.inputs()).is_rewritten  # type: ignore[arg-type]


def test_explain_takes_meta_tensors() -> None:
    model = toys.make().to("meta")
    inputs = {key: value.to("meta") for key, value in toys.inputs().items()}
    assert teacache_fx.explain(model, **inputs).is_rewritten
