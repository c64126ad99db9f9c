"""Which architecture a device in a file's name has, as far as names tell it."""

from __future__ import annotations

import re

_ARCHITECTURES = (
    ("sm_80", r"A100|A800|A30\b"),
    ("sm_86", r"A10G?|A16|A2|A40|RTX_A\d{4}|GeForce_RTX_30\d\d"),
    ("sm_89", r"L4|L20|L40S?|GeForce_RTX_40\d\d|RTX_\d{4}_Ada"),
    ("sm_90", r"H100|H200|H20|H20-3e|H800|GH200"),
    ("sm_100", r"B100|B200|GB200|B300|GB300"),
    ("sm_120", r"RTX_PRO_\d{4}_Blackwell|GeForce_RTX_50\d\d|GB10"),
    ("gfx942", r"MI300[AX]?|MI308X|MI325X?"),
    ("gfx950", r"MI350X?|MI355X?"),
)
_VENDORS = re.compile(r"(?:NVIDIA|AMD_Instinct)_")


def device_arch(device: str) -> str | None:
    """Return the architecture of a device named as in a file, such as `sm_90` or `gfx942`; None where unknown."""
    rest = _VENDORS.sub("", device, count=1)
    if rest == device:
        return None
    for arch, names in _ARCHITECTURES:
        if re.match(rf"(?:{names})(?![A-Za-z0-9])", rest):
            return arch
    return None
