"""Several latents at once, times shaped like latents, and outputs that are filled in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.shapes.parts import CHANNELS, DEPTH, TOKENS, WIDTH, Block, Dit, Expected, images

SOUNDS = 6


class FilledOutputDit(Dit):
    """Returns a tensor that it has put its prediction into, as one with clean frames at the beginning does."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sample = torch.zeros_like(x)
        sample[:, :, 2:] = super().forward(x, t, y)[:, :, 2:]
        return sample


class TypedTimeBlock(Block):
    """Its first matrix product takes a timestep that has been cast to whatever type the tokens have."""

    def __init__(self) -> None:
        super().__init__()
        self.to_c = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, self.to_c(c.type_as(x)))


class TypedTimeDit(Dit):
    def build(self) -> None:
        self.blocks = nn.ModuleList(TypedTimeBlock() for _ in range(DEPTH))


class TimeLikeLatentsDit(Dit):
    """A time for each sample with as many dimensions as the latents of a video."""

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        return super().forward(x.squeeze(2), timestep.flatten(), y).unsqueeze(2)


class SoundedDit(Dit):
    """Pictures and sound in the same blocks; the latents of the pictures come with a condition, in more channels."""

    def __init__(self) -> None:
        super().__init__(3 * CHANNELS, CHANNELS)

    def build(self) -> None:
        super().build()
        self.sound_in, self.sound_out = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, sound_hidden_states: Tensor, t: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        c = self.t_embedder(t) + self.y_embedder(y)
        tokens = self.trunk(torch.cat([self.embed(hidden_states), self.sound_in(sound_hidden_states)], 1), c)
        return self.unpatchify(self.final_layer(tokens[:, :TOKENS], c)), self.sound_out(tokens[:, TOKENS:])


class AlternatingDit(Dit):
    """Space and time take turns in one list: blocks of one class on tokens laid out in two ways."""

    def trunk(self, x: Tensor, c: Tensor) -> Tensor:
        frames, tokens = 2, TOKENS // 2
        x = x.reshape(-1, tokens, WIDTH)
        for space, time in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            x = space(x, c.repeat_interleave(frames, 0)).unflatten(0, (-1, frames)).transpose(1, 2)
            x = time(x.reshape(-1, frames, WIDTH), c.repeat_interleave(tokens, 0)).unflatten(0, (-1, tokens))
            x = x.transpose(1, 2).reshape(-1, tokens, WIDTH)
        return x.reshape(-1, TOKENS, WIDTH)


def _sounded(**more: Any) -> dict[str, Any]:
    given = images(3 * CHANNELS)
    sound = torch.randn(2, SOUNDS, CHANNELS, generator=torch.Generator().manual_seed(3))
    return {"hidden_states": given.pop("x"), "sound_hidden_states": sound, **given, **more}


def _timed() -> dict[str, Any]:
    given = images()
    return {"x": given["x"].unsqueeze(2), "timestep": torch.full((2, 1, 1, 1, 1), 700.0), "y": given["y"]}


CASES = {
    "output filled in place": Expected(FilledOutputDit),
    "time cast to the tokens' type": Expected(TypedTimeDit),
    "time shaped like latents": Expected(TimeLikeLatentsDit, _timed, timestep_input="l_timestep_"),
    "space and time in turns": Expected(AlternatingDit, live=((4, TOKENS // 2, WIDTH),)),
    "pictures and sound": Expected(
        SoundedDit, _sounded, "hidden_states", live=((2, TOKENS + SOUNDS, WIDTH),), share=0.15
    ),
    "sound and pictures": Expected(
        SoundedDit, _sounded, "sound_hidden_states", live=((2, TOKENS + SOUNDS, WIDTH),), share=0.15
    ),
}
