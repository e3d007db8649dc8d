"""Models of diffusers and transformers that are no diffusion transformers, in tiny configurations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
)

from teacache_fx import DeclineReason
from tests.lookalikes.case import Lookalike

WIDTH, WORDS = 32, 6


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _unet() -> Any:
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=WIDTH,
        attention_head_dim=8, layers_per_block=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _controlnet() -> Any:
    return ControlNetModel(
        block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=WIDTH, attention_head_dim=8,
        layers_per_block=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(16,),
    )  # fmt: skip


def _vae() -> Any:
    return AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


class VaeEncoding(nn.Module):
    """A picture to the mean of its latents; what the VAE itself returns is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.vae: Any = _vae()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.vae.encode(x).latent_dist.mode())


def _llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WIDTH, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
        )
    )


def _gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=WIDTH, n_layer=3, n_head=2))


def _clip_text() -> Any:
    return CLIPTextModel(
        CLIPTextConfig(vocab_size=40, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3,
                       num_attention_heads=2, max_position_embeddings=16)
    )  # fmt: skip


def _t5() -> Any:
    return T5EncoderModel(T5Config(vocab_size=40, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=3, num_heads=2))


def _vit() -> Any:
    return ViTForImageClassification(
        ViTConfig(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=16,
                  patch_size=4)
    )  # fmt: skip


def _clip_vision() -> Any:
    return CLIPVisionModel(
        CLIPVisionConfig(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                         image_size=16, patch_size=4)
    )  # fmt: skip


def _ids(**more: Any) -> dict[str, Any]:
    return {"input_ids": torch.arange(2 * WORDS).view(2, WORDS), **more}


def _embeddings(**more: Any) -> dict[str, Any]:
    return {"inputs_embeds": _random(2, WORDS, WIDTH), **more}


def _mask() -> dict[str, Tensor]:
    return {"attention_mask": torch.ones(2, WORDS, dtype=torch.long)}


def _positions() -> dict[str, Tensor]:
    return {**_mask(), "position_ids": torch.arange(WORDS)[None]}


def _denoising() -> dict[str, Any]:
    text = _random(2, WORDS, WIDTH)
    return {"sample": _random(2, 4, 16, 16), "timestep": torch.tensor(700), "encoder_hidden_states": text}


def _uncached(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "use_cache": False}


R = DeclineReason
CASES = {
    "unet": Lookalike(_unet, _denoising, R.CHANGING_SHAPES),
    "controlnet": Lookalike(
        _controlnet, lambda: {**_denoising(), "controlnet_cond": _random(2, 3, 16, 16)}, R.CHANGING_SHAPES
    ),
    "vae": Lookalike(_vae, lambda: {"sample": _random(2, 3, 16, 16)}, R.CHANGING_SHAPES),
    "vae encode": Lookalike(VaeEncoding, lambda: {"x": _random(2, 3, 16, 16)}, R.CHANGING_SHAPES),
    "vae decode": Lookalike(_vae, lambda: {"z": _random(2, 4, 8, 8)}, R.CHANGING_SHAPES, "decode"),
    "llama": Lookalike(_llama, lambda: _uncached(_ids()), R.NO_LATENTS),
    "llama, cached": Lookalike(_llama, _ids, R.NO_LATENTS),
    "llama, embeddings": Lookalike(_llama, lambda: _uncached(_embeddings()), R.NO_TIMESTEP),
    "llama, mask and positions": Lookalike(_llama, lambda: _uncached(_embeddings(**_positions())), R.NO_TIMESTEP),
    "gpt2": Lookalike(_gpt2, lambda: _uncached(_ids(**_positions())), R.NO_LATENTS),
    "gpt2, embeddings": Lookalike(_gpt2, lambda: _uncached(_embeddings(**_positions())), R.NO_TIMESTEP),
    "clip text": Lookalike(_clip_text, lambda: _ids(**_mask()), R.NO_LATENTS),
    "t5": Lookalike(_t5, lambda: _ids(**_mask()), R.NO_LATENTS),
    "t5, embeddings": Lookalike(_t5, lambda: _embeddings(**_mask()), R.NO_TIMESTEP),
    "vit": Lookalike(_vit, lambda: {"pixel_values": _random(2, 3, 16, 16)}, R.NO_LATENTS),
    "clip vision": Lookalike(_clip_vision, lambda: {"pixel_values": _random(2, 3, 16, 16)}, R.NO_LATENTS),
}
