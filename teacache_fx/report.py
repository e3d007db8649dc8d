"""What became of a captured graph, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from teacache_fx.config import ResolvedConfig
from teacache_fx.errors import Declined
from teacache_fx.plan import CachePlan


@dataclass(frozen=True)
class RewriteReport:
    """The plan that a graph was rewritten by, or the reason why it was not. `str()` says it in words.

    Attributes:
        model: class name of the compiled model.
        num_nodes: size of the captured graph.
        plan: facts found, or `None` if declined.
        declined: the typed refusal, or `None` if rewritten.
        config: settings and polynomial, or `None` if declined before they were needed.
        timings: seconds per pass and for what surrounds them, the inner compiler last.
    """

    model: str
    num_nodes: int
    plan: CachePlan | None = None
    declined: Declined | None = None
    config: ResolvedConfig | None = None
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def is_rewritten(self) -> bool:
        """Whether there is a plan."""
        return self.plan is not None

    def __str__(self) -> str:
        head = f"{self.model} ({self.num_nodes} nodes)"
        if self.plan is None:
            return f"{head}: declined, runs uncached\n  {self.declined}"
        return "\n".join([f"{head}: TeaCache inserted", *(f"  {key:<18}{text}" for key, text in self._rows(self.plan))])

    def _rows(self, plan: CachePlan) -> list[tuple[str, str]]:
        blocks = f"{plan.stack.num_blocks} blocks" if plan.stack.lists else "as the extractor says"
        rows = [("block stack", blocks)]
        rows += [("", str(part)) for part in plan.stack.lists]
        rows += [
            ("latents", plan.stack.latents),
            ("timestep", plan.modulation.timestep),
            ("modulated input", f"{plan.modulation.modulated_input} in {plan.modulation.block}"),
            ("pattern", plan.modulation.pattern),
        ]
        for live in plan.stack.live_outputs:
            rows.append(("live output", f"{live.value} - {live.base}, {live.dtype}[{', '.join(live.shape)}]"))
        for name in ("prologue", "blocks", "epilogue"):
            nodes, work = len(getattr(plan.partition, name)), getattr(plan.costs, name)
            rows.append((name, f"{nodes} nodes, {_flops(work)}"))
        rows.append(("skipped step", f"pays {plan.costs.skipped_share:.1%} of a computed step's FLOPs"))
        if self.config is not None:
            rows.append(("threshold", f"{self.config.config.rel_l1_thresh:g} ({self.config.config.accumulation})"))
            rows.append(("coefficients", f"{list(self.config.coefficients)}, {self.config.origin}"))
            if self.config.caveat:
                rows.append(("", f"this polynomial is {self.config.caveat} on [0, 0.3]"))
        rows += [(key, f"{1e3 * seconds:.0f} ms") for key, seconds in self.timings.items()]
        return rows


def _flops(work: Any) -> str:
    if not isinstance(work, int):
        return f"{work} FLOPs"
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if work >= scale:
            return f"{work / scale:.2f} {unit}FLOPs"
    return f"{work} FLOPs"
