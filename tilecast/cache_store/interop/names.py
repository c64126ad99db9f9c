"""How vLLM and SGLang name their files: exactly what their loaders build, and the parse of it.

Sources: vLLM, `fused_moe.get_config_file_name`; SGLang, `fused_moe_triton_config.get_config_file_name` and
`get_moe_configs`. Both put the device's name into the file's, so one letter off is a file that is never read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tilecast.environment import Environment
from tilecast.errors import CacheError
from tilecast.problem import MAX_DIMENSION, ExpertLayer, weight_format

ENGINES = ("vllm", "sglang")
ENGINE_TITLES = {"vllm": "vLLM", "sglang": "SGLang"}
DTYPE_TAGS = {"bf16": "", "fp16": "", "fp32": "float32"}
"""The tag in the name of a layer's files, by its dtype where weights are dense; 16-bit layers have none."""
WEIGHT_TAGS = {"awq": "int4_w4a16", "int4": "int4_w4a16", "int8": "int8_w8a16", "fp8": "fp8_w8a8"}
"""The tag by what weights are quantised to. Groups of integers have no place in a name: files are for all of them."""
BUILT_TAGS = {
    "vllm": frozenset({"", "float32", "fp8_w8a8", "fp8_w8a16", "int8_w8a16", "int4_w4a16"}),
    "sglang": frozenset({"", "float32", "fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16"}),
}
"""The tags that each loader builds (vLLM 0.33, SGLang 0.5.23); files with others exist, and nothing reads them."""

_NAME = re.compile(
    r"E=(?P<experts>\d{1,8}),N=(?P<intermediate>\d{1,8}),device_name=(?P<device>[^,/\s]{0,128}?)"
    r"(?:,dtype=(?P<dtype>[A-Za-z0-9_]{1,32}?))?(?:,backend=(?P<backend>[A-Za-z0-9]{1,32}))?"
    r"(?:,block_shape=\[(?P<rows>\d{1,5}),(?P<space> ?)(?P<columns>\d{1,5})\])?"
    r"(?P<channel>,per_channel_quant=True)?(?P<down>_down)?\.json"
)
_TRITON_FOLDER = re.compile(r"triton_(\d{1,4}(?:_\d{1,4}){1,3})")


@dataclass(frozen=True, kw_only=True)
class PeerName:
    """What a file's name says: local experts E, local intermediate size N, device, and how weights are stored.

    `device` is as the name has it, spaces as `_`; `dtype` is empty for 16-bit weights. `down` marks SGLang's separate
    file of the down projection.
    """

    experts: int
    intermediate: int
    device: str
    dtype: str = ""
    backend: str = ""
    block_shape: tuple[int, int] | None = None
    per_channel: bool = False
    down: bool = False

    def text(self, engine: str) -> str:
        """Return the file name that the engine's loader builds."""
        parts = [f"E={self.experts}", f"N={self.intermediate}", f"device_name={self.device}"]
        if self.dtype:
            parts.append(f"dtype={self.dtype}")
        if self.backend:
            parts.append(f"backend={self.backend}")
        if self.block_shape is not None:
            separator = "," if engine == "vllm" else ", "
            parts.append(f"block_shape=[{separator.join(map(str, self.block_shape))}]")
        if self.per_channel:
            parts.append("per_channel_quant=True")
        return ",".join(parts) + ("_down" if self.down else "") + ".json"


def parse_name(text: str) -> PeerName:
    """Return what a file name of either engine says. Raises CacheError."""
    found = _NAME.fullmatch(text)
    if found is None or not 1 <= int(found["experts"]) <= MAX_DIMENSION:
        raise CacheError(
            f"{text!r:.200}: is no name of a tuning file, expected "
            f"E=…,N=…,device_name=…[,dtype=…][,block_shape=[…]][,per_channel_quant=True][_down].json"
        )
    return PeerName(
        experts=int(found["experts"]),
        intermediate=int(found["intermediate"]),
        device=found["device"],
        dtype=found["dtype"] or "",
        backend=found["backend"] or "",
        block_shape=(int(found["rows"]), int(found["columns"])) if found["rows"] else None,
        per_channel=found["channel"] is not None,
        down=found["down"] is not None,
    )


def device_in_name(engine: str, device: str) -> str:
    """Return a device's name as an engine's file names have it; `device` is torch's name for it.

    vLLM calls every H200 `NVIDIA_H200`, and AMD's virtual functions by the name of the whole device.
    """
    if engine == "sglang":
        return device.replace(" ", "_")
    name = re.sub(r"[\s/]+", "_", device)
    if "H200" in name.split("_"):
        return "NVIDIA_H200"
    return name.removesuffix("_VF") if name.startswith("AMD_") else name


def name_for(engine: str, layer: ExpertLayer, environment: Environment, *, down: bool = False) -> PeerName:
    """Return the name of a layer's file on the environment's device.

    Blocks are in the name for fp8 alone (the engines leave out a block shape with a zero in it, which is what groups
    of integers have), and scales by channel for SGLang alone.
    """
    form = weight_format(layer.weight_format)
    by_channel = engine == "sglang" and form.kind == "fp8" and (form.group, form.rows) == (0, 1)
    return PeerName(
        experts=layer.experts,
        intermediate=layer.intermediate,
        device=device_in_name(engine, environment.device),
        dtype=DTYPE_TAGS[layer.dtype] if form.kind == "dense" else WEIGHT_TAGS[form.kind],
        block_shape=(form.rows, form.group) if form.rows > 1 else None,
        per_channel=by_channel,
        down=down,
    )


def triton_folder(version: str) -> str:
    """Return SGLang's folder for a Triton version: `triton_3_5_1`. Raises CacheError for what is none."""
    folder = f"triton_{version.partition('+')[0].replace('.', '_')}"
    if _TRITON_FOLDER.fullmatch(folder) is None:
        raise CacheError(f"Triton version {version!r:.40} names no folder that SGLang reads, expected such as 3.5.1")
    return folder


def triton_version(folder: str) -> str:
    """Return the Triton version that a folder of SGLang's is for; empty if it is none of those."""
    found = _TRITON_FOLDER.fullmatch(folder)
    return found[1].replace("_", ".") if found else ""


def version_key(version: str) -> tuple[int, ...]:
    """Return what Triton versions sort by."""
    return tuple(int(part) for part in version.split(".")) if version else ()
