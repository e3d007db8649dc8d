"""Tiny pipelines that make pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    QwenImageEditPipeline,
    QwenImagePipeline,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image

from teacache_fx.errors import DeclineReason
from tests.pipelines.components import deep_compression_autoencoder, image_autoencoder, qwen_autoencoder, transformer
from tests.pipelines.spec import Spec
from tests.pipelines.text import clip_encoder, draw, embeddings, t5_encoder, text_prompt, tokenizer

SIZE: dict[str, Any] = {"height": 16, "width": 16}


def _flux(pipeline: Any) -> Any:
    return pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=image_autoencoder(),
        text_encoder=clip_encoder(32),
        tokenizer=tokenizer(),
        text_encoder_2=t5_encoder(32),
        tokenizer_2=tokenizer(),
        transformer=transformer("flux", in_channels=16, guidance_embeds=True),
    )


def _sd3() -> Any:
    absent = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    return StableDiffusion3Pipeline(
        transformer=transformer("sd3", patch_size=2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_autoencoder(),
        **absent,
    )


def _qwen() -> Any:
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=qwen_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer("qwenimage"),
    )


def _qwen_edit() -> Any:
    return QwenImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=qwen_autoencoder(levels=6),  # the pipeline enlarges the picture to a million pixels
        text_encoder=None,
        tokenizer=None,
        processor=None,
        transformer=transformer("qwenimage"),
    )


def _qwen_prompt(seed: int) -> dict[str, Any]:
    """The negative prompt is shorter than the prompt, and another prompt has another length."""
    lengths = {"prompt_embeds": 7 + seed, "negative_prompt_embeds": 5}
    arguments: dict[str, Any] = {}
    for i, (name, length) in enumerate(lengths.items()):
        arguments[name] = draw(2 * seed + i, 1, length, 16)
        arguments[f"{name}_mask"] = torch.ones(1, length, dtype=torch.int64)
    return arguments


def _pixart() -> Any:
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5_encoder(16),
        vae=image_autoencoder(),
        transformer=transformer("pixart", attention_head_dim=8, cross_attention_dim=16, caption_channels=16),
        scheduler=DPMSolverMultistepScheduler(prediction_type="v_prediction"),  # random noise predictions would explode
    )


def _sana() -> Any:
    backbone = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    return SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=deep_compression_autoencoder(),
        transformer=backbone,
        scheduler=scheduler,
    )


def _z_image() -> Any:
    backbone = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[64, 16, 16],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_autoencoder(),
        text_encoder=None,
        tokenizer=None,
        transformer=backbone,
    )


def _z_image_prompt(seed: int) -> dict[str, Any]:
    return {"prompt_embeds": [draw(2 * seed, 7, 16)], "negative_prompt_embeds": [draw(2 * seed + 1, 5, 16)]}


def _chroma() -> Any:
    backbone = ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_autoencoder(),
        text_encoder=t5_encoder(32),
        tokenizer=tokenizer(),
        transformer=backbone,
    )


def _lumina2() -> Any:
    backbone = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 4, 4), axes_lens=(32, 8, 8), cap_feat_dim=16,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=backbone,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_autoencoder(levels=3),  # the pipeline takes it to divide by 8
        text_encoder=None,
        tokenizer=None,
    )


NAMED = ("cond", "uncond")
BATCHED = (None,)  # both guidance branches in one batch
UNNAMED = (None, None)
PICTURE = Image.new("RGB", (16, 16), (200, 40, 90))

SPECS = {
    "flux": Spec(
        lambda: _flux(FluxPipeline), text_prompt, SIZE | {"true_cfg_scale": 2.0, "max_sequence_length": 16}, NAMED
    ),
    "flux_img2img": Spec(
        lambda: _flux(FluxImg2ImgPipeline),
        text_prompt,
        SIZE | {"true_cfg_scale": 2.0, "max_sequence_length": 16, "image": PICTURE, "strength": 0.75},
        UNNAMED,
    ),
    "sd3": Spec(_sd3, lambda seed: embeddings(seed, 32, pooled=64), SIZE | {"guidance_scale": 2.0}, BATCHED),
    "qwenimage": Spec(_qwen, _qwen_prompt, SIZE, NAMED, recaptures=1),
    "qwenimage_edit": Spec(
        _qwen_edit, _qwen_prompt, {"image": PICTURE, "height": 256, "width": 256}, NAMED, recaptures=1
    ),
    "pixart_sigma": Spec(
        _pixart,
        text_prompt,
        SIZE
        | {
            "use_resolution_binning": False,
            "clean_caption": False,
            "num_inference_steps": 10,
            "max_sequence_length": 16,
        },
        BATCHED,
    ),
    "sana": Spec(
        _sana,
        lambda seed: embeddings(seed, 16, mask=torch.int64),
        {"height": 32, "width": 32, "use_resolution_binning": False, "negative_prompt": None},
        BATCHED,
    ),
    "chroma": Spec(_chroma, text_prompt, SIZE | {"max_sequence_length": 16}, UNNAMED),
    "z_image": Spec(_z_image, _z_image_prompt, SIZE, BATCHED, declined=DeclineReason.GRAPH_BREAK),
    "lumina2": Spec(
        _lumina2,
        lambda seed: embeddings(seed, 16, mask=torch.int64),
        {"height": 64, "width": 64},
        UNNAMED,
        declined=DeclineReason.GRAPH_BREAK,
    ),
}
