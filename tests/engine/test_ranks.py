"""Ranks as real processes: agreement, tuning together, parallel layers, and every way in which they may fail."""

from __future__ import annotations

import json
import re
import signal

import pytest

from tests.torchrun.launch import Ended, processes
from tests.torchrun.launch import reports as reports_of

pytestmark = pytest.mark.torchrun

RANKS = 4


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:  # type: ignore[type-arg]
    # Processes that measure take seconds to start: where all is tested they do.
    return reports_of("flows", tmp_path_factory.mktemp("flows"), request.param, sandbox=request.param == 4)


def test_all_ranks_always_have_the_same_table(reports) -> None:  # type: ignore[no-untyped-def]
    for report in reports:
        assert report["digests"] == reports[0]["digests"]
    first, again, wider, loaded, filled = reports[0]["digests"]
    assert first == again and wider == loaded and first != wider
    assert filled


def test_what_was_exported_is_what_every_rank_ran(reports) -> None:  # type: ignore[no-untyped-def]
    for report in reports:
        assert report["exported"] == [report["digests"][0], report["digests"][2]]


def test_every_start_ends_soon(reports) -> None:  # type: ignore[no-untyped-def]
    assert all(len(report["seconds"]) == 6 and max(report["seconds"]) < 30 for report in reports)


def test_uneven_shards_are_tuned_as_different_layers(reports) -> None:  # type: ignore[no-untyped-def]
    assert len({report["layer"] for report in reports}) == 2
    for report in reports:
        assert report["buckets"] == [[1, 4], [1, 4, 16], [1, 4, 16]]


def test_a_second_start_measures_only_what_is_missing(reports) -> None:  # type: ignore[no-untyped-def]
    assert reports[0]["untouched"]
    assert reports[0]["fresh_tokens"] == [16]
    assert reports[0]["refilled"] == [1, 16]
    assert all(report["kept"] for report in reports)


def test_rank_0_stores_what_every_rank_measured(reports) -> None:  # type: ignore[no-untyped-def]
    assert reports[0]["ranks_measured"] == list(range(len(reports)))


def test_a_parallel_layer_has_the_same_bits_on_every_rank(reports) -> None:  # type: ignore[no-untyped-def]
    for report in reports:
        assert report["bits"] == reports[0]["bits"]
        assert report["expert_parallel"] == reports[0]["expert_parallel"]
        assert report["zero"] == reports[0]["zero"]
    assert len(set(reports[0]["bits"])) == 4


def test_a_parallel_layer_is_the_sum_of_its_shards_in_rank_order(reports) -> None:  # type: ignore[no-untyped-def]
    for report in reports:
        assert report["bits"] == report["by_hand"]
        assert report["others"] == report["others_by_hand"] == reports[0]["others"]
        # Two terms give the same sum either way round; more do not, or the comparison could not fail.
        assert (report["backward"] == report["others"][0]) is (len(reports) == 2)


def test_sums_are_in_rank_order_and_the_same_everywhere(reports) -> None:  # type: ignore[no-untyped-def]
    world = len(reports)
    for report in reports:
        assert report["sums"]["sum"] == report["sums"]["wanted"] == reports[0]["sums"]["sum"]
        assert report["sums"]["large"] == [world * (world + 1) / 2]
        assert report["sums"]["empty"] == [0, 7]
        assert report["local_ids"] == [[-1, -1, 0, 1, -1, -1]]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Ended], list[dict]]:  # type: ignore[type-arg]
    folder = tmp_path_factory.mktemp("failures")
    ended = processes("failures", folder, RANKS)
    reports = [folder / f"rank{rank}.json" for rank in range(RANKS)]
    assert all(path.exists() for path in reports), [rank.errors[-2000:] for rank in ended]
    return ended, [json.loads(path.read_text()) for path in reports]


FAILURES = {
    "error_before_joining": ("TilecastError", "^rank 1: OSError: the checkpoint"),
    "another_device": ("AgreementError", "^rank 1 has another device .* device: rank 0 .* rank 1 'another CPU'"),
    "another_kernel": ("AgreementError", "^rank 2 has another .* kernel_source: rank 0"),
    "soft_difference": ("TilecastError", "^agreed on system 0$"),
    "wrong_digest": ("AgreementError", "^rank 1 received a table of digest"),
    "no_such_file": ("CacheError", "^rank 0: .*absent.db.* does not exist"),
    "not_a_table": ("CacheError", "^rank 0: .*text.db.* not a SQLite"),
    "unwritable_export": ("CacheError", "^rank 0: .*x.db: cannot be written .*No such file"),
    "impossible_config": ("ConfigError", "entry E4 H64 I96 top2 fp32, 1 token, reproducible, up: .*mr=99 is outside"),
    "unknown_kernel": ("ConfigError", "entry E4 .* no kernel is named 'no.such_kernel'"),
    "table_of_another_device": ("CoverageError", "tuned for another device .* there 'another CPU'"),
    "some_ranks_hit": ("AgreementError", "rank 0 at 1, 2–4, 5–16 tokens, but .* I95 .* of rank 2 at no tokens"),
    "another_model": ("AgreementError", "^rank 1 has 1 layers, rank 0 2"),
    "other_options": ("AgreementError", "^rank 2 is to tune .*rank 0"),
    "unfit_input": ("InputError", "^rank 2: hidden is torch.float64"),
    "unfit_shard": ("InputError", "^rank 1: w13 is float32"),
    "cut_group": (
        "ModelError",
        r"^rank \d: tp=4 would cut the 64 columns of I .* a group of 32 .* tp that work: 1, 2$",
    ),
    "error_while_tuning": ("TilecastError", "^rank 1: OSError: no space left on device"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_the_same_on_every_rank_within_seconds(failures, name: str) -> None:  # type: ignore[no-untyped-def]
    kind, pattern = FAILURES[name]
    _, reports = failures
    for report in reports:
        seen, message, seconds = report[name]
        assert (seen, message) == (kind, reports[0][name][1])
        assert re.search(pattern, message) and "\n" not in message
        assert seconds < 30


def test_where_a_table_was_tuned_is_told_by_rank_0_alone(failures) -> None:  # type: ignore[no-untyped-def]
    _, reports = failures
    (line,) = reports[0]["logged"]
    assert line.startswith("the table was tuned with threads '77'") and line.endswith("bits do not")
    assert [report["logged"] for report in reports[1:]] == [[]] * (RANKS - 1)


def test_a_rank_that_dies_while_tuning_ends_all_with_one_message(failures) -> None:  # type: ignore[no-untyped-def]
    *living, dead = failures[0]
    assert [rank.code for rank in living] == [5] * (RANKS - 1) and dead.code == -signal.SIGKILL
    for rank in living:
        seconds, message = rank.errors.strip().splitlines()[-2:]
        assert message == f"tilecast: rank {RANKS - 1} died: no sign of life for 5 s; start all ranks again"
        assert float(seconds) < 30
