"""What the parts of a step cost: FLOPs, weights read, and the state that is kept. Expressions under dynamic shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from teacache_fx.flops import flops
from teacache_fx.graph import fake_tensors, is_weight, op_name
from teacache_fx.opaque import opaque_module
from teacache_fx.size_names import Count, SizeName, SizeNames, add, value_at


@dataclass(frozen=True)
class PartCosts:
    """What one part of a step costs; ints, or expressions over named sizes.

    Attributes:
        flops: floating-point operations of its matrix products, counted as `torch.utils.flop_counter` counts them.
        weight_bytes: bytes of the parameters and buffers that its operations take, each once and whole: the least that
            the part reads from memory, and what it spends its time on where tokens are few.
    """

    flops: Count
    weight_bytes: Count

    def __add__(self, other: PartCosts) -> PartCosts:
        """Costs of both parts; a weight that both take is read twice."""
        return PartCosts(add(self.flops, other.flops), add(self.weight_bytes, other.weight_bytes))

    def at(self, sizes: dict[str, int]) -> PartCosts:
        """The numbers at these sizes."""
        return PartCosts(value_at(self.flops, sizes), value_at(self.weight_bytes, sizes))


@dataclass(frozen=True)
class Costs:
    """What one step costs.

    Attributes:
        prologue, blocks, epilogue: of each part.
        state_bytes: what each context keeps from one step to the next: modulated input, residuals and latents. The
            policy's scalars, less than 100 bytes, are left out.
        sizes: what the names in the expressions mean; empty under static shapes.
    """

    prologue: PartCosts
    blocks: PartCosts
    epilogue: PartCosts
    state_bytes: Count
    sizes: tuple[SizeName, ...] = ()

    @property
    def computed(self) -> PartCosts:
        """Costs of a computed step."""
        return self.prologue + self.blocks + self.epilogue

    @property
    def skipped(self) -> PartCosts:
        """Costs of a skipped step."""
        return self.prologue + self.epilogue

    def at(self, **sizes: int) -> Costs:
        """The numbers at other sizes, by name; at the captured ones where none is given.

        Raises:
            ValueError: no size has such a name.
        """
        values = {size.name: size.captured for size in self.sizes}
        if unknown := sizes.keys() - values.keys():
            names = ", ".join(values) or "none: the shapes are static"
            raise ValueError(f"unknown size {', '.join(sorted(unknown))}; sizes that vary: {names}")
        values |= sizes
        parts = {name: getattr(self, name).at(values) for name in PARTS}
        return replace(self, **parts, state_bytes=value_at(self.state_bytes, values), sizes=())

    @property
    def skipped_share(self) -> float:
        """Share of a computed step's FLOPs that a skipped step still pays, from 0 to 1; at the captured sizes."""
        now = self.at()
        return now.skipped.flops / now.computed.flops if now.computed.flops else 1.0

    @property
    def skipped_weight_share(self) -> float:
        """The same of the weights that a step reads."""
        now = self.at()
        return now.skipped.weight_bytes / now.computed.weight_bytes if now.computed.weight_bytes else 1.0


PARTS = ("prologue", "blocks", "epilogue")


def measure(
    parts: Sequence[Sequence[fx.Node]], state: Iterable[fx.Node], inputs: Sequence[fx.Node], latents: fx.Node
) -> Costs:
    """The costs of one graph.

    Args:
        parts: nodes of the prologue, of the blocks and of the epilogue.
        state: nodes whose values are kept until the next step.
        inputs: placeholders of the graph.
        latents: the one that holds the latents.
    """
    names = SizeNames(inputs, latents)
    weights = {node for node in inputs if is_weight(node)}
    costs = []
    for nodes in parts:
        taken = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
        read = (source for source in taken if source in weights or source.op == "get_attr")
        opaque = {node.args[1]: node for node in nodes if op_name(node) == "call_module"}.values()
        weight_bytes = [*map(_num_bytes, read), *map(_opaque_bytes, opaque)]
        costs.append(PartCosts(_written(names, map(flops, nodes)), _written(names, weight_bytes)))
    state_bytes = _written(names, map(_num_bytes, state))
    counts = [count for part in costs for count in (part.flops, part.weight_bytes)]
    prologue, blocks, epilogue = costs
    return Costs(prologue, blocks, epilogue, state_bytes, names.meanings([*counts, state_bytes]))


def _written(names: SizeNames, counts: Iterable[Any]) -> Count:
    """The sum over named sizes. Blocks repeat themselves, so equal terms are put together before they are written."""
    certain, terms, examples = 0, Counter[Any](), dict[Any, torch.SymInt]()
    for count in counts:
        if isinstance(count, torch.SymInt):
            terms[count.node.expr] += 1
            examples[count.node.expr] = count
        else:
            certain += count
    return add(certain, *(number * names.write(examples[term]) for term, number in terms.items()))


def _opaque_bytes(node: fx.Node) -> int:
    """Of the weights that an opaque module holds, which are no inputs of the graph."""
    module = opaque_module(int(node.args[1]))  # type: ignore[arg-type]
    return module.weight_bytes if module is not None else 0


def _num_bytes(node: fx.Node) -> Any:
    return sum(tensor.numel() * tensor.element_size() for tensor in fake_tensors(node))
