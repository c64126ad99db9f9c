from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilecast.errors import UsageError
from tilecast.settings import (
    DEFAULT_SEQUENCE,
    DEFAULT_TOKENS,
    MAX_TOKEN_COUNTS,
    Launcher,
    Settings,
    TuneSettings,
    launcher,
    parse_tokens,
    parse_tune,
)

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TURBOMIND_DEFAULT = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def from_environment(**values: str) -> Settings:
    return Settings.from_environment({"HOME": "/home/someone", **values})


def test_default_tokens_are_the_documented_list() -> None:
    assert (1, 2, 4, *TURBOMIND_DEFAULT) == DEFAULT_TOKENS
    assert parse_tokens(DEFAULT_SEQUENCE) == DEFAULT_TOKENS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8-16-8,16-64-16,8192", TURBOMIND_DEFAULT),
        ("7", (7,)),
        ("16777216", (16777216,)),
        ("1,4,16,64,256", (1, 4, 16, 64, 256)),
        (" 1 , 4 ", (1, 4)),
        # Doubles at 4 (step 2), at 8 (step 4), at 16 (step 8).
        ("1-4-1,40", (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40)),
        # Doubles at once where next is the start.
        ("8-8-8,64", (8, 24, 40, 56, 64)),
        # 20 is never landed on, so the step stays.
        ("8-20-8,40", (8, 16, 24, 32, 40)),
        # Ends where the following item starts, even in the middle of a step.
        ("1-2-1,5-10-5,12", (1, 2, 4, 5, 10, 12)),
        ("8-16-8,9", (8, 9)),
    ],
)
def test_parse_tokens(text: str, expected: tuple[int, ...]) -> None:
    assert parse_tokens(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected 1 to"),
        (",", "expected 1 to"),
        ("4,", "expected 1 to"),
        ("0", "expected 1 to 16777216"),
        ("-4", "start-next-step"),
        ("16777217", "expected 1 to 16777216"),
        ("9" * 1_000_000, "expected 1 to 16777216"),
        ("1.5", "expected 1 to"),
        ("٣", "expected 1 to"),
        ("8-16", "start-next-step"),
        ("8-16-8-8,99", "start-next-step"),
        ("8-16-0,99", "expected 1 to"),
        ("8-4-2,16", "next is 4"),
        ("8-4-2", "next is 4"),
        ("8-16-8", "last item"),
        ("16,8", "ascend"),
        ("8,8", "ascend"),
        ("8-16-8,4", "ascend"),
        ("16-64-16,8-16-8,8192", "ascend"),
        ("1-16777216-1,16777216", f"more than {MAX_TOKEN_COUNTS}"),
    ],
)
def test_parse_tokens_refuses(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_tokens(text)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_parse_tokens_allows_exactly_the_bound() -> None:
    assert parse_tokens(f"1-{MAX_TOKEN_COUNTS}-1,{MAX_TOKEN_COUNTS}") == tuple(range(1, MAX_TOKEN_COUNTS + 1))
    with pytest.raises(UsageError):
        parse_tokens(f"1-{MAX_TOKEN_COUNTS + 1}-1,{MAX_TOKEN_COUNTS + 1}")


@given(st.text("0123456789-, ", max_size=24))
def test_parse_tokens_ascends_or_refuses(text: str) -> None:
    try:
        counts = parse_tokens(text)
    except UsageError:
        return
    assert list(counts) == sorted(set(counts))
    assert 1 <= len(counts) <= MAX_TOKEN_COUNTS


def test_parse_tune() -> None:
    assert parse_tune("1") == parse_tune("TRUE") == TuneSettings(tokens=DEFAULT_TOKENS)
    assert parse_tune("0") is None
    assert parse_tune("off") is None
    assert parse_tune("seq=[8-16-8,16-64-16,8192],max_time=1,top_k=8") == TuneSettings(
        tokens=TURBOMIND_DEFAULT, max_time_ms=1.0, top_k=8
    )
    assert parse_tune("min_iter=2,max_iter=20,top_k=0") == TuneSettings(
        tokens=DEFAULT_TOKENS, top_k=0, min_iter=2, max_iter=20
    )


@pytest.mark.parametrize("text", ["seq=[300]", "seq=300", "seq=(300)", "300"])
def test_a_lone_number_replaces_the_default_maximum(text: str) -> None:
    settings = parse_tune(text)
    assert settings is not None
    assert settings.tokens == (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 300)


@pytest.mark.parametrize(
    ("maximum", "expected"), [(1, (1,)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (16384, (*DEFAULT_TOKENS, 12288, 16384))]
)
def test_the_default_maximum_can_be_any_number(maximum: int, expected: tuple[int, ...]) -> None:
    settings = parse_tune(f"seq={maximum}")
    assert settings is not None
    assert settings.tokens == expected


def test_parse_tune_names_keys_without_effect() -> None:
    settings = parse_tune("swizzle=[2,3,4],max_splits=8,top_k=1")
    assert settings is not None
    assert settings.ignored == ("max_splits", "swizzle")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("maybe", "key=value"),
        ("top_k", "key=value"),
        ("top_k=", "key=value"),
        ("top_k=8,", "key=value"),
        ("topk=8", "unknown key 'topk'.*top_k"),
        ("top_k=8,top_k=9", "twice"),
        ("top_k=-1", "top_k is '-1'"),
        ("top_k=1.5", "top_k is"),
        ("max_time=0", "max_time is '0'"),
        ("max_time=nan", "max_time is"),
        ("max_time=inf", "max_time is"),
        ("max_time=soon", "max_time is"),
        ("min_iter=0", "min_iter is"),
        ("seq=[8-16-8,64", "brackets"),
        ("seq=8]", "brackets"),
        ("seq=[8)", "brackets"),
        ("seq=[[8]]", "brackets"),
        ("seq=[]", "expected 1 to"),
        ("seq=[64,8]", "ascend"),
        ("99999999999", "expected 1 to"),
    ],
)
def test_parse_tune_refuses(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_tune(text)


def test_nothing_set() -> None:
    assert from_environment() == Settings(cache_dir=Path("/home/someone/.cache/tilecast"))


def test_empty_counts_as_unset() -> None:
    names = ("IMPORT", "EXPORT", "TUNE", "MISS", "WARN_CACHE_MISS", "POLICY", "RECORD")
    empty = {f"TM_GEMM_{name}": "" for name in names}
    assert from_environment(**empty, TILECAST_CACHE_DIR="", XDG_CACHE_HOME="") == from_environment()


def test_everything_set() -> None:
    assert from_environment(
        TM_GEMM_IMPORT="postgresql://host/db",
        TM_GEMM_EXPORT="/tmp/out.db",
        TM_GEMM_RECORD="misses.json",
        TM_GEMM_TUNE="seq=[4]",
        TM_GEMM_MISS="error",
        TM_GEMM_WARN_CACHE_MISS="yes",
        TM_GEMM_POLICY="fastest",
        TM_GEMM_ROUTING="zipf:1.2",
        TILECAST_CACHE_DIR="/cache",
    ) == Settings(
        cache_dir=Path("/cache"),
        import_from="postgresql://host/db",
        export_to="/tmp/out.db",
        record_to="misses.json",
        tune=TuneSettings(tokens=(1, 2, 4)),
        miss="error",
        warn_cache_miss=True,
        policy="fastest",
        routing="zipf:1.2",
    )


@pytest.mark.parametrize("text", ["0", "false", "NO", "off"])
def test_switches_can_be_off(text: str) -> None:
    assert not from_environment(TM_GEMM_WARN_CACHE_MISS=text).warn_cache_miss
    assert from_environment(TM_GEMM_TUNE=text).tune is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TM_GEMM_MISS", "ignore"),
        ("TM_GEMM_POLICY", "quick"),
        ("TM_GEMM_WARN_CACHE_MISS", "2"),
        ("TM_GEMM_TUNE", "seq=[8-4-2]"),
    ],
)
def test_a_wrong_value_names_the_variable_and_the_value(name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_environment(**{name: value})
    assert name in str(caught.value)
    assert value in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/tilecast"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/someone/.cache/tilecast"),
        ({"XDG_CACHE_HOME": "/xdg", "TILECAST_CACHE_DIR": "/mine"}, "/mine"),
        ({"TILECAST_CACHE_DIR": "~/kernels"}, "/home/someone/kernels"),
    ],
)
def test_cache_folder(values: dict[str, str], expected: str) -> None:
    assert from_environment(**values).cache_dir == Path(expected)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TM_GEMM_POLICY", "fastest")
    assert Settings.from_environment().policy == "fastest"


def test_launcher() -> None:
    assert launcher(TORCHRUN) == Launcher(
        rank=1, world_size=4, local_rank=1, master_addr="127.0.0.1", master_port=29500
    )
    assert launcher({}) is None
    assert launcher({"MASTER_ADDR": "left-over"}) is None
    without_local_rank = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}
    found = launcher(without_local_rank)
    assert found is not None
    assert found.local_rank == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RANK": ""}, "RANK not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE not set"),
        ({"MASTER_PORT": "", "MASTER_ADDR": ""}, "MASTER_ADDR, MASTER_PORT not set"),
        ({"RANK": "4"}, "RANK is '4', expected an integer from 0 to 3"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ],
)
def test_launcher_refuses(changes: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        launcher({**TORCHRUN, **changes})
