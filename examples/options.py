"""The command lines of the examples: options that they share, and values that are checked before any work begins."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def at_least_one(text: str) -> int:
    """An integer option."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def threshold_value(text: str) -> float:
    """A threshold."""
    return _number(text, lambda number: 0 < number < math.inf, "greater than 0 and finite")


def strength_value(text: str) -> float:
    """How far a picture is noised before it is edited."""
    return _number(text, lambda number: 0 < number <= 1, "greater than 0 and at most 1")


def scale_value(text: str) -> float:
    """A guidance scale."""
    return _number(text, lambda number: 0 <= number < math.inf, "at least 0 and finite")


def _number(text: str, is_valid: Callable[[float], bool], valid: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not is_valid(number):
        raise argparse.ArgumentTypeError(f"must be {valid}, got {text}")
    return number


def json_object(text: str) -> dict[str, Any]:
    """Settings of the cache."""
    wanted = "must be a JSON object like '{\"rel_l1_thresh\": 0.2}'"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{wanted}; {text!r} is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}")
    return value


def picture(text: str) -> Image.Image:
    """The picture in that file, in RGB and upright."""
    try:
        with Image.open(text) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"there is no file {text}") from None
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text} as a picture: {error}") from None


def picture_path(text: str) -> Path:
    """A file to write, in a format that both pillow and matplotlib know."""
    path = Path(text)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(PICTURE_SUFFIXES)}, got {text}")
    return path


def generation_parser(name: str, description: str, prompt: str) -> argparse.ArgumentParser:
    """The options that both examples have.

    Args:
        name: of the example's module.
        description: one line for `--help`.
        prompt: what the shipped model is asked for by default.
    """
    prog = f"python -m examples.{name}"
    # A short usage: with all options it would bury the one line that says what is wrong.
    parser = argparse.ArgumentParser(prog=prog, usage=f"{prog} [options]; --help lists them", description=description)
    model = parser.add_argument_group("model and picture")
    model.add_argument(
        "--model", help="diffusers pipeline: a hub id or a folder (default: the tiny FLUX of this repository)"
    )
    model.add_argument("--prompt", help=f"what to show (needed with --model; default: {prompt!r})")
    model.add_argument("--negative-prompt", metavar="PROMPT", help="what not to show")
    model.add_argument("--guidance-scale", type=scale_value, metavar="S", help="how closely to follow the prompt")
    model.add_argument(
        "--num-inference-steps",
        type=at_least_one,
        metavar="N",
        help="default: 50 for the tiny FLUX, else the pipeline's",
    )
    model.add_argument("--seed", type=int, default=0, metavar="N", help="decides the noise (default: %(default)s)")
    output = Path("out") / f"{name}.png"
    model.add_argument(
        "--output", type=picture_path, default=output, metavar="FILE", help="file to write (default: %(default)s)"
    )
    _add_cache_options(parser)
    return parser


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    cache = parser.add_argument_group("cache")
    cache.add_argument(
        "--cache-backend",
        choices=("tea_cache", "none"),
        help="default: what the environment variable DIFFUSION_CACHE_BACKEND says, or none",
    )
    cache.add_argument(
        "--cache-config",
        type=json_object,
        metavar="JSON",
        help="fields of TeaCacheConfig: '{\"max_consecutive_skips\": 4}'",
    )
    cache.add_argument(
        "--tea-cache-rel-l1-thresh",
        type=threshold_value,
        metavar="T",
        help="higher is faster and less exact (default: 0.1 for the tiny FLUX, else 0.2)",
    )
    cache.add_argument(
        "--inner",
        choices=("inductor", "aot_eager", "eager"),
        default="inductor",
        help="compiler, with the cache and without (default: %(default)s)",
    )
    cache.add_argument("--report", action="store_true", help="print what was found in the model")
    cache.add_argument("--stats", action="store_true", help="print what happened at each step")
    cache.add_argument("--plot", type=picture_path, metavar="FILE", help="draw what happened at each step")
