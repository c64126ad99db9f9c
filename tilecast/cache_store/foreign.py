"""Files that are not ours, told by their first bytes, so that a refusal can say what they are and where they go."""

from __future__ import annotations

import re
import struct

SAMPLE_BYTES = 4096
"""How much of a file is looked at."""

TURBOMIND = (
    "its entries name kernels that are compiled into TurboMind and say nothing about Tilecast's; "
    "tune with `tilecast tune` instead"
)
TURBOMIND_MAGIC = b"TMGEMM"
TURBOMIND_NUMBERS = range(24, 65)
"""How many integers its text of 2024 has in a line, over the versions of its problem and kernel descriptions."""
TURBOMIND_ARCHITECTURES = frozenset({70, 72, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120})
"""The number that a raw record starts with, alone or times ten."""
RAW_INTEGERS = 24
"""A raw record has more; all are sizes, counts or small enumerators."""

STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\x80\x02", "is a pickle, which is never loaded since loading one runs what it holds"),
    (b"\x80\x03", "is a pickle, which is never loaded since loading one runs what it holds"),
    (b"\x80\x04", "is a pickle, which is never loaded since loading one runs what it holds"),
    (b"\x80\x05", "is a pickle, which is never loaded since loading one runs what it holds"),
    (b"PK\x03\x04", "is a ZIP archive (or a PyTorch file), not a Tilecast table; unpack it and name the table in it"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first"),
    (b"{", "looks like JSON; vLLM's and SGLang's configs need `--format vllm` or `--format sglang`"),
)


def described(data: bytes) -> str | None:
    """Return what a file that starts with `data` is and what to do with it, as `is …; …`; None if unknown."""
    kind = _turbomind(data)
    if kind is not None:
        return f"is TurboMind's GEMM cache ({kind}): {TURBOMIND}"
    text = data.lstrip()
    return next((what for start, what in STARTS if text.startswith(start)), None)


def _turbomind(data: bytes) -> str | None:
    if data.startswith(TURBOMIND_MAGIC):
        version = data[len(TURBOMIND_MAGIC) : len(TURBOMIND_MAGIC) + 1].decode("ascii", "replace")
        return f"binary, TMGEMM{version}" if version.isdigit() else "binary"
    line = data.split(b"\n", 1)[0]
    if re.fullmatch(rb"(-?\d{1,10} ?)+\r?", line) and len(line.split()) in TURBOMIND_NUMBERS:
        return "the text form of 2024"
    if len(data) >= 4 * RAW_INTEGERS:
        values = struct.unpack_from(f"<{RAW_INTEGERS}i", data)
        known = TURBOMIND_ARCHITECTURES | {10 * value for value in TURBOMIND_ARCHITECTURES}
        if values[0] in known and any(values[1:]) and all(-1 <= value < 1 << 24 for value in values):
            return "a raw dump of its records"
    return None
