"""What the fixtures' clouds serve."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import CloudProcess
from tests.integration.raw_edge import RawEdge

TINY_PLANS = (
    '{"name": "r8", "r_c2d": 8, "r_d2c": 8}',
    '{"name": "fused", "r_c2d": 5, "r_d2c": 9, "layout": "fused", "layers": [1, 3]}',
)
WIDE = {"hidden_size": 1024, "num_hidden_layers": 1, "head_dim": 8, "num_attention_heads": 1}
BLOCK_TOKENS = 32  # stated here anew: a test that imported it would not notice a change
WIDE_BLOCK_BYTES = 2 * 8 * 4 * BLOCK_TOKENS  # k and v of one layer, one head of 8, float32
WIDE_BLOCKS = 128
WIDE_WAIT_S = 6  # who does not fit waits so long: a test that looks for somebody who waits must find it


@dataclass(frozen=True)
class Served:
    """A cloud process and what it serves."""

    process: CloudProcess
    folder: Path
    cache_dir: Path

    @property
    def address(self) -> str:
        return self.process.address

    def raw(self) -> RawEdge:
        """Return a channel for hand-made messages."""
        return RawEdge(self.address)
