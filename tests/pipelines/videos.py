"""Tiny pipelines that make videos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from diffusers.models.autoencoders import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from tests.pipelines.components import (
    cogvideox_autoencoder,
    hunyuan_autoencoder,
    ltx_autoencoder,
    transformer,
    wan_autoencoder,
)
from tests.pipelines.spec import Spec
from tests.pipelines.text import embeddings, t5_encoder, text_prompt, tokenizer


def _wan(**experts: Any) -> Any:
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5_encoder(16),
        vae=wan_autoencoder(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer("wan"),
        **experts,
    )


def _ltx() -> Any:
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=ltx_autoencoder(),
        text_encoder=t5_encoder(16),
        tokenizer=tokenizer(),
        transformer=transformer("ltx"),
    )


def _hunyuan() -> Any:
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return HunyuanVideoPipeline(
        transformer=transformer("hunyuan_video"),
        vae=hunyuan_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **absent,
    )


def _cogvideox() -> Any:
    return CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5_encoder(8),
        vae=cogvideox_autoencoder(),
        transformer=transformer("cogvideox", attention_head_dim=16, use_rotary_positional_embeddings=True),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
    )


def _ltx2() -> Any:
    """Video with sound: two streams of latents through the same blocks."""
    backbone = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, vae_scale_factors=(2, 2, 2),
    )  # fmt: skip
    connector: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    connector["num_learnable_registers"] = None
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_ltx2_autoencoder(),
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8
        ),
        text_encoder=None,
        tokenizer=None,
        connectors=LTX2TextConnectors(
            caption_channels=16,
            text_proj_in_factor=2,
            **{f"{kind}_connector_{key}": value for kind in ("video", "audio") for key, value in connector.items()},
        ),
        transformer=backbone,
        vocoder=LTX2Vocoder(
            in_channels=16, hidden_channels=8, upsample_kernel_sizes=[4], upsample_factors=[2],
            resnet_kernel_sizes=[3], resnet_dilations=[[1]],
        ),
    )  # fmt: skip


def _ltx2_autoencoder() -> Any:
    """Halves height, width and frames."""
    return AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
    )


SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5}
NAMED = ("cond", "uncond")
BATCHED = ("cond_uncond",)

SPECS = {
    "wan2.1": Spec(_wan, text_prompt, SIZE | {"max_sequence_length": 16}, NAMED),
    "wan2.2": Spec(
        lambda: _wan(transformer_2=transformer("wan"), boundary_ratio=0.8),
        text_prompt,
        SIZE | {"max_sequence_length": 16},
        NAMED,
        ("transformer", "transformer_2"),
    ),
    "ltx": Spec(
        _ltx,
        text_prompt,
        {"height": 32, "width": 32, "num_frames": 3, "max_sequence_length": 16},
        BATCHED,
    ),
    "ltx2": Spec(
        _ltx2,
        lambda seed: embeddings(seed, 32, mask=torch.int64),
        {"height": 32, "width": 32, "num_frames": 3, "spatio_temporal_guidance_blocks": [1]},
        ("cond_uncond", "uncond_stg", "uncond_modality"),
    ),
    "hunyuan_video": Spec(
        _hunyuan,
        lambda seed: embeddings(seed, 16, pooled=8, mask=torch.int64),
        SIZE | {"true_cfg_scale": 2.0},
        NAMED,
    ),
    "cogvideox": Spec(
        _cogvideox,
        text_prompt,
        {"height": 64, "width": 64, "num_frames": 5, "max_sequence_length": 8},
        BATCHED,
    ),
}
