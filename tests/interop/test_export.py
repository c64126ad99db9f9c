from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.interop.engines import (
    H200,
    LAYER,
    SGLANG_FEW,
    SGLANG_MANY,
    choice,
    grouped,
    sglang_runs,
    table_of,
    timed,
    vllm_default,
    vllm_runs,
)
from tests.store_contract import HERE
from tilecast.cache_store.interop.export import EngineExport, engine_files, write_engine_files
from tilecast.cache_store.interop.peers import PeerFolder
from tilecast.cache_store.interop.pinned import Span, pinned, spans
from tilecast.cache_store.interop.rows import read_peer
from tilecast.errors import CacheError, UsageError
from tilecast.evidence import TuningTable
from tilecast.kernels.gpu.grouped import Grouped
from tilecast.kernels.gpu.tma import Tma
from tilecast.problem import Bucket, TileConfig

SMALL, LARGE = grouped(), grouped(block_m=128, block_n=256, group_m=8, num_warps=8, num_stages=4)
SWAPPED = grouped(block_m=8, swap=1)
TMA = TileConfig("triton.moe_tma", {**{k: v for k, v in LARGE.params if k != "swap"}, "waves": 0, "specialize": 0})


def row(config: TileConfig) -> dict[str, int]:
    return {
        "BLOCK_SIZE_M": config.integer("block_m"),
        "BLOCK_SIZE_N": config.integer("block_n"),
        "BLOCK_SIZE_K": config.integer("block_k"),
        "GROUP_SIZE_M": config.integer("group_m"),
        "num_warps": config.integer("num_warps"),
        "num_stages": config.integer("num_stages"),
    }


def written(table: TuningTable, engine: str, folder: Path) -> EngineExport:
    export = engine_files(table, engine)
    write_engine_files(export, folder)
    return export


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(1, 120),
)
def test_every_token_count_gets_what_was_meant(steps: list[tuple[int, int, int]], experts: int) -> None:
    chosen, position = [], 0
    for gap, width, value in steps:
        chosen.append((Bucket(above=position + gap, tokens=position + gap + width), value))
        position += gap + width
    rows = pinned(spans(chosen, [Span(1, experts, -1), Span(experts + 1, None, -2)]))
    keys = [tokens for tokens, _ in rows]
    assert keys == sorted(set(keys))
    values = [value for _, value in rows]
    assert not any(a == b == c for a, b, c in zip(values, values[1:], values[2:], strict=False))
    assert keys[0] >= 1
    for tokens in [*range(1, position + experts + 50), 100_000]:
        meant = next((value for bucket, value in chosen if tokens in bucket), -1 if tokens <= experts else -2)
        # Whichever of two equally near rows an engine takes.
        least = min(abs(key - tokens) for key in keys)
        assert {value for key, value in rows if abs(key - tokens) == least} == {meant}


def test_vllm_picks_what_was_decided_for_every_count(tmp_path: Path) -> None:
    table = table_of({4: (choice(SMALL),) * 2, 64: (choice(SMALL),) * 2, 256: (choice(LARGE),) * 2})
    export = written(table, "vllm", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["E=8,N=3584,device_name=NVIDIA_H200.json"]
    assert export.left_out == ()
    document = json.loads((tmp_path / export.files[0].path).read_text())
    assert document.pop("triton_version") == "3.5.1"
    assert {"4", "64", "256"} <= set(document)
    for tokens in range(1, 1000):
        meant = row(SMALL) if tokens <= 64 else row(LARGE) if tokens <= 256 else vllm_default(tokens, 8)
        assert vllm_runs(tmp_path, H200.device, 8, 3584, tokens) == meant


def test_defaults_outside_the_tuned_range_are_the_engines(tmp_path: Path) -> None:
    layer = replace(LAYER, experts=64, global_experts=64)
    table = table_of({16: (choice(SMALL),) * 2}, layer=layer)
    for engine in ("vllm", "sglang"):
        written(table, engine, tmp_path)
    for tokens in (*range(1, 700), *range(8200, 8300), 10_000, 1 << 20):
        meant = row(SMALL) if tokens <= 16 else vllm_default(tokens, 64)
        assert vllm_runs(tmp_path, H200.device, 64, 3584, tokens) == meant
        meant = row(SMALL) if tokens <= 16 else SGLANG_FEW if tokens <= 64 else SGLANG_MANY
        assert sglang_runs(tmp_path, H200.device, "3.5.1", 64, 3584, tokens, down=False) == meant


@pytest.mark.parametrize("experts", [1, 3, 8])
def test_defaults_on_amd(experts: int, tmp_path: Path) -> None:
    layer = replace(LAYER, experts=experts, top_k=1, global_experts=experts)
    there = replace(H200, device="AMD Instinct MI300X VF", arch="gfx942")
    written(table_of({2: (choice(SMALL),) * 2}, layer=layer, environment=there), "vllm", tmp_path)
    for tokens in range(3, 1500):
        meant = vllm_default(tokens, experts, hip=True)
        assert vllm_runs(tmp_path, "AMD Instinct MI300X", experts, 3584, tokens) == meant


def test_one_config_serves_both_gemms_by_the_smallest_sum() -> None:
    up, down, shared = grouped(block_n=32), grouped(block_n=64), grouped(block_n=256)
    table = table_of({8: (choice(up, 10, grouped(), 30), choice(down, 5, grouped(), 20))})
    times = [(up, 10, 40), (down, 40, 5), (shared, 12, 6)]
    measurements = [timed(g, config, us, 8) for config, a, b in times for g, us in (("up", a), ("down", b))]
    export = engine_files(table, "vllm", measurements)
    assert json.loads(export.files[0].data)["8"] == row(shared)
    assert export.files[0].remarks == ("1 to 8 tokens: 20.0% slower than the decided configs",)
    # Without measurements only the default was timed for both.
    bare = engine_files(table, "vllm")
    assert json.loads(bare.files[0].data)["8"] == row(grouped())


def test_an_unknown_time_is_said() -> None:
    up, down = grouped(block_n=32), grouped(block_n=64)
    export = engine_files(table_of({8: (choice(up), choice(down))}), "vllm")
    assert json.loads(export.files[0].data)["8"] == row(up)
    assert "its time for down is unknown" in export.files[0].remarks[0]


def test_what_means_something_else_is_left_out_with_its_reason(tmp_path: Path) -> None:
    table = table_of({4: (choice(SWAPPED),) * 2, 64: (choice(SMALL),) * 2, 256: (choice(TMA),) * 2})
    export = written(table, "vllm", tmp_path)
    assert [(left.what, left.reason.partition(";")[0]) for left in export.left_out] == [
        (f"{LAYER.label} at 1 to 4 tokens", "up: swapped operands (swap=1) have no setting there"),
        (f"{LAYER.label} at 65 to 256 tokens", "up: tensor descriptors (triton.moe_tma) have no setting there"),
    ]
    assert vllm_runs(tmp_path, H200.device, 8, 3584, 3) == vllm_default(3, 8)
    assert vllm_runs(tmp_path, H200.device, 8, 3584, 65) == vllm_default(65, 8)


@pytest.mark.parametrize("kernel", ["triton.moe_decode", "triton.moe_persistent", "triton.moe_split_k", "other"])
def test_other_kernels_have_no_counterpart(kernel: str) -> None:
    config = TileConfig(kernel, dict(SMALL.params))
    export = engine_files(table_of({4: (choice(config),) * 2}), "vllm")
    assert export.files == ()
    assert f"{kernel} has no counterpart there" in export.left_out[0].reason


def test_a_kept_default_stands_in_for_what_cannot_be_said() -> None:
    decode = TileConfig("triton.moe_decode", {"block_m": 16})
    table = table_of({4: (choice(decode, 10, SMALL, 15), choice(SMALL, 5, SMALL, 5))})
    export = engine_files(table, "vllm")
    assert json.loads(export.files[0].data)["4"] == row(SMALL)
    assert export.files[0].remarks == ("1 to 4 tokens: 33.3% slower than the decided configs",)


def test_sglang_gets_a_file_for_each_gemm(tmp_path: Path) -> None:
    up = LARGE.with_params(block_n=128)
    table = table_of({64: (choice(SMALL), choice(SMALL.with_params(block_k=128))), 256: (choice(up), choice(TMA))})
    export = written(table, "sglang", tmp_path)
    name = "configs/triton_3_5_1/E=8,N=3584,device_name=NVIDIA_H200_NVL"
    assert [file.path for file in export.files] == [f"{name}.json", f"{name}_down.json"]
    for tokens in range(1, 600):
        runs = [sglang_runs(tmp_path, H200.device, "3.5.1", 8, 3584, tokens, down=down) for down in (False, True)]
        if tokens <= 64:
            assert runs == [row(SMALL), {**row(SMALL), "BLOCK_SIZE_K": 128, "USE_TMA": False}]
        elif tokens <= 256:
            assert runs == [row(up), {**row(TMA), "USE_TMA": True}]
        else:
            assert runs == [SGLANG_MANY, {**SGLANG_MANY, "USE_TMA": False}]
    # SGLang turns every key of a file into a number.
    assert all(key.isdigit() for file in export.files for key in json.loads(file.data))


def test_sglangs_pair_has_one_height() -> None:
    low, high = grouped(block_m=16), grouped(block_m=64)
    table = table_of({8: (choice(low, 10, high, 12), choice(high, 5, high, 5))})
    up, down = engine_files(table, "sglang").files
    assert json.loads(up.data)["8"] == row(high)
    assert json.loads(down.data)["8"] == {**row(high), "USE_TMA": False}
    alone = table_of({8: (choice(low), choice(high))})
    assert "no two configs of one BLOCK_SIZE_M" in engine_files(alone, "sglang").left_out[0].reason


def test_one_file_takes_one_layer_and_says_which() -> None:
    fast, safe = table_of({8: (choice(SMALL),) * 2}), table_of({8: (choice(LARGE),) * 2}, policy="reproducible")
    other = table_of({8: (choice(LARGE),) * 2}, layer=replace(LAYER, hidden=2048, dtype="fp16"))
    export = engine_files(fast.merged(safe).merged(other), "vllm")
    assert len(export.files) == 1
    assert json.loads(export.files[0].data)["8"] == row(SMALL)
    assert [left.what.partition(" on ")[0] for left in export.left_out] == [
        "E8 H2048 I3584 top2 fp16",
        "E8 H4096 I3584 top2 bf16",
    ]
    assert all("its file would be" in left.reason for left in export.left_out)


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({"device_kind": "cpu"}, "bf16", "was tuned on a CPU"),
        ({}, "fp32", "TF32"),
        ({"device": "../../evil"}, "bf16", "cannot stand in a file's name"),
        ({"device": "A,dtype=fp8_w8a8"}, "bf16", "cannot stand in a file's name"),
        ({"compiler": "../.."}, "bf16", "names no folder"),
    ],
)
def test_what_no_file_can_stand_for(changes: dict[str, str], dtype: str, reason: str) -> None:
    environment = replace(H200, **changes)  # type: ignore[arg-type]
    table = table_of({8: (choice(SMALL),) * 2}, layer=replace(LAYER, dtype=dtype), environment=environment)
    export = engine_files(table, "sglang")
    assert export.files == ()
    assert reason in export.left_out[0].reason


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    export = engine_files(table_of({8: (choice(SMALL),) * 2}), "sglang")
    write_engine_files(export, tmp_path)
    write_engine_files(export, tmp_path)
    first, second = (tmp_path / file.path for file in export.files)
    first.unlink()
    second.write_text('{"1": "something else"}')
    with pytest.raises(CacheError, match="left alone and nothing was written"):
        write_engine_files(export, tmp_path)
    assert not first.exists()
    assert second.read_text() == '{"1": "something else"}'


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(UsageError, match="expected one of vllm, sglang"):
        engine_files(TuningTable((HERE,), ()), "turbomind")


def test_the_kernels_have_the_parameters_that_are_said() -> None:
    assert set(dict(SMALL.params)) == set(Grouped.domain)
    assert set(dict(TMA.params)) == set(Tma.domain)


QUANTIZED = [
    ("awq_g128", "triton.moe_gemm", "dtype=int4_w4a16", "dtype=int4_w4a16"),
    ("int4_g32", "triton.moe_gemm", "dtype=int4_w4a16", "dtype=int4_w4a16"),
    ("int8_channel", "triton.moe_gemm", "dtype=int8_w8a16", "dtype=int8_w8a16"),
    ("fp8_block128", "triton.moe_fp8", "dtype=fp8_w8a8,block_shape=[128,128]", "dtype=fp8_w8a8,block_shape=[128, 128]"),
]


@pytest.mark.parametrize(("weights", "kernel", "vllm", "sglang"), QUANTIZED)
def test_quantised_layers_have_files_of_their_own(
    weights: str, kernel: str, vllm: str, sglang: str, tmp_path: Path
) -> None:
    layer = replace(LAYER, weight_format=weights)
    config = TileConfig(kernel, {**dict(LARGE.params), "block_k": 128})
    table = table_of({4: (choice(config),) * 2, 64: (choice(config),) * 2}, layer=layer)
    export = written(table, "vllm", tmp_path)
    (file,) = export.files
    assert file.path == f"E=8,N=3584,device_name=NVIDIA_H200,{vllm}.json"
    found = json.loads((tmp_path / file.path).read_text())
    found.pop("triton_version")
    # Nothing is said of counts that were not tuned, as what runs there without a file is no tile.
    assert found == {"4": row(config), "64": row(config)}
    assert "not the engine's default" in " ".join(file.remarks)
    names = [file.path.rpartition("/")[2] for file in engine_files(table, "sglang").files]
    assert names[0] == f"E=8,N=3584,device_name=NVIDIA_H200_NVL,{sglang}.json"
    # What is written is found again, for this format alone.
    folder = PeerFolder(tmp_path / "kept")
    folder.keep(read_peer(tmp_path / file.path, "vllm"))
    assert folder.hints_for(layer.up, 8, H200) == (config,)
    assert folder.hints_for(LAYER.up, 8, H200) == ()


def test_what_is_not_the_same_there_is_left_out() -> None:
    rows16 = table_of({4: (choice(LARGE),) * 2}, layer=replace(LAYER, weight_format="fp8_block128"))
    export = engine_files(rows16, "vllm")
    assert not export.files and "rows are rounded to fp8" in export.left_out[0].reason
    fp8 = TileConfig("triton.moe_fp8", {**dict(LARGE.params), "block_k": 128})
    export = engine_files(table_of({4: (choice(fp8),) * 2}, layer=replace(LAYER, weight_format="fp8_channel")), "vllm")
    assert not export.files and "128 elements at a time" in export.left_out[0].reason


def test_formats_of_one_name_are_said_to_be() -> None:
    first, second = (
        table_of({4: (choice(SMALL),) * 2}, layer=replace(LAYER, weight_format=f"awq_g{group}")) for group in (32, 64)
    )
    export = engine_files(TuningTable(first.environments, (*first.decisions, *second.decisions)), "vllm")
    assert len(export.files) == 1 and "its file would be" in export.left_out[0].reason
