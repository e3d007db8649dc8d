"""Transformers of our own that look like a diffusion transformer from one side, and are none or cannot be cached."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from teacache_fx import DeclineReason
from tests.lookalikes.case import Lookalike
from tests.lookalikes.layered import timed_tokens, tokens
from tests.shapes.parts import TOKENS, WIDTH, Block, Dit, PlainBlock, TimestepEmbedder, images, mlp


class SingleBlockDit(Dit):
    """A whole model, of one block."""

    def build(self) -> None:
        self.blocks = nn.ModuleList([Block()])


class TwoHeadsDit(Dit):
    """One block, and then two equal heads side by side: for the mean and for the variance."""

    def build(self) -> None:
        self.block = Block()
        self.heads = nn.ModuleList(mlp() for _ in range(2))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.block(x, c)
        return torch.as_tensor(self.heads[0](x) + self.heads[1](x))


class ExpertsDit(TwoHeadsDit):
    """One block whose experts stand side by side and are summed by their weights."""

    def build(self) -> None:
        super().build()
        self.experts, self.router = nn.ModuleList(PlainBlock() for _ in range(4)), nn.Linear(WIDTH, 4)

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.block(x, c)
        weights = self.router(x).softmax(-1)
        return sum((weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)), torch.zeros_like(x))


class Siamese(nn.Module):
    """ONE block for two pictures, which are then subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = PlainBlock(), nn.Linear(WIDTH, WIDTH)
        self.t_embedder = TimestepEmbedder()

    def forward(self, hidden_states: Tensor, other: Tensor, timestep: Tensor) -> Tensor:
        embedded = self.t_embedder(timestep).unsqueeze(1)
        return torch.as_tensor(self.head(self.encoder(hidden_states + embedded) - self.encoder(other + embedded)))


class SelfSiamese(Siamese):
    """ONE block for two views of the latents."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states, hidden_states.flip(1), timestep)


class TextStackDit(Dit):
    """All blocks work on the text alone; the latents meet what comes out of them in one step."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        c = self.t_embedder(t)
        text = self.trunk(text, c)
        tokens = self.embed(x)
        weights = (tokens @ text.mT).softmax(-1)
        return self.unpatchify(self.final_layer(tokens + weights @ text, c))


class RefinementHead(Dit):
    """A block, and a small layer that is run again and again over its output."""

    def build(self) -> None:
        self.block, self.update = Block(), nn.Linear(WIDTH, WIDTH)

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.block(x, c)
        for _ in range(5):
            x = x + 0.1 * self.update(x).tanh()
        return x


class LookupDit(Dit):
    """A transformer over pictures, with a level of compression that is looked up: no timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.quality = nn.Embedding(10, WIDTH)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:  # type: ignore[override]
        c = self.quality(quality)
        return self.unpatchify(self.final_layer(self.trunk(self.embed(x), c), c))


class RotaryModel(nn.Module):
    """A transformer over sequences; `where`, of one dimension, turns queries and keys by sines and cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainBlock() for _ in range(4))

    def forward(self, hidden_states: Tensor, where: Tensor) -> Tensor:
        angles = where[:, None].float() * torch.exp(-torch.arange(WIDTH // 2, device=where.device).float())
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        for layer in self.layers:
            turned = torch.cat([-hidden_states[..., WIDTH // 2 :], hidden_states[..., : WIDTH // 2]], dim=-1)
            hidden_states = layer(hidden_states * cos + turned * sin)
        return hidden_states


class AddedPositions(RotaryModel):
    """The sines and cosines of `where` are added to the tokens."""

    def forward(self, hidden_states: Tensor, where: Tensor) -> Tensor:
        angles = where[:, None].float() * torch.exp(-torch.arange(WIDTH // 2, device=where.device).float())
        hidden_states = hidden_states + torch.cat([angles.sin(), angles.cos()], dim=-1)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class ControlNet(Dit):
    """Gives back what each block leaves, to be added in another model; none of it is like the latents."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:  # type: ignore[override]
        tokens, c, taps = self.embed(x), self.t_embedder(t) + self.y_embedder(y), []
        for block in self.blocks:
            tokens = block(tokens, c)
            taps.append(tokens * 0.1)
        return taps


class ViT(Dit):
    """A classifier of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(PlainBlock() for _ in range(4)), nn.Linear(WIDTH, 10)

    def encode(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.as_tensor(self.head(self.encode(x).mean(1)))


class VisionEncoder(ViT):
    """Gives back its tokens."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.encode(x)


def _latents(*names: str) -> dict[str, Any]:
    return {name: value for name, value in images().items() if name in ("x", *names)}


def _text() -> dict[str, Any]:
    return {**_latents("t"), "text": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))}


def _pair() -> dict[str, Any]:
    return {**timed_tokens(), "other": torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))}


R = DeclineReason


class TemperatureModel(Dit):
    """Not a denoiser: what is called `t` divides the result."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.y_embedder(y)
        return self.unpatchify(self.final_layer(self.trunk(self.embed(x), c), c)) / t[:, None, None, None]


class SummedBlock(nn.Module):
    """Passes its tokens on, and gives something beside them, as a WaveNet's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.skip = Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(x, c)
        return x, self.skip(x)


class SummedSkipsDit(Dit):
    """The output is read from the sum of what is given beside the tokens, and these are not in it."""

    def build(self) -> None:
        self.blocks = nn.ModuleList(SummedBlock() for _ in range(4))

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        skips = []
        for block in self.blocks:
            x, skip = block(x, c)
            skips.append(skip)
        total: Tensor = functools.reduce(torch.add, skips)
        return total


class RegistersDit(Dit):
    """Returns its register tokens too, which start from the same numbers at each step."""

    def build(self) -> None:
        super().build()
        self.registers = nn.Parameter(torch.randn(1, 3, WIDTH))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        c, tokens = self.t_embedder(t) + self.y_embedder(y), self.embed(x)
        tokens = self.trunk(torch.cat([self.registers.expand(len(x), -1, -1), tokens], 1), c)
        return self.unpatchify(self.final_layer(tokens[:, 3:], c)), tokens[:, :3]


class ChosenKernelsDit(Dit):
    """Says in its forward which attention kernels may run."""

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return super().trunk(x, c)


CASES = {
    "temperature": Lookalike(TemperatureModel, images, R.NO_TIMESTEP),
    "summed skips": Lookalike(SummedSkipsDit, images, R.NO_MATCHING_INPUT),
    "registers out": Lookalike(RegistersDit, images, R.STALE_OUTPUT),
    "chosen kernels": Lookalike(ChosenKernelsDit, images, R.MODE_ACROSS_CUT),
    "single block": Lookalike(SingleBlockDit, images, R.NO_REPEATED_BLOCKS),
    "two heads": Lookalike(TwoHeadsDit, images, R.SINGLE_BLOCK),
    "experts": Lookalike(ExpertsDit, images, R.SINGLE_BLOCK),
    "siamese": Lookalike(Siamese, _pair, R.SINGLE_BLOCK),
    "siamese of itself": Lookalike(SelfSiamese, timed_tokens, R.SINGLE_BLOCK),
    "text stack": Lookalike(TextStackDit, _text, R.NO_REPEATED_BLOCKS),
    "refinement head": Lookalike(RefinementHead, images, R.SINGLE_BLOCK),
    "looked-up condition": Lookalike(LookupDit, lambda: {**_latents(), "quality": torch.tensor([1, 3])}, R.NO_TIMESTEP),
    "rotary positions": Lookalike(RotaryModel, lambda: tokens(where=torch.arange(TOKENS)), R.NO_TIMESTEP),
    "added positions": Lookalike(AddedPositions, lambda: tokens(where=torch.arange(TOKENS)), R.NO_TIMESTEP),
    "residual taps": Lookalike(ControlNet, images, R.NO_LATENTS),
    "vit": Lookalike(ViT, _latents, R.NO_LATENTS),
    "vision encoder": Lookalike(VisionEncoder, _latents, R.NO_LATENTS),
}
