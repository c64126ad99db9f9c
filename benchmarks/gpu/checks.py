"""The tests that need the device: the kernels' cases, and every test with the marker `gpu`."""

from __future__ import annotations

import importlib.util
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import ROOT, Record, Setup
from tilecast.engine.runtime import default_registry
from tilecast.environment import environment_for

TIMEOUT_S = 400.0
CASES_S = 300.0
SHOWN = 40
TINY_TESTS = ("tests/test_canonical.py",)


class WrongResults(Exception):
    """A kernel was wrong on the device."""


def run(setup: Setup, record: Record) -> dict[str, Any]:
    """Run one of the two. Raises if anything fails, with what did: the step then counts as failed."""
    if record.unit == "cases":
        configs, cases = (1, 3) if setup.tiny else (2, None)
        found = check_cases(setup, configs, cases)
        return found
    paths = TINY_TESTS if setup.tiny else ("tests",)
    marker = "not gpu" if setup.tiny else "gpu"
    return run_pytest(setup, record.parts, paths, marker, timeout_s=min(TIMEOUT_S, setup.seconds_left))


def check_cases(setup: Setup, configs: int, cases: int | None) -> dict[str, Any]:
    """Run the kernels' cases. Raises WrongResults, listing them."""
    from benchmarks.gpu import cases as module

    found = module.check_cases(
        environment_for(setup.device), default_registry(), configs=configs, cases=module.CASES[:cases]
    )
    if found["right"] + len(found["wrong"]) == 0:
        raise WrongResults(f"no kernel runs on {setup.device}, so nothing was checked")
    if found["wrong"]:
        shown = "\n".join(str(wrong) for wrong in found["wrong"][:SHOWN])
        raise WrongResults(f"{found['right']} right, {len(found['wrong'])} wrong:\n{shown}")
    return found


def run_pytest(setup: Setup, folder: Path, paths: tuple[str, ...], marker: str, *, timeout_s: float) -> dict[str, Any]:
    """Run tests in a process of their own. Raises WrongResults if one fails, with what failed."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "junit.xml"
    report.unlink(missing_ok=True)
    words = [setup.python, "-m", "pytest", "-q", "-m", marker, f"--junitxml={report}", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout") is None:
        # A machine without the plugin does not know the project's `timeout`, which is then no reason to stop.
        words += ["-o", "addopts=-ra", "-o", "filterwarnings=default"]
    try:
        done = subprocess.run([*words, *paths], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else ""
        raise WrongResults(f"the tests took more than {timeout_s:.0f} s:\n{said[-4000:]}") from expired
    if not report.exists():
        raise WrongResults(f"pytest ended with code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    found = summarize(report)
    if found["failed"]:
        shown = "\n\n".join(f"{name}\n{text}" for name, text in list(found["failures"].items())[:SHOWN])
        raise WrongResults(f"{found['failed']} of {found['total']} tests failed:\n{shown}")
    return found


def summarize(report: Path) -> dict[str, Any]:
    """Return the counts of a JUnit report, why tests were skipped, and the text of each failure."""
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    failures: dict[str, str] = {}
    # The report is the one that pytest has just written here.
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        skip = case.find("skipped")
        if bad is not None:
            failures[name] = (bad.text or bad.get("message") or "")[-2000:]
        elif skip is not None:
            skipped[skip.get("message") or ""] += 1
        counts["failed" if bad is not None else "skipped" if skip is not None else "passed"] += 1
    return {
        "total": sum(counts.values()),
        **{name: counts[name] for name in ("passed", "failed", "skipped")},
        "skip_reasons": dict(skipped),
        "failures": failures,
    }
