"""Blocks kept in everything but a plain list of modules."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from tests.shapes.parts import DEPTH, WIDTH, Attention, Block, Dit, Expected, PlainBlock, mlp, modulate

IN_TOKENS, SHARED = "timestep inside the tokens", "shared modulation sliced per block (scale + shift)"


class SequentialDit(Dit):
    """`nn.Sequential` of blocks that take one tensor; the timestep is added to the tokens before them."""

    def build(self) -> None:
        self.blocks = nn.Sequential(*(PlainBlock() for _ in range(DEPTH)))  # type: ignore[assignment]

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.as_tensor(self.blocks(x + c.unsqueeze(1)))


class PairBlock(Block):
    """Hands the condition through, since `nn.Sequential` passes on one thing only."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, c = pair
        return super().forward(x, c), c


class PairSequentialDit(Dit):
    """`nn.Sequential` of blocks that take and return a tuple."""

    def build(self) -> None:
        self.blocks = nn.Sequential(*(PairBlock() for _ in range(DEPTH)))  # type: ignore[assignment]

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.as_tensor(self.blocks((x, c))[0])


class ConditionedSequential(nn.Sequential):
    """Passes the condition to each of its blocks."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        for block in self:
            x = block(x, c)
        return x


class ConditionedSequentialDit(Dit):
    """A subclass of `nn.Sequential` with two arguments."""

    def build(self) -> None:
        self.blocks = ConditionedSequential(*(Block() for _ in range(DEPTH)))  # type: ignore[assignment]

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.as_tensor(self.blocks(x, c))


class NumberedDit(Dit):
    """`self.block0`, `self.block1`, ... written out."""

    def build(self) -> None:
        self.block0, self.block1, self.block2, self.block3 = (Block() for _ in range(4))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.block0(x, c)
        x = self.block1(x, c)
        x = self.block2(x, c)
        return torch.as_tensor(self.block3(x, c))


class GetattrDit(Dit):
    """`layer_1`, `layer_2`, ... set and fetched by name."""

    def build(self) -> None:
        for number in range(1, DEPTH + 1):
            setattr(self, f"layer_{number}", Block())

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for number in range(1, DEPTH + 1):
            x = getattr(self, f"layer_{number}")(x, c)
        return x


class NamedDit(Dit):
    """Names without a number: only what the blocks do is alike."""

    def build(self) -> None:
        self.first, self.second, self.third, self.last = (Block() for _ in range(4))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.third(self.second(self.first(x, c), c), c), c))


class DictDit(Dit):
    """`nn.ModuleDict` with the given form of key."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__()

    def build(self) -> None:
        self.blocks = nn.ModuleDict({self.key.format(i): Block() for i in range(DEPTH)})  # type: ignore[assignment]

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks.values():  # type: ignore[operator]
            x = block(x, c)
        return x


class PairsDit(Dit):
    """A list of lists, `for attn, ff in self.layers`, the residuals added in the loop."""

    def build(self) -> None:
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, WIDTH), mlp()]) for _ in range(DEPTH)
        )

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for layer in self.layers:
            norm, attn, to_scale, ff = layer.children()
            x = attn(norm(x) * (1 + to_scale(c).unsqueeze(1))) + x
            x = ff(x) + x
        return x


class SeparateListsDit(Dit):
    """One list per kind of layer, zipped in the loop."""

    def build(self) -> None:
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))
        self.attentions = nn.ModuleList(Attention() for _ in range(DEPTH))
        self.mlps = nn.ModuleList(mlp() for _ in range(DEPTH))
        self.adaln = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(DEPTH))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for norm, attn, ff, adaln in zip(self.norms, self.attentions, self.mlps, self.adaln, strict=True):
            shift, scale = adaln(c).unsqueeze(1).chunk(2, dim=-1)
            x = x + attn(modulate(norm(x), shift, scale))
            x = x + ff(x)
        return x


class StagesDit(Dit):
    """A list of stages, each with a list of blocks."""

    def build(self) -> None:
        self.stages = nn.ModuleList(nn.ModuleList(Block() for _ in range(DEPTH // 2)) for _ in range(2))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, c)
        return x


class PartialsDit(Dit):
    """Blocks bound to their condition before they are run."""

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        steps = [functools.partial(block, c=c) for block in self.blocks]
        return functools.reduce(lambda tokens, step: step(tokens), steps, x)


class SharedDit(Dit):
    """ONE block, called again and again."""

    calls = 3

    def build(self) -> None:
        self.block = Block()

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.block(x, c)
        return x


class SlicedBlock(PlainBlock):
    """Takes its modulation ready-made."""

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:  # type: ignore[override]
        shift, scale, gate = modulation.unsqueeze(1).chunk(3, dim=-1)
        x = x + gate * self.attn(modulate(self.norm1(x), shift, scale))
        return torch.as_tensor(x + self.mlp(self.norm2(x)))


class SharedSlicedDit(Dit):
    """ONE block, called eight times with another slice of one large modulation each time."""

    def build(self) -> None:
        self.block, self.modulation = SlicedBlock(), nn.Linear(WIDTH, 8 * 3 * WIDTH)

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for modulation in self.modulation(c).chunk(8, dim=-1):
            x = self.block(x, modulation)
        return x


class AlternatingDit(Dit):
    """TWO blocks, called in turn three times."""

    def build(self) -> None:
        self.local_block, self.global_block = Block(), Block()

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for _ in range(3):
            x = self.global_block(self.local_block(x, c), c)
        return x


class CheckpointedDit(Dit):
    """Calls each block through activation checkpointing, which does nothing without gradients."""

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=False)
        return x


class NestedRegionBlock(Block):
    """Compiled once for all blocks."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c)


class NestedRegionsDit(Dit):
    def build(self) -> None:
        self.blocks = nn.ModuleList(NestedRegionBlock() for _ in range(DEPTH))


CASES = {
    "checkpointed": Expected(CheckpointedDit),
    "nested compile regions": Expected(NestedRegionsDit),
    "sequential": Expected(SequentialDit, pattern=IN_TOKENS),
    "sequential of pairs": Expected(PairSequentialDit),
    "sequential with a condition": Expected(ConditionedSequentialDit),
    "numbered attributes": Expected(NumberedDit),
    "getattr": Expected(GetattrDit),
    "named attributes": Expected(NamedDit),
    "dict of digits": Expected(lambda: DictDit("{}")),
    "dict of names": Expected(lambda: DictDit("block_{}")),
    "list of lists": Expected(PairsDit, pattern="scale only"),
    "separate lists": Expected(SeparateListsDit, blocks=8, pattern=SHARED),
    "stages": Expected(StagesDit, blocks=2),
    "partials": Expected(PartialsDit),
    "shared": Expected(SharedDit, blocks=3),
    "shared, sliced": Expected(SharedSlicedDit, blocks=8, pattern=SHARED),
    "two in turn": Expected(AlternatingDit, blocks=6),
}
