"""One tuning at a time on a device: times taken while another tuning runs there choose the wrong configs.

A lock is a file of this user's under /tmp, or in TILECAST_LOCK_DIR (containers that share a device and not /tmp give
one folder to all), held with flock, so that it ends with the process whatever ends that. The
ranks of one job may hold it together: on a CPU they share the machine in production, too, and a rank that waits for
another of its own job, which waits for it in a collective, would wait for ever.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tilecast import settings
from tilecast.environment import Environment
from tilecast.errors import DeviceError

try:
    import fcntl
except ImportError:  # There is none on Windows.
    fcntl = None  # type: ignore[assignment]  # the name is a module to mypy

logger = logging.getLogger(__name__)

POLL_S = 0.2
MAX_OWNER_BYTES = 4096
_PROCESS = uuid.uuid4().hex


@contextmanager
def device_lock(
    device: Environment | str, *, timeout_s: float | None = None, job: str | None = None, folder: Path | None = None
) -> Iterator[None]:
    """Hold `device`, an environment's or a name, against every other job of this user on this machine.

    Waits for the job that holds it, for at most `timeout_s` (None: as long as it takes), and logs one line that it
    does; then DeviceError. Processes with the same `job`, by default that of the launcher, else this process by
    itself, hold a device together. Where no lock file can be made, a warning is logged and nothing is held.
    """
    name = device if isinstance(device, str) else device_name(device)
    opened = _files(folder, name)
    if opened is None:
        yield
        return
    handle, gate = opened
    try:
        _wait(name, handle, gate, job or job_name(), timeout_s)
        yield
    finally:
        # Closing lets go of the lock; the files stay, as removing one that somebody just opened would split it.
        os.close(handle)
        os.close(gate)


def device_name(environment: Environment) -> str:
    """Return what names the device that `environment` is about, on this machine: the GPU's UUID, or its number."""
    host = platform.node() or "localhost"
    if environment.device_kind == "cpu":
        return _file_name(f"cpu-{host}")
    import torch

    index = torch.cuda.current_device()
    known = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    # A number means different GPUs to processes that see different ones; there is nothing better then.
    return _file_name(f"gpu-{known}" if known else f"gpu-{host}-{index}")


def job_name(launcher: settings.Launcher | None = None) -> str:
    """Return what the ranks of one job have in common, and no other process on this machine has."""
    started = launcher or settings.launcher()
    if started is None:
        return f"process {os.getpid()} {_PROCESS}"
    # Where the ranks meet: two jobs cannot listen there at once.
    return f"job {started.master_addr}:{started.master_port}"


def runtime_folder(base: Path | None = None) -> Path:
    """Return this user's folder of lock files, made if it is not there. Raises OSError if it is not safe to use.

    It is under `base`, else TILECAST_LOCK_DIR, else /tmp: the same for every process of the user, whatever
    XDG_RUNTIME_DIR or TMPDIR a scheduler gives each. Raises UsageError if TILECAST_LOCK_DIR is no folder.
    """
    base = base or settings.lock_dir() or Path("/tmp")
    root = base if os.access(base, os.W_OK) else Path(tempfile.gettempdir())
    folder = root / f"tilecast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a folder of this user's")
    return folder


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text)[:200]


def _files(folder: Path | None, name: str) -> tuple[int, int] | None:
    """Return the opened lock and gate of a device; None, logged, where they cannot be made."""
    opened: list[int] = []
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        folder = folder if folder is not None else runtime_folder()
        for ending in ("lock", "gate"):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            opened.append(os.open(folder / f"{name}.{ending}", flags, 0o600))
    except OSError as error:
        for handle in opened:
            os.close(handle)
        logger.warning("cannot lock %s (%s); another tuning on it would disturb the times taken", name, error)
        return None
    return opened[0], opened[1]


def _wait(name: str, handle: int, gate: int, job: str, timeout_s: float | None) -> None:
    start, told = time.monotonic(), False
    while (holder := _try(handle, gate, job)) is not None:
        waited_s = time.monotonic() - start
        if timeout_s is not None and waited_s >= timeout_s:
            raise DeviceError(
                f"another tuning, process {holder}, has used {name} for the {timeout_s:g} s that this one waited; "
                "let it finish, or end it"
            )
        if not told:
            logger.warning("waiting for another tuning on %s, process %s", name, holder)
            told = True
        time.sleep(POLL_S if timeout_s is None else min(POLL_S, max(0.0, timeout_s - waited_s)))


def _try(handle: int, gate: int, job: str) -> str | None:
    """Take the lock, or return the process that holds it.

    Every holder holds it shared; who takes it first shows that there is no holder by holding it alone for a moment.
    That, the note of the job, and going over to shared happen behind the gate, so that nobody comes in between.
    """
    fcntl.flock(gate, fcntl.LOCK_EX)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _read_owner(handle)
            if holder.get("job") != job:
                return str(holder.get("process", "unknown"))
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"job": job, "process": os.getpid()}).encode(), 0)
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    finally:
        fcntl.flock(gate, fcntl.LOCK_UN)


def _read_owner(handle: int) -> dict[str, object]:
    try:
        found = json.loads(os.pread(handle, MAX_OWNER_BYTES, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
