"""Seeds made of several numbers."""

from __future__ import annotations


def hash_seed(*parts: int) -> int:
    """Return one seed made of several numbers; near numbers give unrelated seeds."""
    value = 0x9E3779B97F4A7C15
    for part in parts:
        value = ((value ^ (part & 0xFFFFFFFF)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 64)
        value ^= value >> 31
    return value >> 1
