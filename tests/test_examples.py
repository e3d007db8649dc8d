"""The two examples, small: what they draw and print, how the cache is chosen, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from examples import image_edit, text_to_image
from examples.generation import chosen_cache, loaded_job
from examples.options import generation_parser
from examples.tiny_flux.checker import read_picture
from examples.tiny_flux.scenes import IMAGE_SIZE
from teacache_fx import TeaCacheBackend, TeaCacheConfig, TeaCacheWarning

STEPS = 20  # fewer than that bring a warning
EXAMPLES = pytest.mark.parametrize("example", [text_to_image, image_edit], ids=["text_to_image", "image_edit"])


@pytest.fixture(autouse=True)
def _no_cache_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFUSION_CACHE_BACKEND", raising=False)


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., NDArray[np.float32]]:
    """Runs an example and returns its picture, float32 [32, 32, 3] in [0, 1]."""

    def run(example: Any, *arguments: str) -> NDArray[np.float32]:
        path = tmp_path / "new" / "picture.png"
        steps = ["--num-inference-steps", str(STEPS if example is text_to_image else STEPS * 2)]
        example.main([*steps, "--inner", "eager", "--output", str(path), *arguments])
        with Image.open(path) as image:
            assert image.size == (256, 256)
            return np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), np.float32) / np.float32(
                255
            )

    return run


@pytest.mark.parametrize("cache_backend", ["none", "tea_cache"])
def test_text_to_image(draw: Any, cache_backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a small yellow ring on a purple background at the bottom right"
    reading = read_picture(draw(text_to_image, "--prompt", prompt, "--cache-backend", cache_backend))
    found = (reading.size, reading.colour, reading.shape, reading.background, reading.position)
    assert found == ("small", "yellow", "ring", "purple", "bottom right")
    out = capsys.readouterr().out
    assert f"{STEPS} steps in " in out
    assert ("steps skipped" in out) == (cache_backend == "tea_cache")


@pytest.mark.parametrize("cache_backend", ["none", "tea_cache"])
def test_image_edit(draw: Any, cache_backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading = read_picture(draw(image_edit, "--cache-backend", cache_backend))
    assert (reading.colour, reading.shape, reading.position) == ("green", "circle", "top left")
    out = capsys.readouterr().out
    assert f"{round(2 * STEPS * image_edit.STRENGTH)} steps in " in out
    assert ("steps skipped" in out) == (cache_backend == "tea_cache")
    assert (tmp_path / "new" / "picture_input.png").exists()


def test_edited_picture_is_the_one_given(draw: Any, tmp_path: Path) -> None:
    image_edit.drawn_picture(tmp_path / "drawn.png")
    given = str(tmp_path / "drawn_input.png")
    Image.new("RGB", (300, 200), "white").save(tmp_path / "white.png")
    few = ("--strength", "0.5")
    drawn = draw(image_edit, *few)
    assert np.array_equal(draw(image_edit, *few, "--image", given), drawn)
    assert not np.array_equal(draw(image_edit, *few, "--image", str(tmp_path / "white.png")), drawn)


@EXAMPLES
def test_tiny_threshold_changes_nothing(example: Any, draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = draw(example)
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "tea_cache")
    with pytest.warns(TeaCacheWarning, match="not one of 2. steps was skipped"):
        assert np.array_equal(draw(example, "--tea-cache-rel-l1-thresh", "1e-9"), plain)
    assert not np.array_equal(draw(example, "--cache-config", '{"rel_l1_thresh": 1e6}'), plain)


def test_choice_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = generation_parser("text_to_image", "", "")

    def choice(*arguments: str) -> TeaCacheBackend | None:
        return chosen_cache(parser.parse_args(arguments), parser)

    assert choice() is None
    chosen = choice("--cache-backend", "tea_cache", "--inner", "eager", "--cache-config", '{"num_warmup_steps": 2}')
    assert chosen is not None
    assert chosen.config == TeaCacheConfig(0.1, coefficients=(1.0, 0.0), num_warmup_steps=2)
    assert chosen.inner == "eager"
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "tea_cache")
    assert choice("--cache-backend", "none") is None
    loaded = choice("--model", "org/model", "--tea-cache-rel-l1-thresh", "0.4")
    assert loaded is not None
    assert loaded.config == TeaCacheConfig(0.4)  # the tiny model's settings are its own


class Pipeline:
    """Takes guidance as the pipelines of FLUX and QwenImage do: under one name or the other, by the model."""

    def __init__(self, guidance_embeds: bool) -> None:
        self.transformer = SimpleNamespace(config={"guidance_embeds": guidance_embeds})

    def __call__(
        self,
        prompt: str,
        negative_prompt: str,
        true_cfg_scale: float,
        guidance_scale: float,
        num_inference_steps: int = 7,
    ) -> None:
        raise NotImplementedError


def test_arguments_of_loaded_pipelines(capsys: pytest.CaptureFixture[str]) -> None:
    parser = generation_parser("text_to_image", "", "")
    args = parser.parse_args(["--model", "org/model", "--prompt", "a fox", "--guidance-scale", "3"])
    job = loaded_job(Pipeline(guidance_embeds=False), {"image": None}, args, parser)
    assert (job.steps, job.steps_taken) == (7, 7)
    assert job.arguments == {"prompt": "a fox", "true_cfg_scale": 3, "negative_prompt": " "}
    assert loaded_job(Pipeline(True), {}, args, parser).arguments == {"prompt": "a fox", "guidance_scale": 3}
    with pytest.raises(SystemExit):
        loaded_job(Pipeline(True), {"strength": 0.5}, args, parser)
    assert "Pipeline takes no --strength" in capsys.readouterr().err
    args.negative_prompt = "blurry"
    with pytest.raises(SystemExit):
        loaded_job(Pipeline(True), {}, args, parser)
    assert "has learned its guidance; leave --negative-prompt out" in capsys.readouterr().err


def test_what_is_printed_on_demand(draw: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plots" / "plot.png"
    config = ("--cache-config", '{"max_consecutive_skips": 1}', "--tea-cache-rel-l1-thresh", "1e6")
    draw(text_to_image, "--cache-backend", "tea_cache", *config, "--report", "--stats", "--plot", str(plot))
    out = capsys.readouterr().out
    assert f"TeaCache: {STEPS} of {2 * STEPS} steps skipped (50%)" in out  # without the step that compiled
    assert out.count("computed (max consecutive skips)") == STEPS - 2
    assert "transformer_blocks: 2 x" in out
    with Image.open(plot) as image:
        assert min(image.size) > 200


def test_options_of_the_shipped_model(draw: Any) -> None:
    plain = draw(text_to_image, "--guidance-scale", "3")
    assert not np.array_equal(draw(text_to_image, "--guidance-scale", "1"), plain)
    assert not np.array_equal(draw(text_to_image, "--guidance-scale", "3", "--negative-prompt", "a red ring"), plain)


TEA_CACHE = ["--cache-backend", "tea_cache"]


@EXAMPLES
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a red dog"], "unknown word 'dog' in 'a red dog'; the known words are a, an,"),
        (["--negative-prompt", "blurry"], "unknown word 'blurry'"),
        (["--tea-cache-rel-l1-thresh", "0", *TEA_CACHE], "must be greater than 0 and finite, got 0"),
        (["--tea-cache-rel-l1-thresh", "0.2"], "no effect without the cache; add --cache-backend tea_cache"),
        (["--stats"], "--stats has no effect without the cache"),
        (["--cache-config", "{rel_l1_thresh: 1}", *TEA_CACHE], "is no JSON (Expecting property name"),
        (["--cache-config", "[1]", *TEA_CACHE], "must be a JSON object like '{\"rel_l1_thresh\": 0.2}', got '[1]'"),
        (["--cache-config", '{"thresh": 1}', *TEA_CACHE], "unknown option 'thresh'; valid are rel_l1_thresh"),
        (["--cache-config", '{"rel_l1_thresh": -1}', *TEA_CACHE], "rel_l1_thresh must be greater than 0, got -1"),
        (
            ["--cache-config", '{"rel_l1_thresh": 1}', "--tea-cache-rel-l1-thresh", "1", *TEA_CACHE],
            "give the threshold in --tea-cache-rel-l1-thresh or in --cache-config, not in both",
        ),
        (["--cache-backend", "teacache"], "invalid choice: 'teacache'"),
        (["--num-inference-steps", "0"], "must be at least 1, got 0"),
        (["--guidance-scale", "much"], "must be a number, got 'much'"),
        (["--output", "picture.txt"], "must end in one of .png"),
        (["--model", "org/model"], "error: --model needs a"),
    ],
)
def test_bad_input_is_named(
    example: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as exit_:
        example.main(["--output", str(tmp_path / "picture.png"), *arguments])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert len(lines) <= 2  # the usage and the error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "argument --image: there is no file nowhere.png"),
        (["--image", __file__], "as a picture: cannot identify image file"),
        (["--image", "."], "argument --image: cannot read . as a picture"),
        (["--strength", "0"], "argument --strength: must be greater than 0 and at most 1, got 0"),
        (["--strength", "nan"], "argument --strength: must be greater than 0 and at most 1, got nan"),
        (["--model", ".", "--prompt", "a fox"], "--model needs an --image"),
    ],
)
def test_bad_pictures_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        image_edit.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_folder_without_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        text_to_image.main(["--model", str(tmp_path), "--prompt", "a fox"])
    assert exit_.value.code == 2
    assert "which must be a diffusers pipeline: Error no file named model_index.json" in capsys.readouterr().err


def test_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DIFFUSION_CACHE_BACKEND", "dbcache")
    with pytest.raises(SystemExit):
        text_to_image.main([])
    assert "DIFFUSION_CACHE_BACKEND must be 'tea_cache' or 'none', got 'dbcache'" in capsys.readouterr().err
