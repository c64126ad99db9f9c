"""Imported files of other engines: kept beside the store, asked for hints and for baselines, never for decisions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tilecast.cache_store.files import write_atomically
from tilecast.cache_store.interop.names import ENGINES, name_for, triton_folder, triton_version, version_key
from tilecast.cache_store.interop.rows import TRITON_KEY, PeerConfigs, Row, read_peer, tile_config
from tilecast.cache_store.interop.tiles import Evidence, kernel_of, known_times
from tilecast.environment import Environment
from tilecast.errors import CacheError
from tilecast.evidence import Decision
from tilecast.problem import ExpertGemm, ExpertLayer, GemmName, TileConfig

MAX_FILES = 20_000
"""More than all that both engines ship, many times over; a folder of more was named by mistake."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What another engine would run for one GEMM: its row's token count, and the config (None: not one of ours)."""

    gemm: GemmName
    engine: str
    file: str
    triton: str
    tokens: int
    row: Row
    config: TileConfig | None


class PeerFolder:
    """The imported files below one folder: `vllm/NAME` and `sglang/triton_X_Y_Z/NAME`.

    Files are read when a layer asks for them and remembered; a damaged one raises CacheError that names it.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder, which need not be there yet."""
        self._folder = folder
        self._read: dict[Path, PeerConfigs | None] = {}

    def keep(self, configs: PeerConfigs) -> Path:
        """Keep an imported file under the name that its engine looks for and return where. Raises CacheError."""
        place = self._folder / configs.engine
        if configs.engine == "sglang":
            place /= triton_folder(configs.triton) if configs.triton else "any"
        path = place / configs.name.text(configs.engine)
        document: dict[str, object] = {str(tokens): dict(row) for tokens, row in configs.rows}
        if configs.triton and configs.engine == "vllm":
            document = {TRITON_KEY: configs.triton, **document}
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{place}: cannot be made ({error.strerror}); set TILECAST_CACHE_DIR") from error
        write_atomically(path, (json.dumps(document, indent=4) + "\n").encode("ascii"))
        self._read.pop(path, None)
        return path

    def baselines_for(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> tuple[Baseline, ...]:
        """Return what each engine whose file was imported would run, vLLM first; empty where none was.

        The lookup is the engines' own: by local experts, local intermediate size, dtype and device, then the nearest
        token count. Hidden size, top-k and activation are in no name, so a file may have been made for others.
        """
        found = []
        for engine in ENGINES:
            configs = self._file_for(engine, gemm, environment)
            if configs is None:
                continue
            key, row = configs.nearest(tokens)
            kind = "hip" if environment.arch.startswith("gfx") else "cuda"
            found.append(
                Baseline(
                    gemm=gemm.name,
                    engine=engine,
                    file=configs.name.text(engine),
                    triton=configs.triton,
                    tokens=key,
                    row=row,
                    config=tile_config(row, kind, kernel_of(gemm.layer.weight_format)),
                )
            )
        return tuple(found)

    def hints_for(self, gemm: ExpertGemm, tokens: int, environment: Environment) -> tuple[TileConfig, ...]:
        """Return the imported configs worth trying first for a GEMM; a kernel's own checks may still refuse them."""
        baselines = self.baselines_for(gemm, tokens, environment)
        return tuple(dict.fromkeys(b.config for b in baselines if b.config is not None))

    def _file_for(self, engine: str, gemm: ExpertGemm, environment: Environment) -> PeerConfigs | None:
        for down in (True, False) if engine == "sglang" and gemm.name == "down" else (False,):
            for path in self._places(engine, gemm.layer, environment, down=down):
                configs = self._load(path, engine)
                if configs is not None:
                    return configs
        return None

    def _places(self, engine: str, layer: ExpertLayer, environment: Environment, *, down: bool) -> Iterator[Path]:
        """Yield where the engine's loader would look, in its order: SGLang takes its own Triton, then the newest."""
        name = name_for(engine, layer, environment, down=down).text(engine)
        root = self._folder / engine
        if engine == "vllm":
            yield root / name
            return
        versions = [triton_version(path.name) for path in root.glob("triton_*")]
        known = sorted((version for version in versions if version), key=version_key, reverse=True)
        own = environment.compiler.partition("+")[0]
        for version in sorted(known, key=lambda version: version != own):
            yield root / triton_folder(version) / name
        yield root / "any" / name

    def _load(self, path: Path, engine: str) -> PeerConfigs | None:
        if path not in self._read:
            self._read[path] = read_peer(path, engine) if path.exists() else None
        return self._read[path]


def peer_us(baseline: Baseline, decision: Decision, evidence: Evidence) -> float | None:
    """Return the time in µs that a baseline's config took in our kernel, None where it was not measured.

    The decision is the one for the bucket that the baseline was asked for; `tiles.gather` makes the evidence.
    """
    known = known_times(decision, baseline.gemm, evidence)
    return None if baseline.config is None else known.get(baseline.config)


def find_files(paths: list[Path]) -> list[Path]:
    """Return the files meant: those named, and every `.json` below the folders named, in order. Raises CacheError."""
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob("*.json"))
            if not inside:
                raise CacheError(f"{path}: holds no .json file; name a folder of tuning files")
            found |= dict.fromkeys(inside)
        else:
            found[path] = None
        if len(found) > MAX_FILES:
            raise CacheError(f"{path}: more than {MAX_FILES} files, which no folder of tuning files has")
    return list(found)
