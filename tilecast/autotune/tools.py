"""What a tuning on this device works with: the device to itself, a measurer that survives, a model, a watch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tilecast.autotune.calibrate import Calibration, calibration_for, nominal
from tilecast.autotune.device_lock import device_lock
from tilecast.autotune.measure import DeviceMeasurer, Measurer
from tilecast.autotune.plan import Plan
from tilecast.autotune.precompile import Precompiler
from tilecast.autotune.rank import CostModel, ModelRanker
from tilecast.autotune.sandbox import SandboxMeasurer, expected_launch_s
from tilecast.autotune.session import Ahead
from tilecast.autotune.tuner import Ranker
from tilecast.autotune.watches import Watch, watch_for
from tilecast.environment import Environment
from tilecast.errors import DeviceError
from tilecast.kernels.spec import Registry
from tilecast.problem import ExpertGemm

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 600.0
"""How long one of several ranks waits for its device: two jobs that hold devices crosswise would wait for ever."""
PROBE_TIMEOUT_S = 10.0
"""How long a forecast waits to probe: it is asked for an estimate, and the other tuning may take hours."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """See `measure_plan`, which takes each of them."""

    measurer: Measurer
    ranker: Ranker
    watch: Watch | None
    ahead: Ahead | None


@contextmanager
def device_tools(
    plan: Plan,
    registry: Registry,
    *,
    folder: Path | None = None,
    calibrate: Callable[[], Calibration] | None = None,
    ranks: int = 1,
    sandbox: bool = True,
) -> Iterator[Tools]:
    """Hold the device that `plan` is about, and give what measures on it.

    `calibrate` gives the device's limits and is called while the device is held, as other users would disturb a probe;
    by default it gives this device's, kept in `folder`. `sandbox` measures in a process of its own, which a
    candidate that hangs or crashes costs, and not the tuning. Of several `ranks` on a CPU each is what disturbs the
    others, as it will in production: nothing is watched then. Raises DeviceError where the device cannot be had.
    """
    environment = plan.environment
    tokens = tuple(bucket.tokens for bucket in plan.buckets)
    factory = partial(DeviceMeasurer, environment, registry, routing=plan.routing_profile, tokens=tokens)
    with ExitStack() as stack:
        stack.enter_context(device_lock(environment, timeout_s=LOCK_TIMEOUT_S if ranks > 1 else None))
        limits = calibration_for(environment, registry, folder=folder) if calibrate is None else calibrate()
        model = CostModel(environment, limits)
        measurer: Measurer
        pids = None
        if sandbox:
            sandboxed = stack.enter_context(SandboxMeasurer(factory, expected_s=partial(_expected_s, model, registry)))
            measurer, pids = sandboxed, sandboxed.pids
        else:
            measurer = factory()
        is_gpu = environment.device_kind == "cuda"
        yield Tools(
            measurer=measurer,
            ranker=ModelRanker(model, registry, plan.routing_profile),
            watch=watch_for(environment, pids=pids) if is_gpu or ranks == 1 else None,
            ahead=stack.enter_context(Precompiler(registry, environment)) if is_gpu else None,
        )


def limits_for_forecast(environment: Environment, registry: Registry, *, folder: Path) -> Calibration:
    """Return the limits kept in `folder`, or probed while the device is held; nominal ones where others hold it."""
    try:
        return calibration_for(
            environment, registry, folder=folder, hold=partial(device_lock, environment, timeout_s=PROBE_TIMEOUT_S)
        )
    except DeviceError as error:
        logger.warning("the forecast goes by nominal limits, as this device was not probed: %s", error)
        return nominal(environment)


def _expected_s(model: CostModel, registry: Registry, gemm: ExpertGemm, tokens: int) -> float:
    """Return the seconds of one launch of the default config."""
    kernel = registry.default_kernel(gemm, model.environment)
    config = kernel.default(gemm, tokens, model.environment)
    predicted_us = model.predict_us(gemm, tokens, config, registry[config.kernel])
    return expected_launch_s(gemm, tokens) if predicted_us is None else predicted_us / 1e6
