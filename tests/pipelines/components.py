"""Transformers and autoencoders of diffusers, as small as they go."""

from __future__ import annotations

import importlib
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)

from tests.zoo import FAMILIES

CHANNELS = 4
"""Latent channels of all autoencoders."""


def transformer(name: str, **changes: Any) -> Any:
    """The transformer of a family of the zoo, with changes to its configuration."""
    module_name, class_name = FAMILIES[name]["class"].rsplit(".", 1)
    return getattr(importlib.import_module(module_name), class_name)(**FAMILIES[name]["config"] | changes)


def image_autoencoder(levels: int = 1) -> Any:
    """Halves height and width `levels` times."""
    return AutoencoderKL(
        block_out_channels=(8,) * (levels + 1),
        down_block_types=("DownEncoderBlock2D",) * (levels + 1),
        up_block_types=("UpDecoderBlock2D",) * (levels + 1),
        latent_channels=CHANNELS,
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.1,
    )


def deep_compression_autoencoder() -> Any:
    """Halves height and width."""
    return AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )


def qwen_autoencoder(levels: int = 1) -> Any:
    """Halves height and width `levels` times."""
    return AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=CHANNELS,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * levels,
        latents_mean=[0.1] * CHANNELS,
        latents_std=[1.2] * CHANNELS,
    )


def wan_autoencoder() -> Any:
    """Divides height and width by 4 and frames by 2."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * CHANNELS,
        latents_std=[1.2] * CHANNELS,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def ltx_autoencoder() -> Any:
    """Halves height, width and frames."""
    return AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=1,
    )


def hunyuan_autoencoder() -> Any:
    """Divides height and width by 8 and frames by 4."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )


def cogvideox_autoencoder() -> Any:
    """Divides height and width by 8 and frames by 4."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=5.0,
    )
