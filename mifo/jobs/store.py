"""Jobs in a file (SQLite): who asks puts them in, who works takes them out, and both can look; it outlives every process.

    queued -> running -> done | failed | cancelled
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.json_text import json_text, record_text
from .job import Job, read_job

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
MAX_ATTEMPTS = 2
"""Times that a job is begun: the process that does it may have been killed for another reason, or because of it."""
WAIT = 30.0  # seconds for another process to finish writing
TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, request TEXT NOT NULL, state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, stop INTEGER NOT NULL DEFAULT 0, progress TEXT, result TEXT, error TEXT,
    created REAL NOT NULL, started REAL, ended REAL
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, id);
"""


@dataclass(frozen=True)
class Entry:
    """A job and how it stands."""

    id: int
    owner: str
    request: dict[str, Any]
    state: str
    progress: dict[str, Any] | None
    """"what", "done", "total", "values", and "at", seconds of the clock"""
    result: dict[str, Any] | None
    error: str | None
    created: float
    started: float | None
    ended: float | None

    @property
    def job(self) -> Job:
        return read_job(self.request)

    @property
    def over(self) -> bool:
        return self.state not in (QUEUED, RUNNING)


class JobStore:
    """Every method may be called from any process and thread."""

    def __init__(self, path: Path):
        """Raises InputError where the file cannot be made, or is another program's."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.executescript(TABLE)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"{path} cannot hold the list of jobs ({error}); move it away, or choose another folder") from None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction."""
        database = sqlite3.connect(self.path, timeout=WAIT)
        database.row_factory = sqlite3.Row
        try:
            with database:
                yield database
        finally:
            database.close()

    # --- who asks -------------------------------------------------------------------------------

    def add(self, job: Job, owner: str = "", most_queued: int | None = None) -> int:
        """Its number. Raises InputError where `most_queued` jobs wait already."""
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            if most_queued is not None:
                (waiting,) = database.execute("SELECT COUNT(*) FROM jobs WHERE state = ?", (QUEUED,)).fetchone()
                if waiting >= most_queued:
                    raise QueueFull(f"{waiting} jobs wait already, and the queue holds {most_queued}; try again later")
            added = database.execute("INSERT INTO jobs (owner, request, state, created) VALUES (?, ?, ?, ?)",
                                     (owner, json_text(job.to_json()), QUEUED, time.time()))  # fmt: skip
        return int(added.lastrowid or 0)

    def get(self, number: int) -> Entry | None:
        with self._open() as database:
            row = database.execute("SELECT * FROM jobs WHERE id = ?", (number,)).fetchone()
        return _entry(row) if row else None

    def entries(self, states: tuple[str, ...] = (), limit: int = 100, owner: str | None = None, **request: str) -> list[Entry]:
        """The newest first. `request`: what the job itself says, such as kind="learn"."""
        where = {f"state IN ({', '.join('?' * len(states))})": states} if states else {}
        where |= {"owner = ?": (owner,)} if owner is not None else {}
        where |= {f"json_extract(request, '$.{name}') = ?": (value,) for name, value in request.items()}
        text = f"SELECT * FROM jobs {'WHERE ' + ' AND '.join(where) if where else ''} ORDER BY id DESC LIMIT ?"
        values = [*(value for group in where.values() for value in group), limit]
        with self._open() as database:
            return [_entry(row) for row in database.execute(text, values)]

    def count(self, state: str) -> int:
        with self._open() as database:
            return int(database.execute("SELECT COUNT(*) FROM jobs WHERE state = ?", (state,)).fetchone()[0])

    def stop(self, number: int) -> None:
        """A job that waits is cancelled; one that runs is asked to stop after its step."""
        with self._open() as database:
            database.execute("UPDATE jobs SET state = ?, ended = ? WHERE id = ? AND state = ?",
                             (CANCELLED, time.time(), number, QUEUED))  # fmt: skip
            database.execute("UPDATE jobs SET stop = 1 WHERE id = ? AND state = ?", (number, RUNNING))

    # --- who works ------------------------------------------------------------------------------

    def take(self) -> Entry | None:
        """The oldest job that waits, which now runs; None where none waits."""
        with self._open() as database:
            row = database.execute(
                "UPDATE jobs SET state = ?, started = ?, attempts = attempts + 1, stop = 0, progress = NULL WHERE id = "
                "(SELECT id FROM jobs WHERE state = ? ORDER BY id LIMIT 1) RETURNING *", (RUNNING, time.time(), QUEUED)
            ).fetchone()  # fmt: skip
        return _entry(row) if row else None

    def report(self, number: int, what: str, done: int, total: int, values: Mapping[str, float]) -> bool:
        """Notes how far a job is; True where it was asked to stop."""
        record = {"what": what, "done": done, "total": total, "values": dict(values), "at": time.time()}
        with self._open() as database:
            row = database.execute("UPDATE jobs SET progress = ? WHERE id = ? RETURNING stop",
                                   (record_text(record), number)).fetchone()  # fmt: skip
        return bool(row and row["stop"])

    def asked_to_stop(self, number: int) -> bool:
        with self._open() as database:
            row = database.execute("SELECT stop FROM jobs WHERE id = ?", (number,)).fetchone()
        return bool(row and row["stop"])

    def finish(self, number: int, state: str, result: Mapping[str, Any] | None = None, error: str | None = None) -> None:
        """`state`: DONE with its result, FAILED with its error, or CANCELLED."""
        with self._open() as database:
            told = record_text(result) if result is not None else None
            database.execute("UPDATE jobs SET state = ?, result = ?, error = ?, ended = ? WHERE id = ?",
                             (state, told, error, time.time(), number))  # fmt: skip

    def put_back(self, number: int) -> None:
        """For another worker: this one was asked to end, which is not the job's doing."""
        with self._open() as database:
            database.execute("UPDATE jobs SET state = ?, attempts = attempts - 1, started = NULL WHERE id = ? AND state = ?",
                             (QUEUED, number, RUNNING))  # fmt: skip

    def recover(self) -> None:
        """To be called where no process works any more: what runs by the list was left by one that ended, and waits again; or
        has failed, where it was begun too often."""
        with self._open() as database:
            database.execute("UPDATE jobs SET state = ?, ended = ?, error = ? WHERE state = ? AND attempts >= ? AND stop = 0",
                             (FAILED, time.time(), f"the process that did it ended {MAX_ATTEMPTS} times, perhaps for want of "
                              "memory; ask for less at once", RUNNING, MAX_ATTEMPTS))  # fmt: skip
            database.execute("UPDATE jobs SET state = ?, ended = ? WHERE state = ? AND stop = 1",
                             (CANCELLED, time.time(), RUNNING))  # fmt: skip
            database.execute("UPDATE jobs SET state = ? WHERE state = ?", (QUEUED, RUNNING))


class QueueFull(InputError):
    """As many jobs wait as may."""


def _entry(row: sqlite3.Row) -> Entry:
    def plain(name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = json.loads(row[name]) if row[name] else None
        return found

    return Entry(row["id"], row["owner"], plain("request") or {}, row["state"], plain("progress"), plain("result"), row["error"],
                 row["created"], row["started"], row["ended"])  # fmt: skip
