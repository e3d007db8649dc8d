"""The pipeline of passes, in the order in which they run.

Analysis finds facts and freezes them in a plan; rewriting reads the plan and edits a working copy. Between passes an
observer logs, times and verifies (see `teacache_fx.pipeline`).
"""

from teacache_fx.passes.base import Pass, PassContext
from teacache_fx.passes.cleanup import Cleanup
from teacache_fx.passes.find_block_stack import FindBlockStack
from teacache_fx.passes.insert_cond import InsertCond
from teacache_fx.passes.match_modulation import MatchModulation
from teacache_fx.passes.partition_graph import PartitionGraph
from teacache_fx.passes.read_extractor import ReadExtractor

ANALYSIS: tuple[Pass, ...] = (
    ReadExtractor(),  # first: what the user has said need not be found
    FindBlockStack(),  # before all else, which asks where the blocks are
    MatchModulation(),  # needs the region of the stack
    PartitionGraph(),  # needs the indicator: what it takes must stay outside the branch
)
REWRITING: tuple[Pass, ...] = (
    InsertCond(),
    Cleanup(),  # the blocks' nodes are dead only once the cond stands
)
PIPELINE: tuple[Pass, ...] = (*ANALYSIS, *REWRITING)

__all__ = [
    "ANALYSIS",
    "PIPELINE",
    "REWRITING",
    "Cleanup",
    "FindBlockStack",
    "InsertCond",
    "MatchModulation",
    "PartitionGraph",
    "Pass",
    "PassContext",
    "ReadExtractor",
]
