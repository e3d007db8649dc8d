"""Training data: batches of random scenes, drawn from tables."""

import torch
from torch import Tensor

from . import scenes
from .pipeline import PixelShuffleAutoencoder
from .text_encoder import MAX_TOKENS, tokenize

# How often the text says a size, and how often a position.
SAY_CHANCE = 0.8
GRID = scenes.IMAGE_SIZE // 4


class SceneBatches:
    """Random scenes as tensors: every prompt and every mask is prepared once, a batch is then only indexing."""

    def __init__(self) -> None:
        """Tabulate the training triples, their colours, all masks and all token rows."""
        self.triples = scenes.triples(held_back=False)
        self.masks = torch.stack([_masks_of(shape) for shape in scenes.SHAPES])
        self.shape = torch.tensor([scenes.SHAPES.index(shape) for shape, _, _ in self.triples])
        self.colour = torch.stack([scenes.colour_value(colour) for _, colour, _ in self.triples])
        self.background = torch.stack([scenes.colour_value(background) for _, _, background in self.triples])
        # Token rows per (triple, size or unmentioned, position or unmentioned); "unmentioned" comes last.
        sizes, positions = (*scenes.SIZES, None), (*scenes.POSITIONS, None)
        prompts = [scenes.Scene(*t, s, p).prompt for t in self.triples for s in sizes for p in positions]
        self.tokens = tokenize(prompts).view(len(self.triples), len(sizes), len(positions), MAX_TOKENS)

    def indices(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random (triple, size, position) indices, int64 [n] each."""
        counts = (len(self.triples), len(scenes.SIZES), len(scenes.POSITIONS))
        triple, size, position = (torch.randint(count, (n,), generator=generator) for count in counts)
        return triple, size, position

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Packed latents float32 [n, 64, 48] and the token ids of their prompts int64 [n, 12]."""
        triple, size, position = self.indices(n, generator)
        say_size, say_position = (torch.rand(2, n, generator=generator) < SAY_CHANCE).unbind()
        size = torch.where(say_size, size, scenes.SIZES.index(scenes.DEFAULT_SIZE))
        position = torch.where(say_position, position, scenes.POSITIONS.index(scenes.DEFAULT_POSITION))
        said_size = torch.where(say_size, size, len(scenes.SIZES))
        said_position = torch.where(say_position, position, len(scenes.POSITIONS))
        mask = self.masks[self.shape[triple], size, position]
        pictures = scenes.paint(mask, self.colour[triple], self.background[triple])
        return pack(pictures), self.tokens[triple, said_size, said_position]


def _masks_of(shape: str) -> Tensor:
    """Masks of one shape, float32 [sizes, positions, 32, 32]."""
    return torch.stack(
        [torch.stack([scenes.shape_mask(shape, size, place) for place in scenes.POSITIONS]) for size in scenes.SIZES]
    )


def pack(pictures: Tensor) -> Tensor:
    """Pictures [n, 3, 32, 32] to the token layout `FluxPipeline` uses: [n, 64, 48], same dtype."""
    latents = PixelShuffleAutoencoder().encode(pictures)
    patches = latents.reshape(len(pictures), -1, GRID, 2, GRID, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(len(pictures), GRID * GRID, -1)


def image_ids() -> Tensor:
    """Row and column of each image token, as `FluxPipeline` numbers them: float32 [64, 3]."""
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
