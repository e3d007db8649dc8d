"""The report that a user reads first: of a static and of a dynamic graph, of one without modules, and of a refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from teacache_fx import TeaCacheBackend, TeaCacheWarning
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.report import RewriteReport
from tests import toys


def reported(model: nn.Module, dynamic: bool = False, **settings: Any) -> str:
    settings = {"rel_l1_thresh": 0.2, "coefficients": [1.0, 0.0], **settings}
    backend = TeaCacheBackend(inner="eager", on_decline="ignore", **settings)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        torch.compile(model, backend=backend, dynamic=dynamic)(**toys.inputs())
    (report,) = backend.reports
    return str(report)


def without_times(text: str) -> str:
    return text[: text.index("  time taken")]


def test_static_shapes() -> None:
    assert without_times(reported(toys.make(toys.SlicedJointDiT))) == (
        "SlicedJointDiT (149 nodes): TeaCache inserted\n"
        "  found\n"
        "    block stack       2 blocks\n"
        "                      blocks: 2 x Block (all alike)\n"
        "    latents           l_hidden_states_\n"
        "    timestep          l_timestep_\n"
        "    modulated input   modulated in blocks.0: steps are compared on it\n"
        "    pattern           adaLN-zero (scale + shift)\n"
        "    residual          result_1 - cat_1, float32[2, 11, 32]\n"
        "  costs of a step\n"
        "    prologue            37.38 kFLOPs    31.87 kB of weights     28 nodes, on every step\n"
        "    blocks             848.90 kFLOPs   101.12 kB of weights     80 nodes, on computed steps\n"
        "    epilogue             4.10 kFLOPs       784 B of weights      3 nodes, on every step\n"
        "    skipped step          4.7% of them      24.4% of them: the share of a computed step\n"
        "    state                                5.89 kB kept between steps, in each context\n"
        "  settings\n"
        "    threshold         0.2 (abs)\n"
        "    coefficients      [1.0, 0.0], given by the user\n"
    )


def test_dynamic_shapes() -> None:
    text = reported(toys.make(toys.TwoStreamDiT), dynamic=True)
    assert "both are of one size in every call: batch, encoder_hidden_states_1\n" in text
    start, end = text.index("  as expressions"), text.index("  settings")
    assert text[start:end] == (
        "  as expressions\n"
        "    prologue          batch*(768*encoder_hidden_states_1 + 256*tokens + 14336) FLOPs\n"
        "    blocks            batch*(256*encoder_hidden_states_1*tokens + 4096*encoder_hidden_states_1 + 256*tokens**2"
        " + 32768*tokens + 12288) FLOPs\n"
        "    epilogue          256*batch*tokens FLOPs\n"
        "    state             batch*(128*encoder_hidden_states_1 + 272*tokens) bytes\n"
        "    where             batch = hidden_states.shape[0], timestep.shape[0], encoder_hidden_states.shape[0],"
        " 2 at capture\n"
        "                      tokens = hidden_states.shape[1], 8 at capture\n"
        "                      encoder_hidden_states_1 = encoder_hidden_states.shape[1], 3 at capture\n"
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_times_come_last(dynamic: bool) -> None:
    rows = reported(toys.make(), dynamic).split("  time taken\n")[1].splitlines()
    assert all(re.fullmatch(r"    \S.{17}\d+ ms", row) for row in rows)
    assert rows[-1].split()[:2] == ["inner", "compiler"]


def test_a_polynomial_that_may_mislead_is_told() -> None:
    with pytest.warns(TeaCacheWarning, match="is negative"):
        text = reported(toys.make(), coefficients=[1.0, -0.1])
    assert "on [0, 0.3] this polynomial is negative on [0, 0.1]" in text


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(toys.PooledDiT, DeclineReason.NO_LATENTS), (toys.ParallelHeads, DeclineReason.NO_REPEATED_BLOCKS)],
)
def test_a_refusal(kind: Callable[..., nn.Module], reason: DeclineReason) -> None:
    head, why = reported(toys.make(kind)).split("\n", 1)
    assert re.fullmatch(rf"{kind.__name__} \(\d+ nodes\): declined, runs uncached", head)
    assert why.startswith(f"  {reason.value}")
    assert "Way out: " in why


def test_a_refusal_by_hand() -> None:
    report = RewriteReport("Model", 3, declined=Declined(DeclineReason.NOT_A_MODEL, "it is none"))
    assert not report.is_rewritten
    assert str(report).startswith("Model (3 nodes): declined, runs uncached\n  not a model: it is none")
