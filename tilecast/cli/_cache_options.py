"""Options and arguments that several `tilecast cache` commands share, and the texts they are parsed from."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from tilecast.errors import UsageError

_AGE = re.compile(r"(\d{1,5}(?:\.\d{1,3})?)\s*(h|d|w)")
_AGE_UNITS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}

RelaxOption = Annotated[
    list[str] | None,
    typer.Option(
        "--relax",
        metavar="FIELD",
        help="Allow this hard field of the environment to differ, such as torch or kernel_source; may be repeated.",
        show_default=False,
    ),
]
MergePolicyOption = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="POLICY",
        help="What to keep where both decide the same: best (faster beyond the noise), ours, theirs, newest, error.",
    ),
]


def parse_age(text: str) -> float:
    """Return seconds for `90d`, `12h` or `2w`. Raises UsageError."""
    found = _AGE.fullmatch(text.strip().lower())
    if found is None:
        raise UsageError(f"--older-than is {text!r:.40}, expected an age such as 90d, 12h or 2w")
    return float(found[1]) * _AGE_UNITS[found[2]]
