"""Builds the two branches of the cond as graph modules of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from teacache_fx.graph import emit, fake_value, set_fake_value, storages, tensor_of, written_arguments

_aten = torch.ops.aten


@dataclass(frozen=True)
class Crossing:
    """Nodes of the outer graph that both branches deal with.

    Attributes:
        operands: values that the branches take in.
        sources: the same, as they are handed to the cond.
        residuals: state inputs, one per live output.
        values: the stack's live outputs.
        bases: what entered the stack, one per live output.
        needy_samples: bool of shape [batch], which samples need the blocks; `None` where all do or none does.
    """

    operands: Sequence[fx.Node]
    sources: Sequence[fx.Node]
    residuals: Sequence[fx.Node]
    values: Sequence[fx.Node]
    bases: Sequence[fx.Node]
    needy_samples: fx.Node | None = None

    @property
    def from_policy(self) -> list[fx.Node]:
        """State and decisions that the branches take in behind the model's own operands."""
        return [*self.residuals, *([] if self.needy_samples is None else [self.needy_samples])]

    @property
    def cond_operands(self) -> list[fx.Node]:
        """What the cond is called with."""
        return [*self.sources, *self.from_policy]


class _Branch:
    """A graph under construction, and where the outer graph's nodes are found in it."""

    def __init__(self, crossing: Crossing) -> None:
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        outer = (*crossing.operands, *crossing.from_policy)
        for operand, source in zip(outer, crossing.cond_operands, strict=True):
            placeholder = self.graph.placeholder(operand.name)
            set_fake_value(placeholder, fake_value(source))
            self.env[operand] = placeholder

    def protect(self, written: set[int]) -> None:
        """Puts copies in the place of the operands whose storages the blocks will write to.

        cond forbids writing to an operand; and the residual is taken against what it held before.
        """
        for node, inner in list(self.env.items()):
            if storages(node) & written:
                del self.env[node]
                if inner.op == "placeholder":
                    self.env[node] = emit(self.graph, _aten.clone.default, inner)

    def derive(self, node: fx.Node) -> fx.Node:
        """The node's value inside the branch. Views and attributes are derived anew from the operands."""
        if node not in self.env:
            written = written_arguments(node)  # `x.add_(1)` is x, written before the branch is entered
            self.env[node] = self.derive(written[0]) if written else self.copy(node)
        return self.env[node]

    def derive_bases(self, crossing: Crossing) -> list[fx.Node]:
        """What entered the stack, in the floating-point type that leaves it."""
        pairs = zip(crossing.bases, crossing.values, strict=True)
        return [_cast(self.graph, self.derive(base), value) for base, value in pairs]

    def copy(self, node: fx.Node) -> fx.Node:
        """Copies one node. An operand made contiguous may differ from the recorded strides, never in its values."""
        self.env[node] = self.graph.node_copy(node, self.derive)
        self.env[node].meta = dict(node.meta)
        return self.env[node]

    def finish(self, gm: fx.GraphModule, outputs: Sequence[fx.Node], residuals: Sequence[fx.Node]) -> fx.GraphModule:
        """Closes the graph. The attributes that it refers to are shared with the outer module."""
        self.graph.output((*outputs, *residuals))
        return fx.GraphModule(gm, self.graph)


def run_blocks(gm: fx.GraphModule, crossing: Crossing, blocks: Sequence[fx.Node]) -> fx.GraphModule:
    """`(hidden_states_out, ..., residual, ...)`: the blocks as they were, and what they added.

    Outputs are cloned even where they are contiguous already: a slice keeps its storage offset and its base.
    """
    branch = _Branch(crossing)
    entered = branch.derive_bases(crossing)
    branch.protect({s for node in blocks for argument in written_arguments(node) for s in storages(argument)})
    for node in blocks:
        branch.copy(node)
    values = [branch.env[value] for value in crossing.values]
    outputs = [emit(branch.graph, _aten.clone.default, v, memory_format=torch.contiguous_format) for v in values]
    new = [emit(branch.graph, _aten.sub.Tensor, output, base) for output, base in zip(outputs, entered, strict=True)]
    if crossing.needy_samples is not None:
        previous = [branch.env[residual] for residual in crossing.residuals]
        reused = [emit(branch.graph, _aten.add.Tensor, base, r) for base, r in zip(entered, previous, strict=True)]
        needy = branch.env[crossing.needy_samples]
        outputs = [_choose(branch.graph, needy, *pair) for pair in zip(outputs, reused, strict=True)]
        new = [_choose(branch.graph, needy, *pair) for pair in zip(new, previous, strict=True)]
    return branch.finish(gm, outputs, [_contiguous(branch.graph, node) for node in new])


def reuse_residual(gm: fx.GraphModule, crossing: Crossing) -> fx.GraphModule:
    """`(hidden_states + previous_residual, ..., previous_residual, ...)`."""
    branch = _Branch(crossing)
    entered = branch.derive_bases(crossing)
    previous = [branch.env[residual] for residual in crossing.residuals]
    outputs = [emit(branch.graph, _aten.add.Tensor, base, r) for base, r in zip(entered, previous, strict=True)]
    outputs = [_contiguous(branch.graph, node) for node in outputs]
    clones = [emit(branch.graph, _aten.clone.default, r, memory_format=torch.contiguous_format) for r in previous]
    return branch.finish(gm, outputs, clones)


def _choose(graph: fx.Graph, needy: fx.Node, computed: fx.Node, reused: fx.Node) -> fx.Node:
    """For each sample what its own decision asks for, so that a sample's result does not depend on its neighbours."""
    mask = emit(graph, _aten.view.default, needy, [-1, *[1] * (tensor_of(computed).ndim - 1)])
    chosen = emit(graph, _aten.where.self, mask, computed, reused)
    return emit(graph, _aten.clone.default, chosen, memory_format=torch.contiguous_format)


def _contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Both branches must agree in stride order; the sum of two differently laid out tensors takes the first's."""
    if tensor_of(node).is_contiguous():
        return node
    return emit(graph, _aten.clone.default, node, memory_format=torch.contiguous_format)


def _cast(graph: fx.Graph, base: fx.Node, value: fx.Node) -> fx.Node:
    """Under autocast the stack may give back another floating-point type than it was given."""
    dtype = tensor_of(value).dtype
    return base if tensor_of(base).dtype == dtype else emit(graph, _aten._to_copy.default, base, dtype=dtype)
