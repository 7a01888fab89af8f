"""The leaderboard's rows in memory, refreshed from MLflow, with a copy on disk for the next start.

The copy fills the page at once after a restart; MLflow is read again completely.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from deta.platform.leaderboard.rows import (
    COLUMNS,
    LeaderboardRow,
    RegisteredModels,
    with_models,
    with_seed_intervals,
)
from deta.platform.system.atomic_write import write_atomic
from deta.platform.system.redaction import redact

logger = logging.getLogger(__name__)

REFRESH_S, FULL_REFRESH_S = 15.0, 600.0
MARGIN_S = 600.0  # clocks differ between machines, and journals are uploaded with a delay
FORMAT = 2
# What a page needs; the other columns are for grouping.
SENT_COLUMNS = tuple(name for name in COLUMNS if name not in ("group", "ended_s"))


class RunSource(Protocol):
    """The interface to MLflow; see platform/leaderboard/mlflow_source.py."""

    def pages(self, since_s: float | None = None) -> Iterator[list[LeaderboardRow]]: ...
    def models(self) -> RegisteredModels: ...


class Board:
    """All runs; `content` is what a page shows, replaced as a whole by each refresh."""

    def __init__(self, uri: str, folder: Path | None = None) -> None:
        """
        Args:
            uri: of MLflow.
            folder: for the copy on disk; None: no copy.
        """
        key = hashlib.sha256(f"{FORMAT} {uri}".encode()).hexdigest()[:16]  # it may hold a password
        self.cache = None if folder is None else folder / f"leaderboard-{key}.json"
        self._rows: dict[str, LeaderboardRow] = {}
        self._models = RegisteredModels()
        self._is_complete = False  # all runs were read since the start
        self._refreshed_s = 0.0
        self.content: dict[str, Any] = self._content()
        if self.cache is not None:
            with contextlib.suppress(OSError, ValueError, TypeError):  # none yet, or a damaged one
                self.content |= json.loads(self.cache.read_text(encoding="utf-8"))

    def refresh(self, source: RunSource, *, is_full: bool = True) -> None:
        """Read all runs, or those that are likely to have changed since the last refresh.

        Raises:
            Exception: from MLflow; rows read until then stay.
        """
        began_s = time.time()
        since_s = None if is_full else self._refreshed_s - MARGIN_S
        seen: dict[str, LeaderboardRow] = {}
        for page in source.pages(since_s):
            seen |= {row.id: row for row in page}
            self._rows |= seen
            if not self.content["rows"]:  # the first start: show the best runs at once
                self.content = self._content()
        self._rows = seen if is_full else self._rows
        self._is_complete |= is_full
        self._refreshed_s = began_s
        self.content = self._content()
        self._models = source.models()
        self.content = self._content()
        if self.cache is not None:
            copy = json.dumps(self.content | {"is_complete": False}, separators=(",", ":"))
            with contextlib.suppress(OSError):  # a full disk
                write_atomic(self.cache, copy)

    def follow(self, source: RunSource, stop: threading.Event) -> None:
        """Refresh until `stop` is set; MLflow may be unreachable meanwhile."""
        full_s = 0.0
        while not stop.is_set():
            began_s = time.monotonic()
            try:
                is_full = not full_s or began_s - full_s > FULL_REFRESH_S
                self.refresh(source, is_full=is_full)
                full_s = time.monotonic() if is_full else full_s
            except Exception as error:
                text = redact(str(error) or type(error).__name__).partition("\n")[0]
                logger.warning("MLflow: %s", text[:500])
                self.content = self.content | {"error": text[:300]}
            # Poll a slow MLflow less often.
            stop.wait(max(REFRESH_S, 2 * (time.monotonic() - began_s)))

    def _content(self) -> dict[str, Any]:
        """Return what a page shows: rows by columns, highest AP first, then the newest."""
        models = self._models
        rows = with_models(with_seed_intervals(self._rows.values()), models)
        rows.sort(key=lambda row: (row.ap is None, -(row.ap or 0.0), -row.started_s, row.id))
        return {
            "columns": SENT_COLUMNS,
            "rows": [[getattr(row, name) for name in SENT_COLUMNS] for row in rows],
            "promotions": [asdict(one) for one in models.promotions],
            "is_complete": self._is_complete,
            "refreshed_s": self._refreshed_s,
            "error": "",
        }


def first_rows(content: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the content with the best rows alone; a page that has it asks for the others."""
    return {**content, "rows": content["rows"][:number], "is_complete": False}
