from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from tests.store_contract import HERE, decision, measurement
from tilecast.cache_store import files, schema
from tilecast.cache_store.layout import HEAD, REVISIONS, STORE_ID
from tilecast.cache_store.models import metadata
from tilecast.cache_store.session import open_sqlite
from tilecast.cache_store.store import open_store
from tilecast.errors import CacheError, SchemaError
from tilecast.evidence import TuningTable

FIXTURES = Path(__file__).parent / "fixtures"


def restored(folder: Path, revision: str) -> Path:
    """A store as the Tilecast of that revision left it."""
    path = folder / f"store-{revision}.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((FIXTURES / f"store_{revision}.sql").read_text())
    return path


def execute(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def test_revisions_are_the_migrations() -> None:
    scripts = ScriptDirectory(str(schema.MIGRATIONS))
    assert [script.revision for script in scripts.walk_revisions()][::-1] == list(REVISIONS)
    assert scripts.get_heads() == [HEAD]


def test_migrations_make_what_the_models_say(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    open_store(path).close()
    database = open_sqlite(path)
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    database.close()
    with contextlib.closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA application_id").fetchone() == (STORE_ID,)
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("revision", REVISIONS)
def test_stores_of_every_revision_open_for_writing(tmp_path: Path, revision: str) -> None:
    with open_store(restored(tmp_path, revision)) as store:
        assert store.table() == TuningTable((HERE,), (decision(), decision(4, 16)))
        assert store.measurements() == [
            measurement(),
            measurement(status="timeout", samples_us=(), detail="10 s", round=1),
        ]
        store.put_decisions([decision(16, 64)])


def test_store_before_the_first_revision_is_upgraded_only_for_writing(tmp_path: Path) -> None:
    """What a process leaves that was killed after Alembic's own table was made."""
    path = tmp_path / "store.db"
    execute(path, f"PRAGMA application_id={STORE_ID}")
    execute(path, "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    before = path.read_bytes()
    with pytest.raises(SchemaError) as caught:
        open_store(path, read_only=True)
    assert str(caught.value) == (
        f"{path}: has schema none, this Tilecast reads 0001; open it for writing once to upgrade it, "
        f"as `tilecast tune --store {path}` does"
    )
    assert path.read_bytes() == before
    with open_store(path) as store:
        store.add_environment(HERE)
    with open_store(path, read_only=True) as store:
        assert store.environments() == [HERE]


@pytest.mark.parametrize("read_only", [False, True])
def test_store_from_the_future(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "store.db"
    open_store(path).close()
    execute(path, "UPDATE alembic_version SET version_num = '0002'")
    with pytest.raises(SchemaError) as caught:
        open_store(path, read_only=read_only)
    assert str(caught.value) == (
        f"{path}: has schema 0002, this Tilecast reads up to 0001; "
        f"upgrade Tilecast (`pip install --upgrade tilecast`) or use another store"
    )


def test_failed_upgrade_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    """A table in the way makes the migration fail halfway; none of it stays."""
    path = tmp_path / "store.db"
    execute(path, f"PRAGMA application_id={STORE_ID}")
    execute(path, "CREATE TABLE measurement (mine)")
    with pytest.raises(CacheError, match="measurement already exists") as caught:
        open_store(path)
    assert "\n" not in str(caught.value)
    with contextlib.closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT name FROM sqlite_master").fetchall() == [("measurement",)]


def test_store_on_a_network_file_system_says_so_and_uses_no_wal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(schema, "network_filesystem", lambda path: "nfs4")
    with caplog.at_level(logging.WARNING), open_store(tmp_path / "store.db") as store:
        store.add_environment(HERE)
    assert "network file system (nfs4)" in caplog.text
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db")) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_network_file_systems_are_told_by_the_longest_mount_point(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "27 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "28 27 0:40 / /home rw,relatime shared:1 - nfs4 server:/home rw\n"
        "29 28 254:1 / /home/local\\040disk rw - ext4 /dev/vdb rw\n"
    )
    assert files.network_filesystem(Path("/tmp/a.db"), mounts) is None
    assert files.network_filesystem(Path("/home/me/a.db"), mounts) == "nfs4"
    assert files.network_filesystem(Path("/homestead/a.db"), mounts) is None
    assert files.network_filesystem(Path("/home/local disk/a.db"), mounts) is None
    assert files.network_filesystem(Path("/a.db"), tmp_path / "none") is None


@pytest.mark.parametrize(
    ("kind", "remote"),
    [
        *((kind, True) for kind in ("9p", "cifs", "virtiofs", "fuse.sshfs", "fuse.unheard-of")),
        *((kind, False) for kind in ("ext4", "overlay", "tmpfs", "fuseblk", "fuse.fuse-overlayfs")),
    ],
)
def test_kinds_of_file_systems(tmp_path: Path, kind: str, remote: bool) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"27 1 254:0 / / rw - {kind} /dev/vda rw\n")
    assert files.network_filesystem(Path("/tmp/a.db"), mounts) == (kind if remote else None)


def test_store_that_was_moved_to_a_network_file_system_leaves_wal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "store.db"
    with open_store(path) as store:
        store.add_environment(HERE)
    monkeypatch.setattr(schema, "network_filesystem", lambda path: "fuse.sshfs")
    with caplog.at_level(logging.WARNING), open_store(path) as store:
        assert store.environments() == [HERE]
    assert caplog.text.count("network file system (fuse.sshfs)") == 1
    with contextlib.closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    monkeypatch.undo()
    open_store(path).close()
    with contextlib.closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_process_that_hangs_with_the_init_lock_stops_nobody_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "BUSY_TIMEOUT_S", 0.05)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with open_store(tmp_path / "store.db") as store:
            assert store.add_environment(HERE) == HERE.digest
    finally:
        os.close(folder)
