"""`--gpu-experts`: generate, tune and cache coverage with experts on two devices, here both of them the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import LAYER, SPEC, Command, table_of, two_ranks
from tests.tiny_models import save_tiny
from tilecast.cache_store.bundle import export_table, import_table
from tilecast.cli._layers import sharded
from tilecast.cli._output import Output
from tilecast.cli._placement import PlacedLayers, benched_layers, break_even_lines
from tilecast.cli.bench import _parts, _tuned
from tilecast.engine.placed_choice import read_choice, shares_of
from tilecast.engine.streaming import BreakEven
from tilecast.engine.table_runtime import Runtime
from tilecast.environment import cpu_environment
from tilecast.evidence import TuningTable
from tilecast.problem import ExpertLayer

QUICK = ("--tokens", "1,4", "--effort", "quick", "--threads", "1", "--budget", "8s")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, content in (
        ("ids", '{"0": [1, 5], "1": [0]}'),
        ("short", '{"0": [1]}'),
        ("twice", '{"0": [1, 1], "1": []}'),
        ("beyond", '{"0": [8], "1": []}'),
        ("broken", "{"),
        (
            "record",
            '{"format": "tilecast-record", "version": 1, "rank": 0, "world_size": 1, "seconds": 1, "layers": []}',
        ),
    ):
        (folder / f"{name}.json").write_text(content)
    return folder


def test_generate_gives_the_same_tokens_and_says_what_is_where(cli: Command, mixtral: Path, files: Path) -> None:
    options = ("generate", mixtral, "--ids", "5,6,7", "--max-new-tokens", "4", "--json")
    plain = json.loads(cli(*options).out)
    for asked, near in (("3", [[0, 1, 2]] * 2), (files / "ids.json", [[1, 5], [0]])):
        done = cli(*options, "--gpu-experts", asked)
        assert done.code == 0, done.err
        document = json.loads(done.out)
        assert document["outputs"] == plain["outputs"]
        assert document["placement"]["near_experts"] == {"0": near[0], "1": near[1]}
        (line,) = [line for line in done.err.splitlines() if "near" in line]
        assert "of 8 experts of each of 2 layers are near (cpu)" in line and "both parts run on the CPU" in line
    assert plain["placement"] is None


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--gpu-experts", "9"), 3, "gpu_experts is 9, but a layer has 8 experts; give at most as many"),
        (("--gpu-experts=-1",), 2, "gpu_experts is -1, expected 0 or above"),
        (("--gpu-experts", "most"), 2, "'most', expected a number of experts, auto, or a file"),
        (("--gpu-experts", "short.json"), 3, "short.json lacks layer 1 of the model"),
        (("--gpu-experts", "twice.json"), 3, "near expert 1 is given twice"),
        (("--gpu-experts", "beyond.json"), 3, "near expert is 8"),
        (("--gpu-experts", "broken.json"), 3, "broken.json is not JSON"),
        (("--gpu-experts", "record.json"), 3, "record.json has no counts of E8"),
        (("--gpu-experts", "2", "--expert-counts", "ids.json"), 3, "record"),
        (("--gpu-experts", "ids.json", "--expert-counts", "record.json"), 2, "nothing to choose by counts"),
        (("--expert-counts", "record.json"), 2, "--expert-counts is given without --gpu-experts"),
        (("--gpu-experts", "2", "--tp", "2"), 2, "--gpu-experts is for one process"),
        (("--gpu-experts", "2", "--ep", "2"), 2, "--gpu-experts is for one process"),
        (("--gpu-experts", "2", "--experts", "eager"), 2, "needs --experts tilecast"),
    ],
)
def test_generate_tells_wrong_input_in_one_line(
    cli: Command, mixtral: Path, files: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    given = [str(files / option) if option.endswith(".json") else option for option in options]
    cli("generate", mixtral, "--ids", "1", *given).failed(code, words)


@pytest.mark.parametrize(
    ("given", "words"),
    [("9", "gpu_experts is 9, but a layer has 8 experts"), ("beyond.json", "layer 0: near expert is 8, expected")],
)
def test_compare_tells_what_no_layer_has_before_the_reference_runs(
    cli: Command, mixtral: Path, files: Path, given: str, words: str
) -> None:
    cli("compare", mixtral, "--gpu-experts", files / given if given.endswith("json") else given).failed(3, words)


@pytest.mark.torchrun
def test_all_ranks_say_that_one_process_places_experts(mixtral: Path) -> None:
    words = ["generate", str(mixtral), "--tp", "2", "--gpu-experts", "2", "--ids", "1"]
    for code, out, err in two_ranks(words, words):
        assert (code, out) == (2, ""), err
        assert "--gpu-experts is for one process" in err


def test_both_shares_are_tuned_covered_and_run(cli: Command, mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "placed.db"
    done = cli("tune", mixtral, "--gpu-experts", "3", *QUICK, "--export", path, "--json")
    assert done.code == 0, done.err
    assert "both parts are for the CPU" in done.err
    near, far = "E3/8 H64 I48 top2 fp32", "E5/8 H64 I48 top2 fp32"
    assert {d.layer.label for d in import_table(path).decisions} == {near, far}
    (even,) = json.loads(done.out)["break_even"]
    assert (even["near"], even["far"]) == (near, far)
    # On one device to send weights and to run them there takes longer than to run them.
    assert even["tokens"] is None and even["bytes"] == 5 * 3 * 64 * 48 * 4 and even["bytes_per_second"] > 0
    ask = ("cache", "coverage", mixtral, path, "--tokens", "1,4", "--threads", "1")
    covered = cli(*ask, "--gpu-experts", "3", "--json")
    assert covered.code == 0, covered.err
    assert {point["layer"] for point in json.loads(covered.out)["points"]} == {near, far}
    gap = cli(*ask, "--gpu-experts", "2")
    assert gap.code == 4 and "lacks 4 of 4 points" in gap.err and "--gpu-experts 2" in gap.err
    options = ("generate", mixtral, "--ids", "5,6,7", "--max-new-tokens", "3", "--gpu-experts", "3", "--threads", "1")
    assert "4 decisions, 2 of 2 distinct layers covered" in cli(*options, "--import", path).err


def test_a_line_says_from_how_many_tokens_on_weights_are_sent() -> None:
    shares = shares_of(LAYER, 1)
    found = [
        (shares, BreakEven(tokens=tokens, bytes=3 << 20, bytes_per_second=rate))
        for tokens, rate in ((64, 5e10), (None, 5e10), (None, None))
    ]
    label = "E4 H64 I96 top2 bf16"
    sent = f"{label}: sending 3.0 MiB of far experts at 50.0 GB/s to the near device is faster"
    assert break_even_lines(found) == [
        f"{sent} from 64 tokens on",
        f"{sent} at no tuned token count",
        f"{label}: the table has no times of both shares, so there is no break-even",
    ]


def test_dry_run_shows_both_shares(cli: Command, files: Path, mixtral: Path) -> None:
    done = cli("tune", mixtral, "--gpu-experts", files / "ids.json", "--tokens", "1", "--dry-run", "--json")
    assert done.code == 0, done.err
    layers = {(task["layer"]["experts"], task["layer"]["global_experts"]) for task in json.loads(done.out)["tasks"]}
    assert layers == {(1, 8), (7, 8), (2, 8), (6, 8)}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--gpu-experts", "5"), 3, "gpu_experts is 5, but a layer has 4 experts"),
        (("--gpu-experts", "auto"), 2, "give a number"),
        (("--gpu-experts", "ids.json"), 3, "has ids for 2 layers, the model has 1"),
        (("--gpu-experts", "2", "--tp", "2"), 2, "--gpu-experts is for one process"),
        (("--gpu-experts", "2", "--from-record", "record.json"), 2, "--from-record"),
    ],
)
def test_tune_tells_wrong_input_in_one_line(
    cli: Command, files: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    given = [str(files / option) if option.endswith(".json") else option for option in options]
    cli("tune", SPEC, *given).failed(code, words)


def test_compare_runs_placed_experts(cli: Command, mixtral: Path, files: Path) -> None:
    options = ("--check", "batch", "--ids", "5,6,7,8", "--ids", "11,3", "--expect", "close,invariant", "--reproducible")
    done = cli("compare", mixtral, "--gpu-experts", files / "ids.json", *options, "--json")
    assert done.code == 0, (done.out, done.err)
    assert [(one["check"], one["verdict"]) for one in json.loads(done.out)["invariance"]] == [("batch", "equal")]
    wrong = cli("compare", mixtral, "--gpu-experts", "9", *options)
    assert wrong.code == 3 and "gpu_experts is 9, but a layer has 8 experts" in wrong.err
    cli("compare", mixtral, "--gpu-experts", "2", "--experts", "eager", *options).failed(2, "needs --experts tilecast")


def test_bench_times_two_devices_beside_one(cli: Command, tmp_path: Path) -> None:
    path = tmp_path / "table.db"
    whole, near, _ = shares_of(replace(LAYER, dtype="fp32"), 1)
    assert near is not None
    export_table(table_of(whole, (4,)).merged(table_of(near, (4,))), path)
    options = ("--dtype", "fp32", "--tokens", "4", "--rounds", "2", "--peers", "none", "--threads", "1", "--json")
    done = cli("bench", SPEC, "--gpu-experts", "1", "--table", path, *options, "--budget", "2s")
    assert done.code == 0, done.err
    assert "both parts are for the CPU" in done.err
    document = json.loads(done.out)
    assert (document["table"]["buckets_tuned_now"], document["table"]["decisions"]) == (1, 3), (
        "the far share is lacking"
    )
    expert = 3 * 64 * 96 * 4
    (even,) = document["break_even"]
    assert (even["near"], even["far"]) == ("E1/4 H64 I96 top2 fp32", "E3/4 H64 I96 top2 fp32")
    assert even["bytes"] == 3 * expert and even["bytes_per_second"] > 0
    (placed,) = document["points"][0]["placed"]
    assert (placed["near_bytes"], placed["far_bytes"]) == (expert, 3 * expert)
    for name in ("alone", "both", "near_share", "far_share"):
        assert placed[name]["status"] == "ok" and placed[name]["p50_us"] > 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--gpu-experts", "5"), 3, "gpu_experts is 5, but a layer has 4 experts"),
        (("--gpu-experts=-1",), 2, "gpu_experts is -1, expected 0 or above"),
        (("--gpu-experts", "most"), 2, "'most', expected a number of experts, auto, or a file"),
        (("--gpu-experts", "ids.json"), 3, "has ids for 2 layers, the model has 1"),
        (("--gpu-experts", "broken.json"), 3, "broken.json is not JSON"),
        (("--gpu-experts", "record.json"), 3, "record.json has no counts of E4"),
        (("--gpu-experts", "2", "--tp", "2"), 2, "--gpu-experts is for one process"),
    ],
)
def test_bench_tells_wrong_input_in_one_line(
    cli: Command, files: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    given = [str(files / option) if option.endswith(".json") else option for option in options]
    cli("bench", SPEC, *given).failed(code, words)


def test_bench_places_as_many_as_fit(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [sharded(SPEC, dtype=dtype) for dtype in ("bf16", "fp32")]
    expert = 3 * 64 * 96 * 2
    monkeypatch.setattr("tilecast.engine.placed_model.free_bytes", lambda device: (1 << 30) + 2 * expert)
    found = benched_layers(models, read_choice("auto"))
    assert [shares.near and shares.near.experts for shares in found.shares] == [2, 1]
    path = tmp_path / "ids.json"
    path.write_text('{"0": [1, 2, 3]}')
    for asked in (3, path):
        assert benched_layers(models, read_choice(asked)).shares == tuple(
            shares_of(model.layers[0], 3) for model in models
        )


def test_bench_tunes_each_share_where_it_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(cpu_environment(), device_kind="cuda", device="a GPU")
    shares = shares_of(LAYER, 1)
    asked: list[object] = []

    def tune(runtime: Runtime, missing: dict[ExpertLayer, object], *given: object, **options: object) -> TuningTable:
        asked.append((runtime.environment, tuple(missing), options["budget_s"]))
        return TuningTable()

    monkeypatch.setattr("tilecast.engine.tuning.tune_missing", tune)
    parts = _parts((LAYER,), PlacedLayers(shares=(shares,), near=gpu))
    where = str(tmp_path / "store.db")
    _, number, _ = _tuned(Output(), TuningTable(), parts, (1, 4), "reproducible", where, 100.0)
    # 60% of the budget, by what each device lacks.
    assert asked == [(gpu, (LAYER, *shares[1:]), 45.0), (cpu_environment(), (shares.far,), 15.0)]
    assert number == 8
