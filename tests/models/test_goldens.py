"""Goldens of ten real architectures, checked as a user of the plugin would check a model."""

from __future__ import annotations

import pytest

from teacache_fx.testing import TeaCacheGolden
from tests.zoo import ZOO, assemble

MODELS = (
    "cogvideox", "flux", "hunyuan_dit", "latte", "lumina2", "pixart", "qwenimage", "sana", "sd3", "wan",
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")  # torch and diffusers warn of themselves
def test_plan_and_graph(name: str, teacache_golden: TeaCacheGolden) -> None:
    model, inputs = assemble(ZOO[name])
    teacache_golden(name, model, **inputs)
