"""Every valid config of both GEMMs, measured once: the data that tuning is replayed from without the device."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.record import OutOfTime, Record, Setup
from benchmarks.gpu.shapes import find_shape
from tilecast.autotune.plan import make_plan
from tilecast.autotune.search.exhaustive import Exhaustive
from tilecast.autotune.tuner import measure_plan
from tilecast.cache_store.store import open_store
from tilecast.engine.runtime import default_registry
from tilecast.environment import environment_for
from tilecast.evidence import Measurement

MARGIN_S = 5.0
EVERYTHING = Exhaustive(rounds=1, samples=5)


def run(setup: Setup, record: Record) -> dict[str, Any]:
    """Measure one layer at one token count; cut by the run's end, it goes on from the store.

    One round, of every config: the slow ones are what a replay needs, too. The policy is `fastest`, under which nothing
    is left out for its numerics class.
    """
    name, _, count = record.unit.rpartition(".T")
    layer = find_shape(name, tiny=setup.tiny).layer
    plan = make_plan([layer], [int(count)], environment_for(setup.device), policy="fastest")
    budget_s = setup.seconds_left - MARGIN_S
    if budget_s <= 0:
        raise OutOfTime
    setup.out.mkdir(parents=True, exist_ok=True)
    with open_store(setup.out / "sweep.db") as store:
        limit = budget_s if setup.deadline else None
        done = measure_plan(plan, store, default_registry(), strategy=EVERYTHING, budget_s=limit)
        if done.cut:
            print(f"    {record.unit}: {done.measured} measured, {done.cut} left", flush=True)
            raise OutOfTime
        found = [
            measurement
            for gemm in layer.gemms
            for measurement in store.measurements(environment=plan.environment.digest, gemm=gemm, tokens=int(count))
        ]
    statuses = sorted({measurement.status for measurement in found})
    return {
        "layer": layer.to_json(),
        "tokens": int(count),
        "environment": plan.environment.to_json(),
        "counts": {status: sum(m.status == status for m in found) for status in statuses},
        "measurements": [to_json(measurement) for measurement in found],
    }


def to_json(measurement: Measurement) -> dict[str, Any]:
    """Return one measurement without what all of a unit share."""
    return {
        "gemm": measurement.gemm.name,
        "config": measurement.config.to_json(),
        "status": measurement.status,
        "samples_us": list(measurement.samples_us),
        "numerics": measurement.numerics,
        "error_ratio": measurement.error_ratio,
        "run": measurement.run,
        "round": measurement.round,
        "detail": measurement.detail,
    }
