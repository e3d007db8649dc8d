"""What the demo measured, as numbers, as JSON and as a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

import teacache_fx
from examples.tiny_flux.checker import accuracy
from examples.tiny_flux.scenes import Scene
from teacache_fx.stats import StepStats

Pictures = NDArray[np.float32]  # [n, 32, 32, 3] in [0, 1]
MAX_PSNR_DB = 100.0
COLUMNS = ("threshold", "computed", "skipped", "seconds", "speed-up", "PSNR dB", "SSIM", "prompts right")


@dataclass(frozen=True)
class Run:
    """One timed run."""

    seconds: float
    pictures: Pictures


@dataclass(frozen=True)
class CachedRun(Run):
    """One timed run with TeaCache, and its steps in the conditional and the unconditional branch."""

    rel_l1_thresh: float
    cond: Sequence[StepStats]
    uncond: Sequence[StepStats]

    @property
    def computed_steps(self) -> float:
        """Computed steps of one branch: the mean of both, as their decisions may differ."""
        return sum(not step.skipped for step in (*self.cond, *self.uncond)) / 2

    @property
    def skipped_steps(self) -> float:
        """Skipped steps of one branch: the mean of both."""
        return sum(step.skipped for step in (*self.cond, *self.uncond)) / 2


def psnr_db(pictures: Pictures, reference: Pictures) -> float:
    """Peak signal-to-noise ratio over all pictures together, so that a bad one weighs more than in a mean of ratios.

    It ends at 100 dB: equal pictures have no finite ratio, and JSON has no infinity.
    """
    error = float(np.mean(np.square(pictures - reference, dtype=np.float64)))
    return float(min(MAX_PSNR_DB, -10 * np.log10(max(error, 1e-12))))


def mean_ssim(pictures: Pictures, reference: Pictures) -> float:
    """Structural similarity, mean over the pictures; 1 if they are equal."""
    values = [
        structural_similarity(picture, other, channel_axis=-1, data_range=1.0)
        for picture, other in zip(pictures, reference, strict=True)
    ]
    return float(np.mean(values))


@dataclass(frozen=True)
class Report:
    """All runs; `str()` is the table."""

    scenes: Sequence[Scene]
    steps: int
    eager: Run
    baseline: Run
    cached: Sequence[CachedRun]

    def prompt_accuracy(self, run: Run) -> float:
        """Share of pictures that show everything their prompt mentions."""
        right, total = accuracy(self.scenes, run.pictures)["all"]
        return right / total

    def speedup(self, run: Run) -> float:
        """Against the model compiled without a cache."""
        return self.baseline.seconds / run.seconds

    def psnr_db(self, run: Run) -> float:
        """Against the pictures of the model compiled without a cache."""
        return psnr_db(run.pictures, self.baseline.pictures)

    def as_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "versions": {
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "teacache_fx": teacache_fx.__version__,
                "python": platform.python_version(),
            },
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "prompts": len(self.scenes),
            "eager_seconds": round(self.eager.seconds, 3),
            "baseline_prompt_accuracy": self.prompt_accuracy(self.baseline),
            "thresholds": [self._threshold(run) for run in self.cached],
        }

    def _threshold(self, run: CachedRun) -> dict[str, Any]:
        return {
            "rel_l1_thresh": run.rel_l1_thresh,
            "steps": self.steps,
            "computed_steps": _whole(run.computed_steps),
            "skipped_steps": _whole(run.skipped_steps),
            "baseline_seconds": round(self.baseline.seconds, 3),
            "cached_seconds": round(run.seconds, 3),
            "speedup": round(self.speedup(run), 3),
            "psnr_db": round(self.psnr_db(run), 2),
            "ssim": round(mean_ssim(run.pictures, self.baseline.pictures), 4),
            "prompt_accuracy": self.prompt_accuracy(run),
        }

    def save(self, path: Path) -> None:
        """Write report.json."""
        path.write_text(json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        rows = [self._row("eager", self.eager), self._row("no cache", self.baseline)]
        rows += [self._row(f"{run.rel_l1_thresh:g}", run) for run in self.cached]
        widths = [max(len(name), 8) for name in COLUMNS]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [COLUMNS, *rows]
        ]
        title = (
            f"{len(self.scenes)} pictures, {self.steps} steps, {torch.get_num_threads()} threads; speed-up, PSNR and "
        )
        return "\n".join([title + "SSIM against the compiled model without a cache", "", *lines])

    def _row(self, name: str, run: Run) -> tuple[str, ...]:
        computed, skipped = (run.computed_steps, run.skipped_steps) if isinstance(run, CachedRun) else (self.steps, 0)
        return (
            name,
            f"{computed:g}",
            f"{skipped:g}",
            f"{run.seconds:.2f}",
            f"{self.speedup(run):.2f}x",
            "-" if run is self.baseline else f"{self.psnr_db(run):.1f}",
            "-" if run is self.baseline else f"{mean_ssim(run.pictures, self.baseline.pictures):.3f}",
            f"{self.prompt_accuracy(run):.0%}",
        )


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number
