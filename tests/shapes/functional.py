"""Blocks written as functions over tensors of weights: no module tells them, only that the operations repeat."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tests.shapes.containers import SHARED
from tests.shapes.parts import (
    CHANNELS,
    DEPTH,
    WIDTH,
    Block,
    Dit,
    Expected,
    PlainBlock,
    attend,
    modulate,
    sinusoids,
)

Weights = Mapping[str, Tensor]
SHAPES = {
    "modulation": (6 * WIDTH, WIDTH),
    "qkv": (3 * WIDTH, WIDTH),
    "proj": (WIDTH, WIDTH),
    "up": (4 * WIDTH, WIDTH),
    "down": (WIDTH, 4 * WIDTH),
}


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


def norm(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


def dit_block(x: Tensor, c: Tensor, weights: Weights) -> Tensor:
    """adaLN-zero without biases."""
    modulation = nn.functional.linear(nn.functional.silu(c), weights["modulation"]).unsqueeze(1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
    q, k, v = nn.functional.linear(modulate(norm(x), shift, scale), weights["qkv"]).chunk(3, dim=-1)
    x = x + gate * nn.functional.linear(attend(q, k, v), weights["proj"])
    hidden = nn.functional.gelu(nn.functional.linear(modulate(norm(x), shift_mlp, scale_mlp), weights["up"]))
    return x + gate_mlp * nn.functional.linear(hidden, weights["down"])


class ParameterDictDit(Dit):
    """One flat `nn.ParameterDict`, with the number of the block in the keys."""

    def build(self) -> None:
        self.weights = nn.ParameterDict({f"{i}_{key}": weight(*SHAPES[key]) for i in range(DEPTH) for key in SHAPES})

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for i in range(DEPTH):
            x = dit_block(x, c, {key: self.weights[f"{i}_{key}"] for key in SHAPES})
        return x


class ParameterListDit(Dit):
    """One flat `nn.ParameterList`, so many for each block."""

    def build(self) -> None:
        self.weights = nn.ParameterList(weight(*shape) for _ in range(DEPTH) for shape in SHAPES.values())

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for i in range(0, DEPTH * len(SHAPES), len(SHAPES)):
            x = dit_block(x, c, {key: self.weights[i + place] for place, key in enumerate(SHAPES)})
        return x


class StackedDit(Dit):
    """One tensor for each kind of weight, its first dimension the blocks, as a scan over layers wants it."""

    def build(self) -> None:
        for key, shape in SHAPES.items():
            setattr(self, key, weight(DEPTH, *shape))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for i in range(DEPTH):
            x = dit_block(x, c, {key: getattr(self, key)[i] for key in SHAPES})
        return x


class PlainDictDit(Dit):
    """Weights that torch knows nothing of: tensors in a dict of dicts."""

    def build(self) -> None:
        self.weights = {i: {key: weight(*shape).detach() for key, shape in SHAPES.items()} for i in range(DEPTH)}

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        return functools.reduce(lambda tokens, weights: dit_block(tokens, c, weights), self.weights.values(), x)


class CalledWithWeightsDit(Dit):
    """ONE block, called with the weights of each by `torch.func.functional_call`."""

    def build(self) -> None:
        skeleton = self.__dict__["skeleton"] = Block()  # known to nobody as a part of the model
        for name, value in skeleton.state_dict().items():
            setattr(self, name.replace(".", "_"), weight(DEPTH, *value.shape))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        skeleton: nn.Module = self.__dict__["skeleton"]
        names = [name for name, _ in skeleton.named_parameters()]
        for i in range(DEPTH):
            weights = {name: getattr(self, name.replace(".", "_"))[i] for name in names}
            x = torch.func.functional_call(skeleton, weights, (x, c))
        return x


class EinsumDit(Dit):
    """Heads and contractions spelled out as einsums, one modulation for all blocks."""

    def build(self) -> None:
        self.modulation = weight(DEPTH, 3, WIDTH, WIDTH)
        self.qkv, self.proj = weight(DEPTH, 3, 2, WIDTH // 2, WIDTH), weight(DEPTH, 2, WIDTH // 2, WIDTH)
        self.up, self.down = weight(DEPTH, 4 * WIDTH, WIDTH), weight(DEPTH, WIDTH, 4 * WIDTH)

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        modulations = torch.einsum("bw,lnvw->lnbv", c, self.modulation)[:, :, :, None]
        for i in range(DEPTH):
            shift, scale, gate = modulations[i]
            q, k, v = torch.einsum("btw,nhdw->nbhtd", modulate(norm(x), shift, scale), self.qkv[i])
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.25).softmax(-1)
            x = x + gate * torch.einsum("bhqk,bhkd,hdw->bqw", weights, v, self.proj[i])
            hidden = torch.einsum("btw,vw->btv", norm(x), self.up[i]).relu()
            x = x + torch.einsum("btv,wv->btw", hidden, self.down[i])
        return x


class MixedDit(ParameterDictDit):
    """Something else stands between the blocks: each time another operation."""

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        between: list[Callable[[Tensor], Tensor]] = [
            torch.tanh,
            lambda x: x.roll(1, 1),
            lambda x: 0.5 * x + x.mean(1, True),
        ]
        for i in range(DEPTH):
            x = dit_block(x, c, {key: self.weights[f"{i}_{key}"] for key in SHAPES})
            if i < len(between):
                x = between[i](x)
        return x


class MiddleDit(ParameterDictDit):
    """Two blocks, a convolution over the tokens, two blocks."""

    def build(self) -> None:
        super().build()
        self.mix = nn.Conv1d(WIDTH, WIDTH, kernel_size=3, padding=1)

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for i in range(DEPTH):
            x = dit_block(x, c, {key: self.weights[f"{i}_{key}"] for key in SHAPES})
            if i == 1:
                x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x


class RefinedDit(ParameterDictDit):
    """A module list of plain blocks in front of more blocks that are functions."""

    def build(self) -> None:
        super().build()
        self.refiner = nn.ModuleList(PlainBlock() for _ in range(2))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.refiner:
            x = block(x)
        return super().trunk(x, c)


class BareDit(nn.Module):
    """No module inside at all."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = weight(WIDTH, 4 * CHANNELS), weight(4 * CHANNELS, WIDTH)
        self.time = weight(WIDTH, WIDTH)
        self.blocks = nn.ParameterList(weight(DEPTH, *shape) for shape in SHAPES.values())

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = nn.functional.silu(sinusoids(t) @ self.time) * (1 + 0.1 * y[:, None])
        tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).mT @ self.patch.T
        for i in range(DEPTH):
            tokens = dit_block(tokens, c, {key: stack[i] for key, stack in zip(SHAPES, self.blocks, strict=True)})
        return nn.functional.pixel_shuffle(torch.unflatten((norm(tokens) @ self.out.T).mT, -1, (4, 4)), 2)


CASES = {
    "parameter dict": Expected(ParameterDictDit, pattern=SHARED),
    "parameter list": Expected(ParameterListDit, pattern=SHARED),
    "stacked weights": Expected(StackedDit, pattern=SHARED),
    "dict of tensors": Expected(PlainDictDit, pattern=SHARED),
    "functional_call": Expected(CalledWithWeightsDit, pattern=SHARED),
    "einsums": Expected(EinsumDit, pattern=SHARED),
    "mixed": Expected(MixedDit, pattern=SHARED),
    "conv in the middle": Expected(MiddleDit, pattern=SHARED),
    "modules, then functions": Expected(RefinedDit, pattern="no timestep before the first matmul", blocks=6),
    "no modules": Expected(BareDit, pattern=SHARED),
}
