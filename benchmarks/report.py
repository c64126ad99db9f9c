"""Where results go and what every result file says about how it was made."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from tilecast.canonical import Json
from tilecast.environment import cpu_environment

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
PACKAGES = ("tilecast", "torch", "transformers", "llvmlite", "numpy")


def device_slug() -> str:
    """The folder name of this device's results."""
    return re.sub(r"[^a-z0-9]+", "-", cpu_environment().device.lower()).strip("-")


def versions() -> dict[str, Json]:
    found: dict[str, Json] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The checked-out commit, with `+changes` if files differ from it; None outside a checkout."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()


def write_result(name: str, result: Json, folder: Path | None = None) -> Path:
    """Write one subject's result as JSON, whole or not at all, and return its path."""
    target = (folder or RESULTS / device_slug()) / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    value = {
        "command": shlex.join([Path(sys.executable).name, Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "environment": cpu_environment().to_json(),
        "threads": torch.get_num_threads(),
        "load_before": list(os.getloadavg()),
        "result": result,
    }
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".part", delete=False) as part:
        json.dump(value, part, indent=1, allow_nan=False)
        part.write("\n")
    os.chmod(part.name, 0o644)
    os.replace(part.name, target)
    return target
