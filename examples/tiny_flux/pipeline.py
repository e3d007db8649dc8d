"""Load the trained model as a diffusers `FluxPipeline`.

    pipe = load_pipeline()
    pictures = pipe(
        **pipe.encode(["a small red circle on a blue background at the top left"]),
        true_cfg_scale=2.0, num_inference_steps=50, height=32, width=32, output_type="np",
    ).images

The denoising loop is diffusers' own `FluxPipeline.__call__`. Only what surrounds it is small: text is read by
`TinyTextEncoder` before the call, and the autoencoder rearranges pixels and has no parameters.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# Type checkers see placeholder classes under the names that the top-level package exports.
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from .text_encoder import TinyTextEncoder, tokenize

WEIGHTS_DIR = Path(__file__).parent / "weights"
WEIGHTS_NAME = "tiny_flux.safetensors"
CONFIG_NAME = "config.json"
# What is decided late in a big photo is decided early here: a flat shape shows through strong noise. So more of the
# steps go to high noise, in training as in sampling.
TIMESTEP_SHIFT = 3.0

DEFAULT_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 48,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": [8, 12, 12],
}


class PixelShuffleAutoencoder(nn.Module):
    """Latents are the pixels themselves: [B, 3, 32, 32] <-> [B, 12, 16, 16], exactly invertible."""

    def __init__(self) -> None:
        """Carry the configuration that `FluxPipeline` reads."""
        super().__init__()
        # FluxPipeline takes the scale factor from the number of entries: two of them mean a factor of 2.
        self.config = SimpleNamespace(
            block_out_channels=(12, 12), latent_channels=12, scaling_factor=1.0, shift_factor=0.0
        )
        self.register_buffer("_where", torch.zeros(()), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the pipeline was moved to."""
        return self.get_buffer("_where").dtype

    @property
    def device(self) -> torch.device:
        """The device the pipeline was moved to."""
        return self.get_buffer("_where").device

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] to latents [B, 12, H/2, W/2], same dtype."""
        return pixel_unshuffle(pictures, 2)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Latents [B, 12, h, w] to pictures ([B, 3, 2h, 2w],), same dtype; always a tuple."""
        if return_dict:
            raise ValueError("PixelShuffleAutoencoder.decode returns a tuple; pass return_dict=False")
        return (pixel_shuffle(latents, 2),)


class TinyFlux(nn.Module):
    """The two trained parts together, so that one optimizer and one file hold both."""

    def __init__(self, config: dict[str, Any]) -> None:
        """`config` holds the arguments of `FluxTransformer2DModel`."""
        super().__init__()
        self.transformer = FluxTransformer2DModel(**config)
        self.text_encoder = TinyTextEncoder(config["joint_attention_dim"], config["pooled_projection_dim"])


class TinyFluxPipeline(FluxPipeline):  # type: ignore[misc]
    """`FluxPipeline` with a text encoder for the little vocabulary."""

    prompt_encoder: TinyTextEncoder

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings to splat into the pipeline call.

        `prompt_embeds` and `negative_prompt_embeds` are [B, 12, joint_dim]; `pooled_prompt_embeds` and
        `negative_pooled_prompt_embeds` are [B, pooled_dim]; all in the transformer's dtype. The negative ones belong
        to the empty prompt and take effect when `true_cfg_scale` is above 1.
        """
        encoded = {}
        for prefix, texts in (("", prompts), ("negative_", [""] * len(prompts))):
            tokens, pooled = self.prompt_encoder(tokenize(texts))
            encoded[f"{prefix}prompt_embeds"] = tokens.to(self.device, self.transformer.dtype)
            encoded[f"{prefix}pooled_prompt_embeds"] = pooled.to(self.device, self.transformer.dtype)
        return encoded


def build_pipeline(model: TinyFlux) -> TinyFluxPipeline:
    """A pipeline around `model`, which it shares and does not copy."""
    # FluxPipeline allows None for text parts when it is given embeddings, though its annotations do not say so.
    components: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=TIMESTEP_SHIFT),
        "vae": PixelShuffleAutoencoder(),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "transformer": model.transformer,
    }
    pipe = TinyFluxPipeline(**components)
    pipe.prompt_encoder = model.text_encoder
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_weights(model: TinyFlux, config: dict[str, Any], folder: Path) -> None:
    """Write the weights (float16, half the size) and the configuration into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def load_pipeline(weights: str | Path | None = None) -> TinyFluxPipeline:
    """The pipeline with trained weights in float32 on the CPU; `weights` is a folder, by default the shipped one."""
    folder = WEIGHTS_DIR if weights is None else Path(weights)
    model = TinyFlux(json.loads((folder / CONFIG_NAME).read_text()))
    state = {name: value.float() for name, value in load_file(folder / WEIGHTS_NAME).items()}
    model.load_state_dict(state)
    return build_pipeline(model.eval().requires_grad_(False))
