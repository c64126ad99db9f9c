"""The process that compiles: one build a line on standard input, one report a line on standard output.

`compilers.py` starts it, without TRITON_INTERPRET (with it, kernels would be the interpreter's and could not be
compiled). For static analysis Triton's cache is in a folder of its own, and ptxas's report switched on. For launches
to come, builds are compiled exactly as these would, into the cache in which they look.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from tilecast.kernels.assembly import gcn_usage, machine_code, ptx_threads, ptxas_usage, read_gcn, read_ptx
from tilecast.kernels.compilers import READY
from tilecast.kernels.dtypes import TORCH_DTYPES
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.target import Target, parse_target

MAX_ERROR = 400


def build_from_json(value: dict[str, Any]) -> Build:
    """Return the build that `Build.to_json` described."""
    return Build(
        module=value["module"],
        function=value["function"],
        signature=tuple((name, kind) for name, kind in value["signature"]),
        constants=tuple(value["constants"].items()),
        num_warps=value["num_warps"],
        num_stages=value["num_stages"],
        options=tuple(value["options"].items()),
    )


def source_of(build: Build) -> ASTSource:
    """Return a build as what Triton compiles, specialised as a launch with aligned pointers would be."""
    function = build.kernel
    types, constants = dict(build.signature), dict(build.constants)
    known = set(types) | set(constants)
    if known != set(function.arg_names) or len(known) != len(types) + len(constants):
        raise ValueError(f"{build.function} takes {', '.join(function.arg_names)}; given {', '.join(sorted(known))}")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(function.params)
        if types.get(parameter.name, "").startswith("*")
        and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    }
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    return ASTSource(function, signature=signature, constexprs=constants, attrs=aligned)


def compile_build(build: Build, target: Target) -> dict[str, Any]:
    """Compile one build and return the report's fields, `error` among them where it cannot be compiled."""
    log = io.StringIO()
    start = time.perf_counter()
    try:
        # ptxas's report, and all that Triton has to say about a failure, is printed.
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                source_of(build),
                target=GPUTarget(target.kind, target.triton_arch, target.warp_size),
                options=build.triton_options,
            )
        seconds = time.perf_counter() - start
        return {**_facts(compiled, log.getvalue()), "compile_seconds": seconds}
    except Exception as error:  # Triton's passes raise what they like; the report carries it
        return {"error": _one_line(error), "compile_seconds": time.perf_counter() - start}


def compile_ahead(build: Build, target: GPUTarget) -> dict[str, Any]:
    """Compile one build into Triton's cache, where a launch on `target` finds it; `error` where that fails.

    `code` is equal where machine code, warps and shared memory are.
    """
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            source, options = launch_source(build, target)
            compiled = triton.compile(source, target=target, options=options)
        _, code = machine_code(compiled.asm["cubin" if "cubin" in compiled.asm else "hsaco"])
        metadata = compiled.metadata
        return {
            "code": f"{code} {metadata.num_warps} {metadata.shared}", "compile_seconds": time.perf_counter() - start,
        }  # fmt: skip
    except Exception as error:  # Triton's passes raise what they like; the answer carries it
        return {"error": _one_line(error), "compile_seconds": time.perf_counter() - start}


def launch_source(build: Build, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """Return what Triton's JIT hands to its compiler for a launch of `build`: the source and the options.

    The key in the cache is made of their text, so they have to be the JIT's own and not just mean the same.
    """
    kernel, backend = build.kernel, make_backend(target)
    knobs = triton.knobs
    keywords = {
        **dict(build.constants),
        **build.triton_options,
        "debug": kernel.debug or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*(_stand_in(kind) for _, kind in build.signature), **keywords)
    parsed, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), parsed.__dict__


def _stand_in(kind: str) -> Any:
    """Return an argument of a type, as `Build.signature` has it, that a launch would not tell from a real one."""
    if kind.startswith("*"):
        return MockTensor(_ELEMENTS[kind[1:]])
    if not kind.startswith("tensordesc<"):
        # Numbers are not specialised on; 0 and 1 would be taken for constants by Triton if they were.
        return 3
    dtype, _, block = kind.removeprefix("tensordesc<").removesuffix("]>").partition("[")
    sizes = [int(size) for size in block.split(",")]
    # 16-byte strides, whatever the dtype; nothing is read.
    base = torch.empty(16, dtype=_ELEMENTS[dtype])
    return TensorDescriptor(base, [16] * len(sizes), [16] * (len(sizes) - 1) + [1], sizes)


_ELEMENTS = {**TORCH_DTYPES, "i32": torch.int32, "i64": torch.int64}


def _facts(compiled: Any, log: str) -> dict[str, Any]:
    metadata = compiled.metadata
    if "ptx" in compiled.asm:
        text = compiled.asm["ptx"]
        seen = read_ptx(text)
        facts = {**ptxas_usage(log), "shared_bytes": 0, "threads": ptx_threads(text)}
        code = compiled.asm["cubin"]
    else:
        text = compiled.asm["amdgcn"]
        seen = read_gcn(text)
        facts = gcn_usage(text)
        code = compiled.asm["hsaco"]
    code_bytes, digest = machine_code(code)
    return {
        **facts,
        # Triton asks for shared memory at launch; what the code object itself holds is only AMD's static part.
        "shared_bytes": max(facts["shared_bytes"], metadata.shared),
        "tensor_columns": getattr(metadata, "tmem_size", None) or 0,
        "instructions": seen.mma,
        "mma_k": seen.mma_k,
        "loop_float_ops": seen.float_ops,
        "loop_copies": seen.copies,
        "code_bytes": code_bytes,
        "machine_code": digest,
    }


def _one_line(error: Exception) -> str:
    """Return the innermost reason: a kernel's source that Triton does not take is quoted above it."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What ptxas says, then whatever else is called an error, then the last line.
    told = [line for line in lines if line.startswith("ptxas") and ("error" in line or "fatal" in line)]
    told = told or [line for line in lines if "error" in line.lower()] or lines[-1:]
    return f"{type(error).__name__}: {told[0] if told else 'without a message'}"[:MAX_ERROR]


def _diagnosis(errors: Path, seen: int) -> str:
    """Return the first error that the compiler's passes wrote to standard error since `seen` bytes."""
    with errors.open("rb") as file:
        file.seek(seen)
        lines = file.read(1 << 20).decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in lines if "error:" in line), "")[:MAX_ERROR]


def main(errors: Path, cache: Path | None) -> None:
    """Serve until standard input ends. `errors` is where standard error goes, `cache` is Triton's folder.

    Without `cache`, builds are compiled for launches to come and stay where Triton puts them.
    """
    # Ctrl-C is the parent's to handle; it ends this process by closing its input or killing it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever else is printed must not come between the reports.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        print(READY, file=answers, flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            seen = errors.stat().st_size
            build = build_from_json(job["build"])
            if cache is None:
                facts = compile_ahead(build, GPUTarget(*job["target"]))
            else:
                facts = compile_build(build, parse_target(job["target"]))
            if "error" in facts:
                said = _diagnosis(errors, seen)
                facts["error"] = f"{facts['error']} ({said})" if said and said not in facts["error"] else facts["error"]
            if cache is not None:
                # A thousand compiled kernels would fill gigabytes, and nobody reads them again.
                shutil.rmtree(cache, ignore_errors=True)
            print(json.dumps(facts), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None)
