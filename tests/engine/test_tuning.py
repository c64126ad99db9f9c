"""Tuning by several ranks on one durable store; ranks are threads here, processes are in test_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from tests.engine.tables import LAYER, default_config
from tests.engine.test_group import Ranks
from tests.torchrun.small_kernel import small_registry
from tilecast.autotune.plan import make_plan
from tilecast.cache_store.store import open_store
from tilecast.engine.group import Group
from tilecast.engine.tuning import _WatchingVerifier, tune_together
from tilecast.environment import cpu_environment
from tilecast.errors import AgreementError
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
