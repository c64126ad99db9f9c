"""The process that runs one step's units: nothing that it breaks on the device outlives it."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
import traceback
from typing import Any

from benchmarks.gpu.record import OutOfTime, Poisoned, Record, Setup

MODULES = {
    "device": "device",
    "tests": "checks",
    "certify": "certification",
    "questions": "questions",
    "layers": "layers",
    "sweep": "sweep",
    "sanitizer": "sanitizer",
}
"""The module of each step; each has `run(setup, record) -> JSON` and may have parts."""
BROKEN = 75
"""Exit code after which the driver starts a new process."""


def main(request: dict[str, Any]) -> int:
    """Run units until one breaks the process or the time is up, which is no failure."""
    _end_with_parent()
    setup = Setup.from_json(request["setup"])
    for unit in request["units"]:
        record = Record(setup, request["step"], unit)
        try:
            run_unit(setup, record)
        except OutOfTime:
            record.running.unlink(missing_ok=True)
            return 0
        except Poisoned:
            return BROKEN
        known = record.read()
        if known is not None and known["status"] == "failed" and setup.device == "cuda":
            return BROKEN
    return 0


def run_unit(setup: Setup, record: Record) -> None:
    """Run one unit and keep its result, or its traceback; `partial` if some of its parts failed.

    Raises OutOfTime and Poisoned.
    """
    record.path.parent.mkdir(parents=True, exist_ok=True)
    record.running.touch()
    start = time.monotonic()
    try:
        module = importlib.import_module(f"benchmarks.gpu.{MODULES[record.step]}")
        result = module.run(setup, record)
    except (OutOfTime, Poisoned):
        raise
    except Exception:
        text = traceback.format_exc()
        print(text, flush=True)
        record.finish(status="failed", seconds=time.monotonic() - start, error=text[-8000:])
        return
    status = "partial" if result.get("failures") else "ok"
    record.finish(status=status, seconds=time.monotonic() - start, result=result)


def _end_with_parent() -> None:
    """End this process and its children when the driver is killed: two workers would spoil each other's times."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
