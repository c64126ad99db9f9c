"""What is wrong in a folder of vLLM's or SGLang's files: names nothing builds, rows nothing picks, impossible tiles."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tilecast.cache_store.interop.devices import device_arch
from tilecast.cache_store.interop.names import (
    BUILT_TAGS,
    ENGINE_TITLES,
    PeerName,
    device_in_name,
    parse_name,
    triton_version,
)
from tilecast.cache_store.interop.peers import find_files
from tilecast.cache_store.interop.rows import PeerConfigs, Row, read_peer
from tilecast.errors import CacheError

KINDS = {
    "unreadable": "no tuning file that an engine could read",
    "unreachable": "no engine looks for this name or row",
    "mis-keyed": "an engine uses something else than the entry says",
    "duplicate": "says again what another entry says",
    "impossible": "cannot run on the device that it is for",
}

BITS = {"": (16, 16), "float32": (32, 32), "fp8_w8a8": (8, 8), "int8_w8a8": (8, 8), "int8_w8a16": (16, 8)} | {
    "int4_w4a16": (16, 4)
}
"""Bits of an element of rows and of weights, by dtype tag; other tags' shared memory is not judged."""


@dataclass(frozen=True, order=True, kw_only=True)
class Finding:
    """One thing wrong. `entry` is a token count, or empty where it is about the whole file."""

    file: str
    entry: str
    kind: str
    message: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.file}{f' at {self.entry}' if self.entry else ''}: {self.kind}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Linted:
    """How many files were looked at, how many rows they have, and what is wrong."""

    files: int
    rows: int
    findings: tuple[Finding, ...]


def guess_engine(path: Path) -> str:
    """Return whose file it is by where it lies and what its name has; vLLM's where nothing tells."""
    sglang = triton_version(path.parent.name) or any(mark in path.name for mark in (", ", "per_channel", "_down.json"))
    return "sglang" if sglang else "vllm"


def lint_folder(folder: Path, shared_bytes: Mapping[str, int], engine: str | None = None) -> Linted:
    """Check every file below a folder. `shared_bytes` gives what a program may use at most, by architecture.

    Raises CacheError where the folder is none or holds no file.
    """
    if not folder.is_dir():
        raise CacheError(f"{folder}: is no folder; name one that holds tuning files")
    findings: list[Finding] = []
    read: dict[Path, PeerConfigs] = {}
    paths = find_files([folder])
    for path in paths:
        try:
            read[path] = read_peer(path, engine or guess_engine(path))
        except CacheError as error:
            text = str(error).removeprefix(f"{path}: ")
            findings.append(Finding(file=_relative(path, folder), entry="", kind=_kind_of(path), message=text))
    # Without a file of its own the folder is one of folders, each of which may be what vLLM is told to read.
    nested = all(path.parent != folder for path in paths)
    for path, configs in read.items():
        file = _relative(path, folder)
        findings += [
            Finding(file=file, entry="", kind="unreachable", message=reason)
            for reason in _unreachable(path, configs, None if nested else folder)
        ]
        if configs.says_triton and configs.engine == "sglang":
            message = "SGLang stops at the key triton_version: the version is the folder's name there"
            findings.append(Finding(file=file, entry="", kind="unreadable", message=message))
        findings += _row_findings(file, configs, shared_bytes)
        if configs.name.down:
            up = path.with_name(replace(configs.name, down=False).text(configs.engine))
            findings += _pair_findings(file, configs, read.get(up))
    findings += _same_contents(read, folder)
    rows = sum(len(configs.rows) for configs in read.values())
    return Linted(files=len(paths), rows=rows, findings=tuple(sorted(set(findings))))


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))


def _kind_of(path: Path) -> str:
    """Tell a good file with a name that nothing builds from a file that cannot be read at all."""
    try:
        parse_name(path.name)
    except CacheError:
        return "unreachable"
    return "unreadable"


def _unreachable(path: Path, configs: PeerConfigs, folder: Path | None) -> Iterable[str]:
    """Yield why the engine never reads a file; `folder` is the one that vLLM is told to read, None if unknown."""
    name, engine = configs.name, configs.engine
    title = ENGINE_TITLES[engine]
    if name.text(engine) != path.name:
        yield f"{title} looks for {name.text(engine)!r}"
    if not name.device:
        yield "the name lacks the device"
    elif (alias := device_in_name(engine, name.device)) != name.device:
        wanted = replace(name, device=alias).text(engine)
        yield f"{title} calls this device {alias} and looks for {wanted!r}"
    if name.dtype not in BUILT_TAGS[engine]:
        yield f"no weights have the tag dtype={name.dtype} there; 16-bit weights have none"
    if name.block_shape is not None and not name.dtype:
        yield "block_shape without a dtype: only quantised weights have blocks, and those have a dtype"
    if engine == "vllm" and (name.down or name.per_channel):
        yield "vLLM has no separate file of the down projection and no tag for channels"
    if engine == "vllm" and folder is not None and path.parent != folder:
        yield "vLLM reads no folders below its folder"
    if engine == "sglang" and not triton_version(path.parent.name):
        yield "SGLang reads only folders named by Triton's version, such as triton_3_5_1"


def _row_findings(file: str, configs: PeerConfigs, shared_bytes: Mapping[str, int]) -> Iterable[Finding]:
    limit = shared_bytes.get(device_arch(configs.name.device) or "", 0)
    ordered = sorted(configs.rows, key=lambda row: row[0])
    for index, (tokens, row) in enumerate(ordered):
        for reason in _impossible(configs.name, row, limit):
            yield Finding(file=file, entry=str(tokens), kind="impossible", message=reason)
        beside = ordered[max(0, index - 1) : index] + ordered[index + 1 : index + 2]
        if len(beside) == 2 and all(other == row for _, other in beside):
            message = f"equals its neighbours at {beside[0][0]} and {beside[1][0]}, so it changes nothing"
            yield Finding(file=file, entry=str(tokens), kind="duplicate", message=message)


def _impossible(name: PeerName, row: Row, limit: int) -> Iterable[str]:
    if "BLOCK_SIZE_M" not in row:
        return
    for field in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps"):
        value = int(row.get(field, 1))
        if value & (value - 1):
            yield f"{field} is {value}, no power of two"
    needed = least_shared_bytes(name, row)
    if limit and needed > limit:
        yield f"needs at least {needed} bytes of shared memory, {name.device} has {limit} for a program"


def least_shared_bytes(name: PeerName, row: Row) -> int:
    """Return what a row's operand buffers take at least: one buffer a stage but the last; 0 where unknown.

    Instructions that read shared memory need one more, so a row within bounds may still be refused by the device.
    """
    if name.dtype not in BITS:
        return 0
    row_bits, weight_bits = BITS[name.dtype]
    m, n, k = (int(row[f"BLOCK_SIZE_{axis}"]) for axis in "MNK")
    if name.block_shape is not None:
        k = min(k, *name.block_shape)
    buffers = max(1, int(row.get("num_stages", 2)) - 1)
    return buffers * k * (m * row_bits + n * weight_bits) // 8


def _pair_findings(file: str, down: PeerConfigs, up: PeerConfigs | None) -> Iterable[Finding]:
    """SGLang sorts rows once for both projections, by the up file's BLOCK_SIZE_M."""
    if up is None:
        message = "the file of the up projection is missing beside it, so the default's BLOCK_SIZE_M rules"
        yield Finding(file=file, entry="", kind="mis-keyed", message=message)
        return
    for tokens, row in down.rows:
        wanted = up.nearest(tokens)[1].get("BLOCK_SIZE_M")
        if row.get("BLOCK_SIZE_M") != wanted:
            message = f"BLOCK_SIZE_M is {row.get('BLOCK_SIZE_M')}, SGLang takes the up projection's {wanted} instead"
            yield Finding(file=file, entry=str(tokens), kind="mis-keyed", message=message)


def _same_contents(read: Mapping[Path, PeerConfigs], folder: Path) -> Iterable[Finding]:
    groups: dict[str, list[Path]] = {}
    for path, configs in read.items():
        groups.setdefault(json.dumps([[tokens, dict(row)] for tokens, row in configs.rows]), []).append(path)
    for paths in groups.values():
        first, *others = sorted(paths)
        for path in others:
            message = f"has the rows of {_relative(first, folder)}"
            yield Finding(file=_relative(path, folder), entry="", kind="duplicate", message=message)
