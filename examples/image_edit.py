r"""Change a picture as a text says, with TeaCache or without.

    python -m examples.image_edit --prompt "a green circle on a white background"
    python -m examples.image_edit --image out/text_to_image.png --prompt "a purple ring on an orange background"
    python -m examples.image_edit --cache-backend tea_cache --strength 0.8
    python -m examples.image_edit --model Qwen/Qwen-Image-Edit --image fox.png --prompt "make it night" \
        --cache-backend tea_cache

Without --model the tiny FLUX of this repository edits, on the CPU and without a download, and draws itself a picture to
edit where none is given. It starts from the picture with noise on it (diffusers' image-to-image pipeline), as other
models do that take a --strength; models made for editing take instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

# Type checkers see placeholder classes under the names that the top-level package exports.
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
from PIL import Image
from torch import Tensor

from examples.generation import ZOOM, Job, chosen_cache, generate, loaded_job, loaded_pipeline, shipped_job
from examples.options import generation_parser, picture, strength_value
from examples.tiny_flux.pipeline import load_pipeline
from examples.tiny_flux.scenes import IMAGE_SIZE, Scene

DRAWN = Scene("square", "red", "white", "large", "top left")
PROMPT = "a large green circle on a white background at the top left"
STRENGTH = 0.6


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Read the command line."""
    parser = generation_parser("image_edit", "Change a picture as a text says, with TeaCache or without.", PROMPT)
    edit = parser.add_argument_group("edit")
    edit.add_argument(
        "--image", type=picture, metavar="FILE", help=f"picture to edit (needed with --model; default: {DRAWN.prompt})"
    )
    edit.add_argument(
        "--strength",
        type=strength_value,
        metavar="S",
        help=f"noise on the picture, up to 1 (default: {STRENGTH} for the tiny FLUX, else the pipeline's)",
    )
    return parser.parse_args(arguments), parser


def drawn_picture(output: Path) -> Image.Image:
    """A picture to edit, also written beside the output."""
    pixels = ((DRAWN.draw().permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    path = output.with_name(f"{output.stem}_input.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((ZOOM * image.width, ZOOM * image.height), Image.Resampling.NEAREST).save(path)
    print(f"{path}: {DRAWN.prompt}")
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """A picture of any size as the tiny model takes it: float32 [1, 3, 32, 32] in [-1, 1]."""
    pixels = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


def shipped_edit(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Job:
    """A job for the tiny model, in diffusers' pipeline made of the same parts."""
    encoder = load_pipeline()
    pipe = FluxImg2ImgPipeline(**encoder.components)
    pipe.set_progress_bar_config(disable=True)
    job = shipped_job(pipe, encoder, PROMPT if args.prompt is None else args.prompt, args, parser)
    image = drawn_picture(args.output) if args.image is None else args.image
    # Latents are taken as they are; the pipeline's own encoding expects the autoencoder of a full-size Flux.
    extra = {"image": pipe.vae.encode(to_tensor(image)), "strength": args.strength or STRENGTH}
    return dataclasses.replace(job, arguments=job.arguments | extra)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args, parser = parse(arguments)
    backend = chosen_cache(args, parser)
    if args.model is None:
        job = shipped_edit(args, parser)
    else:
        if args.image is None:
            parser.error("--model needs an --image")
        extra = {"image": args.image, "strength": args.strength}
        job = loaded_job(loaded_pipeline("AutoPipelineForImage2Image", args, parser), extra, args, parser)
    generate(job, backend, args, parser)


if __name__ == "__main__":
    main()
