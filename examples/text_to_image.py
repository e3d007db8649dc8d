"""Draw what a text says, with TeaCache or without.

    python -m examples.text_to_image --prompt "a small red ring on a white background at the top left"
    python -m examples.text_to_image --cache-backend tea_cache
    DIFFUSION_CACHE_BACKEND=tea_cache python -m examples.text_to_image --tea-cache-rel-l1-thresh 0.2 --stats
    python -m examples.text_to_image --model Qwen/Qwen-Image --prompt "a fox on snow" --cache-backend tea_cache

Without --model the tiny FLUX of this repository draws, on the CPU and without a download; it knows a few words, which
it lists when it is given another one.
"""

from __future__ import annotations

from collections.abc import Sequence

from examples.generation import chosen_cache, generate, loaded_job, loaded_pipeline, shipped_job
from examples.options import generation_parser
from examples.tiny_flux.pipeline import load_pipeline

PROMPT = "a red circle on a blue background"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = generation_parser("text_to_image", "Draw what a text says, with TeaCache or without.", PROMPT)
    args = parser.parse_args(arguments)
    backend = chosen_cache(args, parser)
    if args.model is None:
        pipe = load_pipeline()
        job = shipped_job(pipe, pipe, PROMPT if args.prompt is None else args.prompt, args, parser)
    else:
        job = loaded_job(loaded_pipeline("AutoPipelineForText2Image", args, parser), {}, args, parser)
    generate(job, backend, args, parser)


if __name__ == "__main__":
    main()
