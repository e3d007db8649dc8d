"""Makes one picture with a diffusers pipeline, with TeaCache or without, and says how long it took."""

from __future__ import annotations

import argparse
import inspect
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from examples.tiny_flux.pipeline import TinyFluxPipeline
from examples.tiny_flux.scenes import IMAGE_SIZE
from teacache_fx import CacheStats, TeaCacheBackend, get_cache_backend

# The polynomial published for FLUX.1-dev does not fit the tiny model, so the distance is left as it is (the identity,
# highest power first). The threshold was chosen by looking at results: above it, pictures begin to differ.
SHIPPED_CONFIG: dict[str, Any] = {"rel_l1_thresh": 0.1, "coefficients": [1.0, 0.0]}
SHIPPED_STEPS = 50
SHIPPED_GUIDANCE = 2.0
ZOOM = 8  # the tiny model's pictures are too small to look at


@dataclass(frozen=True)
class Job:
    """A pipeline, and what it is called with.

    Attributes:
        pipe: a diffusers pipeline.
        arguments: of its call, beside the number of steps and the noise.
        steps: `num_inference_steps`.
        zoom: each pixel is enlarged to a square of so many.
    """

    pipe: Any
    arguments: dict[str, Any]
    steps: int
    zoom: int = 1

    @property
    def steps_taken(self) -> int:
        """A pipeline that starts from a noised picture leaves out the first steps."""
        strength = self.arguments.get("strength", 1.0)
        return self.steps - int(max(self.steps - min(self.steps * strength, self.steps), 0))

    def picture(self, steps: int, seed: int) -> Image.Image:
        """Calls the pipeline."""
        generator = torch.Generator().manual_seed(seed)
        output = self.pipe(**self.arguments, num_inference_steps=steps, generator=generator)
        if not hasattr(output, "images"):
            raise SystemExit(f"{type(self.pipe).__name__} makes no pictures; name another --model")
        image: Image.Image = output.images[0]
        return image.resize((image.width * self.zoom, image.height * self.zoom), Image.Resampling.NEAREST)


def shipped_job(
    pipe: Any, encoder: TinyFluxPipeline, prompt: str, args: argparse.Namespace, parser: argparse.ArgumentParser
) -> Job:
    """A job for the tiny model.

    Args:
        pipe: the pipeline to call.
        encoder: the pipeline that reads the prompts.
        prompt: what to show.
        args: the command line.
        parser: says what is wrong with it.
    """
    try:
        embeddings, negative = (encoder.encode([text]) for text in (prompt, args.negative_prompt or ""))
    except ValueError as error:  # a word that the tiny model does not know
        parser.error(str(error))
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        embeddings[f"negative_{name}"] = negative[name]
    guidance = SHIPPED_GUIDANCE if args.guidance_scale is None else args.guidance_scale
    arguments = {**embeddings, "true_cfg_scale": guidance, "height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return Job(pipe, arguments, args.num_inference_steps or SHIPPED_STEPS, ZOOM)


def loaded_pipeline(kind: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> Any:
    """A pipeline from the hub or a folder: bfloat16 on a GPU, float32 without one.

    Args:
        kind: name of the class of diffusers that chooses the pipeline's class by the task.
        args: the command line, which names the model.
        parser: says what is wrong with it.
    """
    if not args.prompt:
        parser.error("--model needs a --prompt")
    import diffusers  # slow, since it looks for all that might be installed; the tiny model does not need it

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # its new name is not in every release
            try:
                pipe = getattr(diffusers, kind).from_pretrained(args.model, torch_dtype=dtype)
            except ValueError:  # no class of the model is listed for this task
                pipe = diffusers.DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
    except (ImportError, OSError, ValueError) as error:
        parser.error(f"cannot load --model {args.model}, which must be a diffusers pipeline: {_first_line(error)}")
    return pipe.to("cuda") if on_gpu else pipe


def loaded_job(pipe: Any, extra: dict[str, Any], args: argparse.Namespace, parser: argparse.ArgumentParser) -> Job:
    """A job for a pipeline from the hub or a folder.

    Args:
        pipe: the pipeline.
        extra: arguments of its call that only one of the examples has; `None` for not given.
        args: the command line.
        parser: says what is wrong with it.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    arguments = {name: value for name, value in extra.items() if value is not None}
    arguments |= _guidance(pipe, set(accepted), args, parser)
    if unknown := [name for name in arguments if name not in accepted]:
        parser.error(
            f"{type(pipe).__name__} takes no --{unknown[0].replace('_', '-')}; leave it out, or name another --model"
        )
    if "strength" in accepted:
        arguments.setdefault("strength", accepted["strength"].default)
    steps = args.num_inference_steps or accepted["num_inference_steps"].default
    return Job(pipe, {"prompt": args.prompt, **arguments}, steps)


def _guidance(
    pipe: Any, accepted: set[str], args: argparse.Namespace, parser: argparse.ArgumentParser
) -> dict[str, Any]:
    """A distilled model has learned its guidance; any other is called twice a step. Arguments of both kinds occur."""
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    is_distilled = config.get("guidance_embeds", False)
    in_two_calls = "true_cfg_scale" in accepted and not is_distilled
    negative = args.negative_prompt
    if is_distilled and negative is not None:
        parser.error(f"{type(pipe).__name__} with this model has learned its guidance; leave --negative-prompt out")
    if in_two_calls and negative is None:
        negative = " "  # without a negative prompt these pipelines leave the guidance out
    scale_name = "true_cfg_scale" if in_two_calls else "guidance_scale"
    arguments = {scale_name: args.guidance_scale, "negative_prompt": negative}
    return {name: value for name, value in arguments.items() if value is not None}


def chosen_cache(args: argparse.Namespace, parser: argparse.ArgumentParser) -> TeaCacheBackend | None:
    """The cache that the command line or the environment asks for; to be called before the work, for its errors."""
    config: dict[str, Any] = args.cache_config or {}
    if args.tea_cache_rel_l1_thresh is not None:
        if "rel_l1_thresh" in config:
            parser.error("give the threshold in --tea-cache-rel-l1-thresh or in --cache-config, not in both")
        config = config | {"rel_l1_thresh": args.tea_cache_rel_l1_thresh}
    if args.model is None:
        config = SHIPPED_CONFIG | config
    try:
        backend = get_cache_backend(args.cache_backend, config, inner=args.inner)
    except (TypeError, ValueError) as error:
        parser.error(_first_line(error))
    needs_cache = ("cache_config", "tea_cache_rel_l1_thresh", "report", "stats", "plot")
    if backend is None and (given := [name for name in needs_cache if getattr(args, name)]):
        option = given[0].replace("_", "-")
        parser.error(f"--{option} has no effect without the cache; add --cache-backend tea_cache, or leave it out")
    return backend


def generate(
    job: Job, backend: TeaCacheBackend | None, args: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    """Makes the picture, writes it, and prints how long it took and what the cache did."""
    try:
        for path in filter(None, (args.output, args.plot)):
            path.parent.mkdir(parents=True, exist_ok=True)
        if backend is None:
            _compile(job.pipe, args.inner)
        else:
            backend.enable(job.pipe)
            backend.refresh(job.pipe, job.steps_taken, verbose=False)
    except (OSError, TypeError) as error:  # a folder that cannot be made, a pipeline without a transformer
        parser.error(_first_line(error))
    print(f"compiling with {args.inner} ...", flush=True)
    started = time.perf_counter()
    job.picture(1, args.seed)  # compiles, outside of what is timed
    print(f"compiled in {time.perf_counter() - started:.1f} s")
    if backend is not None:
        backend.reset_state()
        backend.reset_stats()
    started = time.perf_counter()
    picture = job.picture(job.steps, args.seed)
    seconds = time.perf_counter() - started
    picture.save(args.output)
    print(f"{job.steps_taken} steps in {seconds:.2f} s: {args.output}")
    if backend is not None:
        _print_cache(backend, backend.stats(), args)


def _compile(pipe: Any, inner: str) -> None:
    for name in ("transformer", "transformer_2"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).compile(backend=inner)


def _print_cache(backend: TeaCacheBackend, stats: CacheStats, args: argparse.Namespace) -> None:
    print(stats if args.stats else _first_line(stats))
    if args.report:
        print(*backend.reports[:1])
    if args.plot is not None and not stats.contexts:
        print(f"{args.plot} is not written: no step has run with TeaCache")
    elif args.plot is not None:
        stats.plot().savefig(args.plot)
        print(args.plot)


def _first_line(value: object) -> str:
    return (str(value).strip() or type(value).__name__).splitlines()[0]
