"""Says what would become of a model, without compiling it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from teacache_fx.capture import CaptureSite, capture_site
from teacache_fx.config import TeaCacheConfig
from teacache_fx.contexts import original
from teacache_fx.errors import Declined, DeclineReason, TeaCacheWarning
from teacache_fx.pipeline import Pipeline
from teacache_fx.report import RewriteReport


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> RewriteReport:
    """Captures the model, runs the analysis, and reports the plan or why there is none. Nothing is compiled.

    The model runs twice, eagerly and without gradients. Where the capture breaks into several graphs, the report is
    that of the graph which holds the blocks, or else of the largest one.

    Args:
        model: the transformer, compiled or not; meta tensors will do.
        *args: what it is called with.
        **kwargs: likewise.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model has no parameters, or is called with no tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    model = original(model)
    name = type(model).__name__
    if not any(True for _ in model.parameters()):
        raise ValueError(f"model {name} has no parameters: pass the transformer itself, not a wrapper around it")
    if not any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves((args, kwargs))):
        raise ValueError(f"model {name} is called with no tensor: pass the inputs of one denoising step")
    reports: list[RewriteReport] = []

    def analyse(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        site = capture_site()
        reports.append(report_of(gm, type(site.root).__name__ if site.root is not None else name, site))
        return gm.forward

    with torch.no_grad():
        model.forward(*args, **kwargs)  # some models build tables at their first call, which dynamo could not capture
    # A limit of its own: explaining must not eat up the recompilations that the user's own compile may need.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16):
        # Of the forward, since calling a model that is compiled in place would run what it was compiled to.
        torch.compile(model.forward, backend=analyse)(*args, **kwargs)
    if not reports:
        declined = Declined(DeclineReason.NO_REPEATED_BLOCKS, "nothing of the model could be captured")
        return RewriteReport(name, 0, declined=declined)
    return max(reports, key=lambda report: (report.is_rewritten, report.num_nodes))


def report_of(gm: fx.GraphModule, class_name: str, site: CaptureSite = CaptureSite()) -> RewriteReport:  # noqa: B008
    """Analyses one captured graph with the default settings."""
    timings: dict[str, float] = {}
    try:
        pipeline = Pipeline(gm)
        timings = pipeline.timings
        plan = pipeline.analyse()
    except Declined as refusal:
        declined = explained(refusal, site)
        return RewriteReport(class_name, len(gm.graph.nodes), declined=declined, timings=timings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TeaCacheWarning)  # the report names the polynomial
        resolved = TeaCacheConfig().resolve(class_name)
    return RewriteReport(class_name, len(gm.graph.nodes), plan, config=resolved, timings=timings)


_MISSING = {
    DeclineReason.NO_LATENTS,
    DeclineReason.NO_TIMESTEP,
    DeclineReason.NO_REPEATED_BLOCKS,
    DeclineReason.SINGLE_BLOCK,
}


def explained(refusal: Declined, site: CaptureSite) -> Declined:
    """The refusal, or the graph break behind it: what a part of a forward lacks is in another part."""
    if refusal.reason not in _MISSING or not site.is_part:
        return refusal
    here = f"{refusal.reason.value} in what is {'before' if site.graph_break else 'behind'} it"
    where = str(site.graph_break or "the capture broke earlier")
    return Declined(DeclineReason.GRAPH_BREAK, f"{where}; {here}", refusal.node)
