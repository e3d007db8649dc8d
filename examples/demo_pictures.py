"""The demo's two figures: what was drawn, and which steps were computed for it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from examples.demo_report import CachedRun, Report, Run
from examples.tiny_flux.scenes import Scene, is_held_back
from teacache_fx.stats import StepStats

DPI = 150
MAX_COLUMNS = 10
INK, FAINT = "#222222", "#767676"
COND, UNCOND, SKIPPED = "#1f6fb4", "#e07b16", "#ececec"

# Inches.
CELL, GAP = 1.12, 0.07
LABEL_WIDTH, HEADER_HEIGHT, MARGIN = 1.95, 1.05, 0.18


def save_grid(report: Report, path: Path) -> None:
    """One row without the cache and one per threshold; one column per prompt, the first `MAX_COLUMNS` of them."""
    scenes = report.scenes[:MAX_COLUMNS]
    rows: list[tuple[str, str, Run]] = [("no cache", _baseline_label(report), report.baseline)]
    rows += [(f"threshold {run.rel_l1_thresh:g}", _cached_label(report, run), run) for run in report.cached]
    width, height = _grid_size(len(rows), len(scenes))
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    for column, scene in enumerate(scenes):
        left = LABEL_WIDTH + column * (CELL + GAP)
        _column_label(figure, scene, left / width, (height - HEADER_HEIGHT + 0.1) / height)
    for row, (title, details, run) in enumerate(rows):
        bottom = height - HEADER_HEIGHT - CELL - row * (CELL + GAP)
        figure.text(
            MARGIN / width, (bottom + CELL * 0.84) / height, title, color=INK, weight="bold", size=10, va="center"
        )
        figure.text(
            MARGIN / width, (bottom + CELL * 0.70) / height, details, color=INK, size=8, va="top", linespacing=1.4
        )
        for column in range(len(scenes)):
            left = LABEL_WIDTH + column * (CELL + GAP)
            axes = figure.add_axes((left / width, bottom / height, CELL / width, CELL / height))
            axes.imshow(run.pictures[column], interpolation="nearest", vmin=0, vmax=1)
            axes.set_axis_off()
    figure.savefig(path)


def _grid_size(rows: int, columns: int) -> tuple[float, float]:
    width = LABEL_WIDTH + columns * (CELL + GAP) - GAP + MARGIN
    return width, HEADER_HEIGHT + rows * (CELL + GAP) - GAP + MARGIN


def _column_label(figure: Figure, scene: Scene, x: float, y: float) -> None:
    """The prompt, and whether training never showed this shape in these colours."""
    text = textwrap.fill(scene.prompt, 16)
    note = "held back" if is_held_back(scene) else "seen in training"
    figure.text(x, y, f"{text}\n", color=INK, size=7.2, va="bottom", linespacing=1.2)
    figure.text(x, y, note, color=UNCOND if is_held_back(scene) else FAINT, size=6.6, va="bottom", style="italic")


def _baseline_label(report: Report) -> str:
    return f"{report.steps} of {report.steps} steps computed\n{report.baseline.seconds:.1f} s"


def _cached_label(report: Report, run: CachedRun) -> str:
    return (
        f"{run.computed_steps:g} of {report.steps} steps computed\n"
        f"{run.seconds:.1f} s, speed-up {report.speedup(run):.2f}x\n"
        f"PSNR {report.psnr_db(run):.1f} dB"
    )


def save_timeline(report: Report, path: Path) -> None:
    """Per threshold the accumulated distance at each step, and below it which steps were computed."""
    count = len(report.cached)
    height = 1.0 + 2.2 * count
    figure = Figure(figsize=(11, height), dpi=DPI, facecolor="white")
    grid = figure.add_gridspec(
        3 * count - 1,
        1,
        height_ratios=[share for _ in report.cached for share in (3.0, 0.8, 1.5)][:-1],
        hspace=0.06,
        left=0.085,
        right=0.985,
        top=1 - 0.85 / height,
        bottom=0.5 / height,
    )
    for index, run in enumerate(report.cached):
        distance = figure.add_subplot(grid[3 * index])
        strip = figure.add_subplot(grid[3 * index + 1], sharex=distance)
        _draw_distance(distance, run)
        _draw_strip(strip, run)
        result = f"{run.computed_steps:g} of {report.steps} steps computed, speed-up {report.speedup(run):.2f}x"
        distance.set_title(f"threshold {run.rel_l1_thresh:g}", loc="left", color=INK, weight="bold", size=10)
        distance.set_title(f"{result}, PSNR {report.psnr_db(run):.1f} dB", loc="right", color=INK, size=9)
        strip.tick_params(labelbottom=index == count - 1)
    strip.set_xlabel("denoising step", color=INK, size=9)
    figure.legend(handles=_legend(), loc="upper center", ncols=5, frameon=False, fontsize=8.5)
    figure.savefig(path)


def _draw_distance(axes: Axes, run: CachedRun) -> None:
    """The sawtooth of the accumulated distance, which a computed step (a dot) sets back to 0."""
    for steps, colour, width in ((run.cond, COND, 1.6), (run.uncond, UNCOND, 1.0)):
        computed = [(index, step.accumulated) for index, step in enumerate(steps) if not step.skipped]
        drops = [(index, 0.0) for index, _ in computed]
        points = [(index, step.accumulated) for index, step in enumerate(steps)]
        path = sorted(points + drops, key=lambda point: point[0])  # stable: a drop comes after the step's own point
        axes.plot([x for x, _ in path], [y for _, y in path], color=colour, linewidth=width, zorder=2)
        axes.scatter([x for x, _ in computed], [y for _, y in computed], s=7 * width**2, color=colour, zorder=3)
    axes.axhline(run.rel_l1_thresh, color=INK, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
    axes.set_ylim(0, 1.12 * max(run.rel_l1_thresh, *(step.accumulated for step in (*run.cond, *run.uncond))))
    axes.set_ylabel("accumulated\ndistance", color=INK, size=8)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelbottom=False, bottom=False, labelsize=8, colors=FAINT)
    _hide_frame(axes, keep=("left",))


def _draw_strip(axes: Axes, run: CachedRun) -> None:
    """One row of cells per branch, coloured where the step was computed."""
    cells = np.array([_codes(run.cond, 1), _codes(run.uncond, 2)])
    palette = ListedColormap([SKIPPED, COND, UNCOND])
    steps = cells.shape[1]
    axes.pcolormesh(
        np.arange(steps + 1) - 0.5,
        [-0.5, 0.5, 1.5],
        cells,
        cmap=palette,
        vmin=0,
        vmax=2,
        edgecolor="white",
        linewidth=1.2,
    )
    axes.set_xlim(-0.5, steps - 0.5)
    axes.invert_yaxis()
    axes.set_yticks([0, 1], ["cond", "uncond"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.tick_params(length=0, labelsize=8, colors=FAINT)
    _hide_frame(axes)


def _codes(steps: Sequence[StepStats], code: int) -> list[int]:
    return [0 if step.skipped else code for step in steps]


def _hide_frame(axes: Axes, keep: Sequence[str] = ()) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(FAINT)


def _legend() -> list[Line2D | Patch]:
    return [
        Patch(color=COND, label="computed, conditional"),
        Patch(color=UNCOND, label="computed, unconditional"),
        Patch(color=SKIPPED, label="skipped"),
        Line2D([], [], color=INK, linestyle=(0, (4, 3)), linewidth=0.9, label="threshold"),
    ]
