from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.interop.engines import PEERS
from tests.interop.test_rows import NAME, ROW, peer, real
from tilecast.cache_store.interop.devices import device_arch
from tilecast.cache_store.interop.lint import Linted, lint_folder
from tilecast.errors import CacheError
from tilecast.kernels.gpu.target import TARGETS

LIMITS = {target.environment_arch: target.shared_bytes for target in TARGETS}
OTHER = {**ROW, "BLOCK_SIZE_N": 64}


def found(folder: Path, engine: str | None = None) -> list[tuple[str, str, str]]:
    return [(f.file, f.entry, f.kind) for f in lint_folder(folder, LIMITS, engine).findings]


def only(linted: Linted) -> str:
    (finding,) = linted.findings
    return str(finding)


def test_good_folders_have_nothing_wrong(tmp_path: Path) -> None:
    peer(tmp_path / "vllm", NAME, {"triton_version": "3.5.1", "1": ROW, "64": OTHER})
    peer(tmp_path / "sglang" / "triton_3_5_1", "E=8,N=64,device_name=NVIDIA_H200_NVL.json", {"1": ROW, "64": ROW})
    peer(
        tmp_path / "sglang" / "triton_3_5_1",
        "E=8,N=64,device_name=NVIDIA_H200_NVL_down.json",
        {"1": {**ROW, "USE_TMA": True}},
    )
    assert lint_folder(tmp_path, LIMITS) == Linted(files=3, rows=5, findings=())


@pytest.mark.parametrize(
    ("engine", "place", "name", "words"),
    [
        ("vllm", ".", "mixtral.json", "is no name of a tuning file"),
        ("vllm", ".", "E=8,N=64,device_name=NVIDIA_H200_NVL.json", "looks for 'E=8,N=64,device_name=NVIDIA_H200.json'"),
        ("vllm", ".", "E=8,N=64,device_name=NVIDIA_B200,dtype=bf16.json", "no weights have the tag dtype=bf16"),
        ("vllm", ".", "E=8,N=64,device_name=NVIDIA_B200,block_shape=[128,128].json", "block_shape without a dtype"),
        ("vllm", ".", "E=8,N=64,device_name=NVIDIA_B200,dtype=int8_w8a8.json", "no weights have the tag"),
        (
            "vllm",
            ".",
            "E=8,N=64,device_name=NVIDIA_B200,dtype=fp8_w8a8,block_shape=[128, 128].json",
            "looks for 'E=8,N=64,device_name=NVIDIA_B200,dtype=fp8_w8a8,block_shape=[128,128].json'",
        ),
        ("vllm", ".", "E=8,N=64,device_name=,dtype=fp8_w8a8.json", "lacks the device"),
        ("vllm", ".", "E=08,N=64,device_name=NVIDIA_B200.json", "looks for 'E=8,N=64"),
        ("sglang", "old", "E=8,N=64,device_name=NVIDIA_B200.json", "only folders named by Triton's version"),
    ],
)
def test_names_that_nothing_looks_for(engine: str, place: str, name: str, words: str, tmp_path: Path) -> None:
    peer(tmp_path / place, name, {"1": ROW})
    line = only(lint_folder(tmp_path, LIMITS, engine))
    assert ": unreachable: " in line
    assert words in line


def test_folders_below_vllms_are_not_read(tmp_path: Path) -> None:
    peer(tmp_path, NAME, {"1": ROW})
    peer(tmp_path / "old", NAME, {"1": OTHER})
    assert found(tmp_path) == [(f"old/{NAME}", "", "unreachable")]


def test_rows_that_say_nothing_new(tmp_path: Path) -> None:
    peer(tmp_path, NAME, {"1": ROW, "8": ROW, "64": ROW, "128": OTHER, "256": ROW})
    peer(tmp_path, NAME.replace("N=3584", "N=1792"), {"1": ROW, "8": ROW, "64": ROW, "128": OTHER, "256": ROW})
    assert found(tmp_path, "vllm") == [
        ("E=8,N=1792,device_name=NVIDIA_H200.json", "8", "duplicate"),
        (NAME, "", "duplicate"),
        (NAME, "8", "duplicate"),
    ]


@pytest.mark.parametrize(
    ("device", "changes", "words"),
    [
        ("NVIDIA_B200", {"BLOCK_SIZE_N": 96}, "BLOCK_SIZE_N is 96, no power of two"),
        ("NVIDIA_B200", {"num_warps": 6}, "num_warps is 6, no power of two"),
        # (128 + 256) × 64 × 2 bytes in each of 5 buffers, of 6 stages.
        (
            "NVIDIA_B200",
            {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "num_stages": 6},
            "at least 245760 bytes of shared memory, NVIDIA_B200 has 232448",
        ),
        ("NVIDIA_L40S", {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256}, "at least 98304"),
    ],
)
def test_impossible_rows(device: str, changes: dict[str, int], words: str, tmp_path: Path) -> None:
    row = {**ROW, **changes}
    peer(tmp_path, f"E=8,N=64,device_name={device}.json", {"4": row})
    linted = lint_folder(tmp_path, LIMITS)
    if device == "NVIDIA_L40S":
        assert linted.findings == ()
        peer(tmp_path, f"E=8,N=64,device_name={device}.json", {"4": {**row, "num_stages": 4}})
        linted, words = lint_folder(tmp_path, LIMITS), "at least 147456"
    assert f" at 4: impossible: {words}" in only(linted) or words in only(linted)
    peer(tmp_path, f"E=8,N=64,device_name={device}.json", {"4": {**row, **ROW}})
    assert lint_folder(tmp_path, LIMITS).findings == ()


def test_sglangs_pairs_have_one_height(tmp_path: Path) -> None:
    folder = tmp_path / "triton_3_5_1"
    down = peer(folder, "E=8,N=64,device_name=NVIDIA_B200_down.json", {"1": {**ROW, "BLOCK_SIZE_M": 64}, "256": ROW})
    assert found(tmp_path) == [(f"triton_3_5_1/{down.name}", "", "mis-keyed")]
    peer(folder, "E=8,N=64,device_name=NVIDIA_B200.json", {"1": OTHER, "512": OTHER})
    assert found(tmp_path) == [(f"triton_3_5_1/{down.name}", "1", "mis-keyed")]


def test_sglang_stops_at_vllms_key(tmp_path: Path) -> None:
    peer(tmp_path / "triton_3_5_1", "E=8,N=64,device_name=NVIDIA_B200.json", {"triton_version": "3.5.1", "1": ROW})
    assert [kind for *_, kind in found(tmp_path)] == ["unreadable"]


def test_unreadable_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"holds no \.json file"):
        lint_folder(tmp_path, LIMITS)
    with pytest.raises(CacheError, match="is no folder"):
        lint_folder(tmp_path / "absent", LIMITS)
    (tmp_path / NAME).write_text('{"1": 7}')
    assert found(tmp_path) == [(NAME, "", "unreadable")]


@pytest.mark.parametrize(
    ("device", "arch"),
    [
        ("NVIDIA_H100_80GB_HBM3", "sm_90"),
        ("NVIDIA_H20-3e", "sm_90"),
        ("NVIDIA_A100-SXM4-80GB", "sm_80"),
        ("NVIDIA_A10", "sm_86"),
        ("NVIDIA_GB200", "sm_100"),
        ("NVIDIA_RTX_PRO_6000_Blackwell_Server_Edition", "sm_120"),
        ("NVIDIA_RTX_6000_Ada_Generation", "sm_89"),
        ("NVIDIA_GeForce_RTX_4090", "sm_89"),
        ("AMD_Instinct_MI325_OAM", "gfx942"),
        ("AMD_Instinct_MI355X", "gfx950"),
        ("NVIDIA_L20Y", None),
        ("Intel(R)_Arc(TM)_Pro_B60_Graphics", None),
        ("H100", None),
    ],
)
def test_devices_tell_their_architecture(device: str, arch: str | None) -> None:
    assert device_arch(device) == arch


@real
def test_real_files_are_mostly_right() -> None:
    linted = lint_folder(PEERS, LIMITS)
    assert linted.files == 728
    counts = Counter(finding.kind for finding in linted.findings)
    assert counts["unreadable"] == 0
    # Two lack the device's name, and some have tags that nothing builds.
    files = {finding.file.rpartition("/")[2] for finding in linted.findings if finding.kind == "unreachable"}
    assert {
        "E=384,N=128,device_name=,dtype=int4_w4a16.json",
        "E=16,N=7168,device_name=NVIDIA_H100_80GB_HBM3,dtype=float8.json",
        "E=64,N=8960,device_name=NVIDIA_H100_80GB_HBM3,dtype=bf16.json",
    } <= files
    # All of these were timed on their device by those who made them: what is called impossible there must be rare.
    assert counts["impossible"] < 0.01 * linted.rows
