"""Cache folders of tests' own: a store and a calibration for each, and one folder of compiled kernels for all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tilecast.settings import Settings

KERNELS = Settings.from_environment().cache_dir / "kernels"
"""Where this process keeps them, looked up before a test changes variables. Compiling one takes seconds, and it is
kept under all that it depends on; what is said of compiling is tested with folders that are empty."""


def cache_folder(folder: Path) -> Path:
    """Make a folder for TILECAST_CACHE_DIR, if it is not there, and return it."""
    with suppress(OSError):  # where nothing can be written, kernels are compiled each time, as for users
        KERNELS.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (folder / "kernels").symlink_to(KERNELS, target_is_directory=True)
    return folder
