"""The leaderboard in memory: filled page by page, kept up to date, and kept on disk.

A reader asks for what has changed since a revision and gets that alone, so that a page with
thousands of runs is sent once. The copy on disk shows something at once after a restart; it is a
cache, and everything in it is asked for again.
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
    Promotion,
    Row,
    with_models,
    with_seed_intervals,
)
from deta.platform.system.atomic_write import write_atomic
from deta.platform.system.redaction import redact

logger = logging.getLogger(__name__)

REFRESH_S, FULL_REFRESH_S = 15.0, 600.0
MARGIN_S = 600.0  # clocks of machines differ, and journals are sent a little later
MAX_ASKED = 50
FORMAT = 1
# What a page needs; the rest is for grouping.
SENT = tuple(name for name in COLUMNS if name not in ("group", "ended_s"))


class Reader(Protocol):
    """MLflow as the board reads it; see platform/leaderboard/mlflow_source.py."""

    def pages(self) -> Iterator[list[Row]]: ...
    def recent(self, since_s: float) -> Iterator[list[Row]]: ...
    def one(self, run_id: str) -> Row | None: ...
    def models(self) -> Any: ...


class Board:
    """All rows, each with the revision in which it changed last. Safe to use from threads."""

    def __init__(self, uri: str, cache: Path | None = None) -> None:
        """
        Args:
            uri: of MLflow; a copy of another MLflow is not used.
            cache: file for the copy on disk.
        """
        self.uri, self.cache = uri, cache
        self.revision = 0
        self.is_complete = False  # all pages were read since the start
        self.error = ""
        self.refreshed_s = 0.0
        self.promotions: tuple[Promotion, ...] = ()
        self._rows: dict[str, tuple[int, Row]] = {}
        self._removed: dict[str, int] = {}
        self._models: tuple[dict[str, list[str]], frozenset[str]] = ({}, frozenset())
        self._kept = 0  # revision of the copy on disk
        self._lock = threading.Lock()
        self._read_cache()

    def rows(self) -> list[Row]:
        """The best first; those without an AP last, the newest of them first."""
        with self._lock:
            return sorted((row for _, row in self._rows.values()), key=_rank)

    def best(self, number: int) -> list[Row]:
        return self.rows()[:number]

    def changes(self, since: int) -> dict[str, Any]:
        """What has changed since a revision, as JSON: rows by columns, ids that are gone."""
        with self._lock:
            changed = [row for revision, row in self._rows.values() if revision > since]
            removed = [run for run, revision in self._removed.items() if revision > since]
            content = {
                "revision": self.revision,
                "is_complete": self.is_complete,
                "error": self.error,
                "refreshed_s": self.refreshed_s,
                "columns": SENT,
                "removed": removed,
                "promotions": [asdict(one) for one in self.promotions],
            }
        changed.sort(key=_rank)
        return content | {"rows": [[getattr(row, name) for name in SENT] for row in changed]}

    def read_all(self, source: Reader) -> None:
        """Everything, page by page; each is seen by readers as it comes.

        Raises:
            Exception: of MLflow; what was read until then stays.
        """
        began_s, seen = time.time(), set[str]()
        is_first = True
        for page in source.pages():
            seen |= {row.id for row in page}
            self._take(page)
            if is_first:
                self._take_models(source)
                is_first = False
        if is_first:
            self._take_models(source)
        with self._lock:
            gone = [run for run in self._rows if run not in seen]
        # Pages move while runs come: who was missed is asked for alone. Many were not missed.
        asked = gone if len(gone) <= MAX_ASKED else []
        kept = [row for run in asked if (row := source.one(run)) is not None]
        self._take(kept, remove=set(gone) - {row.id for row in kept})
        self._is_read(began_s, is_complete=True)

    def read_recent(self, source: Reader) -> None:
        """What is likely to have changed since the last time."""
        began_s = time.time()
        with self._lock:
            running = {run for run, (_, row) in self._rows.items() if row.status == "RUNNING"}
        seen: set[str] = set()
        for page in source.recent(self.refreshed_s - MARGIN_S):
            seen |= {row.id for row in page}
            self._take(page)
        ended = {run: source.one(run) for run in running - seen}
        self._take(
            [row for row in ended.values() if row is not None],
            remove={run for run, row in ended.items() if row is None},
        )
        self._take_models(source)
        self._is_read(began_s, is_complete=self.is_complete)

    def follow(self, source: Reader, stop: threading.Event) -> None:
        """Keep up to date until told to stop; MLflow may come and go meanwhile."""
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
            # A slow MLflow is not asked all the time.
            stop.wait(max(REFRESH_S, 2 * (time.monotonic() - began_s)))

    def _take(self, rows: Iterable[Row], remove: Iterable[str] = ()) -> None:
        """Add or replace rows. What several rows say together is said anew for all of them."""
        with self._lock:
            now = {run: row for run, (_, row) in self._rows.items()} | {r.id: r for r in rows}
            for run in remove:
                now.pop(run, None)
            self._replace(now)

    def _take_models(self, source: Reader) -> None:
        try:
            models = source.models()
        except Exception as error:  # runs can be shown without
            logger.warning("MLflow's registry: %s", redact(str(error)).partition("\n")[0][:500])
            return
        with self._lock:
            self._models = (models.versions, models.champions)
            self.promotions = models.promotions
            self._replace({run: row for run, (_, row) in self._rows.items()})

    def _replace(self, now: dict[str, Row]) -> None:
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

    def _is_read(self, began_s: float, *, is_complete: bool) -> None:
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
            rows = [Row.from_json(row) for row in content["rows"]]
            self.promotions = tuple(Promotion(**one) for one in content["promotions"])
        except (OSError, ValueError, TypeError, KeyError, EOFError):  # none, or another version's
            return
        self._rows = {row.id: (1, row) for row in rows}
        self.revision = 1
        self.refreshed_s = float(content.get("refreshed_s", 0.0))

    def _write_cache(self) -> None:
        if self.cache is None or self._kept == self.revision:
            return
        with self._lock:
            self._kept = self.revision
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


def _rank(row: Row) -> tuple[bool, float, float, str]:
    return row.ap is None, -(row.ap or 0.0), -row.started_s, row.id
