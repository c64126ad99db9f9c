"""Record full sweeps: every valid config of some layers at some token counts, as a file that strategies replay.

`python -m benchmarks.sweep --out FOLDER [--layers NAME,…] [--samples N]` writes one file a layer, after every sweep,
and goes on where it stopped. Stretches of measuring that other processes disturbed are measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tilecast.autotune.calibrate import Calibration, calibrate
from tilecast.autotune.measure import DeviceMeasurer
from tilecast.autotune.replay import load_sweeps, record_sweep, save_sweeps
from tilecast.engine.runtime import default_registry
from tilecast.environment import cpu_environment
from tilecast.problem import ExpertLayer

CALIBRATION = "calibration.json"
TOKENS = (1, 4, 16, 64, 128, 256)
LAYERS = {
    "mixtral-tp8-bf16": ExpertLayer(hidden=4096, intermediate=1792, experts=8, top_k=2),
    "qwen3-30b-tp4-bf16": ExpertLayer(hidden=2048, intermediate=192, experts=128, top_k=8),
    "olmoe-tp4-fp32": ExpertLayer(hidden=2048, intermediate=256, experts=64, top_k=8, dtype="fp32"),
    "gpt-oss-20b-tp8-bf16": ExpertLayer(
        hidden=2880, intermediate=360, experts=32, top_k=4, bias=True, activation="swiglu_oai"
    ),
    "deepseek-v2-lite-tp4-fp16": ExpertLayer(hidden=2048, intermediate=352, experts=64, top_k=6, dtype="fp16"),
    "small-fp32": ExpertLayer(hidden=512, intermediate=1024, experts=8, top_k=2, dtype="fp32"),
}


def sweep_files(folder: Path) -> list[Path]:
    """Return the files of sweeps in a folder, by name."""
    return sorted(path for path in folder.glob("*.json") if path.name != CALIBRATION)


def calibration_beside(folder: Path) -> Calibration | None:
    """Return what the device of a folder of sweeps could do when they were recorded; None if that is not kept."""
    path = folder / CALIBRATION
    return Calibration.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def main() -> None:
    """Record what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    options = parser.parse_args()
    tokens = tuple(int(part) for part in options.tokens.split(","))
    options.out.mkdir(parents=True, exist_ok=True)
    environment, registry = cpu_environment(), default_registry()
    if calibration_beside(options.out) is None:
        probed = json.dumps(calibrate(environment, registry).to_json(), indent=1, sort_keys=True)
        (options.out / CALIBRATION).write_text(probed + "\n", encoding="ascii")
    measurer = DeviceMeasurer(environment, registry)
    for name in options.layers.split(","):
        layer, path = LAYERS[name], options.out / f"{name}.json"
        sweeps = load_sweeps(path) if path.exists() else []
        done = {(sweep.gemm, sweep.tokens) for sweep in sweeps}
        for gemm in layer.gemms:
            for count in tokens:
                if (gemm, count) in done:
                    continue
                sweep = record_sweep(
                    gemm, count, environment, registry, measurer, samples=options.samples, all_tokens=tokens
                )
                sweeps.append(sweep)
                save_sweeps(path, sweeps)
                best, default = sweep.best(), sweep.recorded[0]
                print(
                    f"{name} {gemm.name} {count}: {len(sweep.ok)} of {len(sweep.recorded)} configs, best "
                    f"{best.p50_us:.0f} µs, default {default.p50_us:.0f} µs, {sweep.stolen:.1%} of the CPUs used by "
                    f"others, {sweep.retried} stretches measured again",
                    flush=True,
                )
            measurer.release(gemm)


if __name__ == "__main__":
    main()
