"""Draws statistics. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from teacache_fx.policy import StepReason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from teacache_fx.stats import ContextStats

# One colour each (Okabe and Ito's palette, which colour-blind readers can tell apart), in the order of the legend.
_COLOURS = {
    StepReason.SKIPPED: "#dddddd",
    StepReason.FIRST: "#0072b2",
    StepReason.SHAPE_CHANGED: "#56b4e9",
    StepReason.TRAJECTORY_RESTARTED: "#cc79a7",
    StepReason.CONDITIONING_CHANGED: "#882255",
    StepReason.NON_FINITE: "#000000",
    StepReason.WARMUP: "#009e73",
    StepReason.FINAL: "#117733",
    StepReason.MAX_CONSECUTIVE_SKIPS: "#e69f00",
    StepReason.THRESHOLD: "#d55e00",
}


def plot_stats(contexts: Sequence[ContextStats]) -> Figure:
    """One row of axes per context: the relative and the accumulated distance, and why each step was computed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to plot.
    """
    if not contexts:
        raise ValueError("there is nothing to plot: no step has run")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("plot() needs matplotlib: pip install 'teacache-fx[plot]'") from error

    figure = Figure(figsize=(10, 1 + 2.2 * len(contexts)), layout="constrained")
    rows = figure.subplots(len(contexts), 1, squeeze=False)[:, 0]
    for axes, context in zip(rows, contexts, strict=True):
        _plot_context(axes, context)
    rows[-1].set_xlabel("step")
    seen = [reason for reason in _COLOURS if any(reason in context.reasons for context in contexts)]
    from matplotlib.patches import Patch

    patches = [Patch(color=_COLOURS[reason], label=reason.name.lower().replace("_", " ")) for reason in seen]
    figure.legend(handles=patches, loc="outside upper center", ncols=min(5, len(patches)), frameon=False)
    return figure


def _plot_context(axes: Axes, context: ContextStats) -> None:
    for number, step in enumerate(context.steps):
        axes.axvspan(number - 0.5, number + 0.5, color=_COLOURS[step.reason], alpha=0.45, linewidth=0)
        if step.step_index == 0 and number:
            axes.axvline(number - 0.5, color="black", linewidth=1)
    places = range(len(context.steps))
    axes.bar(places, [step.rel_l1 for step in context.steps], width=0.5, color="#444444", label="rel_l1")
    axes.plot(places, [step.accumulated for step in context.steps], "k.-", linewidth=1, label="accumulated")
    axes.set_xlim(-0.5, len(context.steps) - 0.5)
    axes.set_title(f"{context.model}, {context.name}: {context.hit_rate:.0%} skipped", loc="left", fontsize=10)
    axes.legend(loc="best", fontsize=8)
