"""GPU candidates are compiled while others are measured: their first launch finds them in Triton's cache.

On a CPU there is nothing to do here: compiling takes the cores that are measured, and the measurer does it before
(`DeviceMeasurer.compile`); what was compiled is kept on disk by the kernels themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, Protocol, cast

from tilecast.canonical import Json, digest
from tilecast.environment import Environment
from tilecast.errors import DeviceError
from tilecast.kernels.compilers import AheadCompilers
from tilecast.kernels.gpu.build import Build
from tilecast.kernels.gpu.target import Target, target_of
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm, TileConfig

MAX_WORKERS = 8
"""Each takes a core and half a gigabyte; more candidates than these compile are rarely needed at once."""

COMPILED_ONLY = ("group_m", "num_stages")
"""Parameters that nothing but compiled code depends on: grids, descriptors and operands follow from the others."""

Compiling = Future[dict[str, Any]]


class _Compiled(Protocol):
    """A kernel that says what a launch compiles."""

    def builds(
        self, gemm: ExpertGemm, config: TileConfig, target: Target, *, out_dtype: str | None = None
    ) -> tuple[Build, ...]: ...


class Precompiler:
    """Compiles candidates in processes of their own. A context manager: leaving it ends them.

    One less process than there are cores compiles, so that the one that submits launches to the device has its own.
    """

    def __init__(self, registry: Registry, environment: Environment, *, workers: int | None = None) -> None:
        """Compile kernels of `registry` for the device of `environment`."""
        self._registry = registry
        self._target = None if environment.device_kind == "cpu" else target_of(environment)
        self._arch = environment.arch
        self._workers = workers or max(1, min(MAX_WORKERS, _cores() - 1))
        self._pool: AheadCompilers | None = None
        self._jobs: dict[str, Compiling] = {}

    def __enter__(self) -> Precompiler:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process."""
        self.close()

    def submit(self, gemm: ExpertGemm, configs: Iterable[TileConfig]) -> None:
        """Start compiling what launches of `configs` need, in this order, each build once; does not wait."""
        for config in configs:
            self._futures(gemm, config)

    def wait(self, gemm: ExpertGemm, config: TileConfig) -> str | None:
        """Wait until `config` is compiled, submitted before or not; return the compiler's error, None if all is well.

        A kernel that compiles nothing counts as well, and so do a pool that was closed or cannot start and a process
        that was killed: a launch compiles by itself, and says what is wrong.
        """
        for future in self._futures(gemm, config):
            try:
                error = future.result().get("error")
            except (CancelledError, DeviceError):
                return None
            if error:
                return str(error)
        return None

    def code(self, gemm: ExpertGemm, config: TileConfig) -> str | None:
        """Return what configs have in common whose launches are one: machine code, grid and operands.

        None where some of the code is not compiled, or nothing is told of it.
        """
        futures = self._futures(gemm, config)
        if not futures or not all(future.done() and not future.cancelled() for future in futures):
            return None
        codes = [None if future.exception() else future.result().get("code") for future in futures]
        if None in codes:
            return None
        launched = {name: value for name, value in config.params if name not in COMPILED_ONLY}
        return digest({"kernel": config.kernel, "params": launched, "code": codes})

    def close(self) -> None:
        """End every process, whatever it is doing."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self._target = None

    def _futures(self, gemm: ExpertGemm, config: TileConfig) -> list[Compiling]:
        return [self._submitted(build) for build in self._builds(gemm, config)]

    def _builds(self, gemm: ExpertGemm, config: TileConfig) -> tuple[Build, ...]:
        kernel = self._registry[config.kernel]
        if self._target is None or not hasattr(kernel, "builds"):
            return ()
        # The gate launches down into float32 as well: the partial sum of a rank.
        wanted = (None,) if gemm.name == "up" else (None, "fp32")
        compiled = cast(_Compiled, kernel)
        return tuple(
            b for out_dtype in wanted for b in compiled.builds(gemm, config, self._target, out_dtype=out_dtype)
        )

    def _submitted(self, build: Build) -> Compiling:
        found = self._jobs.get(build.digest)
        if found is None:
            self._pool = self._pool or AheadCompilers(self._workers)
            found = self._jobs[build.digest] = self._pool.submit(
                {"build": build.to_json(), "target": _triton_target(cast(Target, self._target), self._arch)}
            )
        return found


def _triton_target(target: Target, arch: str) -> Json:
    """Return the arguments of Triton's GPUTarget for this device: its own architecture, not that of its kind."""
    own: Json = int(arch.removeprefix("sm_")) if target.kind == "cuda" else arch
    return [target.kind, own, target.warp_size]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
