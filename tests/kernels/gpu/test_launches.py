"""A launch compiles what the static analysis compiled: the same types, constants, alignment and options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from tests.kernels.gpu.test_experts import VARIANTS
from tilecast.settings import child_environment

pytest.importorskip("triton", reason="Triton is not installed")


@cache
def derived() -> dict[str, Any]:
    """What Triton's JIT would compile, in a process that does not interpret, against the builds."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.gpu.derived_launches"], capture_output=True, text=True, timeout=120,
        env=child_environment({"PYTHONPATH": path}, without=("TRITON_INTERPRET",)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("variant", [*VARIANTS, "fp8"])
def test_a_launch_compiles_what_was_analysed(variant: str) -> None:
    mine = {name: count for name, count in derived()["launches"].items() if name.startswith(f"{variant} E")}
    # Up, down into the layer's dtype and into float32: one kernel each, and what sums the latter's rows or stretches;
    # all that for three token counts. Before each product of codes, rows are rounded.
    each = 3 * {"decode": 3, "split-K": 6, "fp8": 8}.get(variant.split()[0], 5)
    assert mine, "no layer was launched"
    assert set(mine.values()) == {each}
    assert [line for line in derived()["differences"] if line.startswith(f"{variant} E")] == []
