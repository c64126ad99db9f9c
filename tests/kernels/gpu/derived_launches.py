"""Launch every variant in a process that does not interpret, up to what Triton's JIT would compile; print differences.

Run by test_launches.py. Nothing is launched: operands are on the CPU, and a launch ends where Triton would look for
its compiled kernel.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from tests.cases import operands
from tests.kernels.gpu.test_experts import HERE, TILE, VARIANTS
from tilecast.kernels._compile import source_of
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.fp8 import Fp8
from tilecast.kernels.gpu.moe import TritonExperts
from tilecast.problem import ExpertLayer, TileConfig

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
LAYERS = (
    ExpertLayer(hidden=272, intermediate=264, experts=4, top_k=2, bias=True, activation="swiglu_oai"),
    ExpertLayer(hidden=16, intermediate=16, experts=1, top_k=1, dtype="fp16", gated=False, activation="relu"),
    ExpertLayer(hidden=33, intermediate=47, experts=5, top_k=3, dtype="fp32"),
    ExpertLayer(hidden=64, intermediate=96, experts=2, top_k=2, weight_format="awq_g32"),
    ExpertLayer(hidden=64, intermediate=64, experts=2, top_k=2, weight_format="int8_channel", bias=True),
    ExpertLayer(hidden=272, intermediate=131, experts=4, top_k=2, weight_format="fp8_block128"),
)
LAUNCHED: dict[str, tuple[TritonExperts, TileConfig]] = {
    **VARIANTS,
    "fp8": (Fp8(), TileConfig(Fp8.name, {**TILE, "block_k": 128, "swap": 1})),
}


def derived(build: Build, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What Triton's JIT makes of a launch: types, constants, and what it specialises on."""
    kernel, keywords = build.kernel, {**dict(build.constants), **build.triton_options}
    bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    bound, specialization, options = bind(*arguments, **keywords)
    parsed, signature, constants, attributes = kernel._pack_args(BACKEND, keywords, bound, specialization, options)
    return {
        # Triton writes blocks with spaces here, and takes both forms.
        "types": {name: kind.replace(", ", ",") for name, kind in signature.items()},
        "constants": {str(k): v for k, v in constants.items()},
        "attributes": {str(k): v for k, v in attributes.items() if v},
        "options": {name: getattr(parsed, name) for name in build.triton_options},
    }  # fmt: skip


def built(build: Build) -> dict[str, Any]:
    """What the static analysis compiles for the same build."""
    source, names = source_of(build), build.kernel.arg_names
    constants = {str((names.index(k),)) if isinstance(k, str) else str(k): v for k, v in source.constants.items()}
    return {
        "types": dict(source.signature), "constants": constants,
        "attributes": {str(k): v for k, v in source.attrs.items()},
        "options": build.triton_options,
    }  # fmt: skip


def main() -> None:
    differences: list[str] = []
    launches: dict[str, int] = {}

    def launch(build: Build, grid: tuple[int, ...], device: torch.device, *arguments: Any) -> None:
        if build.module == "_sorting":
            return  # What it writes is not read here.
        there, here = derived(build, arguments), built(build)
        launches[name] = launches.get(name, 0) + 1
        order = [*dict(build.signature), *dict(build.constants)]
        if order != build.kernel.arg_names:
            differences.append(f"{name}: {build.function} takes {build.kernel.arg_names}, the build has {order}")
        for part, launched in there.items():
            for key in sorted(launched.keys() | here[part].keys()):
                pair = launched.get(key), here[part].get(key)
                if repr(pair[0]) != repr(pair[1]):  # True is not 1: either compiles, and each once.
                    differences.append(
                        f"{name}: {build.function} {part} {key}: launched {pair[0]!r}, built {pair[1]!r}"
                    )

    Build.launch = launch  # type: ignore[method-assign, assignment]
    for layer in LAYERS:
        for variant, (kernel, config) in LAUNCHED.items():
            if any(kernel.rejects(gemm, HERE) or kernel.invalid(gemm, config, HERE) for gemm in layer.gemms):
                continue
            name = f"{variant} {layer.label}"
            for tokens in (1, 16, 23):
                given = operands(layer, tokens)
                out = torch.empty(tokens * layer.top_k, layer.intermediate, dtype=given.hidden.dtype)
                kernel.up(config, given.hidden, given.up, given.route, out)
                for dtype in (given.hidden.dtype, torch.float32):
                    out = torch.empty(tokens, layer.hidden, dtype=dtype)
                    kernel.down(config, given.intermediate, given.down, given.route, given.topk_weights, out)
    json.dump({"launches": launches, "differences": differences}, sys.stdout)


if __name__ == "__main__":
    main()
