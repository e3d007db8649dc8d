"""What became of a captured graph, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from teacache_fx.config import ResolvedConfig
from teacache_fx.costs import PARTS
from teacache_fx.errors import Declined
from teacache_fx.plan import CachePlan

Row: TypeAlias = tuple[str, str]
"""What is told, and what of it."""


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
        lines = [f"{head}: TeaCache inserted"]
        for title, rows in self._sections(self.plan):
            lines += [f"  {title}", *(f"    {key:<18}{text}" for key, text in rows)] if rows else []
        return "\n".join(lines)

    def _sections(self, plan: CachePlan) -> list[tuple[str, list[Row]]]:
        timings = [(key, f"{1e3 * seconds:.0f} ms") for key, seconds in self.timings.items()]
        return [
            ("found", _found(plan)),
            ("costs of a step", _costs(plan)),
            ("as expressions", _expressions(plan)),
            ("settings", self._settings()),
            ("time taken", timings),
        ]

    def _settings(self) -> list[Row]:
        if self.config is None:
            return []
        rows = [
            ("threshold", f"{self.config.config.rel_l1_thresh:g} ({self.config.config.accumulation})"),
            ("coefficients", f"{list(self.config.coefficients)}, {self.config.origin}"),
        ]
        return rows + ([("", f"on [0, 0.3] this polynomial is {self.config.caveat}")] if self.config.caveat else [])


def _found(plan: CachePlan) -> list[Row]:
    rows = [("block stack", f"{plan.stack.num_blocks} blocks" if plan.stack.lists else "as the extractor says")]
    rows += [("", str(part)) for part in plan.stack.lists]
    where = f" in {plan.modulation.block}" if plan.modulation.block else ""
    rows += [
        ("latents", plan.stack.latents),
        ("timestep", plan.modulation.timestep),
        ("modulated input", f"{plan.modulation.modulated_input}{where}: steps are compared on it"),
        ("pattern", plan.modulation.pattern),
    ]
    for live in plan.stack.live_outputs:
        rows.append(("residual", f"{live.value} - {live.base}, {live.dtype}[{', '.join(live.shape)}]"))
        if live.proven:
            rows.append(("", f"both are of one size in every call: {', '.join(live.proven)}"))
    return rows


def _costs(plan: CachePlan) -> list[Row]:
    """At the captured sizes."""
    costs, now = plan.costs, plan.costs.at()
    rows = []
    for name in PARTS:
        part, nodes = getattr(now, name), len(getattr(plan.partition, name))
        when = "computed steps" if name == "blocks" else "every step"
        amounts = f"{_amount(part.flops, 'FLOPs'):>14}{_amount(part.weight_bytes, 'B'):>12} of weights"
        rows.append((name, f"{amounts}{nodes:>7} nodes, on {when}"))
    share = f"{costs.skipped_share:>8.1%} of them{costs.skipped_weight_share:>11.1%}"
    rows.append(("skipped step", f"{share} of them: the share of a computed step"))
    rows.append(("state", f"{_amount(now.state_bytes, 'B'):>26} kept between steps, in each context"))
    return rows


def _expressions(plan: CachePlan) -> list[Row]:
    """The same where sizes vary between calls; the other costs are numbers."""
    counts = [(name, "FLOPs", getattr(plan.costs, name).flops) for name in PARTS]
    counts.append(("state", "bytes", plan.costs.state_bytes))
    rows = [(name, f"{count} {unit}") for name, unit, count in counts if not isinstance(count, int)]
    return rows + [("" if i else "where", str(size)) for i, size in enumerate(plan.costs.sizes)]


def _amount(count: int, unit: str) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {prefix}{unit}"
    return f"{count} {unit}"
