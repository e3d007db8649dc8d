"""A tiny learned text encoder over the words the scenes use.

It stands where CLIP and T5 stand in a full-size Flux: it gives one embedding per token for the joint attention, and
one pooled embedding for the modulation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .scenes import COLOURS, POSITIONS, SHAPES, SIZES

MAX_TOKENS = 12
_GLUE_WORDS = ("a", "an", "on", "background", "at", "the")
_PLACE_WORDS = tuple(dict.fromkeys(" ".join(POSITIONS).split()))
# Index 0 is padding. The empty prompt is padding only: it is the unconditional prompt.
WORDS = ("", *_GLUE_WORDS, *SIZES, *COLOURS, *SHAPES, *_PLACE_WORDS)
_INDEX = {word: index for index, word in enumerate(WORDS)}


def tokenize(prompts: Sequence[str]) -> Tensor:
    """Word indices, padded with 0: int64 [len(prompts), 12]."""
    ids = torch.zeros(len(prompts), MAX_TOKENS, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        words = prompt.lower().split()
        if len(words) > MAX_TOKENS:
            raise ValueError(f"{prompt!r} has {len(words)} words; the text encoder reads at most {MAX_TOKENS}")
        for column, word in enumerate(words):
            if word not in _INDEX:
                raise ValueError(f"unknown word {word!r} in {prompt!r}; the known words are {', '.join(WORDS[1:])}")
            ids[row, column] = _INDEX[word]
    return ids


class TinyTextEncoder(nn.Module):
    """Word and position embeddings, one transformer layer, and a pooled projection."""

    def __init__(self, joint_dim: int, pooled_dim: int) -> None:
        """Both widths match the transformer's `joint_attention_dim` and `pooled_projection_dim`."""
        super().__init__()
        self.words = nn.Embedding(len(WORDS), joint_dim)
        self.positions = nn.Parameter(torch.zeros(MAX_TOKENS, joint_dim))
        self.layer = nn.TransformerEncoderLayer(
            joint_dim, nhead=4, dim_feedforward=2 * joint_dim, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(joint_dim)
        self.pool = nn.Linear(joint_dim, pooled_dim)
        nn.init.normal_(self.positions, std=0.2)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids int64 [B, 12] to token embeddings [B, 12, joint_dim] and pooled embeddings [B, pooled_dim]."""
        tokens = self.norm(self.layer(self.words(ids) + self.positions))
        return tokens, self.pool(tokens.mean(dim=1))
