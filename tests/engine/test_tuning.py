"""Tuning by several ranks on one durable store; ranks are threads here, processes are in test_ranks.py."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest

from tests.engine.tables import LAYER, default_config
from tests.engine.test_group import Ranks
from tests.torchrun.small_kernel import small_registry
from tilecast.autotune.calibrate import Calibration, nominal
from tilecast.autotune.device_lock import device_lock
from tilecast.autotune.plan import make_plan
from tilecast.cache_store.store import open_store
from tilecast.engine.group import Group
from tilecast.engine.tuning import _tools, _WatchingVerifier, tune_together
from tilecast.environment import cpu_environment
from tilecast.errors import AgreementError, DeviceError
from tilecast.evidence import TuningTable
from tilecast.problem import Bucket

HERE = cpu_environment()


def test_another_number_of_ranks_is_a_new_run_in_the_store_that_the_next_start_goes_on_with(tmp_path: Path) -> None:
    plan, path = make_plan([LAYER], (1,), HERE), tmp_path / "store.db"
    ranks = Ranks(2)

    def tune(group: Group) -> TuningTable:
        store = open_store(path) if group.rank == 0 else None
        try:
            return tune_together(plan, store, group, registry=small_registry())
        finally:
            if store is not None:
                store.close()

    tune(Group.alone())
    counts = []
    for _ in range(2):
        first, second = ranks.run(tune)
        assert isinstance(first, TuningTable) and first == second
        with open_store(path) as store:
            found = store.measurements()
        counts.append(len(found))
        assert {(m.run, m.world_size, m.rank) for m in found} == {(0, 1, 0), (1, 2, 0), (1, 2, 1)}
    assert counts[0] == counts[1], "the second start of two ranks measured again"


def test_the_class_check_ends_when_another_rank_failed() -> None:
    class Failed:
        def check(self) -> None:
            raise AgreementError("rank 1 died")

    verifier = _WatchingVerifier(cast(Group, Failed()), HERE, small_registry())
    with pytest.raises(AgreementError, match="rank 1 died"):
        verifier.verify(LAYER.up, default_config(LAYER.up, 1), Bucket(above=0, tokens=1))


def test_rank_0_probes_the_device_once_while_the_job_holds_it(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    probes: list[bool] = []

    def probe(*_: object, **__: object) -> Calibration:
        held = True
        with suppress(DeviceError), device_lock(HERE, timeout_s=0.0, job="another"):
            held = False
        probes.append(held)
        return nominal(HERE)

    monkeypatch.setenv("TM_GEMM_SANDBOX", "0")
    monkeypatch.setattr("tilecast.engine.tuning.calibration_for", probe)

    def start(group: Group) -> bool:
        with _tools(make_plan([LAYER], (1,), HERE), small_registry(), group) as tools:
            return tools.ranker is not None

    assert Ranks(2).run(start) == [True, True]
    assert probes == [True]
