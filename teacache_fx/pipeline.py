"""Runs the pipeline of passes on a working copy of a captured graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from teacache_fx.coefficients import evaluate, horner
from teacache_fx.config import ResolvedConfig
from teacache_fx.dataflow import transforms
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.fixed_numbers import with_fixed_numbers
from teacache_fx.flops import is_matmul
from teacache_fx.fragments import with_call_inputs
from teacache_fx.graph import copy_graph_module, fake_value, inside_functorch
from teacache_fx.marks import take_marks
from teacache_fx.modes import without_idle_modes
from teacache_fx.passes import ANALYSIS, REWRITING, Pass, PassContext
from teacache_fx.passes.verify import verify
from teacache_fx.plan import CachePlan
from teacache_fx.policy import Policy
from teacache_fx.regions import with_regions_inlined
from teacache_fx.render import render
from teacache_fx.signature import CacheSignature
from teacache_fx.slices import with_known_slices

log = logging.getLogger(__name__)
Observer = Callable[[str, fx.GraphModule], None]


@dataclass(frozen=True)
class RewrittenGraph:
    """A rewritten copy of a graph and how to call it.

    Attributes:
        gm: takes the model's inputs and then the state; returns the model's outputs, the new state and the records.
        plan: the facts that the rewriting was made from.
        signature: layout of the added inputs and outputs.
        fingerprint: of the captured graph, equal for equal graphs within a process. Two graphs of one model differ
            where a flag, a number or a precision is built in; they must not share a state.
    """

    gm: fx.GraphModule
    plan: CachePlan
    signature: CacheSignature
    fingerprint: int


class Pipeline:
    """Runs passes on one working copy, and observes: logs and times each, and verifies after each that edited.

    Args:
        gm: the captured graph; it is never edited.
        observer: called after each pass with its name and the graph as it is then, `None` for nobody.
        is_fragment: the graph begins behind a graph break; the caller will pass `CALL_INPUTS` behind its own inputs.

    Attributes:
        timings: seconds per pass, and for copying the graph and generating its code.

    Raises:
        Declined: the graph cannot even be prepared for the passes (INTERNAL_ERROR).
    """

    def __init__(self, gm: fx.GraphModule, observer: Observer | None = None, is_fragment: bool = False) -> None:
        self._observer = observer
        self.timings: dict[str, float] = {}
        gm = with_call_inputs(gm) if is_fragment else gm
        try:
            self.original, marked = take_marks(_prepared(gm))
        except Exception as error:
            raise _failure("preparing the graph", error) from error
        self.gm = self.original
        self.context = PassContext(marked=marked, is_fragment=is_fragment)
        self._known = {node.name for node in self.gm.graph.nodes}

    def analyse(self) -> CachePlan:
        """Finds the plan; edits nothing.

        Raises:
            Declined: the graph cannot be rewritten.
        """
        _check_capture(self.gm)
        for step in ANALYSIS:
            self._run(step)
        return self.context.plan

    def rewrite(self, config: ResolvedConfig, is_portable: bool = False) -> RewrittenGraph:
        """Rewrites a copy from the plan, with these settings in it. The original graph is not touched.

        Args:
            config: the settings.
            is_portable: add only operations that ONNX has; see `content_hash` for the price.

        Raises:
            Declined: the graph cannot be rewritten.
        """
        plan = self.context.plan
        self.context.policy, self.context.is_portable = policy_of(config), is_portable
        started = time.perf_counter()
        self.gm = copy_graph_module(self.original)
        self.timings["copy"] = time.perf_counter() - started
        for step in REWRITING:
            self._run(step)
        started = time.perf_counter()
        self.gm.recompile()
        self.timings["generate code"] = time.perf_counter() - started
        assert self.context.signature is not None
        fingerprint = _fingerprint(self.original, self.context.signature)
        return RewrittenGraph(self.gm, plan, self.context.signature, fingerprint)

    def _run(self, step: Pass) -> None:
        started = time.perf_counter()
        try:
            changed = step(self.gm, self.context)
            if changed:
                verify(self.gm, self._known, step.name)
        except Declined:
            raise
        except Exception as error:
            raise _failure(step.name, error) from error
        self.timings[step.name] = time.perf_counter() - started
        log.info("%s: %s, %.1f ms", step.name, "changed" if changed else "read", 1e3 * self.timings[step.name])
        if self._observer is not None:
            self._observer(step.name, self.gm)
        if changed and log.isEnabledFor(logging.DEBUG):
            log.debug("graph after %s:\n%s", step.name, render(self.gm))


def _failure(what: str, error: Exception) -> Declined:
    """A bug of ours must not take the user's model down with it."""
    cause = str(error).partition("\n")[0]
    return Declined(DeclineReason.INTERNAL_ERROR, f"{what} failed with {type(error).__name__}: {cause}")


def _prepared(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph without what is in the way of moving nodes into a branch."""
    return with_known_slices(with_fixed_numbers(without_idle_modes(with_regions_inlined(gm))))


def policy_of(config: ResolvedConfig) -> Policy:
    """The traced policy with the config's numbers in it; the polynomial is in Horner form."""
    settings = config.config
    expression = horner(config.coefficients)

    def rescale(rel_l1: Tensor) -> Tensor:
        value = (
            torch.as_tensor(evaluate(expression, rel_l1)) if expression.free_symbols else rel_l1 * 0 + float(expression)
        )
        return value.abs() if settings.accumulation == "abs" else value

    return Policy(
        settings.rel_l1_thresh,
        rescale,
        settings.num_warmup_steps,
        settings.num_final_steps,
        settings.max_consecutive_skips,
        settings.granularity == "sample",
    )


def _fingerprint(gm: fx.GraphModule, signature: CacheSignature) -> int:
    nodes = tuple((str(node.target), str(node.args), str(node.kwargs)) for node in gm.graph.nodes)
    return hash((nodes, tuple(tensor.dtype for tensor in signature.tensors)))


def _check_capture(gm: fx.GraphModule) -> None:
    if inside_functorch() or any(is_matmul(node) for stretch in transforms(gm.graph.nodes) for node in stretch):
        raise Declined(DeclineReason.VMAP, "the graph is mapped over a batch dimension by functorch")
    tensors = [node for node in gm.graph.nodes if node.op == "placeholder" and isinstance(fake_value(node), Tensor)]
    if not tensors:
        raise Declined(DeclineReason.NOT_A_MODEL, "the graph takes no tensor")
    if any(
        node.target is torch.ops.higher_order.cond and "reuse_residual" in str(node.args) for node in gm.graph.nodes
    ):
        raise Declined(DeclineReason.ALREADY_REWRITTEN, "the graph holds a reuse_residual branch")
    if torch.is_grad_enabled():
        learning = [node for node in tensors if fake_value(node).requires_grad]
        if learning:
            detail = f"grad mode is on and {len(learning)} inputs or parameters require gradients"
            raise Declined(DeclineReason.GRADIENTS_NEEDED, detail, learning[0].name)
