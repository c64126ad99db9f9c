"""Run the benchmarks and write their results under benchmarks/results/<device>/.

python benchmarks/run.py                      everything, as published
python benchmarks/run.py lookup startup       some subjects
python benchmarks/run.py layer --dtypes bf16 --tokens 1,64 --policies fastest
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import layer
import lookup
import startup
import torch
from report import ROOT, write_result
from shapes import DTYPES, TOKENS, reference_layer

from tilecast.engine.peers import PEERS, find_peers
from tilecast.errors import TilecastError
from tilecast.evidence import POLICIES

SUBJECTS = ("layer", "lookup", "startup")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run the benchmarks and write their results.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)}; none: all")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated")
    parser.add_argument("--policies", default="reproducible,fastest", help="comma-separated")
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS), help="comma-separated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tune-budget", type=float, default=180.0, help="seconds per layer and policy")
    parser.add_argument("--bench-budget", type=float, default=120.0, help="seconds per layer and policy")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--store", type=Path, default=ROOT / "tuning.db", help="keeps measurements between runs")
    parser.add_argument("--results", type=Path, help="folder for the results; none: by device")
    options = parser.parse_args()
    unknown = [name for name in options.subjects if name not in SUBJECTS]
    if unknown:
        parser.error(f"no subject is named {unknown[0]!r}, expected of {', '.join(SUBJECTS)}")
    for text in options.policies.split(","):
        if text not in POLICIES:
            parser.error(f"no policy is named {text!r}, expected of {', '.join(POLICIES)}")
    return options


def run_layer(options: argparse.Namespace) -> Path:
    result = layer.measure(
        [reference_layer(dtype) for dtype in options.dtypes.split(",")],
        tuple(int(count) for count in options.tokens.split(",")),
        policies=tuple(options.policies.split(",")),
        peers=find_peers([name for name in options.peers.split(",") if name]),
        store=options.store,
        tune_s=options.tune_budget,
        bench_s=options.bench_budget,
        rounds=options.rounds,
        threads=options.threads,
    )
    layer.print_result(result)
    return write_result("layer", layer.to_json(result), options.results)


def main() -> int:
    options = arguments()
    # Before anything asks for the environment, which records the thread count.
    torch.set_num_threads(options.threads)
    for subject in options.subjects or SUBJECTS:
        print(f"{subject} …", flush=True)
        try:
            if subject == "layer":
                path = run_layer(options)
            else:
                found = {"lookup": lookup, "startup": startup}[subject].measure()
                print(f"  {found}")
                path = write_result(subject, found, options.results)
        except TilecastError as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 1
        print(f"  written to {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
