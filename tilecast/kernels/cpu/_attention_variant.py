"""What the generated attention depends on: its variant and the words of its argument block."""

from __future__ import annotations

from dataclasses import dataclass

from tilecast.kernels.cpu._micro import Micro

VALUE_CHAIN = 256
"""Keys of one accumulation chain of the values' weighted sum; the chains' sums are added in ascending order."""

ENTRY = "tilecast_attention"

ARGS = (
    # a counter that the threads share, and one that numbers them
    "job", "thread",
    # operands; first and stop: int32 [B, 1 or H, Tq]; mask: bytes, bias: float32, both [B, 1 or H, Tq, Tk]
    "query", "key", "value", "out", "first", "stop", "mask", "bias", "sinks",
    # strides in bytes over sequences, heads and tokens
    "query_b", "query_h", "query_t", "key_b", "key_h", "key_t", "value_b", "value_h", "value_t",
    "out_b", "out_h", "out_t", "range_b", "range_h", "mask_b", "mask_h", "mask_t", "bias_b", "bias_h", "bias_t",
    # sizes; block: queries of one job; pitch: floats of one row of scores
    "batch", "heads", "groups", "queries", "depth", "width", "block", "pitch",
    # float32 bits
    "scale", "softcap",
    # scratch of one thread, and byte offsets of its parts
    "scratch", "scratch_stride", "at_pointers", "at_staged", "at_queries", "at_scores", "at_sums", "at_rows",
)  # fmt: skip
"""The 64-bit words of the argument block, in order."""

POINTERS = frozenset({"query", "key", "value", "out", "first", "stop", "mask", "bias", "sinks", "scratch"})


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Everything that the generated code depends on. mr rows and key_vectors or value_vectors are held in registers."""

    dtype: str
    mask: bool
    bias: bool
    sinks: bool
    softcap: bool
    mr: int
    key_vectors: int
    value_vectors: int
    lanes: int
    fma: bool

    @property
    def keys(self) -> int:
        """Keys of one panel of scores."""
        return self.key_vectors * self.lanes

    @property
    def micro(self) -> Micro:
        """The micro-kernel of the scores."""
        return Micro(nv=self.key_vectors, unroll=2, source="f32", panel=self.keys, lanes=self.lanes)
