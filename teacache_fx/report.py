"""What became of a captured graph, in words."""

from __future__ import annotations

from dataclasses import dataclass, field

from teacache_fx.config import ResolvedConfig
from teacache_fx.costs import PARTS
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
            if live.proven:
                rows.append(("", f"as large as `{live.base}` in every call: {', '.join(live.proven)}"))
        rows += _costs(plan)
        if self.config is not None:
            rows.append(("threshold", f"{self.config.config.rel_l1_thresh:g} ({self.config.config.accumulation})"))
            rows.append(("coefficients", f"{list(self.config.coefficients)}, {self.config.origin}"))
            if self.config.caveat:
                rows.append(("", f"this polynomial is {self.config.caveat} on [0, 0.3]"))
        rows += [(key, f"{1e3 * seconds:.0f} ms") for key, seconds in self.timings.items()]
        return rows


def _costs(plan: CachePlan) -> list[tuple[str, str]]:
    costs, now = plan.costs, plan.costs.at()
    rows = []
    for name in PARTS:
        part, numbers = getattr(costs, name), getattr(now, name)
        amount = f"{_amount(numbers.flops, 'FLOPs')}, {_amount(numbers.weight_bytes, 'B')} of weights"
        rows.append((name, f"{len(getattr(plan.partition, name))} nodes, {amount}"))
        if not isinstance(part.flops, int):
            rows.append(("", f"FLOPs: {part.flops}"))
    shares = (
        f"{costs.skipped_share:.1%} of a computed step's FLOPs, reads {costs.skipped_weight_share:.1%} of its weights"
    )
    rows += [("skipped step", f"pays {shares}"), ("state", f"{_amount(now.state_bytes, 'B')} in each context")]
    if not isinstance(costs.state_bytes, int):
        rows.append(("", f"bytes: {costs.state_bytes}"))
    rows += [("" if i else "sizes", str(size)) for i, size in enumerate(costs.sizes)]
    return rows


def _amount(count: int, unit: str) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {prefix}{unit}"
    return f"{count} {unit}"
