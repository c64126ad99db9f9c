"""Run the GPU suite; see docs/gpu-suite.md.

python benchmarks/gpu/run.py --out gpu-results --minutes 8      go on where the last call stopped
python benchmarks/gpu/run.py --out gpu-results --only layers    some steps
python benchmarks/gpu/run.py --device cpu --tiny --out /tmp/dry the same code on a CPU, in seconds
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # As a script this folder would be searched first, where `report` or `device` are anybody's names.
    sys.path[0] = str(ROOT)

from benchmarks.gpu import shapes  # noqa: E402
from benchmarks.gpu.record import Record, Setup  # noqa: E402

UNIT_LIMIT_S = {"tests": 420.0, "sanitizer": 300.0}
"""Most seconds of one unit that cannot go on where it was cut."""
GRACE_S = 15.0
"""How long after the deadline a worker may go on before it is ended."""
LEAST_S = 10.0
POLL_S = 0.1


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run the GPU suite, or go on with it.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="where results are kept")
    parser.add_argument("--only", nargs="+", metavar="STEP", help=f"of {', '.join(shapes.STEPS)}; none: all")
    parser.add_argument("--units", nargs="+", metavar="UNIT", help="only units whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=0.0, help="end after so long; 0: no limit")
    parser.add_argument("--again", action="store_true", help="drop the results of these steps and measure anew")
    parser.add_argument("--retry", action="store_true", help="run again what failed, whole units and single parts")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the suite, measures nothing")
    parser.add_argument("--tune-seconds", type=float, default=90.0, help="tuning budget per layer")
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds per point")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, and run nothing")
    parser.add_argument("--worker", metavar="JSON", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    unknown = [step for step in options.only or () if step not in shapes.STEPS]
    if unknown:
        parser.error(f"no step is named {unknown[0]!r}, expected of {', '.join(shapes.STEPS)}")
    return options


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    if options.worker:
        from benchmarks.gpu import worker

        return worker.main(json.loads(options.worker))
    setup = Setup(
        out=options.out.resolve(),
        device=options.device,
        tiny=options.tiny,
        deadline=time.time() + 60 * options.minutes if options.minutes else 0.0,
        tune_s=options.tune_seconds,
        rounds=options.rounds,
        python=sys.executable,
    )
    steps = [step for step in shapes.STEPS if step in (options.only or shapes.STEPS)]
    records = {step: _records(setup, step, options.units) for step in steps}
    if options.again or options.retry:
        for record in (r for step in steps for r in records[step]):
            record.forget(failures_only=not options.again)
    if not options.list:
        for step in steps:
            run_step(setup, step, records[step])
    return summary(setup, records)


def _records(setup: Setup, step: str, wanted: list[str] | None) -> list[Record]:
    names = shapes.units(step, tiny=setup.tiny)
    return [Record(setup, step, name) for name in names if not wanted or any(word in name for word in wanted)]


def run_step(setup: Setup, step: str, records: list[Record]) -> None:
    """Run a step's unfinished units in a process of their own, and in a new one after each that breaks it."""
    while todo := [record for record in records if record.read() is None]:
        if setup.seconds_left < LEAST_S:
            return
        print(f"{step}: {', '.join(record.unit for record in todo)}", flush=True)
        before = _progress(setup, step)
        code, tail, why = _run_worker(setup, step, [record.unit for record in todo])
        left = [record for record in todo if record.read() is None]
        if not left or setup.seconds_left < LEAST_S:
            return
        broken = next((record for record in left if record.running.exists()), left[0])
        if why or (code != 0 and _progress(setup, step) == before):
            # Else a part that broke the process is on record, and the next process goes on behind it.
            reason = why or f"the process ended with code {code} and left no result"
            broken.finish(status="failed", seconds=0.0, error=f"{reason}; its last words:\n{tail}")
        elif code == 0:
            return


def _progress(setup: Setup, step: str) -> int:
    return sum(1 for _ in (setup.out / step).glob("**/*.json"))


def _run_worker(setup: Setup, step: str, units: list[str]) -> tuple[int, str, str]:
    """Run a worker and show what it says; returns its exit code, its last words, and why it was ended, if it was."""
    log = setup.out / "logs" / f"{step}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for stale in (setup.out / step).glob("*.running"):
        # Left by a run that was killed: its age says nothing about this one.
        stale.unlink(missing_ok=True)
    request = json.dumps({"setup": setup.to_json(), "step": step, "units": units})
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    why = ""
    with log.open("ab") as sink, log.open("rb") as source:
        source.seek(0, os.SEEK_END)
        # Of its own session, so that it ends with whatever it has started; it watches that this process lives.
        child = subprocess.Popen(
            [setup.python, str(Path(__file__).resolve()), "--worker", request],
            cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        said = b""
        try:
            while child.poll() is None:
                time.sleep(POLL_S)
                said = (said + _show(source))[-8000:]
                why = why or _overdue(setup, step)
                if why or setup.seconds_left < -GRACE_S:
                    _end(child)
        finally:
            _end(child)
        said = (said + _show(source))[-8000:]
    return child.returncode, said.decode(errors="replace"), why


def _show(source: object) -> bytes:
    new: bytes = source.read()  # type: ignore[attr-defined]
    if new:
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()
    return new


def _overdue(setup: Setup, step: str) -> str:
    limit = UNIT_LIMIT_S.get(step)
    if limit is None:
        return ""
    for marker in (setup.out / step).glob("*.running"):
        try:
            ran = time.time() - marker.stat().st_mtime
        except FileNotFoundError:
            continue
        if ran > limit:
            return f"ended after {ran:.0f} s, more than the {limit:.0f} s that it may take"
    return ""


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a worker and all that it started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def summary(setup: Setup, records: dict[str, list[Record]]) -> int:
    """Say what is done, what failed and what is left; 0 if all is done, 1 with failures, 4 if some is left."""
    left, failed = [], []
    for step, of_step in records.items():
        for record in of_step:
            known = record.read()
            state = "left" if known is None else str(known["status"])
            if known is None:
                left.append(f"{step}/{record.unit}")
            elif state != "ok":
                failed.append(f"{step}/{record.unit}")
            seconds = "" if known is None else f"{known['seconds']:.0f} s"
            print(f"  {step + '/' + record.unit:36} {state:8} {seconds}")
    if failed:
        print(f"failed: {', '.join(failed)} (see the `error` in {setup.out}/STEP/UNIT.json; --retry runs them again)")
    if left:
        print(f"left: {', '.join(left)} (the same command goes on)")
    return 4 if left else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
