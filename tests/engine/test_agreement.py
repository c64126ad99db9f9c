"""Start-up of one process; several ranks are in test_ranks.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.tables import LAYER, decided, default_config
from tests.torchrun.small_kernel import SmallGemm, small_registry
from tilecast.autotune.plan import make_plan
from tilecast.autotune.race import Progress
from tilecast.cache_store.bundle import export_table, import_table
from tilecast.cache_store.memory import MemoryStore
from tilecast.cache_store.store import open_store
from tilecast.engine import runtime
from tilecast.engine.agreement import agree_on_table, startup
from tilecast.engine.group import Group
from tilecast.engine.table_runtime import Runtime
from tilecast.engine.tuning import tune_together
from tilecast.environment import cpu_environment
from tilecast.errors import CacheError, CoverageError
from tilecast.evidence import TuningTable
from tilecast.kernels.cpu.onednn import OneDnnLinear
from tilecast.kernels.spec import Registry
from tilecast.problem import TileConfig
from tilecast.settings import Settings, TuneSettings

HERE = cpu_environment()


def start(tmp_path: Path, store: MemoryStore | None = None, **options: object) -> Runtime:
    settings = Settings(cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]
    return startup([LAYER], settings, group=Group.alone(), registry=small_registry(), store=store, budget_s=4)


def test_nothing_asked_for_is_an_empty_table(tmp_path: Path) -> None:
    here = start(tmp_path)
    assert len(here.table) == 0 and runtime.current() is here
    assert not here.lookup(LAYER, 1).hit


def test_tuning_covers_exports_and_is_kept_in_the_default_store(tmp_path: Path) -> None:
    path = tmp_path / "out.db"
    here = start(tmp_path, tune=TuneSettings(tokens=(1, 4)), export_to=str(path))
    assert [b.tokens for b in here.buckets(LAYER)] == [1, 4]
    assert here.lookup(LAYER, 3).hit
    assert import_table(path).digest == here.table.digest
    with open_store(tmp_path / "cache" / "store.db") as store:
        assert store.table().digest == here.table.digest
        assert store.measurements()


def test_miss_tune_tunes_at_start_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilecast.engine.agreement.DEFAULT_TOKENS", (2,))
    here = start(tmp_path, MemoryStore(), miss="tune")
    assert here.lookup(LAYER, 2).hit
    assert not here.lookup(LAYER, 3).hit  # a later miss acts as default


def test_missing_buckets_keep_the_layout_of_the_decided_ones(tmp_path: Path) -> None:
    """panel32 is never the default's layout, so only the anchor can make it so."""
    path = tmp_path / "in.db"
    table = decided(LAYER, tokens=(4,), choose=lambda g, t: default_config(g, 1).with_params(layout="panel32"))
    export_table(table, path)
    here = start(tmp_path, MemoryStore(), import_from=str(path), tune=TuneSettings(tokens=(1, 2, 4, 8)))
    # 1, 2 and 4 are in the bucket 1–4 already.
    assert [(b.above, b.tokens) for b in here.buckets(LAYER)] == [(0, 4), (4, 8)]
    entry = here.lookup(LAYER, 8)
    assert entry.hit and entry.up["layout"] == entry.down["layout"] == "panel32"
    assert type(entry.up_kernel) is SmallGemm
    assert here.table.decisions[0].to_json() == table.decisions[0].to_json()


def test_tuning_the_rest_of_a_table_keeps_what_was_tuned_on_another_number_of_threads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "in.db"
    export_table(decided(LAYER, tokens=(4,), environment=replace(HERE, threads=77)), path)
    with caplog.at_level("WARNING"):
        here = start(tmp_path, MemoryStore(), import_from=str(path), tune=TuneSettings(tokens=(4, 8)))
    assert [b.tokens for b in here.buckets(LAYER)] == [4, 8]
    assert here.lookup(LAYER, 3).hit and here.lookup(LAYER, 8).hit


def test_a_start_logs_in_one_line_where_the_table_was_tuned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "in.db"
    export_table(decided(LAYER, environment=replace(HERE, threads=77)), path)
    with caplog.at_level("WARNING"):
        start(tmp_path, import_from=str(path))
    assert len(caplog.records) == 1 and "bits do not" in caplog.records[0].getMessage()


def test_a_cache_folder_that_cannot_be_made_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CacheError, match="cache"):
        start(tmp_path, tune=TuneSettings(tokens=(1,)))


def test_the_rest_of_a_layer_whose_gemms_run_on_different_kernels(tmp_path: Path) -> None:
    path = tmp_path / "in.db"
    plain = TileConfig("onednn.linear", {"prepack": "no", "row_block": 0})
    for up, down in ((None, plain), (plain, None)):
        chosen = {"up": up, "down": down}
        table = decided(
            LAYER, tokens=(4,), policy="fastest",
            choose=lambda g, t, chosen=chosen: chosen[g.name] or default_config(g, t),  # type: ignore[misc]
        )  # fmt: skip
        export_table(table, path)
        here = startup(
            [LAYER],
            Settings(
                cache_dir=tmp_path, import_from=str(path), policy="fastest", tune=TuneSettings(tokens=(4, 8))
            ),
            group=Group.alone(), registry=Registry((SmallGemm(), OneDnnLinear())), store=MemoryStore(), budget_s=2,
        )  # fmt: skip
        assert [b.tokens for b in here.buckets(LAYER)] == [4, 8]


def test_what_is_covered_is_not_tuned_again(tmp_path: Path) -> None:
    path = tmp_path / "in.db"
    export_table(decided(LAYER, tokens=(1, 4)), path)
    store = MemoryStore()
    here = start(tmp_path, store, import_from=str(path), tune=TuneSettings(tokens=(1, 4)))
    assert store.measurements() == [] and store.environments() == []
    assert here.table.digest == import_table(path).digest


def test_a_start_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    store = MemoryStore()
    plan = make_plan([LAYER], (1, 4), HERE)

    def stop(event: Progress) -> None:
        if event.task == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_together(plan, store, Group.alone(), registry=small_registry(), progress=stop)
    kept = {m.key: m for m in store.measurements()}
    assert kept
    table = tune_together(plan, store, Group.alone(), registry=small_registry(), budget_s=2)
    assert {key: m for key, m in ((m.key, m) for m in store.measurements()) if key in kept} == kept
    assert [d.bucket.tokens for d in table.decisions] == [1, 4]
    assert store.table().digest == table.digest


def test_fresh_tuning_measures_again(tmp_path: Path) -> None:
    store = MemoryStore()
    plan = make_plan([LAYER], (1,), HERE)
    for fresh in (False, False, True):
        tune_together(plan, store, Group.alone(), registry=small_registry(), budget_s=2, fresh=fresh)
    assert {m.run for m in store.measurements()} == {0, 1}


def test_an_export_that_cannot_be_written_fails_before_anything_is_measured(tmp_path: Path) -> None:
    store = MemoryStore()
    tune = TuneSettings(tokens=(1,))
    notes = tmp_path / "notes.txt"
    notes.write_text("keep me" * 100)
    for path, reason in (
        (tmp_path / "no" / "x.db", "cannot be written"),
        (tmp_path, "is a directory"),
        (notes, "some other file"),
    ):
        with pytest.raises(CacheError, match=reason):
            start(tmp_path, store, tune=tune, export_to=str(path))
    assert notes.read_text().startswith("keep me")
    assert store.measurements() == []


def test_a_failed_start_leaves_the_table_in_use_as_it_was(tmp_path: Path) -> None:
    before = runtime.use_table(decided(LAYER))
    path = tmp_path / "foreign.db"
    export_table(decided(LAYER, environment=replace(HERE, device="another CPU")), path)
    with pytest.raises(CoverageError, match="another CPU"):
        start(tmp_path, import_from=str(path))
    assert runtime.current() is before
    good, out = tmp_path / "good.db", tmp_path / "out.db"
    export_table(decided(LAYER, tokens=(2,)), good)
    out.mkdir()
    with pytest.raises(CacheError):
        start(tmp_path, import_from=str(good), export_to=str(out))
    assert runtime.current() is before


def test_agreeing_alone_returns_the_table() -> None:
    table = decided(LAYER)
    assert agree_on_table(Group.alone(), table) is table
    assert agree_on_table(Group.alone(), None) == TuningTable()
