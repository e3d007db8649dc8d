"""The plan and what the rewriting adds, in the words of the canonical text."""

from __future__ import annotations

from torch import fx

from teacache_fx.canonical import Words
from teacache_fx.graph import fake_value
from teacache_fx.pipeline import RewrittenGraph
from teacache_fx.plan import CachePlan

_BRANCHES = ("run_blocks", "reuse_residual")


def plan_lines(plan: CachePlan, graph: fx.Graph, words: Words) -> list[str]:
    """The facts that the rewriting was made from.

    Args:
        plan: of the graph.
        graph: as captured.
        words: of the graph.
    """
    nodes = {node.name: node for node in graph.nodes}

    def say(names: tuple[str, ...]) -> str:
        return ", ".join(words.at_end(nodes[name]) for name in names)

    steady = tuple(name for name in plan.partition.steady if name not in plan.partition.conditioning)
    taken = tuple(name for name in plan.partition.operands if not words.is_weight(nodes[name]))
    rows = [
        *(("blocks", str(part)) for part in plan.stack.lists),
        ("latents", say((plan.stack.latents,))),
        ("timestep", say((plan.modulation.timestep,))),
        ("further timesteps", "" if plan.is_fragment else say(plan.partition.further_times)),
        ("conditioning", say(plan.partition.conditioning)),
        ("also steady", say(steady)),
        ("modulated input", f"{say((plan.modulation.modulated_input,))}, pattern {plan.modulation.pattern}"),
        *(
            ("residual", f"{say((live.value,))} - {say((live.base,))}, {words.kind(fake_value(nodes[live.value]))}")
            for live in plan.stack.live_outputs
        ),
        ("blocks take", say(taken)),
        ("skipped step", f"pays {plan.costs.skipped_share:.1%} of a computed step's FLOPs"),
        ("fragment", "begins behind a graph break" if plan.is_fragment else ""),
    ]
    return [f"    {key}: {text}" for key, text in rows if text]


def state_lines(rewritten: RewrittenGraph, words: Words) -> list[str]:
    """What is carried from step to step, and what the branches do besides the blocks.

    The traced policy is not told: it is the same for all models.
    """
    signature = rewritten.signature
    pairs = zip(signature.tensor_names, signature.tensors, strict=True)
    lines = [f"    {name}: {words.kind(tensor)}" for name, tensor in pairs]
    for branch in _BRANCHES:
        graph: fx.Graph = getattr(rewritten.gm, branch).graph
        added = [node.target for node in graph.nodes if node.op == "call_function" and _is_added(node)]
        lines.append(f"    {branch} adds: {', '.join(map(str, added))}")
    return lines


def _is_added(node: fx.Node) -> bool:
    """What the rewriting adds has nothing recorded but its fake value."""
    return node.meta.keys() <= {"example_value"}
