"""Static analysis: what the compiler makes of a build for a GPU that need not be here.

`analyse` compiles builds in processes of their own and keeps the reports; `verdict` says whether a launch could
work; `duplicates` finds builds that differ by name only. See docs/static-analysis.md.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache as remember
from pathlib import Path
from typing import Any, cast

from tilecast.canonical import Json, digest, fields_of
from tilecast.environment import gpu_toolchain, kernel_source_digest
from tilecast.errors import DeviceError, InputError
from tilecast.kernels.compilers import Compilers
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.target import Target

FORMAT = 1
MAX_SPILL_BYTES = 64
"""Local memory of a thread that a valid kernel may use: a few values kept across the loop cost nothing in it."""
REGISTER_FILE = {"cuda": 1 << 16, "hip": 1 << 17}
"""32-bit registers of an SM (CUDA C++ Programming Guide) or a CU (four SIMDs of 512 × 64, CDNA 3 ISA guide)."""
REGISTER_STEP = 8
"""Registers of a thread are handed out in eights on either kind."""
TENSOR_COLUMNS = 512
"""Columns of an SM's tensor memory (PTX ISA, "Tensor Memory")."""
MAX_REPORT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is known about one build compiled for one target.

    build is its digest, target `cuda:90`. error is empty, or the compiler's one line, and then nothing else is
    known. registers are a thread's, stack_bytes the local memory of a thread, spill_bytes what it spills and loads
    back, threads a program's, tensor_columns what it allocates of tensor memory. instructions counts matrix
    instructions by kind, shape and types (`wgmma m64n256k16 f32.bf16.bf16`), mma_k is their reduction length.
    loop_float_ops and loop_copies are counts in the innermost loop with matrix instructions: arithmetic that
    rounds outside of them, and asynchronous copies into shared memory. machine_code is the SHA-256 of the code
    section, code_bytes its size.
    """

    build: str
    target: str
    error: str = ""
    shared_bytes: int = 0
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    threads: int = 0
    tensor_columns: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    mma_k: int = 0
    loop_float_ops: int = 0
    loop_copies: dict[str, int] = field(default_factory=dict)
    code_bytes: int = 0
    machine_code: str = ""
    compile_seconds: float = 0.0

    @property
    def mma_kinds(self) -> tuple[str, ...]:
        """The kinds of matrix instructions: some of `wgmma`, `mma.sync`, `tcgen05.mma`, `mfma`, `smfmac`."""
        return tuple(dict.fromkeys(name.partition(" ")[0] for name in self.instructions))

    def to_json(self) -> dict[str, Json]:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Report:
        """Build from parsed JSON. Raises InputError."""
        known: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (float, int)}
        kinds = {f.name: known.get(str(f.type), dict) for f in fields(cls)}
        parsed = fields_of(value, kinds, "report")
        for name in ("instructions", "loop_copies"):
            for kind, count in cast(dict[Any, Any], parsed[name]).items():
                if isinstance(count, bool) or not isinstance(count, int):
                    raise InputError(f"report: {name} counts {kind!r:.80} as {count!r:.40}, expected an integer")
        return cls(**cast(Any, parsed))


def analyse(
    builds: Sequence[Build],
    target: Target,
    *,
    workers: int | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Report]:
    """Compile every build for `target` and return the reports in the builds' order; equal builds compile once.

    workers: how many processes compile at once, by default one a core. cache: a folder where reports are kept and
    found again, None to keep none. progress is called with how many different builds are done, of how many. A
    build that the compiler refuses, crashes on or works on for too long gives a report with `error`; one that a
    killed process leaves is not kept. Raises DeviceError where Triton cannot run at all.
    """
    different = {build.digest: build for build in builds}
    shelf = None if cache is None else _Shelf(cache, target)
    found = {} if shelf is None else {key: held for key, b in different.items() if (held := shelf.read(b)) is not None}
    missing = [build for key, build in different.items() if key not in found]
    done = len(found)
    if progress is not None and different:
        progress(done, len(different))
    if missing:
        if gpu_toolchain()["triton"] == "absent":
            raise DeviceError("Triton is not installed, so nothing can be compiled for a GPU; install triton")
        jobs: list[Json] = [{"build": build.to_json(), "target": target.name} for build in missing]
        with Compilers(min(len(jobs), workers or _cores())) as compilers:
            for index, facts, kept in compilers.run(jobs):
                report = Report(build=missing[index].digest, target=target.name, **facts)
                found[report.build] = report
                if shelf is not None and kept:
                    shelf.write(missing[index], report)
                done += 1
                if progress is not None:
                    progress(done, len(different))
    return [found[build.digest] for build in builds]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Shelf:
    """Reports on disk, one file each, named after all that a report depends on."""

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder = folder
        self._target = target
        self._triton = gpu_toolchain()["triton"]

    def _key(self, build: Build) -> dict[str, Json]:
        return {
            "format": FORMAT,
            "build": build.digest,
            "target": self._target.name,
            "kernel_source": _source_digest(build.module),
            "analysis": _analysis_digest(),
            "triton": self._triton,
        }

    def _path(self, key: dict[str, Json]) -> Path:
        name = digest(key)
        return self._folder / name[:2] / f"{name}.json"

    def read(self, build: Build) -> Report | None:
        """Return what is kept; None for nothing, or for what is not exactly as it was written."""
        key = self._key(build)
        try:
            with self._path(key).open("rb") as file:
                text = file.read(MAX_REPORT_BYTES)
            parsed = fields_of(json.loads(text), {"key": dict, "report": dict, "sha256": str}, "kept report")
            whole = parsed["key"] == key and parsed["sha256"] == digest(cast(Json, parsed["report"]))
            return Report.from_json(parsed["report"]) if whole else None
        except (OSError, ValueError, TypeError, RecursionError, InputError):
            return None

    def write(self, build: Build, report: Report) -> None:
        """Keep a report, atomically; a folder that cannot be written costs only the next run's time."""
        key, body = self._key(build), report.to_json()
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "w") as file:
                json.dump({"key": key, "report": body, "sha256": digest(body)}, file)
            os.replace(name, path)
        except OSError:
            return


@remember
def _analysis_digest() -> str:
    """Return the SHA-256 of what turns a build into a report: no kernel's source, yet reports depend on it."""
    total = hashlib.sha256()
    for name in ("_compile.py", "assembly.py", "static.py"):
        total.update(Path(__file__).with_name(name).read_bytes() + b"\0")
    return total.hexdigest()


@remember
def _source_digest(module: str) -> str:
    """Return the SHA-256 of the kernels' source; for a module outside of the package, of that and its own."""
    ours = kernel_source_digest("cuda")
    if "." not in module:
        return ours
    try:
        found = importlib.util.find_spec(module)
    except ImportError:
        found = None
    if found is None or found.origin is None:
        return ours
    return hashlib.sha256(ours.encode() + Path(found.origin).read_bytes()).hexdigest()


def verdict(
    report: Report, target: Target, *, tensor_cores: bool, max_spill_bytes: int = MAX_SPILL_BYTES
) -> str | None:
    """Return why a build cannot, or should not, be launched on `target`; None if nothing speaks against it.

    tensor_cores: whether it must hold matrix instructions, as every GEMM in 16 bits or less must.
    """
    if report.error:
        return f"does not compile: {report.error}"
    if report.shared_bytes > target.shared_bytes:
        return f"needs {report.shared_bytes} bytes of shared memory, {target.name} has {target.shared_bytes}"
    if report.tensor_columns > TENSOR_COLUMNS:
        return f"needs {report.tensor_columns} columns of tensor memory, {target.name} has {TENSOR_COLUMNS}"
    registers = -(-report.registers // REGISTER_STEP) * REGISTER_STEP * report.threads
    if registers > REGISTER_FILE[target.kind]:
        return (
            f"needs {registers} registers ({report.registers} in each of {report.threads} threads), "
            f"{target.name} has {REGISTER_FILE[target.kind]}"
        )
    local = max(report.stack_bytes, report.spill_bytes)
    if local > max_spill_bytes:
        return (
            f"spills {local} bytes of registers a thread into local memory, at most {max_spill_bytes} are worth a try"
        )
    if tensor_cores and not report.instructions:
        return f"has no tensor-core instruction ({' or '.join(target.mma)}) where the GEMM should use them"
    return None


def duplicates(reports: Iterable[Report]) -> tuple[tuple[int, ...], ...]:
    """Return groups of indices, each of two or more, whose launches are one: equal code, threads and memory."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, report in enumerate(reports):
        if not report.error:
            launch = report.machine_code, report.threads, report.shared_bytes, report.registers
            groups[report.target, *launch].append(index)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
