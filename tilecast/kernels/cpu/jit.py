"""From a variant to a callable address: generate, compile, keep the object file on disk, load, run on threads.

The compiled object is a file of this user's own cache folder, named by the SHA-256 of all that it depends on
and guarded by a checksum; a damaged one is made again. Threads are those of torch's own OpenMP runtime, so
that two pools never share the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import torch
from llvmlite import ir

from tilecast.canonical import digest
from tilecast.environment import kernel_source_digest
from tilecast.errors import DeviceError
from tilecast.kernels.cpu._layer import MAX_THREADS, PARALLEL
from tilecast.kernels.cpu._moe import Gemm
from tilecast.kernels.cpu._variant import BARRIER, Variant
from tilecast.kernels.cpu.isa import Isa, host_isa
from tilecast.settings import Settings

CHECKSUM_BYTES = 32
_loaded: list[Any] = []
_lock = threading.Lock()


def target_machine(isa: Isa) -> Any:
    """Return LLVM's code generator for an instruction set."""
    if isa.triple != llvm.get_process_triple():
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(isa.triple)
    return target.create_target_machine(cpu=isa.cpu, features=isa.features, opt=3, reloc="pic", codemodel="default")


def optimised(build: Callable[[Any], None], isa: Isa) -> tuple[Any, Any]:
    """Generate a module with `build`, optimise it, and return (LLVM module, target machine).

    Loop and SLP vectorisation and loop unrolling stay off: the generator writes its own.
    """
    module = ir.Module(name="tilecast")
    module.triple = isa.triple
    build(module)
    machine = target_machine(isa)
    module.data_layout = str(machine.target_data)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(parsed, passes)
    return parsed, machine


def compile_assembly(variant: Variant, isa: Isa) -> str:
    """Return a variant's assembly for any instruction set, without having the CPU."""
    module, machine = optimised(lambda m: Gemm(m, variant).build(), isa)
    return str(machine.emit_assembly(module))


def _object_path(key: str) -> Path:
    return Settings.from_environment().cache_dir / "kernels" / f"{key}.o"


def _read_object(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    body = data[CHECKSUM_BYTES:]
    return body if body and hashlib.sha256(body).digest() == data[:CHECKSUM_BYTES] else None


def _write_object(path: Path, body: bytes) -> None:
    """Keep an object file, atomically; a folder that cannot be written costs only the next start's time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(name, path)
    except OSError:
        return


def _object(build: Callable[[Any], None], key: str, isa: Isa) -> bytes:
    path = _object_path(key)
    body = _read_object(path)
    if body is None:
        if not _rules.compiles:
            raise NotCompiled(partial(_object, build, key, isa), key)
        module, machine = optimised(build, isa)
        body = bytes(machine.emit_object(module))
        _write_object(path, body)
    return body


def load(build: Callable[[Any], None], fields: dict[str, Any], entry: str) -> int:
    """Return the address of `entry` in the code that `build` generates; `fields` name all it depends on.

    Loaded code lives as long as the process.
    """
    isa = host_isa()
    key = digest(
        {
            "fields": fields,
            "source": kernel_source_digest("cpu"),
            "llvmlite": llvmlite.__version__,
            "cpu": isa.cpu,
            "features": isa.features,
        }
    )
    body = _object(build, key, isa)
    with _lock:
        llvm.add_symbol(BARRIER, openmp_symbol("GOMP_barrier") or _noop_address())
        for symbol, name in ((PARALLEL, "GOMP_parallel"), (MAX_THREADS, "omp_get_max_threads")):
            llvm.add_symbol(symbol, openmp_symbol(name) or _noop_address())
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine(isa))
        engine.add_object_file(llvm.ObjectFileRef.from_data(body))
        engine.finalize_object()
        _loaded.append(engine)
        return int(engine.get_function_address(entry))


class NotCompiled(Exception):
    """Code that nobody compiled yet, where none may be: see `compile_together`."""

    def __init__(self, make: Callable[[], object], key: str) -> None:
        """Say what compiles and keeps it, and under which key."""
        super().__init__(key)
        self.make = make
        self.key = key


class _Rules(threading.local):
    """Whether this thread's loads may compile."""

    def __init__(self) -> None:
        self.compiles = True


_rules = _Rules()


def compile_together(loads: Sequence[Callable[[], object]], processes: int) -> int:
    """Have the code that `loads` would compile one after the other compiled by so many processes at once.

    They leave it in the cache folder, where the next load finds it: LLVM runs in one thread of a process at a time.
    Returns how many were compiled by others than this process. What a load raises is not raised here, as that load
    will raise it again; what a process cannot compile is left out.
    """
    wanted: dict[str, Callable[[], object]] = {}
    _rules.compiles = False
    try:
        for load_one in loads:
            try:
                load_one()
            except NotCompiled as missing:
                wanted.setdefault(missing.key, missing.make)
            except Exception:  # The launch that needs it says what is wrong.
                continue
    finally:
        _rules.compiles = True
    makes = list(wanted.values())
    shares = [makes[first::processes] for first in range(max(1, min(processes, len(makes))))]
    if len(shares) < 2 or sys.platform != "linux":
        return 0
    children = [_forked(share) for share in shares[1:]]
    start = time.monotonic()
    for make in shares[0]:
        make()
    _wait_for(children, start + LATE_FACTOR * (time.monotonic() - start) + LATE_S)
    return sum(map(len, shares[1:]))


LATE_FACTOR, LATE_S = 3.0, 5.0
"""A process that takes so many times as long as this one's share, and these seconds more, is ended."""


def _forked(makes: Sequence[Callable[[], object]]) -> int:
    """Return the id of a process that compiles its share and ends."""
    with warnings.catch_warnings():
        # Of this process's threads the child needs none; a lock that one holds is what `_wait_for` is for.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    try:
        for make in makes:
            make()
    finally:
        os._exit(0)


def _wait_for(children: Sequence[int], deadline: float) -> None:
    for child in children:
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.001)


@cache
def load_variant(variant: Variant) -> int:
    """Return the address of a variant's entry function, compiled at first use."""
    from tilecast.kernels.cpu._variant import ENTRY

    return load(lambda module: Gemm(module, variant).build(), asdict(variant), ENTRY)


# Threads ------------------------------------------------------------------------


@cache
def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP runtime that torch itself runs on, if it speaks GNU's interface."""
    torch.get_num_threads()
    candidates = []
    try:
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if "omp" in Path(path).name and ".so" in path and path not in candidates:
                candidates.append(path)
    except OSError:
        candidates = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("lib*omp*")]
    # torch's own copy first: another package may have brought a second runtime.
    candidates.sort(key=lambda path: "torch" not in path)
    for path in candidates:
        try:
            library = ctypes.CDLL(path)
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            for name in ("GOMP_barrier", "omp_get_max_threads"):
                getattr(library, name)  # Raises AttributeError where the symbol is missing.
        except (OSError, AttributeError):
            continue
        return library
    return None


def openmp_symbol(name: str) -> int | None:
    """Return a function's address in torch's OpenMP runtime, None where there is no such runtime."""
    library = _openmp()
    if library is None:
        return None
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value


def openmp_path() -> str | None:
    """Return the file of torch's OpenMP runtime, None where none speaks GNU's interface."""
    library = _openmp()
    return None if library is None else str(library._name)


_noop = ctypes.CFUNCTYPE(None)(lambda: None)
"""Stands in for a barrier where there is one thread."""


def _noop_address() -> int:
    address = ctypes.cast(_noop, ctypes.c_void_p).value
    if address is None:
        raise DeviceError("ctypes gives no address for a callback")
    return address


def available_threads() -> int:
    """Return how many threads kernels use: torch's count, or 1 where its OpenMP runtime is not to be had."""
    return torch.get_num_threads() if _openmp() is not None else 1


def run(address: int, arguments: int, threads: int) -> None:
    """Call `address(arguments)` on `threads` threads at once and return when all are done."""
    library = _openmp()
    if library is None or threads == 1:
        _single(address)(arguments)
    else:
        library.GOMP_parallel(address, arguments, threads, 0)


@cache
def _single(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
