"""What survives a SIGKILL: the write-ahead log in SQLite, and checksummed tensor files beside it.

One thread owns all writing. Every transaction waits for the disk (`synchronous=FULL`), and whatever has been handed in
while the last one was written goes into the next, so that many clients share one flush. Callbacks run in the order in
which writes were handed in, after their commit: the order of the log is the order of the queue.

    consumes  `write(fn, then)` calls, from any thread
    waits for the disk
    unblocked by a call, or by `close`
    produces  a future for each call, and its `then` run in order

Left out on purpose: what the rows mean (`service.py`), and when a cut is made (`engine.py`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cispo.types import CispoError, ConfigError

VERSION = 1
RESERVE_BYTES = 32 << 20
"""Below this much free disk nothing new is accepted: what is under way must still be able to finish."""

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sessions (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, seen REAL NOT NULL, body TEXT NOT NULL, finished TEXT
);
CREATE TABLE models (
  id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, base TEXT NOT NULL, body TEXT NOT NULL,
  created REAL NOT NULL, seen REAL NOT NULL, blob TEXT, done INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE samplers (
  id TEXT PRIMARY KEY, session TEXT NOT NULL, owner TEXT NOT NULL, base TEXT NOT NULL, path TEXT, model TEXT,
  blob TEXT, shape TEXT, kind TEXT NOT NULL, created REAL NOT NULL, clients INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE checkpoints (
  path TEXT PRIMARY KEY, model TEXT NOT NULL, owner TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL,
  blob TEXT NOT NULL, created REAL NOT NULL, expires REAL, public INTEGER NOT NULL DEFAULT 0, body TEXT NOT NULL
);
CREATE TABLE blobs (id TEXT PRIMARY KEY, owner TEXT NOT NULL, size INTEGER NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE requests (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, kind TEXT NOT NULL,
  scope TEXT NOT NULL, seq INTEGER NOT NULL, digest BLOB NOT NULL, payload BLOB, created REAL NOT NULL,
  blob TEXT, together INTEGER, status TEXT NOT NULL, result BLOB, finished REAL, delivered REAL, UNIQUE (scope, seq)
);
"""


class DiskFull(CispoError, RuntimeError):
    """Too little disk is left to accept more: HTTP 503, nothing was accepted."""


class Corrupted(CispoError, RuntimeError):
    """A stored file is not what was written."""


@dataclass(frozen=True)
class BlobRow:
    """A tensor file: its name, size in bytes, and the checksum that it must have."""

    id: str
    size: int
    sha256: str


class Store:
    """The state directory. Raises ConfigError where another server holds it or it is of another version."""

    def __init__(self, folder: Path, *, on_commit: Callable[[float, int], None] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self.folder = folder
        self.blobs = folder / "blobs"
        self.blobs.mkdir(exist_ok=True)
        self._lock = _take_lock(folder)
        self._on_commit = on_commit or (lambda seconds, writes: None)
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self.failed: Exception | None = None
        try:
            self._connection = self._open()
        except BaseException:
            self._lock.close()
            raise
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def _open(self) -> sqlite3.Connection:
        path = self.folder / "server.db"
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA temp_store=MEMORY")
            fresh = not connection.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone()
            if fresh:
                connection.executescript(f"BEGIN; {SCHEMA} INSERT INTO meta VALUES ('version', '{VERSION}'); COMMIT;")
            else:
                broken = connection.execute("PRAGMA quick_check").fetchone()[0]
                if broken != "ok":
                    raise ConfigError(
                        f"--state-dir {self.folder}: server.db is damaged ({broken}); restore a copy of it"
                    )
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"--state-dir {self.folder}: server.db cannot be used ({error})") from None
        version = connection.execute("SELECT value FROM meta WHERE key='version'").fetchone()[0]
        if version != str(VERSION):
            raise ConfigError(
                f"--state-dir {self.folder}: is of version {version}, this server of {VERSION}; use another folder"
            )
        connection.row_factory = sqlite3.Row
        return connection

    # --------------------------------------------------------------------------------------------------------- write

    def write(self, fn: Callable[[sqlite3.Connection], Any], then: Callable[[Any], None] | None = None) -> Future:
        """Run `fn` in the next transaction; the future has its value once that is on disk. `then` runs before."""
        future: Future = Future()
        if self.failed is not None:
            future.set_exception(self.failed)
        else:
            self._queue.put(_Write(fn, then, future))
        return future

    def check_space(self) -> None:
        """Raises DiskFull."""
        free = shutil.disk_usage(self.folder).free
        if free < RESERVE_BYTES:
            raise DiskFull(f"the server's disk has {free >> 20} MiB left; free some space, then retry")

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            stop = None in batch
            writes = [write for write in batch if write is not None]
            if writes:
                self._commit(writes)
            if stop:
                return

    def _commit(self, writes: list[_Write]) -> None:
        """One transaction for all. A write that fails takes back only itself, unless the disk does."""
        start = time.perf_counter()
        outcomes: list[tuple[_Write, Any, Exception | None]] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for write in writes:
                self._connection.execute("SAVEPOINT one")
                try:
                    outcomes.append((write, write.fn(self._connection), None))
                except sqlite3.IntegrityError as error:
                    self._connection.execute("ROLLBACK TO one")
                    outcomes.append((write, None, error))
                self._connection.execute("RELEASE one")
            self._connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            refusal = DiskFull(f"the write-ahead log cannot be written ({error}); nothing was accepted")
            outcomes = [(write, None, refusal) for write in writes]
        self._on_commit(time.perf_counter() - start, len(writes))
        for write, value, error in outcomes:
            if error is None and write.then is not None:
                write.then(value)
            if error is None:
                write.future.set_result(value)
            else:
                write.future.set_exception(error)

    def close(self) -> None:
        """Finish what was handed in."""
        self._queue.put(None)
        self._thread.join()
        self._connection.close()
        self._lock.close()

    def read(self, sql: str, *arguments: Any) -> list[sqlite3.Row]:
        """Rows, from a connection of its own (any thread)."""
        connection = sqlite3.connect(self.folder / "server.db", isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            return connection.execute(sql, arguments).fetchall()
        finally:
            connection.close()

    # --------------------------------------------------------------------------------------------------------- blobs

    def write_blob(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> BlobRow:
        """A new file, on disk when this returns. It is nobody's until a committed row names it."""
        data = save_tensors(dict(tensors), {"cispo": json.dumps(metadata)})
        return self.write_bytes(data)

    def write_bytes(self, data: bytes) -> BlobRow:
        name = secrets.token_hex(12)
        path = self.blobs / name
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(self.blobs)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise DiskFull(
                f"the checkpoint cannot be written ({error.strerror}); free some space, then retry"
            ) from None
        return BlobRow(name, len(data), hashlib.sha256(data).hexdigest())

    def read_blob(self, blob: BlobRow) -> dict[str, Tensor]:
        """Raises Corrupted where the file is missing or not what was written."""
        return load_tensors(self.read_bytes(blob))

    def read_bytes(self, blob: BlobRow) -> bytes:
        try:
            data = (self.blobs / blob.id).read_bytes()
        except OSError as error:
            raise Corrupted(f"stored weights {blob.id} cannot be read ({error.strerror})") from None
        if len(data) != blob.size or hashlib.sha256(data).hexdigest() != blob.sha256:
            raise Corrupted(f"stored weights {blob.id} are damaged: their checksum is not the recorded one")
        return data

    def delete_blobs(self, names: list[str]) -> None:
        for name in names:
            (self.blobs / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Write:
    fn: Callable[[sqlite3.Connection], Any]
    then: Callable[[Any], None] | None
    future: Future


def _take_lock(folder: Path) -> Any:
    file = open(folder / "lock", "a+")  # noqa: SIM115 (held for the life of the process)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(
            f"--state-dir {folder}: is in use by {holder}; stop that server, or use another folder"
        ) from None
    file.seek(0)
    file.truncate()
    file.write(f"the server with pid {os.getpid()}")
    file.flush()
    return file


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
