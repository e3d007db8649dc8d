"""Little pictures drawn from a description: one flat shape on a flat background.

A `Scene` names a shape, its colour and the background, and may also name a size and a position:

    Scene("circle", "red", "blue")                           a red circle on a blue background
    Scene("ring", "black", "yellow", "small", "top left")    a small black ring on a yellow background at the top left

A shape without a size is large, and one without a position is in the center.

Some (shape, colour, background) triples are held back from training, so that a picture of one of them shows that
the model puts known words together and does not only remember pictures. Which ones is a fixed function of the words.
"""

import functools
import itertools
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross")
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 230, 70),
    "green": (30, 150, 60),
    "blue": (35, 75, 220),
    "purple": (145, 50, 175),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
COLOURS = tuple(PALETTE)
RADII = {"small": 5.0, "large": 9.0}
SIZES = tuple(RADII)
# Centres (x, y) in pixels. A large shape in a corner still leaves the outermost pixel to the background.
CENTRES = {
    "center": (16, 16),
    "top": (16, 10),
    "bottom": (16, 22),
    "left": (10, 16),
    "right": (22, 16),
    "top left": (10, 10),
    "top right": (22, 10),
    "bottom left": (10, 22),
    "bottom right": (22, 22),
}
POSITIONS = tuple(CENTRES)
DEFAULT_SIZE = "large"
DEFAULT_POSITION = "center"
HELD_BACK_PERCENT = 15
SUBPIXELS = 8

Triple = tuple[str, str, str]


@dataclass(frozen=True)
class Scene:
    """One shape on a background; `size` and `position` are None where the text does not mention them."""

    shape: str
    colour: str
    background: str
    size: str | None = None
    position: str | None = None

    def __post_init__(self) -> None:
        """Refuse words that cannot be drawn, and a shape that cannot be seen."""
        for value, known in ((self.shape, SHAPES), (self.colour, COLOURS), (self.background, COLOURS)):
            _require_known(value, known)
        if self.size is not None:
            _require_known(self.size, SIZES)
        if self.position is not None:
            _require_known(self.position, POSITIONS)
        if self.colour == self.background:
            raise ValueError(f"a {self.colour} shape cannot be seen on a {self.background} background")

    @property
    def prompt(self) -> str:
        """The text that describes this scene, as far as its attributes are set."""
        words = [self.size, self.colour, self.shape]
        thing = _with_article(" ".join(word for word in words if word is not None))
        place = "" if self.position is None else f" at the {self.position}"
        return f"{thing} on {_with_article(self.background)} background{place}"

    def draw(self) -> Tensor:
        """The picture: float32 [3, 32, 32] in [-1, 1], anti-aliased."""
        mask = shape_mask(self.shape, self.size or DEFAULT_SIZE, self.position or DEFAULT_POSITION)
        return paint(mask, colour_value(self.colour), colour_value(self.background))


def _require_known(value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"cannot draw {value!r}; choose one of {', '.join(known)}")


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def colour_value(colour: str) -> Tensor:
    """A palette colour: float32 [3] in [-1, 1]."""
    return torch.tensor(PALETTE[colour], dtype=torch.float32) / 127.5 - 1


def paint(mask: Tensor, colour: Tensor, background: Tensor) -> Tensor:
    """Blend two flat colours: mask [..., 32, 32] in [0, 1] and colours [..., 3] give pictures [..., 3, 32, 32]."""
    cover = mask.unsqueeze(-3)
    return background[..., None, None] + cover * (colour - background)[..., None, None]


@functools.cache
def shape_mask(shape: str, size: str, position: str) -> Tensor:
    """How much of each pixel the shape covers: float32 [32, 32] in [0, 1]."""
    ticks = (np.arange(IMAGE_SIZE * SUBPIXELS) + 0.5) / SUBPIXELS
    centre_x, centre_y = CENTRES[position]
    x = (ticks[None, :] - centre_x) / RADII[size]
    y = (ticks[:, None] - centre_y) / RADII[size]
    inside = _inside(shape, x, y).astype(np.float32)
    grid = inside.reshape(IMAGE_SIZE, SUBPIXELS, IMAGE_SIZE, SUBPIXELS)
    return torch.from_numpy(grid.mean(axis=(1, 3)))


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether points (x [1, n], y [n, 1], unit radius, y down) lie in the shape: bool [n, n]."""
    distance = np.hypot(x, y)
    across, along = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    found: NDArray[np.bool_] = {
        "circle": distance <= 1,
        "square": along <= 0.85,
        "triangle": (y <= 0.75) & (abs(x) <= (y + 1) / 1.75),
        "diamond": abs(x) + abs(y) <= 1,
        "ring": (distance <= 1) & (distance >= 0.55),
        "cross": (across <= 0.3) & (along <= 1),
    }[shape]
    return found


@functools.cache
def triples(held_back: bool) -> tuple[Triple, ...]:
    """All (shape, colour, background) that are held back from training, or all that are not."""
    every = ((s, c, b) for s, c, b in itertools.product(SHAPES, COLOURS, COLOURS) if c != b)
    return tuple(triple for triple in every if _is_held_back(triple) == held_back)


def _is_held_back(triple: Triple) -> bool:
    return zlib.crc32(" ".join(triple).encode()) % 100 < HELD_BACK_PERCENT


def is_held_back(scene: Scene) -> bool:
    """Whether training never shows this scene's (shape, colour, background)."""
    return _is_held_back((scene.shape, scene.colour, scene.background))


def held_back_scenes(n: int, seed: int) -> list[Scene]:
    """`n` scenes that training never shows; size and position are each mentioned in about half of them."""
    rng = random.Random(seed)
    return [
        Scene(
            *rng.choice(triples(True)), rng.choice([None, rng.choice(SIZES)]), rng.choice([None, rng.choice(POSITIONS)])
        )
        for _ in range(n)
    ]


def held_back_prompts(n: int, seed: int) -> list[str]:
    """The prompts of `held_back_scenes(n, seed)`."""
    return [scene.prompt for scene in held_back_scenes(n, seed)]
