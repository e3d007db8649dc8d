"""What the docs quote is what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import teacache_fx
from examples import catch_a_change
from tests import toys

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore")  # torch and diffusers warn of themselves
def test_the_quoted_change() -> None:
    page = (ROOT / "docs" / "ci.md").read_text("utf-8")
    quoted = page.split("<!-- output of examples.catch_a_change -->\n```\n")[1].split("\n```")[0]
    assert quoted == catch_a_change.difference()


def test_the_quoted_snapshot() -> None:
    page = (ROOT / "docs" / "ci.md").read_text("utf-8")
    quoted = page.split("## Reading a snapshot\n\n```\n")[1].split("\n```")[0]
    golden = (ROOT / "tests" / "models" / "goldens" / "pixart.teacache.txt").read_text("utf-8").splitlines()
    for line in quoted.splitlines():
        assert line.strip() == "..." or line in golden


@pytest.mark.filterwarnings("ignore")  # as above
def test_the_code_about_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks run one after the other, and leave what the text says."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "export.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {
        "torch": torch,
        "teacache_fx": teacache_fx,
        "transformer": toys.make(),
        "inputs": toys.inputs(),
    }
    with torch.no_grad():
        for block in blocks:
            if "executorch" in block and importlib.util.find_spec("executorch") is None:
                continue
            exec(compile(block, "docs/export.md", "exec"), names)
    assert names["output"].shape == names["inputs"]["hidden_states"].shape
    expected = toys.make()(**toys.inputs())
    torch.testing.assert_close(names["noise_prediction"], expected)
