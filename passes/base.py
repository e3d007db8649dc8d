"""What a pass is: a frozen dataclass with a name, called on a working copy of the graph and the facts found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from teacache_fx.costs import Costs
from teacache_fx.dataflow import Dataflow
from teacache_fx.errors import Declined, DeclineReason
from teacache_fx.plan import BlockStack, CachePlan, Modulation, Partition
from teacache_fx.policy import Policy
from teacache_fx.signature import CacheSignature


class Pass(Protocol):
    """One step of the pipeline. Analysis passes return False: they never edit."""

    @property
    def name(self) -> str:
        """Kebab-case name, as in logs and reports."""

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> bool:
        """Runs the pass and says whether the graph changed.

        Raises:
            Declined: the graph cannot be rewritten.
        """


@dataclass
class PassContext:
    """Facts about one working copy. Analysis passes fill them in; asking for one too early is a bug in the pipeline.

    Attributes:
        policy: the settings to trace into the graph, `None` while only analysing.
        marked: names of the nodes that an extractor has marked, by role; empty without an extractor.
        is_fragment: the graph begins behind a graph break, and has `CALL_INPUTS` for what it lacks.
        is_portable: the rewriting adds only operations that ONNX has.
        stack, modulation, partition, costs: parts of the plan, `None` until found.
        signature: layout of the added inputs and outputs, `None` until the cond is inserted.
    """

    policy: Policy | None = None
    marked: dict[str, str] = field(default_factory=dict)
    is_fragment: bool = False
    is_portable: bool = False
    stack: BlockStack | None = None
    modulation: Modulation | None = None
    partition: Partition | None = None
    costs: Costs | None = None
    signature: CacheSignature | None = None
    _flow: Dataflow | None = field(default=None, repr=False)

    def dataflow(self, gm: fx.GraphModule) -> Dataflow:
        """Dependencies of the graph as it was before any rewriting; computed once for all analysis passes."""
        if self._flow is None:
            self._flow = Dataflow(gm.graph)
        return self._flow

    @property
    def plan(self) -> CachePlan:
        """The finished plan."""
        if not (self.stack and self.modulation and self.partition and self.costs):
            raise RuntimeError("the plan is not complete: an analysis pass is missing before this one")
        return CachePlan(self.stack, self.modulation, self.partition, self.costs, self.is_fragment)


def nodes_by_name(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The graph's nodes under the names that a plan holds."""
    return {node.name: node for node in gm.graph.nodes}


def output_arguments(gm: fx.GraphModule) -> list[Any]:
    """The flat list of what the graph returns."""
    returned = gm.graph.output_node().args[0]
    if not isinstance(returned, (tuple, list)):
        raise Declined(DeclineReason.NOT_A_MODEL, f"the graph returns a bare {type(returned).__name__}")
    return list(returned)
