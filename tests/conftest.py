"""What all tests share: Triton's interpreter where there is no GPU, and hypothesis without deadlines."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Read as torch is imported: threads that have nothing to do sleep. Two workers of as many threads as there are cores
# would otherwise spend more time on waiting for work than on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read by Triton when a kernel is defined, so before any test imports one. Whoever compiles drops it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A process that measures takes seconds to start: tests of it ask for it.
os.environ.setdefault("TM_GEMM_SANDBOX", "0")

# Files of tests run side by side in two workers, and a tuning in one need not wait for the other's: no time is judged.
os.environ["TILECAST_LOCK_DIR"] = tempfile.mkdtemp(prefix="tilecast-locks-")
atexit.register(shutil.rmtree, os.environ["TILECAST_LOCK_DIR"], ignore_errors=True)

settings.register_profile("tilecast", deadline=None)
settings.load_profile("tilecast")


@pytest.fixture(scope="session", autouse=True)
def _undisturbed() -> Iterator[None]:
    """Tunings in this process go on while the other worker computes: watched, they would measure all again and wait."""
    from tilecast.autotune import tools, watches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "watch_for", lambda *_, **__: watches.Blind())
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One of torch's threads for a whole file, its other fixtures included."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
