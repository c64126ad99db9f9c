"""How long a tuning takes beside its forecast, and whether a second one chooses as fast a table.

`python -m benchmarks.tune MODEL [--tp 8] [--tokens 1,16,64] [--efforts quick,standard] [--runs 2] [--out FILE.json]`
For every effort and run, in an empty cache folder: `tilecast tune --dry-run`, then `tilecast tune --fresh`, as
processes that are timed from start to end; a tuning that waits for another one has that in its time, so let nothing
else run. Prints JSON: forecast and real seconds and real ÷ forecast of each run, and what limits the forecast went by;
then, for each layer, bucket and GEMM, the time of every run's chosen config, how far apart they are, and the largest
noise that the decisions state. Those times were taken minutes apart: where the runs chose otherwise, `head_to_head` has
all choices and the default measured side by side afterwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.head_to_head import head_to_head
from tilecast.autotune.measure import DeviceMeasurer
from tilecast.cache_store.store import open_store
from tilecast.canonical import Json
from tilecast.environment import here
from tilecast.evidence import TuningTable
from tilecast.kernels import registry
from tilecast.settings import child_environment

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A forecast and the tuning that followed: seconds, the limits' source, what `tune --json` printed and kept."""

    forecast_s: float
    limits: str
    real_s: float
    tuned: Document
    table: TuningTable | None = None

    def to_json(self) -> dict[str, Json]:
        """Return the seconds and their ratio."""
        ratio = self.real_s / self.forecast_s
        return {"forecast_s": self.forecast_s, "limits": self.limits, "real_s": self.real_s, "ratio": ratio}


def run_once(arguments: Sequence[str], effort: str) -> Run:
    """Forecast and tune in an empty cache folder. Raises CalledProcessError where a command fails."""
    with tempfile.TemporaryDirectory(prefix="tilecast-benchmark-") as folder:
        line = [*arguments, "--effort", effort]
        forecast, _ = tilecast([*line, "--dry-run"], Path(folder))
        tuned, real_s = tilecast([*line, "--fresh"], Path(folder))
        with closing(open_store(Path(folder) / "store.db", read_only=True)) as store:
            table = store.table()
    source = forecast["calibration"]["source"]
    return Run(forecast_s=forecast["seconds"], limits=source, real_s=real_s, tuned=tuned, table=table)


def tilecast(arguments: Sequence[str], cache: Path) -> tuple[Document, float]:
    """Run `tilecast tune` and return what it printed, and its seconds from start to end."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tilecast", "tune", *arguments, "--json"],
        env=child_environment({"TILECAST_CACHE_DIR": str(cache)}), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    seconds = time.monotonic() - start
    document: Document = json.loads(done.stdout)
    return document, seconds


def compared(documents: Sequence[Document]) -> list[Json]:
    """Return each layer's, bucket's and GEMM's chosen times over the runs, slowest ÷ fastest - 1, and the noise."""
    found: list[Json] = []
    for decisions in zip(*(document["table"]["decisions"] for document in documents), strict=True):
        first = decisions[0]
        for gemm in ("up", "down"):
            choices = [decision[gemm] for decision in decisions]
            times = [choice["p50_us"] for choice in choices]
            difference, noise = max(times) / min(times) - 1, max(choice["noise"] for choice in choices)
            found.append(
                {
                    "layer": first["layer"], "tokens": first["tokens"], "gemm": gemm, "chosen_us": times,
                    "difference": difference, "noise": noise, "within_noise": difference <= noise,
                    "same_config": all(choice["config"] == choices[0]["config"] for choice in choices),
                }
            )  # fmt: skip
    return found


def measure(arguments: Sequence[str], efforts: Sequence[str], runs: int) -> dict[str, Json]:
    """Return the report on all efforts, each run as often."""
    environment = here()
    if "--threads" in arguments:
        torch.set_num_threads(int(arguments[arguments.index("--threads") + 1]))
    document: dict[str, Json] = {
        "command": ["python", "-m", "benchmarks.tune", *sys.argv[1:]],
        "environment": environment.to_json(),
    }
    for effort in efforts:
        made = []
        for number in range(runs):
            made.append(run_once(arguments, effort))
            print(f"{effort} {number + 1} of {runs}: {made[-1].real_s:.1f} s", file=sys.stderr, flush=True)
        tables = [run.table for run in made if run.table is not None]
        document[effort] = {
            "runs": [run.to_json() for run in made], "choices": compared([run.tuned for run in made]),
            "head_to_head": cast(Json, head_to_head(tables, DeviceMeasurer(environment, registry))),
        }  # fmt: skip
    return document


def main() -> None:
    """Print the report, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as `tilecast tune` takes it")
    parser.add_argument("--tp", default="1")
    parser.add_argument("--tokens", default="1,16,64,256,1024")
    parser.add_argument("--threads", help="CPU threads; none: torch's")
    parser.add_argument("--efforts", default="quick,standard", help="comma-separated")
    parser.add_argument("--runs", type=int, default=2, choices=range(1, 21), metavar="N")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arguments = [options.model, "--tp", options.tp, "--tokens", options.tokens]
    if options.threads:
        arguments += ["--threads", options.threads]
    text = json.dumps(measure(arguments, options.efforts.split(","), options.runs), indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
