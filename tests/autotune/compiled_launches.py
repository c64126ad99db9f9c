"""Compile ahead, then launch up to where Triton has its compiled kernel; print for each whether the cache had it.

Run by test_precompile.py in a process that does not interpret. The device is a pretended one; nothing is run on it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.cases import operands
from tests.kernels.gpu.test_experts import VARIANTS
from tilecast.autotune.precompile import Precompiler
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.target import parse_target
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertLayer

LAYER = ExpertLayer(hidden=272, intermediate=264, experts=4, top_k=2)
HERE = parse_target("cuda:90").environment()


class Pretended:
    """The part of Triton's driver that a launch asks before it has a kernel."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    names = sys.argv[1:]
    chosen = {name: VARIANTS[name] for name in names}
    registry = Registry()
    for kernel in {kernel.name: kernel for kernel, _ in chosen.values()}.values():
        registry.register(kernel)
    with Precompiler(registry, HERE, workers=2) as ahead:
        for gemm in LAYER.gemms:
            ahead.submit(gemm, [config for _, config in chosen.values()])
        errors = [ahead.wait(gemm, config) for gemm in LAYER.gemms for _, config in chosen.values()]

    triton.runtime.driver.set_active(Pretended())
    hits: list[tuple[str, bool]] = []
    label, function = "", ""

    def heard(*, cache_hit: bool, **_: Any) -> None:
        hits.append((f"{label} {function}", cache_hit))

    triton.knobs.compilation.listener = heard

    def launch(build: Build, grid: tuple[int, ...], device: torch.device, *arguments: Any) -> None:
        nonlocal function
        if build.module != "_sorting":
            function = build.function
            keywords = {**dict(build.constants), **build.triton_options}
            build.kernel.run(*arguments, grid=grid, warmup=True, **keywords)

    Build.launch = launch  # type: ignore[method-assign, assignment]
    for name, (kernel, config) in chosen.items():
        label = name
        given = operands(LAYER, 23)
        out = torch.empty(23 * LAYER.top_k, LAYER.intermediate, dtype=given.hidden.dtype)
        kernel.up(config, given.hidden, given.up, given.route, out)
        for dtype in (given.hidden.dtype, torch.float32):
            out = torch.empty(23, LAYER.hidden, dtype=dtype)
            kernel.down(config, given.intermediate, given.down, given.route, given.topk_weights, out)
    # What nobody compiled ahead is not in the cache: the listener would say so.
    label = "control"
    kernel, config = VARIANTS["grouped"]
    other = operands(ExpertLayer(hidden=272, intermediate=272, experts=4, top_k=2, activation="gelu"), 4)
    out = torch.empty(8, 272, dtype=other.hidden.dtype)
    kernel.up(config, other.hidden, other.up, other.route, out)
    json.dump({"errors": errors, "hits": hits}, sys.stdout)


if __name__ == "__main__":
    main()
