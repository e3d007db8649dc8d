"""What dynamo knows of a capture while it calls the backend. Its private API stands here and in `graph.py`.

Tried on torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._guards import TracingContext

from teacache_fx.graph import tensor_of

_RESUMED = "torch_dynamo_resume_in_"  # how dynamo names the code that goes on behind a graph break


@dataclass(frozen=True)
class GraphBreak:
    """Where and why dynamo could not go on.

    Attributes:
        place: file and line, and the code that stands there.
        cause: dynamo's own words, the first line of them.
        frames: file and line of each call on the way there, the innermost last.
    """

    place: str
    cause: str
    frames: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"the capture broke at {self.place}: {self.cause}"


@dataclass(frozen=True)
class CaptureSite:
    """Where in the user's code a graph comes from.

    Attributes:
        root: the module whose forward is being compiled, or `None` for a plain function.
        is_resumed: the graph begins behind a graph break: inputs of the model are missing from it.
        graph_break: what ended the graph, or `None` if it reaches to the end of the forward.
    """

    root: nn.Module | None = None
    is_resumed: bool = False
    graph_break: GraphBreak | None = None

    @property
    def is_part(self) -> bool:
        """Whether the graph is only a part of the forward."""
        return self.is_resumed or self.graph_break is not None


def capture_site() -> CaptureSite:
    """Inside a dynamo backend: where the graph comes from; an empty one elsewhere."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
        scope, code = translator.output.local_scope, translator.f_code
    except (AttributeError, LookupError):  # not called by dynamo
        return CaptureSite()
    candidates = (scope.get("self"), scope.get("module"))  # the latter in accelerate's and diffusers' wrappers
    root = next((root for root in candidates if isinstance(root, nn.Module)), None)
    reason = getattr(translator.output, "compile_subgraph_reason", None)
    return CaptureSite(root, code.co_name.startswith(_RESUMED), _graph_break(reason))


def _graph_break(reason: Any) -> GraphBreak | None:
    if reason is None or not reason.graph_break:
        return None
    frame = reason.user_stack[-1] if reason.user_stack else None
    path = "/".join(frame.filename.replace("\\", "/").split("/")[-2:]) if frame else "unknown"
    place = f"{path}:{frame.lineno} `{(frame.line or '').strip()}`" if frame else path
    frames = tuple((frame.filename, frame.lineno or 0) for frame in reason.user_stack)
    return GraphBreak(place, str(reason.reason).strip().split("\n")[0], frames)


def state_examples(gm: fx.GraphModule, num_inputs: int) -> list[torch.Tensor]:
    """Example inputs for the placeholders behind the first `num_inputs`, in the fake mode that dynamo gives backends.

    The graph's own fake values live in the mode of the capture, which AOTAutograd would not mix with the backend's.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    fakes = [tensor_of(node) for node in placeholders[num_inputs:]]
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return fakes
    with context.fake_mode:
        return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in fakes]
