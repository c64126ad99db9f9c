from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.interop.engines import H200, LAYER, PEERS, TILE, choice, grouped, table_of, timed
from tilecast.cache_store.interop.names import PeerName, device_in_name, name_for, parse_name
from tilecast.cache_store.interop.peers import PeerFolder, find_files, peer_us
from tilecast.cache_store.interop.rows import parse_rows, read_peer, tile_config
from tilecast.cache_store.interop.tiles import gather
from tilecast.errors import CacheError
from tilecast.kernels import registry
from tilecast.kernels.spec import outside_domain
from tilecast.problem import TileConfig

ROW = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3}
LARGE = grouped(block_m=128)
NAME = "E=8,N=3584,device_name=NVIDIA_H200.json"
real = pytest.mark.skipif(not PEERS.is_dir(), reason="the engines' own files are not beside this checkout")


def peer(folder: Path, name: str, rows: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("engine", "name", "text"),
    [
        ("vllm", PeerName(experts=8, intermediate=3584, device="NVIDIA_H200"), NAME),
        (
            "vllm",
            PeerName(experts=256, intermediate=256, device="NVIDIA_B200", dtype="fp8_w8a8", block_shape=(128, 128)),
            "E=256,N=256,device_name=NVIDIA_B200,dtype=fp8_w8a8,block_shape=[128,128].json",
        ),
        (
            "sglang",
            PeerName(
                experts=256, intermediate=256, device="NVIDIA_B200", dtype="fp8_w8a8", block_shape=(128, 128), down=True
            ),
            "E=256,N=256,device_name=NVIDIA_B200,dtype=fp8_w8a8,block_shape=[128, 128]_down.json",
        ),
        (
            "sglang",
            PeerName(experts=161, intermediate=384, device="NVIDIA_B200", dtype="fp8_w8a8", per_channel=True),
            "E=161,N=384,device_name=NVIDIA_B200,dtype=fp8_w8a8,per_channel_quant=True.json",
        ),
        (
            "sglang",
            PeerName(experts=8, intermediate=64, device="NVIDIA_H20-3e", down=True),
            "E=8,N=64,device_name=NVIDIA_H20-3e_down.json",
        ),
    ],
)
def test_names_are_the_engines_own(engine: str, name: PeerName, text: str) -> None:
    assert name.text(engine) == text
    assert parse_name(text) == name


@pytest.mark.parametrize(
    ("device", "vllm", "sglang"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA_H100_80GB_HBM3", "NVIDIA_H100_80GB_HBM3"),
        ("NVIDIA H200 NVL", "NVIDIA_H200", "NVIDIA_H200_NVL"),
        ("NVIDIA GH200 480GB", "NVIDIA_GH200_480GB", "NVIDIA_GH200_480GB"),
        ("AMD Instinct MI300X VF", "AMD_Instinct_MI300X", "AMD_Instinct_MI300X_VF"),
    ],
)
def test_devices_are_called_as_each_engine_calls_them(device: str, vllm: str, sglang: str) -> None:
    assert (device_in_name("vllm", device), device_in_name("sglang", device)) == (vllm, sglang)


@pytest.mark.parametrize(
    "name", ["table.db", "E=8,N=64.json", "E=0,N=64,device_name=A.json", "E=8,N=64,device_name=a b.json", f"../{NAME}"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(CacheError, match="is no name of a tuning file"):
        parse_name(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not the JSON"),
        ("[]", "holds a list"),
        ("{}", "has 0 token counts"),
        ("[" * 100_000, "is not the JSON"),
        ("\x00", "is not the JSON"),
        ('{"1": {}, "1": {}}', "given twice"),
        ('{"1": []}', "the row of 1 is a list"),
        ('{"1": {"BLOCK_SIZE_M": 16}}', "lacks BLOCK_SIZE_N"),
        ('{"triton_version": 3}', "triton_version is 3"),
        ('{"1": {"BLOCK_SIZE_M": NaN}}', "NaN is no integer"),
        ('{"1": {"BLOCK_SIZE_M": 1.5}}', "1.5 is no integer"),
        ('{"1": {"BLOCK_SIZE_M": 1' + "0" * 5000 + "}}", "out of range"),
        *(
            (json.dumps({key: ROW}), "is no token count")
            for key in ("0", "-1", "01", "1.0", " 1", "x", "٣", "99999999", "9" * 5000, "')); DROP TABLE config; --")
        ),
        *(
            (json.dumps({"1": {**ROW, name: value}}), "expected")
            for name, value in [
                ("BLOCK_SIZE_M", 0), ("BLOCK_SIZE_N", -64), ("BLOCK_SIZE_K", 1 << 20), ("num_warps", True),
                ("num_stages", "3"), ("num_stages", None), ("USE_TMA", 1), ("grf_mode", "x"), ("evil", 1),
            ]
        ),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_text(text)
    with pytest.raises(CacheError, match=message) as caught:
        read_peer(path, "vllm")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_huge_files_and_folders_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CacheError, match="more than the"):
        read_peer(path, "vllm")
    with pytest.raises(CacheError, match="is a directory"):
        read_peer(tmp_path, "vllm")
    with pytest.raises(CacheError, match="does not exist"):
        read_peer(tmp_path / "E=1,N=1,device_name=A.json", "vllm")


def test_damaged_files_are_refused_or_as_good_as_whole() -> None:
    draw = random.Random(7)
    whole = json.dumps({"triton_version": "3.5.1", **{str(tokens): ROW for tokens in (1, 16, 256)}}).encode()
    refused = 0
    for _ in range(2000):
        data = bytearray(whole)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.randint(1, 3)):
            if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            rows, version = parse_rows(bytes(data))
        except CacheError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert isinstance(version, str)
        for tokens, row in rows:
            assert 1 <= tokens <= 1 << 24
            assert {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M"} <= set(row)
            assert all(isinstance(value, int) and 0 <= value <= 4096 for value in row.values())
    assert refused > 1000


def test_rows_become_configs_of_ours() -> None:
    assert tile_config(ROW) == grouped()
    bare = {name: value for name, value in ROW.items() if name.startswith(("BLOCK", "GROUP"))}
    assert tile_config(bare) == grouped(num_warps=4, num_stages=3)
    assert tile_config(bare, "hip") == grouped(num_warps=4, num_stages=2)
    descriptors = TileConfig("triton.moe_tma", {**TILE, "waves": 0, "specialize": 0})
    assert tile_config({**ROW, "USE_TMA": True}) == descriptors
    assert tile_config({**ROW, "SPLIT_K": 1, "num_ctas": 1}) == grouped()
    assert tile_config({**ROW, "SPLIT_K": 2}) is None
    assert tile_config({"tile_m": 16}) is None
    assert outside_domain(registry["triton.moe_gemm"], grouped()) is None
    assert outside_domain(registry["triton.moe_tma"], descriptors) is None


def test_hints_come_from_the_nearest_row_of_the_layers_own_file(tmp_path: Path) -> None:
    wide = {**ROW, "BLOCK_SIZE_N": 256}
    deep = {**ROW, "BLOCK_SIZE_K": 128}
    triton = tmp_path / "in" / "triton_3_5_1"
    older = tmp_path / "in" / "triton_3_6_0"
    name = "E=8,N=3584,device_name=NVIDIA_H200_NVL"
    folder = PeerFolder(tmp_path / "peers")
    assert folder.hints_for(LAYER.up, 4, H200) == ()
    for path, engine in [
        (peer(tmp_path / "in", NAME, {"triton_version": "3.4.0", "1": ROW, "64": wide}), "vllm"),
        (peer(older, f"{name}.json", {"1": {**ROW, "num_warps": 8}}), "sglang"),
        (peer(triton, f"{name}.json", {"1": deep}), "sglang"),
        (peer(triton, f"{name}_down.json", {"1": {**deep, "USE_TMA": False, "num_stages": 4}}), "sglang"),
    ]:
        folder.keep(read_peer(path, engine))
    folder = PeerFolder(tmp_path / "peers")
    assert folder.hints_for(LAYER.up, 16, H200) == (grouped(), grouped(block_k=128))
    assert folder.hints_for(LAYER.up, 4096, H200) == (grouped(block_n=256), grouped(block_k=128))
    assert folder.hints_for(LAYER.down, 16, H200) == (grouped(), grouped(block_k=128, num_stages=4))
    first, second = folder.baselines_for(LAYER.down, 40, H200)
    assert (first.engine, first.file, first.triton, first.tokens) == ("vllm", NAME, "3.4.0", 64)
    assert (second.engine, second.file, second.triton) == ("sglang", f"{name}_down.json", "3.5.1")
    assert name_for("vllm", LAYER, H200).text("vllm") == NAME


def test_what_tuning_gained_over_a_peer_is_told_where_it_was_measured(tmp_path: Path) -> None:
    folder = PeerFolder(tmp_path / "peers")
    folder.keep(read_peer(peer(tmp_path / "in", NAME, {"1": ROW, "64": {**ROW, "BLOCK_SIZE_N": 256}}), "vllm"))
    (decision,) = table_of({8: (choice(grouped(num_stages=4), 10, grouped(), 15), choice(LARGE, 20))}).decisions
    up, down = (folder.baselines_for(gemm, 8, H200)[0] for gemm in LAYER.gemms)
    assert (peer_us(up, decision, {}), peer_us(down, decision, {})) == (15, None)
    assert peer_us(down, decision, gather([timed("down", grouped(), 30.0, 8)])) == 30
    assert peer_us(replace(up, config=None), decision, {}) is None


def test_a_damaged_kept_file_is_named(tmp_path: Path) -> None:
    peer(tmp_path / "vllm", NAME, {"1": []})
    with pytest.raises(CacheError, match="E=8,N=3584"):
        PeerFolder(tmp_path).hints_for(LAYER.up, 1, H200)


@real
def test_every_real_file_imports(tmp_path: Path) -> None:
    folder = PeerFolder(tmp_path)
    paths = find_files([PEERS])
    counts = {"vllm": 0, "sglang": 0}
    configs = dropped = 0
    for path in paths:
        engine = "vllm" if "vllm" in str(path) else "sglang"
        found = read_peer(path, engine)
        counts[engine] += 1
        assert found.name.text(engine) == path.name or "," in found.name.device
        assert found.rows == tuple(
            (int(key), value) for key, value in json.loads(path.read_text()).items() if key != "triton_version"
        )
        for _, row in found.rows:
            made = tile_config(row)
            configs, dropped = configs + (made is not None), dropped + (made is None)
        kept = folder.keep(found)
        assert read_peer(kept, engine).rows == found.rows
    assert counts == {"vllm": 338, "sglang": 390}
    assert configs > 12_000
    # Those of flydsl's kernel, and none other.
    assert dropped == 128
