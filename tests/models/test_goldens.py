"""Goldens of ten real architectures, checked as a user of the plugin would check a model."""

from __future__ import annotations

import pytest
import torch

from teacache_fx.testing import TeaCacheGolden
from tests.zoo import ZOO, assemble

MODELS = (
    "cogvideox", "flux", "hunyuan_dit", "latte", "lumina2", "pixart", "qwenimage", "sana", "sd3", "wan",
)  # fmt: skip
# Those whose capture is another one with other versions than the golden's.
VARYING = {
    "cogvideox": "from torch 2.14 on a dropout that does nothing is a view",
    "lumina2": "torch 2.11 breaks the graph elsewhere",
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")  # torch and diffusers warn of themselves
def test_plan_and_graph(name: str, teacache_golden: TeaCacheGolden) -> None:
    if name in VARYING and not torch.__version__.startswith("2.13."):
        pytest.skip(VARYING[name])
    model, inputs = assemble(ZOO[name])
    teacache_golden(name, model, **inputs)
