"""Typed refusals: why a graph was not rewritten, and what the user can do about it."""

from __future__ import annotations

import enum


class DeclineReason(enum.Enum):
    """Why a captured graph was left as it is. The value is the text shown to users; `remedy` is the way out."""

    NO_LATENTS = "no latents found"
    NO_TIMESTEP = "no timestep found"
    NO_REPEATED_BLOCKS = "no repeated blocks"
    SINGLE_BLOCK = "single blocks only"
    CHANGING_SHAPES = "blocks that change the shape of what they carry"
    NO_MODULATED_INPUT = "no modulated input found"
    NO_MATCHING_INPUT = "output of the block stack matches none of its inputs"
    LITTLE_TO_SKIP = "little to skip"
    VARYING_FLOAT = "python float that varies"
    STALE_OUTPUT = "a skipped step would not follow the latents"
    MUTATION_ACROSS_CUT = "in-place write across the cut"
    MODE_ACROSS_CUT = "context manager inside the graph"
    NO_SAMPLE_DIMENSION = "samples cannot decide for themselves"
    GRADIENTS_NEEDED = "gradients needed"
    GRAPH_BREAK = "graph break"
    VMAP = "vmap"
    UNKNOWN_STATE_SHAPE = "state shape unknown"
    NOT_A_MODEL = "not a model"
    ALREADY_REWRITTEN = "already rewritten"
    NOT_EXPORTABLE = "torch.export does not take the model"
    INTERNAL_ERROR = "an error within teacache_fx"

    @property
    def remedy(self) -> str:
        """What the user can change so that the graph is rewritten."""
        return _REMEDIES[self]


_REMEDIES = {
    DeclineReason.NO_LATENTS: "pass the latents as a floating-point tensor of the shape that the model returns",
    DeclineReason.NO_TIMESTEP: "pass the timestep as a tensor argument of the module that is compiled",
    DeclineReason.NO_REPEATED_BLOCKS: (
        "compile the whole transformer; two or more of its blocks must do the same operations on the latents, "
        "one behind the other"
    ),
    DeclineReason.SINGLE_BLOCK: (
        "compile the whole transformer (transformer.compile(backend=...)) instead of its blocks one by one "
        "(compile_repeated_blocks): the decision to skip spans all of them"
    ),
    DeclineReason.CHANGING_SHAPES: (
        "nothing to cache as one residual: TeaCache serves transformers, whose blocks keep the shape; "
        "run a U-Net as it is"
    ),
    DeclineReason.NO_MODULATED_INPUT: "the first block must apply a linear, conv or matmul to the latents' tokens",
    DeclineReason.NO_MATCHING_INPUT: (
        "the block stack must carry a tensor in and out with the same shape, so that a residual can be cached"
    ),
    DeclineReason.LITTLE_TO_SKIP: "nothing to cache: most of the model's work lies outside its repeated blocks",
    DeclineReason.VARYING_FLOAT: (
        "set torch._dynamo.config.specialize_float = True before compiling, or pass the number as a tensor"
    ),
    DeclineReason.STALE_OUTPUT: "nothing to cache: run such a model as it is",
    DeclineReason.MUTATION_ACROSS_CUT: "make the named in-place write functional (torch.cat, torch.where, out = x + y)",
    DeclineReason.MODE_ACROSS_CUT: "enter the context manager around the call of the model, not inside its forward",
    DeclineReason.NO_SAMPLE_DIMENSION: "set granularity='batch', which decides for the whole batch",
    DeclineReason.GRADIENTS_NEEDED: (
        "the cache serves inference: call the model under torch.no_grad() or torch.inference_mode(), "
        "or call model.requires_grad_(False)"
    ),
    DeclineReason.GRAPH_BREAK: (
        "TeaCacheBackend.enable or apply_teacache_hook, which set torch._dynamo.config.capture_scalar_outputs and "
        "capture_dynamic_output_shape_ops and see the whole call; or change the code at the break so that "
        "torch.compile(model, fullgraph=True) captures the model"
    ),
    DeclineReason.VMAP: "call the model on a batch instead of mapping it with torch.vmap",
    DeclineReason.UNKNOWN_STATE_SHAPE: "let the token count follow from the shapes of the inputs, not their values",
    DeclineReason.NOT_A_MODEL: "compile an nn.Module with parameters and call it with tensors",
    DeclineReason.ALREADY_REWRITTEN: "rewrite the original model once",
    DeclineReason.NOT_EXPORTABLE: "use torch.compile(model, backend=TeaCacheBackend(...)), which needs no export",
    DeclineReason.INTERNAL_ERROR: (
        "the model runs uncached; please report this, with what TORCH_LOGS='+teacache_fx' and on_decline='raise' print"
    ),
}


class Declined(Exception):  # noqa: N818 - a public name: declining is a normal result, not an error
    """A graph cannot be rewritten.

    Attributes:
        reason: the typed reason.
        detail: what was found in this graph.
        node: name of the graph node concerned, or `None`.
    """

    def __init__(self, reason: DeclineReason, detail: str, node: str | None = None) -> None:
        self.reason = reason
        self.detail = detail
        self.node = node
        super().__init__(reason, detail, node)

    def __str__(self) -> str:
        where = f" (node `{self.node}`)" if self.node else ""
        return f"{self.reason.value}: {self.detail}{where}. Way out: {self.reason.remedy}."


class TeaCacheWarning(UserWarning):
    """Category of every warning of this package, so that callers can filter them."""


class VerificationError(AssertionError):
    """Something does not compute what it must.

    Raised as such, a rewriting pass broke the contract of the graph: a bug of this package, never of the user's model,
    which is declined for it (INTERNAL_ERROR). `verify_export` raises its subclass `ExportError`, of programs that may
    have been made in any way.
    """
