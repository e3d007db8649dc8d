"""A second process finds what the first has compiled; a changed setting compiles anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = """
import json, sys, torch
from torch._dynamo.utils import counters
from teacache_fx import TeaCacheBackend
from tests import toys

model, inputs = toys.make(), toys.inputs()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(float(sys.argv[2]))
    backend = TeaCacheBackend(rel_l1_thresh=float(sys.argv[1]), coefficients=[1.0, 0.0], on_decline="raise")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results = [compiled(**inputs), compiled(**inputs)]
    expected = model(**inputs)
    error = max(float((result - expected).abs().max()) for result in results)
print(json.dumps({
    "aot": dict(counters["aot_autograd"]), "inductor": dict(counters["inductor"]),
    "error": error, "skipped": backend.stats().num_skipped,
}))
"""


def _run(cache: Path, thresh: float = 1e3, weights: float = 1.0) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(thresh), str(weights)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_caches(tmp_path: Path) -> None:
    cold, warm = _run(tmp_path), _run(tmp_path)
    assert cold["aot"].get("autograd_cache_bypass", 0) == 0
    assert cold["aot"]["autograd_cache_miss"] == 1
    assert cold["aot"]["autograd_cache_saved"] == 1
    assert warm["aot"]["autograd_cache_hit"] == 1
    assert warm["aot"].get("autograd_cache_miss", 0) == 0

    other_weights = _run(tmp_path, weights=0.5)
    assert other_weights["aot"]["autograd_cache_hit"] == 1
    other_thresh = _run(tmp_path, thresh=2e3)
    assert other_thresh["aot"]["autograd_cache_miss"] == 1
    for run in (cold, warm, other_weights, other_thresh):
        assert run["error"] < 1e-5
        assert run["skipped"] == 1
