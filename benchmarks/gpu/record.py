"""What is kept of a run: one JSON per unit and one per part of a unit, each written whole or not at all.

A unit or part that is there is not run again, so that a run that is cut short, by its own limit or from outside,
goes on where it was. A failure is a record too: its traceback is kept, and others go on.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MAX_TRACEBACK = 8000


class OutOfTime(Exception):
    """The run's time is up; what is finished is kept."""


class Poisoned(Exception):
    """The device's context of this process is broken: a new process has to go on."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the suite was asked to run. `deadline` is a wall-clock time in seconds; 0 for none."""

    out: Path
    device: str = "cuda"
    tiny: bool = False
    deadline: float = 0.0
    tune_s: float = 90.0
    rounds: int = 21
    python: str = "python3"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time() if self.deadline else 1e9

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Setup:
        return cls(**{**value, "out": Path(value["out"])})


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".part", delete=False) as part:
        json.dump(value, part, indent=1, allow_nan=False)
        part.write("\n")
        part.flush()
        os.fsync(part.fileno())
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)


def read_json(path: Path) -> Any | None:
    """Return what a file holds, or None if there is none or it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Record:
    """One unit's result file and the parts it is made of."""

    def __init__(self, setup: Setup, step: str, unit: str) -> None:
        self.setup, self.step, self.unit = setup, step, unit
        self.path = setup.out / step / f"{unit}.json"
        self.parts = setup.out / step / f"{unit}.parts"

    @property
    def running(self) -> Path:
        """Is there while the unit runs, and says since when."""
        return self.path.with_suffix(".running")

    def read(self) -> dict[str, Any] | None:
        """Return the unit's record; None if it has not finished."""
        found = read_json(self.path)
        return found if isinstance(found, dict) else None

    def part(
        self,
        name: str,
        make: Callable[[], Any],
        *,
        needs_s: float = 0.0,
        healthy: Callable[[], bool] = lambda: True,
    ) -> dict[str, Any]:
        """Return a finished part, or make and keep it: {status, seconds, result or error}.

        Raises OutOfTime if fewer than `needs_s` seconds are left, and Poisoned after a failure that leaves
        the process not `healthy`; the failed part is kept before.
        """
        path = self.parts / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.json"
        known = read_json(path)
        if isinstance(known, dict):
            return known
        if self.setup.seconds_left <= needs_s:
            raise OutOfTime
        start = time.monotonic()
        value: dict[str, Any] = {"status": "ok", "error": None, "result": None}
        try:
            value["result"] = make()
        except OutOfTime:
            raise
        except Exception:
            value.update(status="failed", error=traceback.format_exc()[-MAX_TRACEBACK:])
        value["seconds"] = time.monotonic() - start
        write_json(path, value)
        print(f"    {self.step}/{self.unit} {name}: {value['status']} ({value['seconds']:.1f} s)", flush=True)
        if value["status"] == "failed":
            print(value["error"], flush=True)
            if not healthy():
                raise Poisoned(name)
        return value

    def finish(self, *, status: str, seconds: float, result: Any = None, error: str | None = None) -> None:
        """Write the unit's record."""
        value = {
            "step": self.step,
            "unit": self.unit,
            "status": status,
            "error": error,
            "seconds": seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": command(self.setup),
            "setup": {"device": self.setup.device, "tiny": self.setup.tiny, "rounds": self.setup.rounds},
            "versions": versions(),
            "commit": commit(),
            "result": result,
        }
        write_json(self.path, value)
        self.running.unlink(missing_ok=True)

    def forget(self, *, failures_only: bool) -> None:
        """Drop what is kept of the unit; with `failures_only` its failed parts, and its record if it failed."""
        if not failures_only:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.parts, ignore_errors=True)
            return
        bad = [path for path in self.parts.glob("*.json") if (read_json(path) or {}).get("status") != "ok"]
        for path in bad:
            path.unlink()
        known = self.read()
        if known is not None and (bad or known["status"] != "ok"):
            self.path.unlink()


def command(setup: Setup) -> str:
    """Return the command that makes such a result again."""
    words = ["python", "benchmarks/gpu/run.py", "--device", setup.device, *(["--tiny"] if setup.tiny else [])]
    words += ["--rounds", str(setup.rounds), "--tune-seconds", f"{setup.tune_s:g}"]
    return shlex.join(words)


def versions() -> dict[str, str | None]:
    """Return the versions of what results depend on; None for what is not installed."""
    import platform
    from importlib import metadata

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "numpy", "llvmlite", "sqlalchemy", "alembic", "triton_kernels"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    from tilecast import __version__

    found["tilecast"] = __version__
    return found


def commit() -> str | None:
    """Return the checked-out commit, with `+changes` if files differ from it; None outside a checkout."""
    import subprocess

    words = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
