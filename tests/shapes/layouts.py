"""Latents of other layouts than [batch, channels, height, width], and timesteps of other shapes than [batch]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.shapes.containers import SHARED
from tests.shapes.parts import CHANNELS, DEPTH, TOKENS, WIDTH, Dit, Expected, images, mlp, modulate


def _latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class ChannelsLastDit(Dit):
    """[batch, height, width, channels]"""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2), t, y).permute(0, 2, 3, 1)


class UnbatchedDit(Dit):
    """[channels, height, width]: one picture."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x[None], t[None], y[None])[0]


class VideoDit(Dit):
    """[batch, channels, frames, height, width], all frames in one sequence."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoise(x, self.t_embedder(t) + self.y_embedder(y))

    def denoise(self, x: Tensor, c: Tensor) -> Tensor:
        frames = x.shape[2]
        tokens = torch.unflatten(self.embed(x.transpose(1, 2).flatten(0, 1)), 0, (-1, frames)).flatten(1, 2)
        patches = torch.unflatten(self.final_layer(self.trunk(tokens, c), c), 1, (frames, -1))
        return torch.unflatten(self.unpatchify(patches.flatten(0, 1)), 0, (-1, frames)).transpose(1, 2)


class FramesFirstDit(VideoDit):
    """[batch, frames, channels, height, width]"""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2), t, y).transpose(1, 2)


class ImageToVideoDit(VideoDit):
    """Joins a picture, shaped like the latents, to their channels."""

    def __init__(self) -> None:
        super().__init__(in_channels=2 * CHANNELS)

    def forward(self, image: Tensor, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([x, image], dim=1), t, y)


class AudioDit(Dit):
    """[batch, channels, length]"""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Conv1d(CHANNELS, WIDTH, 4, 4), nn.ConvTranspose1d(WIDTH, CHANNELS, 4, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.in_proj(x).transpose(1, 2)
        return torch.as_tensor(self.out_proj(self.trunk(tokens, c).transpose(1, 2)))


class SequenceDit(Dit):
    """[batch, tokens, channels], patched already; `final_layer` gives back four of them for each."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(4 * CHANNELS, WIDTH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        return torch.as_tensor(self.final_layer(self.trunk(self.in_proj(x) + self.pos_embed, c), c))


class EncoderBlock(nn.Module):
    """Tokens first, as `nn.MultiheadAttention` has them unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.mlp = nn.MultiheadAttention(WIDTH, num_heads=2), mlp()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = c.chunk(2, dim=-1)
        normed = modulate(self.norm1(x), shift, scale)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return torch.as_tensor(x + self.mlp(self.norm2(x)))


class TokensFirstDit(SequenceDit):
    """[tokens, batch, channels]"""

    def build(self) -> None:
        self.blocks = nn.ModuleList(EncoderBlock() for _ in range(DEPTH))
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.trunk(self.in_proj(x), self.modulation(c))
        return torch.as_tensor(self.final_layer(tokens.transpose(0, 1), c).transpose(0, 1))


class VectorDit(Dit):
    """[batch, width]: an embedding, cut into tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.in_proj(torch.unflatten(x, 1, (TOKENS, 8)))
        return torch.as_tensor(self.out_proj(self.trunk(tokens, c)).flatten(1))


class TokenTimesDit(Dit):
    """A timestep for each token: [batch, tokens]."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder(t) + self.y_embedder(y).unsqueeze(1)
        return self.unpatchify(self.final_layer(self.trunk(self.embed(x), c), c))


class FrameTimesDit(VideoDit):
    """A timestep for each frame: [batch, frames]."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        per_token = self.t_embedder(t).repeat_interleave(TOKENS, dim=1)
        c = per_token + self.y_embedder(y).unsqueeze(1)
        return self.denoise(x, c)


def _video(*shape: int, **more: Any) -> dict[str, Any]:
    return images(x=_latents(*shape), **more)


VIDEO = ((2, 3 * TOKENS, WIDTH),)
ONE = ((1, TOKENS, WIDTH),)

CASES = {
    "channels last": Expected(ChannelsLastDit, lambda: images(x=_latents(2, 8, 8, CHANNELS))),
    "memory format channels_last": Expected(
        Dit, lambda: images(x=_latents(2, CHANNELS, 8, 8).to(memory_format=torch.channels_last))
    ),
    "unbatched": Expected(
        UnbatchedDit,
        lambda: {"x": _latents(CHANNELS, 8, 8), "t": torch.tensor(700.0), "y": torch.tensor(3)},
        live=ONE,
    ),
    "video": Expected(VideoDit, lambda: _video(2, CHANNELS, 3, 8, 8), live=VIDEO),
    "video, frames first": Expected(FramesFirstDit, lambda: _video(2, 3, CHANNELS, 8, 8), live=VIDEO),
    "image to video": Expected(
        ImageToVideoDit,
        lambda: {"image": _latents(2, CHANNELS, 3, 8, 8) * 0.5, **_video(2, CHANNELS, 3, 8, 8)},
        live=VIDEO,
    ),
    "condition channels": Expected(lambda: Dit(2 * CHANNELS, CHANNELS), lambda: images(2 * CHANNELS)),
    "learned sigma": Expected(lambda: Dit(CHANNELS, 2 * CHANNELS)),
    "audio": Expected(AudioDit, lambda: images(x=_latents(2, CHANNELS, 4 * TOKENS))),
    "sequence": Expected(SequenceDit, lambda: images(x=_latents(2, TOKENS, 4 * CHANNELS))),
    "tokens first": Expected(
        TokensFirstDit, lambda: images(x=_latents(TOKENS, 2, 4 * CHANNELS)), live=((TOKENS, 2, WIDTH),), pattern=SHARED
    ),
    "vector": Expected(VectorDit, lambda: images(x=_latents(2, 8 * TOKENS))),
    "timestep per token": Expected(TokenTimesDit, lambda: images(t=torch.full((2, TOKENS), 700.0)), share=0.15),
    "timestep per frame": Expected(
        FrameTimesDit, lambda: _video(2, CHANNELS, 3, 8, 8, t=torch.full((2, 3), 700.0)), live=VIDEO, share=0.15
    ),
}
