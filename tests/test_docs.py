"""What the docs quote is what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import catch_a_change

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
