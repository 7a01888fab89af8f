"""The leaderboard in memory: filled page by page, refreshed, and cached on disk.

A reader gets only the changes since a revision, so that a page with thousands of runs is sent once.
The cache on disk fills the page at once after a restart; MLflow is read again completely.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from deta.platform.leaderboard.rows import (
    COLUMNS,
    LeaderboardRow,
    Promotion,
    with_models,
    with_seed_intervals,
)
from deta.platform.system.atomic_write import write_atomic
from deta.platform.system.redaction import redact

logger = logging.getLogger(__name__)

REFRESH_S, FULL_REFRESH_S = 15.0, 600.0
MARGIN_S = 600.0  # clocks differ between machines, and journals are uploaded with a delay
MAX_SINGLE_READS = 50  # of runs that a full read missed
FORMAT = 1
# What a page needs; the other columns are for grouping.
SENT_COLUMNS = tuple(name for name in COLUMNS if name not in ("group", "ended_s"))


class RunSource(Protocol):
    """The interface to MLflow; see platform/leaderboard/mlflow_source.py."""

    def pages(self) -> Iterator[list[LeaderboardRow]]: ...
    def recent(self, since_s: float) -> Iterator[list[LeaderboardRow]]: ...
    def get_run(self, run_id: str) -> LeaderboardRow | None: ...
    def models(self) -> Any: ...


class Board:
    """All rows, each with the revision of its last change. Thread-safe."""

    def __init__(self, uri: str, cache: Path | None = None) -> None:
        """
        Args:
            uri: of MLflow; the cache of another one is not used.
            cache: file of the cache on disk; None: no cache.
        """
        self.uri, self.cache = uri, cache
        self.revision = 0
        self.is_complete = False  # all pages have been read since the start
        self.error = ""
        self.refreshed_s = 0.0
        self.promotions: tuple[Promotion, ...] = ()
        self._rows: dict[str, tuple[int, LeaderboardRow]] = {}
        self._removed: dict[str, int] = {}
        self._models: tuple[dict[str, list[str]], frozenset[str]] = ({}, frozenset())
        self._saved_revision = 0  # of the cache on disk
        self._lock = threading.Lock()
        self._read_cache()

    def rows(self) -> list[LeaderboardRow]:
        """Return the rows, highest AP first; those without an AP last, the newest of them first."""
        with self._lock:
            return sorted((row for _, row in self._rows.values()), key=_rank)

    def best(self, number: int) -> list[LeaderboardRow]:
        return self.rows()[:number]

    def changes(self, since: int) -> dict[str, Any]:
        """Return the changes since a revision as JSON: rows by columns, and removed ids."""
        with self._lock:
            changed = [row for revision, row in self._rows.values() if revision > since]
            removed = [run for run, revision in self._removed.items() if revision > since]
            content = {
                "revision": self.revision,
                "is_complete": self.is_complete,
                "error": self.error,
                "refreshed_s": self.refreshed_s,
                "columns": SENT_COLUMNS,
                "removed": removed,
                "promotions": [asdict(one) for one in self.promotions],
            }
        changed.sort(key=_rank)
        return content | {
            "rows": [[getattr(row, name) for name in SENT_COLUMNS] for row in changed]
        }

    def read_all(self, source: RunSource) -> None:
        """Read all runs page by page; readers see each page as soon as it is read.

        Raises:
            Exception: from MLflow; rows read until then stay.
        """
        began_s, seen = time.time(), set[str]()
        is_first = True
        for page in source.pages():
            seen |= {row.id for row in page}
            self._merge(page)
            if is_first:
                self._read_models(source)
                is_first = False
        if is_first:
            self._read_models(source)
        with self._lock:
            gone = [run for run in self._rows if run not in seen]
        # Pages shift while runs are added, so a read can miss a few: read those one by one. If many
        # are missing, they were deleted.
        checked = gone if len(gone) <= MAX_SINGLE_READS else []
        found = [row for run in checked if (row := source.get_run(run)) is not None]
        self._merge(found, remove=set(gone) - {row.id for row in found})
        self._finish_refresh(began_s, is_complete=True)

    def read_recent(self, source: RunSource) -> None:
        """Read the runs that are likely to have changed since the last refresh."""
        began_s = time.time()
        with self._lock:
            running = {run for run, (_, row) in self._rows.items() if row.status == "RUNNING"}
        seen: set[str] = set()
        for page in source.recent(self.refreshed_s - MARGIN_S):
            seen |= {row.id for row in page}
            self._merge(page)
        ended = {run: source.get_run(run) for run in running - seen}
        self._merge(
            [row for row in ended.values() if row is not None],
            remove={run for run, row in ended.items() if row is None},
        )
        self._read_models(source)
        self._finish_refresh(began_s, is_complete=self.is_complete)

    def follow(self, source: RunSource, stop: threading.Event) -> None:
        """Refresh until `stop` is set; MLflow may be unreachable meanwhile."""
        full_s = 0.0
        while not stop.is_set():
            began_s = time.monotonic()
            try:
                if not full_s or began_s - full_s > FULL_REFRESH_S:
                    self.read_all(source)
                    full_s = time.monotonic()
                else:
                    self.read_recent(source)
            except Exception as error:
                logger.warning("MLflow: %s", redact(str(error)).partition("\n")[0][:500])
                with self._lock:
                    self.error = redact(str(error) or type(error).__name__)[:300]
            # Poll a slow MLflow less often.
            stop.wait(max(REFRESH_S, 2 * (time.monotonic() - began_s)))

    def _merge(self, rows: Iterable[LeaderboardRow], remove: Iterable[str] = ()) -> None:
        """Add, replace and remove rows; compute again what depends on several of them."""
        with self._lock:
            now = {run: row for run, (_, row) in self._rows.items()} | {r.id: r for r in rows}
            for run in remove:
                now.pop(run, None)
            self._replace(now)

    def _read_models(self, source: RunSource) -> None:
        try:
            models = source.models()
        except Exception as error:  # the runs can be shown without them
            logger.warning("MLflow's registry: %s", redact(str(error)).partition("\n")[0][:500])
            return
        with self._lock:
            self._models = (models.versions, models.champions)
            self.promotions = models.promotions
            self._replace({run: row for run, (_, row) in self._rows.items()})

    def _replace(self, now: dict[str, LeaderboardRow]) -> None:
        rows = with_models(with_seed_intervals(now.values()), *self._models)
        revision = self.revision + 1
        before = self._rows
        self._rows = {}
        is_changed = False
        for row in rows:
            known = before.get(row.id)
            if known is not None and known[1] == row:
                self._rows[row.id] = known
            else:
                self._rows[row.id] = (revision, row)
                self._removed.pop(row.id, None)
                is_changed = True
        for run in before.keys() - self._rows.keys():
            self._removed[run] = revision
            is_changed = True
        if is_changed:
            self.revision = revision

    def _finish_refresh(self, began_s: float, *, is_complete: bool) -> None:
        with self._lock:
            self.refreshed_s, self.error, self.is_complete = began_s, "", is_complete
        self._write_cache()

    def _key(self) -> str:
        return hashlib.sha256(self.uri.encode()).hexdigest()[:16]

    def _read_cache(self) -> None:
        if self.cache is None:
            return
        try:
            content = json.loads(gzip.decompress(self.cache.read_bytes()))
            if (content["format"], content["of"]) != (FORMAT, self._key()):
                return
            rows = [LeaderboardRow.from_json(row) for row in content["rows"]]
            self.promotions = tuple(Promotion(**one) for one in content["promotions"])
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            EOFError,
        ):  # no cache, or of another version
            return
        self._rows = {row.id: (1, row) for row in rows}
        self.revision = 1
        self.refreshed_s = float(content.get("refreshed_s", 0.0))

    def _write_cache(self) -> None:
        if self.cache is None or self._saved_revision == self.revision:
            return
        with self._lock:
            self._saved_revision = self.revision
            content = {
                "format": FORMAT,
                "of": self._key(),
                "refreshed_s": self.refreshed_s,
                "rows": [row.to_json() for _, row in self._rows.values()],
                "promotions": [asdict(one) for one in self.promotions],
            }
        data = gzip.compress(json.dumps(content).encode(), 1, mtime=0)
        with contextlib.suppress(OSError):  # a full disk
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.cache, data)


def _rank(row: LeaderboardRow) -> tuple[bool, float, float, str]:
    return row.ap is None, -(row.ap or 0.0), -row.started_s, row.id
