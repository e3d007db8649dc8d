"""The shape of the code base: imports run one way, no model is named, private torch stays in its corner."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import teacache_fx
from tests.zoo import ZOO

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("teacache_fx/*.py"), *ROOT.glob("passes/*.py")])

# Each module may import from the levels before its own. What a pass is made of lies below the passes.
LEVELS = (
    {
        "argument_names", "checks", "errors", "coefficients", "einsum", "forwards", "module_paths",
        "opaque", "own_inputs", "policy", "sizes", "snapshot_text",
    },
    {"advice", "call_layout", "contexts", "graph", "graph_diff", "signature", "trajectory"},
    {
        "capture", "config", "dataflow", "exported", "fixed_numbers", "flops", "fragments", "identity", "listener",
        "marks", "modes", "pin_operands", "plot", "segments", "size_names", "state_buffers",
    },
    {"costs", "compilers", "extractors", "regions", "render", "slices", "state", "whole_call"},
    {"canonical", "plan", "stats", "store"},
    {"flat_state", "folding", "report", "passes.base"},
    {
        "passes.block_lists", "passes.branches", "passes.input_roles", "passes.modulation_patterns",
        "passes.pair_live_outputs", "passes.verify",
    },
    {"passes.follow_latents", "passes.memory_order", "passes.repetition"},
    {
        "passes.cleanup", "passes.find_block_stack", "passes.insert_cond", "passes.match_modulation",
        "passes.partition_graph", "passes.read_extractor",
    },
    {"passes"},
    {"pipeline"},
    {"plan_text", "runtime", "explanation"},
    {"export_capture", "graph_backend"},
    {"hook", "rewritten_model"},
    {"backend", "export", "program_runners", "snapshot"},
    {"onnx_runner", "reference_steps", "select", "targets", "testing"},
    {"open_program", "verified_steps"},
    {"verification"},
    {"cli"},
    {""},
)  # fmt: skip


def _module(path: Path) -> str:
    stem = "" if path.stem == "__init__" else path.stem
    return ".".join(part for part in ("passes" if path.parent.name == "passes" else "", stem) if part)


def _is_for_annotations(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _imports(path: Path) -> set[str]:
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_annotations = {inner for node in ast.walk(tree) if _is_for_annotations(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in for_annotations:
            continue
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_run_one_way(path: Path) -> None:
    level = {module: i for i, modules in enumerate(LEVELS) for module in modules}
    for name in _imports(path):
        assert name.split(".")[0] != "passes", "its name is teacache_fx.passes"
        if name.startswith("teacache_fx"):
            imported = name.removeprefix("teacache_fx").removeprefix(".")
            assert level[imported] < level[_module(path)], f"{_module(path)} must not import {imported}"


def test_policy_imports_torch_alone() -> None:
    third_party = {name.split(".")[0] for name in _imports(ROOT / "teacache_fx" / "policy.py")}
    assert third_party - {"__future__", "enum", "collections", "dataclasses", "typing"} == {"torch"}


def _model_names() -> re.Pattern[str]:
    """Any name in the zoo, be it of an entry, a module or a class; ordinary words excepted."""
    ordinary = {"", "2d", "prior", "temporal", "dit", "transformer_2d", "Prior", "DiT"}
    snakes, prefixes = set(), set()
    for entry, description in ZOO.items():
        module, class_name = description["class"].split(".")[-2:]
        snakes |= {entry.split("+")[0], re.sub("^transformer_|_transformer(_[23]d)?$", "", module)}
        prefixes.add(re.sub("(Transformer|DiTModel|DiT2DModel|Decoder).*", "", class_name))
    snake, prefix = ("|".join(sorted(names - ordinary)) for names in (snakes, prefixes))
    of_any_model = r"\w+(?:Transformer[23]DModel|Transformer3D|DiTModel|TransformerBlock)"
    return re.compile(rf"(?<![A-Za-z0-9])(?:(?i:{snake})(?![A-Za-z0-9])|(?:{prefix})(?![a-z])|{of_any_model}\b)")


@pytest.mark.parametrize(
    "text", ["FLUX", "flux", "Wan", "hunyuan_video", "HunyuanDiT2DModel", "SanaBlock", "_z_image_"]
)
def test_names_of_models_are_recognised(text: str) -> None:
    assert _model_names().search(f"for {text}, say")


@pytest.mark.parametrize(
    "text", ["want", "DiT", "prior", "influx", "temporal", "sanatorium", "Transformer2DModelOutput"]
)
def test_other_words_are_not_taken_for_models(text: str) -> None:
    assert not _model_names().search(f"for {text}, say")


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_no_model_is_named(path: Path) -> None:
    name = _model_names().search(path.read_text("utf-8"))
    assert name is None, f"the matcher knows structure, not {name.group(0) if name else ''}"


def test_public_names() -> None:
    assert set(teacache_fx.__all__) == {
        "CacheContext", "CacheStats", "DeclineReason", "Declined", "RewriteReport", "StepReason", "TeaCacheBackend",
        "TeaCacheConfig", "TeaCacheHook", "TeaCacheState", "TeaCacheWarning", "apply_teacache_hook", "cache_context",
        "explain", "get_cache_backend", "register_extractor", "remove_teacache_hook", "rewrite", "session",
        "teacache_backend", "verify_export",
    }  # fmt: skip
    for name in teacache_fx.__all__:
        assert getattr(teacache_fx, name).__doc__
