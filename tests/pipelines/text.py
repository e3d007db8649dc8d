"""Tokenizers and text encoders that need no download, and prompts."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ("red", "blue", "fox", "boat", "on", "snow", "at", "sea", "small", "blurry")
VOCABULARY = {word: index for index, word in enumerate(("<pad>", "<unk>", *WORDS, "<end>"))}
PROMPTS = ("red fox on snow", "small blue boat at sea")


def text_prompt(seed: int) -> dict[str, Any]:
    """A prompt and a negative prompt in words."""
    return {"prompt": PROMPTS[seed % len(PROMPTS)], "negative_prompt": "blurry"}


def draw(seed: int, *shape: int) -> Tensor:
    """Embeddings as if a text encoder had made them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))


def embeddings(seed: int, dim: int, pooled: int = 0, mask: torch.dtype | None = None) -> dict[str, Any]:
    """`prompt_embeds` of shape [1, 8, dim] and their negatives, with pooled ones and masks where asked for."""
    arguments: dict[str, Any] = {}
    for i, prefix in enumerate(("", "negative_")):
        arguments[f"{prefix}prompt_embeds"] = draw(2 * seed + i, 1, 8, dim)
        if pooled:
            arguments[f"{prefix}pooled_prompt_embeds"] = draw(2 * seed + i, 1, pooled)
        if mask is not None:
            used = torch.arange(8) < 6 - i
            arguments[f"{prefix}prompt_attention_mask"] = used[None].to(mask)
    return arguments


def tokenizer(max_length: int = 16) -> Any:
    """One token for each word of `WORDS`, and one at the end."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", VOCABULARY["<end>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        model_max_length=max_length,
    )


def t5_encoder(dim: int) -> Any:
    """A T5 encoder of one layer."""
    config = T5Config(vocab_size=len(VOCABULARY), d_model=dim, d_kv=8, d_ff=dim, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def clip_encoder(dim: int, max_length: int = 16) -> Any:
    """A CLIP text encoder of one layer, which pools at the last token."""
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=dim,
        intermediate_size=dim,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=None,
        eos_token_id=VOCABULARY["<end>"],
        pad_token_id=VOCABULARY["<pad>"],
    )
    return CLIPTextModel(config).eval()
