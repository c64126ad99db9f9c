"""What vLLM and SGLang do with their files, told again from their documentation: the loaders that tests hold us to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tests.store_contract import HERE
from tilecast.environment import Environment
from tilecast.evidence import Choice, Decision, Measurement, TuningTable
from tilecast.problem import ExpertLayer, TileConfig, buckets

H200 = replace(HERE, device_kind="cuda", device="NVIDIA H200 NVL", arch="sm_90", features="", compiler="3.5.1")
LAYER = ExpertLayer(hidden=4096, intermediate=3584, experts=8, top_k=2)
TILE = {"block_m": 16, "block_n": 128, "block_k": 64, "group_m": 1, "num_warps": 4, "num_stages": 3}
PEERS = Path(__file__).parents[3] / "shared" / "data" / "peers"
SGLANG_FEW = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
SGLANG_MANY = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8}


def grouped(**changes: int) -> TileConfig:
    return TileConfig("triton.moe_gemm", {**TILE, "swap": 0, **changes})


def choice(config: TileConfig, us: float = 10.0, default: TileConfig | None = None, default_us: float = 20.0) -> Choice:
    return Choice(config=config, p50_us=us, default=config if default is None else default, default_us=default_us)


def table_of(
    choices: dict[int, tuple[Choice, Choice]],
    *,
    layer: ExpertLayer = LAYER,
    environment: Environment = H200,
    policy: str = "fastest",
) -> TuningTable:
    decisions = tuple(
        Decision(environment=environment.digest, layer=layer, bucket=bucket, policy=policy, up=up, down=down)
        for bucket, (up, down) in zip(buckets(list(choices)), choices.values(), strict=True)
    )
    return TuningTable((environment,), decisions)


def timed(gemm: str, config: TileConfig, us: float, tokens: int) -> Measurement:
    chosen = LAYER.up if gemm == "up" else LAYER.down
    return Measurement(environment=H200.digest, gemm=chosen, tokens=tokens, config=config, samples_us=(us,))


def vllm_default(tokens: int, experts: int, *, hip: bool = False) -> dict[str, int]:
    """Return what vLLM 0.33 runs for 16-bit weights where it finds no file."""
    if tokens <= 32:
        height, stages = 16, 4
    else:
        height, stages = 32 if tokens <= 96 else 64 if tokens <= 512 else 128, 3
    return {
        "BLOCK_SIZE_M": height,
        "BLOCK_SIZE_N": 64 if tokens <= 64 else 128,
        "BLOCK_SIZE_K": 128 if tokens <= 64 else 64,
        "GROUP_SIZE_M": 16 if tokens // experts > 128 else 1,
        "num_warps": 4 if tokens <= 128 else 8,
        "num_stages": 2 if hip else stages,
    }


def vllm_runs(folder: Path, device: str, experts: int, intermediate: int, tokens: int) -> dict[str, int]:
    """Return the config that vLLM runs for 16-bit weights; VLLM_TUNED_CONFIG_FOLDER is `folder`."""
    device = "NVIDIA_H200" if "H200" in device.split() else device.replace(" ", "_")
    path = folder / f"E={experts},N={intermediate},device_name={device}.json"
    found = json.loads(path.read_text())
    found.pop("triton_version", None)
    return nearest(found, tokens)


def sglang_runs(
    folder: Path, device: str, triton: str, experts: int, intermediate: int, tokens: int, *, down: bool
) -> dict[str, int]:
    """Return the config that SGLang runs for 16-bit weights; SGLANG_MOE_CONFIG_DIR is `folder`."""
    name = f"E={experts},N={intermediate},device_name={device.replace(' ', '_')}{'_down' if down else ''}.json"
    path = folder / "configs" / f"triton_{triton.replace('.', '_')}" / name
    return nearest(json.loads(path.read_text()), tokens)


def nearest(found: dict[str, dict[str, int]], tokens: int) -> dict[str, int]:
    configs = {int(key): value for key, value in found.items()}
    return configs[min(configs, key=lambda key: abs(key - tokens))]
