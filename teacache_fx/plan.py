"""The facts that analysis finds about a graph. Passes meet here: analysis fills the plan, rewriting reads it.

Nodes are held by name: a working copy of a graph keeps the names of the original, and names can be printed.
"""

from __future__ import annotations

from dataclasses import dataclass

from teacache_fx.costs import Costs


@dataclass(frozen=True)
class BlockList:
    """One list of repeated blocks inside the stack.

    Attributes:
        path: module path of the list, such as `transformer_blocks`, or of one module that is called again and again;
            empty where no module tells and the repetition of the operations does.
        num_blocks: how many of its blocks the stack runs.
        block_classes: class names of the blocks, without repetition, in order of appearance; empty strings without
            modules.
        num_kinds: how many different op sequences the blocks have.
    """

    path: str
    num_blocks: int
    block_classes: tuple[str, ...]
    num_kinds: int

    def __str__(self) -> str:
        kinds = "all alike" if self.num_kinds == 1 else f"{self.num_kinds} kinds"
        what = " | ".join(filter(None, self.block_classes)) or "repeated operations"
        return f"{self.path or 'no module'}: {self.num_blocks} x {what} ({kinds})"


@dataclass(frozen=True)
class LiveOutput:
    """A value of the stack that is used after it, and the input of the stack that its residual is taken against.

    Attributes:
        value: node name of the stack's output.
        base: node name of the stack's input of the same shape.
        shape: sizes as printed, those that vary between calls by their names in `Costs.sizes`.
        dtype: of the value and of its residual.
        proven: for each size that varies, the recorded sizes of value and base, such as `((batch**2)//batch) = batch`;
            sympy has proven them equal for all calls. Empty under static shapes.
    """

    value: str
    base: str
    shape: tuple[str, ...]
    dtype: str
    proven: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockStack:
    """The repeated blocks that carry the latents.

    Attributes:
        lists: the lists of blocks that it is made of, in order of execution.
        latents: name of the placeholder that holds the latents.
        region: names of the stack's nodes that depend on the latents, in graph order.
        live_outputs: what is used after the stack, each with what entered it.
    """

    lists: tuple[BlockList, ...]
    latents: str
    region: tuple[str, ...]
    live_outputs: tuple[LiveOutput, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks in all lists together."""
        return sum(part.num_blocks for part in self.lists)


@dataclass(frozen=True)
class Modulation:
    """The tensor on which steps are compared.

    Attributes:
        modulated_input: node name of the indicator.
        pattern: name of the modulation pattern that confirmed it.
        timestep: name of the placeholder that holds the timestep.
        block: module path of the block that it was found in.
    """

    modulated_input: str
    pattern: str
    timestep: str
    block: str


@dataclass(frozen=True)
class Partition:
    """Every node that computes something belongs to exactly one part, in graph order.

    Attributes:
        prologue: runs on every step before the decision.
        blocks: moves into the branch `run_blocks`.
        epilogue: runs on every step after the branch.
        dead: needed by nothing; dynamo leaves unused projections behind.
        operands: values that the branch takes from outside it.
        conditioning: placeholders whose identity tells one prompt or guidance branch from another.
        steady: placeholders that keep their contents throughout a generation, the conditioning among them.
        further_times: placeholders that are timesteps beside the first; what they hold changes with it.
    """

    prologue: tuple[str, ...]
    blocks: tuple[str, ...]
    epilogue: tuple[str, ...]
    dead: tuple[str, ...]
    operands: tuple[str, ...]
    conditioning: tuple[str, ...]
    steady: tuple[str, ...]
    further_times: tuple[str, ...] = ()


@dataclass(frozen=True)
class CachePlan:
    """All that the rewriting passes need to know about one graph.

    Attributes:
        stack, modulation, partition, costs: what each pass has found.
        is_fragment: the graph begins behind a graph break, and is told timestep and conditioning by the hook.
    """

    stack: BlockStack
    modulation: Modulation
    partition: Partition
    costs: Costs
    is_fragment: bool = False
