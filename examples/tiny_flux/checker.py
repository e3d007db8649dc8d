"""Read back what a picture shows and compare it with its prompt. No learned model is involved.

    python -m examples.tiny_flux.checker --prompts 64 --steps 50

A picture is read in three plain steps: the border gives the background colour, the other pixels give the shape's
colour, and how far each pixel lies between the two colours gives a soft mask. The mask is compared with that of every
shape, size and position; the best intersection over union wins. A picture in which nothing fits well enough has no
shape, size or position, and so fails every prompt.
"""

import argparse
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .pipeline import TinyFluxPipeline, load_pipeline
from .scenes import (
    COLOURS,
    DEFAULT_POSITION,
    DEFAULT_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    colour_value,
    held_back_scenes,
    shape_mask,
)

MIN_OVERLAP = 0.85
ATTRIBUTES = ("shape", "colour", "background", "size", "position")

Picture = NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """What a picture shows; None where it cannot be read. `overlap` is the best intersection over union."""

    shape: str | None
    colour: str | None
    background: str | None
    size: str | None
    position: str | None
    overlap: float


def _sharpen(mask: Tensor) -> Tensor:
    """Take what is nearly 0 or 1 as 0 or 1: faint texture over a whole picture would otherwise outweigh a shape."""
    return ((mask - 0.5) / 0.6 + 0.5).clamp(0, 1)


@functools.cache
def _templates() -> tuple[tuple[tuple[str, str, str], ...], Tensor]:
    """Every (shape, size, position) and its mask, float32 [108, 32, 32]."""
    keys = tuple(itertools.product(SHAPES, SIZES, POSITIONS))
    return keys, torch.stack([_sharpen(shape_mask(*key)) for key in keys])


def read_picture(picture: Picture) -> Reading:
    """Read a picture, float [32, 32, 3] in [0, 1]."""
    pixels = torch.as_tensor(picture, dtype=torch.float32) * 2 - 1
    palette = torch.stack([colour_value(colour) for colour in COLOURS])
    labels = torch.cdist(pixels.flatten(0, 1), palette).argmin(dim=1).view(pixels.shape[:2])
    border = torch.cat([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    background = int(border.mode().values)
    others = labels[labels != background]
    if not len(others):
        return Reading(None, None, COLOURS[background], None, None, 0.0)
    colour = int(others.mode().values)
    direction = palette[colour] - palette[background]
    mask = _sharpen((pixels - palette[background]) @ direction / direction.square().sum())
    keys, templates = _templates()
    overlaps = torch.minimum(mask, templates).sum((1, 2)) / torch.maximum(mask, templates).sum((1, 2))
    overlap, best = overlaps.max(dim=0)
    found = keys[int(best)] if overlap >= MIN_OVERLAP else (None, None, None)
    return Reading(found[0], COLOURS[colour], COLOURS[background], found[1], found[2], float(overlap))


def check_picture(scene: Scene, picture: Picture) -> dict[str, bool]:
    """Whether each attribute of `scene` is right in a picture, float [32, 32, 3] in [0, 1]."""
    reading = read_picture(picture)
    wanted = {name: getattr(scene, name) for name in ATTRIBUTES}
    wanted |= {"size": scene.size or DEFAULT_SIZE, "position": scene.position or DEFAULT_POSITION}
    return {name: getattr(reading, name) == value for name, value in wanted.items()}


def accuracy(scenes: Sequence[Scene], pictures: Iterable[Picture]) -> dict[str, tuple[int, int]]:
    """(right, total) per attribute, and under "all" for pictures that are right in every attribute."""
    checks = [check_picture(scene, picture) for scene, picture in zip(scenes, pictures, strict=True)]
    counts = {name: (sum(check[name] for check in checks), len(checks)) for name in ATTRIBUTES}
    return counts | {"all": (sum(all(check.values()) for check in checks), len(checks))}


def sample(
    pipe: TinyFluxPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 50,
    cfg_scale: float = 2.0,
    seed: int = 0,
    batch_size: int = 32,
) -> NDArray[np.float32]:
    """Pictures for `prompts`: float32 [len(prompts), 32, 32, 3] in [0, 1]. The noise follows from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, len(prompts), batch_size):
        result = pipe(
            **pipe.encode(prompts[start : start + batch_size]),
            true_cfg_scale=cfg_scale,
            num_inference_steps=steps,
            height=32,
            width=32,
            generator=generator,
            output_type="np",
        )
        batches.append(result.images)
    return np.concatenate(batches)


def save_grid(pictures: NDArray[np.float32], path: Path, columns: int = 8, zoom: int = 4) -> None:
    """Write pictures [n, 32, 32, 3] in [0, 1] as one PNG, row by row; the last row is padded with grey."""
    missing = -len(pictures) % columns
    padded = np.concatenate([pictures, np.full((missing, *pictures.shape[1:]), 0.5, pictures.dtype)])
    bordered = np.pad(padded, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=0.5)
    side = bordered.shape[1]
    grid = bordered.reshape(-1, columns, side, side, 3).swapaxes(1, 2).reshape(-1, columns * side, 3)
    image = Image.fromarray((grid * 255).round().astype(np.uint8))
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Command line: sample held-back prompts and print how many are right."""
    parser = argparse.ArgumentParser(description="Prompt accuracy of the tiny Flux model on held-back prompts.")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0, help="decides the prompts and the noise")
    parser.add_argument("--weights", type=Path, help="folder of other weights than the shipped ones")
    parser.add_argument("--grid", type=Path, help="also write the pictures to this PNG file")
    args = parser.parse_args()
    scenes = held_back_scenes(args.prompts, args.seed)
    pipe = load_pipeline(args.weights)
    prompts = [scene.prompt for scene in scenes]
    pictures = sample(pipe, prompts, steps=args.steps, cfg_scale=args.cfg_scale, seed=args.seed)
    for name, (right, total) in accuracy(scenes, pictures).items():
        print(f"{name:<12}{right:>5} of {total:<5}{right / total:>8.1%}")
    for scene, picture in zip(scenes, pictures, strict=True):
        if not all(check_picture(scene, picture).values()):
            print(f"wrong: {scene.prompt!r} shows {read_picture(picture)}")
    if args.grid is not None:
        save_grid(pictures, args.grid)


if __name__ == "__main__":
    main()
