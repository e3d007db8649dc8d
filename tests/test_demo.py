"""The demo, small: what it writes, that its numbers agree with one another, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples import demo
from examples.demo_report import MAX_PSNR_DB, mean_ssim, psnr_db
from examples.tiny_flux.scenes import is_held_back

pytestmark = pytest.mark.filterwarnings("ignore:a generation of .* steps leaves little to skip")

STEPS, NEVER = 4, 1000.0  # no distance reaches the threshold NEVER


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the demo has written to."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    arguments = ["--steps", str(STEPS), "--prompts", "2", "--thresholds", str(NEVER), "0.0001"]
    demo.main([*arguments, "--inner", "eager", "--out", str(folder)])
    return folder


def test_report(out: Path) -> None:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert set(report["versions"]) == {"torch", "diffusers", "teacache_fx", "python"}
    assert report["machine"]["threads"] == 1
    assert report["eager_seconds"] > 0
    assert 0 <= report["baseline_prompt_accuracy"] <= 1
    exact, reused = report["thresholds"]
    assert (exact["rel_l1_thresh"], reused["rel_l1_thresh"]) == (0.0001, NEVER)
    for row in (exact, reused):
        assert row["steps"] == STEPS == row["computed_steps"] + row["skipped_steps"]
        assert row["baseline_seconds"] > 0
        assert row["cached_seconds"] > 0
        assert row["speedup"] == pytest.approx(row["baseline_seconds"] / row["cached_seconds"], rel=0.05)
        assert 0 <= row["prompt_accuracy"] <= 1
    # A threshold that every step reaches leaves the model as it is.
    assert (exact["computed_steps"], exact["psnr_db"], exact["ssim"]) == (STEPS, MAX_PSNR_DB, 1.0)
    assert reused["computed_steps"] == 1
    assert reused["psnr_db"] < MAX_PSNR_DB
    assert reused["ssim"] < 1


@pytest.mark.parametrize(("name", "width", "height"), [("grid.png", 650, 650), ("timeline.png", 1650, 750)])
def test_pictures(out: Path, name: str, width: int, height: int) -> None:
    with Image.open(out / name) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] == pytest.approx(height, rel=0.2)
    assert pixels.shape[1] == pytest.approx(width, rel=0.2)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_half_of_the_prompts_are_held_back() -> None:
    scenes = demo.choose_scenes(7, seed=0)
    assert [is_held_back(scene) for scene in scenes] == [True, False] * 3 + [True]
    assert scenes == demo.choose_scenes(7, seed=0) != demo.choose_scenes(7, seed=1)


def test_measures_of_known_pictures() -> None:
    black = np.zeros((2, 32, 32, 3), np.float32)
    grey = black + np.float32(0.1)
    assert psnr_db(grey, black) == pytest.approx(20, abs=1e-3)
    assert psnr_db(black, black) == MAX_PSNR_DB
    assert mean_ssim(black, black) == 1
    assert mean_ssim(grey, black) < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["--prompts", "-3"], "argument --prompts: must be at least 1, got -3"),
        (["--thresholds", "0.1", "0"], "argument --thresholds: must be greater than 0 and finite, got 0"),
        (["--thresholds", "nan"], "argument --thresholds: must be greater than 0 and finite, got nan"),
        (["--thresholds", "low"], "argument --thresholds: must be a number, got 'low'"),
        (["--steps", "2.5"], "argument --steps: must be an integer, got '2.5'"),
        (["--inner", "gcc"], "argument --inner: invalid choice: 'gcc'"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err
