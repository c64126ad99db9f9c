from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.tables import LAYER, decided, default_config
from tilecast.cache_store.bundle import export_table
from tilecast.engine import runtime
from tilecast.engine.adapted_model import AdaptedModel, AdaptedModule, log_adapted
from tilecast.engine.runtime import use_table
from tilecast.engine.table_runtime import Runtime, missing_buckets
from tilecast.environment import cpu_environment
from tilecast.errors import CacheError, ConfigError, CoverageError, InputError
from tilecast.evidence import TuningTable
from tilecast.kernels import registry
from tilecast.problem import Bucket, ExpertGemm, ExpertLayer, TileConfig

HERE = cpu_environment()


def built(table: TuningTable, policy: str = "reproducible", miss: str = "default", warn_miss: bool = False) -> Runtime:
    return Runtime(table, environment=HERE, registry=registry, policy=policy, miss=miss, warn_miss=warn_miss)


def marked(gemm: ExpertGemm, tokens: int) -> TileConfig:
    """The default config, its thread cap changed, so that a decided config can be told from a default one."""
    return default_config(gemm, tokens).with_params(threads=tokens)


def test_every_token_count_finds_its_bucket_and_nothing_else() -> None:
    table = decided(LAYER, tokens=(1, 4, 16), choose=marked)
    here = built(table)
    for tokens in range(1, 17):
        entry = here.lookup(LAYER, tokens)
        edge = next(t for t in (1, 4, 16) if tokens <= t)
        assert entry.hit and entry.bucket is not None and tokens in entry.bucket
        assert entry.up.integer("threads") == edge == entry.down.integer("threads")
    assert here.misses() == ()
    assert not here.lookup(LAYER, 17).hit


def test_a_gap_between_buckets_is_a_miss() -> None:
    whole = decided(LAYER, tokens=(1, 4, 16))
    gap = TuningTable(whole.environments, tuple(d for d in whole.decisions if d.bucket.tokens != 4))
    here = built(gap)
    assert here.lookup(LAYER, 1).hit and here.lookup(LAYER, 5).hit
    assert not here.lookup(LAYER, 2).hit and not here.lookup(LAYER, 4).hit
    assert here.covers(LAYER, 1) and not here.covers(LAYER, 3)
    assert missing_buckets(here, LAYER, [1, 3, 4, 9, 40]) == (
        Bucket(above=1, tokens=3),
        Bucket(above=3, tokens=4),
        Bucket(above=16, tokens=40),
    )


def test_a_miss_runs_the_default_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    other = replace(LAYER, hidden=128)
    here = built(decided(LAYER), warn_miss=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            entry = here.lookup(other, 5)
        here.lookup(LAYER, 99)
    assert entry.up == default_config(other.up, 5) and not entry.hit
    assert [(m.layer, m.tokens, m.count) for m in here.misses()] == [(other, 5, 3), (LAYER, 99, 1)]
    assert here.miss_count == 4
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "the table has no decision for E4 H128" in lines[0] and LAYER.label in lines[0]
    assert "covers 99 tokens; covered: 1, 2–4, 5–16" in lines[1]


def test_a_miss_without_warnings_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        built(TuningTable()).lookup(LAYER, 5)
    assert caplog.records == []


def test_a_miss_keeps_layout_and_class_of_the_decided_buckets() -> None:
    table = decided(LAYER, choose=lambda gemm, tokens: default_config(gemm, tokens).with_params(layout="panel32"))
    entry = built(table).lookup(LAYER, 1000)
    assert not entry.hit
    assert entry.up["layout"] == entry.down["layout"] == "panel32"
    assert registry.invalid(LAYER.up, entry.up, HERE) is None


def test_miss_error_names_the_reason_and_the_way_out() -> None:
    here = built(decided(LAYER), miss="error")
    assert here.lookup(LAYER, 3).hit
    with pytest.raises(CoverageError, match=r"covers 17 tokens.*tilecast tune.*TM_GEMM_MISS=default"):
        here.lookup(LAYER, 17)


def test_decisions_of_another_policy_are_a_miss_that_says_so() -> None:
    here = built(decided(LAYER, policy="fastest"))
    assert "decided for fastest/uniform only" in here.lookup(LAYER, 1).reason
    assert here.with_policy("fastest").lookup(LAYER, 1).hit
    assert here.with_policy("reproducible") is here


@pytest.mark.parametrize("tokens", [0, -1, 1 << 25])
def test_impossible_token_counts(tokens: int) -> None:
    with pytest.raises(InputError, match="tokens is"):
        built(TuningTable()).lookup(LAYER, tokens)


def test_unknown_policy_and_miss_mode() -> None:
    with pytest.raises(InputError, match="policy is 'fast'"):
        built(TuningTable(), policy="fast")
    with pytest.raises(InputError, match="miss mode is 'crash'"):
        built(TuningTable(), miss="crash")


@pytest.mark.parametrize(
    ("choose", "reason"),
    [
        (lambda g, t: TileConfig("no.such_kernel"), "no kernel is named 'no.such_kernel'"),
        (lambda g, t: default_config(g, t).with_params(mr=99), "mr=99 is outside"),
        (lambda g, t: default_config(g, t).with_params(mr=14, nv=8), "do not fit"),
        (lambda g, t: TileConfig("llvm.moe_gemm", {"mr": 1}), "missing parameters"),
    ],
)
def test_an_impossible_config_is_refused_naming_its_entry(choose, reason: str) -> None:  # type: ignore[no-untyped-def]
    table = decided(LAYER, tokens=(4,), choose=choose)
    with pytest.raises(ConfigError, match=reason) as caught:
        built(table)
    assert f"entry {LAYER.label}, 1–4 tokens, reproducible, up" in str(caught.value)


def test_buckets_of_one_layer_must_share_the_weight_layout() -> None:
    def choose(gemm: ExpertGemm, tokens: int) -> TileConfig:
        return default_config(gemm, tokens).with_params(layout="panel16" if tokens == 1 else "panel32")

    with pytest.raises(ConfigError, match=r"2–4 tokens.*weight layout differs"):
        built(decided(LAYER, choose=choose))


@pytest.mark.parametrize("field", ["device", "arch", "features", "kernel_source"])
def test_a_table_of_another_device_is_refused_with_the_field(field: str) -> None:
    there = replace(HERE, **{field: "another"})
    with pytest.raises(CoverageError, match=f"{field}: here .* there 'another'") as caught:
        built(decided(LAYER, environment=there))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "effect"),
    [
        ({"system": "another system", "threads": 77}, "times may differ, bits do not"),
        ({"torch": f"{HERE.torch}.post9", "threads": 77}, "tune it here to be sure of times and bits"),
    ],
)
def test_soft_differences_are_allowed_and_logged_once(
    caplog: pytest.LogCaptureFixture, changes: dict[str, object], effect: str
) -> None:
    there = replace(HERE, **changes)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        here = use_table(decided(LAYER, environment=there))
        assert here.lookup(LAYER, 1).hit and here.lookup(LAYER, 2).hit
        here.with_policy("fastest")
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"threads '77' (here '{HERE.threads}')" in line and line.endswith(effect)


def test_gaps_are_filled_from_environments_that_differ_softly() -> None:
    """What was tuned here in addition must not hide what came with the table."""
    there = replace(HERE, threads=77)
    foreign = decided(LAYER, tokens=(4, 16), environment=there, choose=marked)
    here = built(foreign.merged(decided(LAYER, tokens=(8,))))
    # 1-8 was decided here; 5-16 overlaps it, and so does 1-4.
    assert here.buckets(LAYER) == (Bucket(above=0, tokens=8),)
    apart = TuningTable(foreign.environments, tuple(d for d in foreign.decisions if d.bucket.tokens == 16))
    here = built(apart.merged(decided(LAYER, tokens=(4,))))
    assert [b.tokens for b in here.buckets(LAYER)] == [4, 16]
    assert here.lookup(LAYER, 3).up == default_config(LAYER.up, 4)
    assert here.lookup(LAYER, 9).up == marked(LAYER.up, 16)


def test_what_has_another_layout_elsewhere_fills_no_gap() -> None:
    there = replace(HERE, threads=77)
    other = decided(
        LAYER, tokens=(4, 16), environment=there, choose=lambda g, t: default_config(g, t).with_params(layout="panel16")
    )
    mine = decided(LAYER, tokens=(4,), choose=lambda g, t: default_config(g, t).with_params(layout="panel32"))
    assert [b.tokens for b in built(mine.merged(other)).buckets(LAYER)] == [4]


def test_the_closest_environment_decides_a_layer() -> None:
    there = replace(HERE, system="another system")
    foreign = replace(HERE, device="another device")
    mine = decided(LAYER, tokens=(4,), choose=marked)
    table = mine.merged(decided(LAYER, tokens=(8,), environment=there)).merged(decided(LAYER, environment=foreign))
    here = built(table)
    assert here.buckets(LAYER) == (Bucket(above=0, tokens=4),)
    assert here.lookup(LAYER, 3).up.integer("threads") == 4


def test_current_reads_the_environment_variables_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    path = tmp_path / "table.db"
    export_table(decided(LAYER, choose=marked), path)
    monkeypatch.setenv("TM_GEMM_IMPORT", str(path))
    first = runtime.current()
    path.unlink()
    assert runtime.current() is first
    assert runtime.lookup(LAYER, 3).up.integer("threads") == 4
    assert runtime.misses() == ()
    runtime.forget_table()
    with pytest.raises(CacheError, match=r"table\.db"):
        runtime.current()


def test_use_table_takes_policy_and_miss_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TM_GEMM_POLICY", "fastest")
    monkeypatch.setenv("TM_GEMM_MISS", "error")
    here = use_table(decided(LAYER, policy="fastest"))
    assert here.policy == "fastest" and runtime.current() is here
    with pytest.raises(CoverageError):
        runtime.lookup(LAYER, 99)
    assert use_table(None, policy="reproducible", miss="default").lookup(LAYER, 1).hit is False


@pytest.mark.parametrize(("layer", "warned"), [(LAYER, False), (replace(LAYER, intermediate=48), True)])
def test_a_table_that_decides_nothing_of_a_model_is_warned_of(
    layer: ExpertLayer, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    used = use_table(decided(LAYER))
    modules = (AdaptedModule(name="experts", layers=(layer,), reason=None),)
    log_adapted(AdaptedModel(modules=modules, runtime=used), "another way")
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert bool(found) == warned
    assert all("all are on default configs" in text and layer.label in text and LAYER.label in text for text in found)
