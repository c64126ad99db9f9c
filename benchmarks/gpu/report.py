"""From a run's records to what is committed: benchmarks/results/<device>/gpu/*.json, docs/gpu-results.md, pictures.

python benchmarks/gpu/report.py --collect gpu-results     take over a run's records, then write the page
python benchmarks/gpu/report.py                           write the page from what is committed
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.gpu.device import Limits  # noqa: E402
from benchmarks.gpu.picture import Dot, roofline  # noqa: E402
from benchmarks.gpu.record import read_json, write_json  # noqa: E402
from benchmarks.gpu.shapes import STEPS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
PAGE = "gpu-results.md"
TUNED, DEFAULT = "tilecast tuned", "tilecast default"
HEAD = """# GPU results

Written by `make gpu-report` from `benchmarks/results/*/gpu/`; how it is measured is in [gpu-suite.md](gpu-suite.md).
"""
NOTHING = """
Nothing was measured on a GPU yet.
"""

Records = dict[str, dict[str, Any]]
"""A device's records by `step/unit`."""


class ReportError(Exception):
    """The records are not ones that can be published."""


def collect(out: Path, results: Path = RESULTS, *, trial: bool = False) -> Path:
    """Copy a run's finished records into the folder of its device and return that.

    Raises ReportError without a `device` record, and, unless `trial`, for a run on a CPU or on tiny shapes.
    """
    device = read_json(out / "device" / "device.json")
    if not isinstance(device, dict) or device["status"] != "ok":
        raise ReportError(f"{out} has no finished `device` step, so nothing says what it was measured on")
    if not trial and (device["setup"]["device"] == "cpu" or device["setup"]["tiny"]):
        raise ReportError(f"{out} is a trial of the suite, no measurement of a GPU")
    name = device["result"]["about"]["name"]
    folder = results / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") / "gpu"
    for step in STEPS:
        for path in sorted((out / step).glob("*.json")):
            write_json(folder / step / path.name, read_json(path))
    return folder


def read(folder: Path) -> Records:
    """Return a device's records in the order of the steps."""
    return {
        f"{step}/{path.stem}": found
        for step in STEPS
        for path in sorted((folder / step).glob("*.json"))
        if isinstance(found := read_json(path), dict)
    }


def write_page(results: Path = RESULTS, docs: Path = DOCS) -> Path:
    """Write the page and its pictures from all devices' records and return its path."""
    text = HEAD
    folders = sorted(path.parent for path in results.glob("*/gpu") if read(path))
    for folder in folders:
        records = read(folder / "gpu")
        text += "\n" + device_section(folder.name, records)
        picture = draw(records)
        if picture:
            (docs / "pictures").mkdir(parents=True, exist_ok=True)
            (docs / "pictures" / f"roofline-{folder.name}.svg").write_text(picture, encoding="utf-8")
    if not folders:
        text += NOTHING
    docs.mkdir(parents=True, exist_ok=True)
    path = docs / PAGE
    path.write_text(text, encoding="utf-8")
    return path


# Sections ---------------------------------------------------------------------------------------------------


def device_section(slug: str, records: Records) -> str:
    """Return everything about one device."""
    device = records["device/device"]
    found = device["result"]
    about, limits = found["about"], found["limits"]
    lines = [
        f"## {about['name']}",
        "",
        provenance(device, found["environment"]),
        "",
        f"Measured limits: {limits['read_gb_s']:.0f} GB/s read, {found['memory']['copy_gb_s']:.0f} GB/s copied (read "
        f"and written), {limits['dense_tflop_s']:.0f} TFLOP/s bf16 at {found['matmul']['size']}³; a launch takes "
        f"{found['launch']['in_graph_us']:.1f} µs in a graph and {found['launch']['eager_us']:.1f} µs from Python.",
    ]
    clocks = [
        f"{when}: SM {seen.get('clocks.sm')}, memory {seen.get('clocks.mem')}, {seen.get('temperature.gpu')} °C"
        for when, seen in (("before", found["clocks_before"]), ("after", found["clocks_after"]))
        if seen
    ]
    lines += ["", f"Clocks {'; '.join(clocks)}."] if clocks else []
    layers = [record for record in _of_step(records, "layers") if record["result"]]
    if layers:
        lines += ["", f"![Roofline](pictures/roofline-{slug}.svg)"]
    for record in layers:
        lines += ["", *layer_table(record)]
    for make in (question_tables, certificate_tables, check_lines, failure_lines):
        more = make(records)
        lines += ["", *more] if more else []
    return "\n".join(lines) + "\n"


def provenance(record: dict[str, Any], environment: dict[str, Any]) -> str:
    """Return with what, when and by which command a record was made."""
    versions = record["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if versions.get(name))
    driver = f", driver {environment['driver']}" if environment.get("driver") else ""
    return (
        f"{shown}, Python {versions['python']}{driver}; commit {record['commit'] or 'unknown'}, {record['finished']}; "
        f"`{record['command']}`"
    )


def layer_table(record: dict[str, Any]) -> list[str]:
    """Return one model's table: medians in µs, with the 20th and 80th percentile of the tuned time."""
    found = record["result"]
    rows = []
    for point in found["points"]:
        times = {c["name"]: c for c in point["contestants"] if c["p50_us"]}
        best = point["derived"]["best_peer"]
        main = TUNED if TUNED in times else DEFAULT
        derived = point["derived"]["contestants"].get(main, {})
        share = derived.get("roofline_share")
        rows.append(
            (
                point["tokens"],
                _us(times.get(DEFAULT)),
                _us(times.get(TUNED)),
                _spread(times.get(main)),
                f"{_us(times.get(best))} ({best})" if best else "–",
                _ratio(derived.get("best_peer_over_this")),
                f"{derived['tflop_s']:.0f}" if derived else "–",
                f"{derived['weights_gb_s']:.0f}" if derived else "–",
                f"{share:.0%} ({point['derived']['bound']})" if share else "–",
                _bits(point["bits"]),
            )
        )
    head = (
        "T", "default µs", "tuned µs", "p20–p80", "best peer µs", "peer ÷ ours", "TFLOP/s", "weights GB/s", "of limit",
        "alone = in batch",
    )  # fmt: skip
    lines = [f"### {found['title']}", "", *_table(head, rows), "", provenance(record, found["environment"])]
    said = sorted(
        {
            f"- {c['name']}, T = {point['tokens']}: {c['status']}, {c['detail']}"
            for point in found["points"]
            for c in point["contestants"]
            if c["status"] not in ("ok", "unavailable")
        }
    )
    eager = sorted(
        {c["name"] for point in found["points"] for c in point["contestants"] if c["graph"] is False and c["p50_us"]}
    )
    if eager:
        said.append(f"- Timed launch by launch at some T, as no graph could be captured: {', '.join(eager)}")
    return [*lines, "", *said] if said else lines


def question_tables(records: Records) -> list[str]:
    """Return which form won each question."""
    lines: list[str] = []
    for record in (r for r in _of_step(records, "questions") if r["result"]):
        for answer in record["result"]["answers"]:
            rows = [
                (
                    form["form"],
                    form["raced"],
                    _us(form),
                    _label(form["config"]) or "; ".join(form["notes"])[:200] or "–",
                )
                for form in answer["forms"]
            ]
            lines += ["", f"{answer['text']} ({answer['tokens']} tokens, {_layer(answer['layer'])})", ""]
            lines += _table(("form", "configs", "best µs", "config"), rows)
        lines += ["", provenance(record, record["result"]["environment"])]
    return ["### Which form is faster", *lines] if lines else []


def certificate_tables(records: Records) -> list[str]:
    """Return the answers to the certification questions."""
    lines: list[str] = []
    for record in (r for r in _of_step(records, "certify") if r["result"]):
        found = record["result"]
        for gemm in found["gemms"]:
            rows = [
                (a["question"], a["answer"], a["inputs"], a.get("members", "–"), ", ".join(a.get("varied", {})) or "–")
                for a in gemm["answers"]
            ]
            lines += ["", f"{found['dtype']}, {gemm['gemm']}", ""]
            lines += _table(("question", "answer", "inputs", "members", "varied among them"), rows)
        lines += ["", provenance(record, found["environment"])]
    return ["### Which configs give the same bits", *lines] if lines else []


def check_lines(records: Records) -> list[str]:
    """Return one line for each check, and for the sweeps."""
    lines = []
    for name, record in records.items():
        step, result = name.partition("/")[0], record["result"]
        if step not in ("tests", "sanitizer", "sweep") or result is None:
            continue
        if "passed" in result:
            said = f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"
        elif "right" in result:
            said = (
                f"{result['right']} runs right, {len(result['wrong'])} wrong, {result['unreached']} cases not reached"
            )
        elif "counts" in result:
            said = ", ".join(f"{count} {status}" for status, count in result["counts"].items())
        else:
            said = f"{result['errors']} errors" if result["ran"] else f"not run: {result['reason']}"
        lines.append(f"- {name}: {said}")
    return ["### Checks and sweeps", "", *lines] if lines else []


def failure_lines(records: Records) -> list[str]:
    """Return what failed, with the last line that it left."""
    lines = []
    for name, record in records.items():
        errors = [record["error"]] if record["error"] else (record["result"] or {}).get("failures", [])
        lines += [f"- {name}: {error.strip().splitlines()[-1][:300]}" for error in errors]
    return ["### What failed", "", *lines] if lines else []


def draw(records: Records) -> str:
    """Return the roofline with every model's points; empty without any."""
    limits = records["device/device"]["result"]["limits"]
    series: dict[str, Sequence[Dot]] = {}
    for record in (r for r in _of_step(records, "layers") if r["result"]):
        dots = []
        for point in record["result"]["points"]:
            reached = point["derived"]["contestants"]
            name = TUNED if TUNED in reached else DEFAULT
            if name in reached:
                label = f"{record['result']['title']}, T = {point['tokens']}: {reached[name]['tflop_s']:.1f} TFLOP/s"
                intensity = point["flops"] / point["bytes"]
                dots.append(Dot(intensity=intensity, tflop_s=reached[name]["tflop_s"], label=label))
        if dots:
            series[record["result"]["title"]] = dots
    if not series:
        return ""
    title = f"{records['device/device']['result']['about']['name']}: whole expert layers under the measured limits"
    return roofline(title, Limits(**limits), series)


# Pieces -----------------------------------------------------------------------------------------------------


def _of_step(records: Records, step: str) -> list[dict[str, Any]]:
    return [record for name, record in records.items() if name.startswith(f"{step}/")]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    ]


def _us(timed: dict[str, Any] | None) -> str:
    if not timed or not timed["p50_us"]:
        return "–"
    return f"{timed['p50_us']:.1f}" if timed["p50_us"] < 1000 else f"{timed['p50_us']:.0f}"


def _spread(timed: dict[str, Any] | None) -> str:
    return f"{timed['p20_us']:.1f}–{timed['p80_us']:.1f}" if timed else "–"


def _ratio(value: float | None) -> str:
    return f"{value:.2f}" if value else "–"


def _bits(bits: dict[str, dict[str, int]]) -> str:
    checked, equal = (sum(found[key] for found in bits.values()) for key in ("checked", "equal"))
    return f"{equal} of {checked}"


def _label(config: dict[str, Any] | None) -> str:
    return "" if config is None else " ".join([config["kernel"], *(f"{k}={v}" for k, v in config["params"].items())])


def _layer(layer: dict[str, Any]) -> str:
    return (
        f"E {layer['experts']}, H {layer['hidden']}, I {layer['intermediate']}, top-{layer['top_k']}, {layer['dtype']}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Publish the GPU suite's results.")
    parser.add_argument("--collect", type=Path, metavar="OUT", help="a run's folder, whose records are taken over")
    options = parser.parse_args()
    try:
        if options.collect is not None:
            print(f"records in {collect(options.collect)}")
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        return 3
    print(f"page in {write_page()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
