"""compute-sanitizer over the kernels' cases: accesses out of bounds, and races in shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

from benchmarks.gpu.record import ROOT, Record, Setup

TOOL = "compute-sanitizer"
TIMEOUT_S = 280.0
FOUND_CODE = 9
"""Exit code that the tool is told to use for what it finds."""


class SanitizerError(Exception):
    """The tool found something, or could not run."""


def run(setup: Setup, record: Record) -> dict[str, Any]:
    """Run one of the tools. Raises SanitizerError if it finds something; a machine without it is no failure."""
    where = shutil.which(TOOL)
    if setup.device == "cpu" or where is None:
        return {"ran": False, "reason": "runs on GPUs only" if setup.device == "cpu" else f"{TOOL} is not on PATH"}
    words = [where, "--tool", record.unit, "--error-exitcode", str(FOUND_CODE), "--target-processes", "all"]
    words += [setup.python, "benchmarks/gpu/cases.py", "--device", setup.device, "--configs", "1", "--dtypes", "bf16"]
    words += ["--cases", "8", "--seconds", "200"]
    try:
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=min(TIMEOUT_S, setup.seconds_left)
        )
    except subprocess.TimeoutExpired as expired:
        raise SanitizerError(f"{record.unit} took more than {expired.timeout:.0f} s") from expired
    return judge(done.returncode, done.stdout + done.stderr)


def judge(code: int, said: str) -> dict[str, Any]:
    """Return what the tool and the cases said. Raises SanitizerError with the end of it if either found something."""
    counted = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", said)
    errors = None if counted is None else int(counted[1] or counted[2])
    if code != 0 or errors is None or errors > 0:
        raise SanitizerError(f"exit code {code}, {errors} errors:\n{said[-6000:]}")
    return {"ran": True, "errors": errors, "said": said.strip().splitlines()[-3:]}
