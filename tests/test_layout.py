"""The shape of the code base: imports run one way, no model is named, private torch stays in its corner."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import teacache_fx

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("teacache_fx/*.py"), *ROOT.glob("passes/*.py")])

# Each module may import from the levels before its own. What a pass is made of lies below the passes.
LEVELS = (
    {"errors", "coefficients", "policy"},
    {"config", "contexts", "graph", "signature"},
    {"dataflow", "flops", "state", "render", "pin_operands"},
    {"plan", "compilers", "stats"},
    {"report", "passes.base"},
    {"passes.branches", "passes.modulation_patterns", "passes.pair_live_outputs", "passes.verify"},
    {"passes.follow_latents", "passes.memory_order"},
    {
        "passes.cleanup", "passes.find_block_stack", "passes.insert_cond", "passes.match_modulation",
        "passes.partition_graph",
    },
    {"passes"},
    {"rewrite"},
    {"runtime", "explain"},
    {"backend"},
    {""},
)  # fmt: skip


def _module(path: Path) -> str:
    stem = "" if path.stem == "__init__" else path.stem
    return ".".join(part for part in ("passes" if path.parent.name == "passes" else "", stem) if part)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_no_model_is_named(path: Path) -> None:
    name = re.search(r"\b\w+(Transformer[23]DModel|Transformer3D|DiTModel|TransformerBlock)\b", path.read_text("utf-8"))
    assert name is None, f"the matcher knows structure, not {name.group(0) if name else ''}"


def test_public_names() -> None:
    assert set(teacache_fx.__all__) == {
        "CacheStats", "DeclineReason", "Declined", "RewriteReport", "StepReason", "TeaCacheBackend", "TeaCacheConfig",
        "TeaCacheState", "TeaCacheWarning", "cache_context", "explain", "teacache_backend",
    }  # fmt: skip
    for name in teacache_fx.__all__:
        assert getattr(teacache_fx, name).__doc__
