"""Sends journals to a tracking store that may be unreachable, slow or broken.

If an uploader dies, nothing is lost or sent twice: see `upload_plan.py`. A lock in the run's folder
admits one uploader at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from deta.platform.run.journal import JOURNAL_FILE, read_events
from deta.platform.run.run_file import read_run_file
from deta.platform.system.atomic_write import write_json
from deta.platform.system.redaction import redact
from deta.platform.tracking.upload_plan import (
    REPLACED_FILE,
    REPORT_FILE,
    REPORT_TAG,
    TEXTS,
    UploadRecord,
    UploadRow,
    count_unsent,
    next_rows,
    read_record,
)
from deta.platform.tracking.upload_process import (
    STATE_FILE,
    UploadState,
    read_upload_state,
)

if TYPE_CHECKING:  # slow to import, and imported by the process that calls it
    from deta.platform.tracking.mlflow_store import MlflowStore

logger = logging.getLogger(__name__)

LOCK_FILE = "mlflow.lock"
MAX_FILES_BYTES = 20 * 10**9  # limit for the files of one run: best checkpoint, images, reports
HEARTBEAT_S = 30.0
LONGEST_FILES_WAIT_S = 30.0  # after a failure, before files are tried again; doubles up to it


class BusyError(RuntimeError):
    """Another uploader is sending this run."""


class FilesError(RuntimeError):
    """Files could not be sent; all rows were. They are tried again later."""


class RunUploader:
    """Sends the journal and files of one run.

    Rows go first and wait for no file: a store that takes no files still takes all numbers.
    """

    def __init__(self, folder: Path, store: MlflowStore) -> None:
        self.folder, self.store = folder, store
        self.record = UploadRecord()
        self.needs_parent = False
        self._lock = FileLock(folder / LOCK_FILE, timeout=0, thread_local=False)
        self._is_open = self._is_unsaved = False
        self.written_state = read_upload_state(folder)
        self._last_success_s, self._last_heartbeat_s = 0.0, -HEARTBEAT_S
        self._known: dict[str, dict[int, int]] = {}
        self._failures, self._files_due_s, self._files_error = 0, 0.0, ""

    def has_new(self) -> bool:
        record = self.record
        left = record.files or record.texts or record.tags
        return bool(self._journal_bytes() != record.offset_bytes or left)

    def has_sent_end(self, behind_bytes: int = 0) -> bool:
        """Return whether all rows are sent and the last event is an `ended` after this offset."""
        record = self.record
        is_end = record.end_bytes > behind_bytes and record.end_bytes == record.offset_bytes
        return self._is_open and is_end and self._journal_bytes() == record.offset_bytes

    def is_complete(self, behind_bytes: int = 0) -> bool:
        """Return whether all is sent and the last event is an `ended` after this offset."""
        return self.has_sent_end(behind_bytes) and not self.has_new()

    def send_new(self, *, heartbeats: bool = False) -> None:
        """Send all new rows, tags and files.

        Args:
            heartbeats: also send heartbeats, every `HEARTBEAT_S`.

        Raises:
            BusyError: another uploader is sending the run.
            FilesError: all rows are sent, and some files are not.
            Exception: of the store. What was sent is recorded; the next call sends the rest.
        """
        if not self._lock.is_locked:
            try:
                self._lock.acquire()
            except Timeout:
                raise BusyError(f"{self.folder}: another process is sending this run") from None
            self.record = read_record(self.folder)
        if not self._is_open:
            self._open()
        run_id = self.record.run_id
        self._send_rows(run_id)
        is_due = time.monotonic() > self._last_heartbeat_s + HEARTBEAT_S
        if heartbeats and not self.record.end_bytes and is_due:
            self.store.heartbeat(run_id)
            self._last_heartbeat_s = time.monotonic()
            self._last_success_s = time.time()
        if time.monotonic() >= self._files_due_s:
            self._try_files(run_id)
        if self._is_unsaved:
            self._is_done(self.record)
        if self._files_error:
            self.write_state("waiting", self._files_error)
            raise FilesError(self._files_error)
        self.write_state("finished" if self.is_complete() else "waiting")

    def _send_rows(self, run_id: str) -> None:
        """Send all new rows and tags."""
        if self._journal_bytes() < self.record.offset_bytes:  # another file, or cut by a disk check
            self.record.offset_bytes = 0
        for record, rows in next_rows(self.folder, self.record):
            new = [row for row in rows if not self._is_redone(row)]
            record.skipped_rows += len(rows) - len(new)
            if new:
                record.refused_rows += self.store.send(run_id, new)
                record.sent_rows += len(new)
            if record.status != self.record.status or record.end_bytes:
                self.store.set_status(run_id, record)
            self._is_done(record)
        if self.record.tags:
            self.store.set_tags(run_id, self.record.tags)
            record = self.record.copy()
            record.tags = {}
            self._is_done(record)

    def _try_files(self, run_id: str) -> None:
        """Send all files, and between two of them the rows that are new by then.

        After a failure, the rest waits for a later call.
        """
        sending = self._send_files(run_id)
        while True:
            try:
                is_end = next(sending, True)
            except Exception as error:
                self._failures += 1
                wait_s = min(LONGEST_FILES_WAIT_S, 0.5 * 2**self._failures)
                self._files_due_s = time.monotonic() + wait_s
                self._files_error = f"files are not stored: {str(error) or type(error).__name__}"
                return
            self._failures, self._files_due_s, self._files_error = 0, 0.0, ""
            if is_end:
                return
            self._send_rows(run_id)

    def write_state(self, state: str, error: str = "") -> None:
        """Write uploader.json, if the state has changed."""
        record = self.record
        new_state = UploadState(
            uri=self.store.shown_uri,
            run_id=record.run_id,
            state=state,
            left_rows=count_unsent(self.folder)[0] if error else 0,
            left_files=len(record.files) + len(record.texts),
            sent_rows=record.sent_rows,
            skipped_rows=record.skipped_rows,
            refused_rows=record.refused_rows,
            error=redact(error)[:2000],
            last_success_s=round(self._last_success_s, 1),
            call_s=round(self.store.call_s, 2),
            process=os.getpid(),
        )
        if new_state != self.written_state:
            with contextlib.suppress(OSError):  # a full disk; the next call writes it
                write_json(self.folder / STATE_FILE, asdict(new_state))
                self.written_state = new_state

    def close(self) -> None:
        """Release the run's lock for other uploaders."""
        self._lock.release()
        self._is_open = False

    def _open(self) -> None:
        uri = self.store.shown_uri
        if self.record.uri not in ("", uri):
            self.record = UploadRecord()  # another server needs all of it
        if self.record.uri != uri:
            self.record.uri = uri
            self._save()
        description = read_run_file(self.folder)
        run_id = self.store.open(
            self.folder, description, self.record.run_id, needs_parent=self.needs_parent
        )
        if run_id != self.record.run_id:
            if self.record.run_id:  # that run no longer exists
                self.record = UploadRecord(uri=uri)
            self.record.run_id = run_id
            self._save()
        cluster = description["config"].get("cluster")
        if cluster and "deta.kind" not in (description.get("tags") or {}):  # no sweep
            self.record.is_gpu = bool(cluster.get("gpu"))
            self.record.cpus_per_worker = float(cluster.get("cpus_per_worker", 0.0))
        if not self.record.is_described:
            self.store.describe(run_id, description)
            self.record.is_described = True
            self.record.texts = [name for name in TEXTS if name in description]
            self._save()
        known = self.store.known_steps(run_id)
        self._known = {
            kind: {s: t for s, t in steps.items() if s > self.record.last_steps.get(kind, -1)}
            for kind, steps in known.items()
        }
        self._is_open = True

    def _is_redone(self, row: UploadRow) -> bool:
        """Return whether MLflow has this step with another time.

        Such a row was sent before the record was lost, or by another machine. With the same time it
        is the same row: an uploader died before it saved the record, and perhaps only a part of its
        call arrived.
        """
        return self._known.get(row.kind, {}).get(row.step, row.time_ms) != row.time_ms

    def _send_files(self, run_id: str) -> Iterator[bool]:
        """Send texts and files; yield False after each."""
        for name in list(self.record.texts):
            self.store.send_text(run_id, name, read_run_file(self.folder)[name])
            record = self.record.copy()
            record.texts.remove(name)
            self._is_done(record)
            yield False
        for path, folder in list(self.record.files):
            record = self.record.copy()
            record.files.remove([path, folder])
            file = (self.folder / path).resolve()
            try:
                if file.is_relative_to(self.folder.resolve()):
                    if path == REPLACED_FILE:
                        _write_replaced(self.folder)
                    num_bytes = file.stat().st_size if file.is_file() else None
                    if num_bytes is not None and record.files_bytes + num_bytes > MAX_FILES_BYTES:
                        logger.warning(
                            "%s is not sent to MLflow: with its %s bytes, the run would have sent "
                            "over %s", file, f"{num_bytes:,}", f"{MAX_FILES_BYTES:,}",
                        )  # fmt: skip
                    elif num_bytes is not None:
                        self.store.send_file(run_id, file, folder)
                        record.files_bytes += num_bytes
                        if file.name == REPORT_FILE:
                            stored_path = f"{folder}/{file.name}".lstrip("/")
                            self.store.set_tags(run_id, {REPORT_TAG: stored_path})
            except Exception:
                record.files.append([path, folder])  # to the end, so that others are not blocked
                self.record = record
                raise
            self._is_done(record)
            yield False

    def _is_done(self, record: UploadRecord) -> None:
        self.record = record
        self._last_success_s = time.time()
        self._save()
        self.write_state("sending")

    def _save(self) -> None:
        try:
            self.record.save(self.folder)
            self._is_unsaved = False
        except OSError as error:  # a full disk: the record is a cache, sending goes on
            self._is_unsaved = True
            logger.warning("%s: cannot be written now: %s", self.folder / "mlflow.json", error)

    def _journal_bytes(self) -> int:
        try:
            return (self.folder / JOURNAL_FILE).stat().st_size
        except OSError:
            return 0


def _write_replaced(folder: Path) -> None:
    """Write a readable file that lists each replaced image once."""
    seen: set[int] = set()
    lines = []
    for event, _ in read_events(folder):
        if event["kind"] == "replaced":
            for image in event.get("images", []):
                if image.get("image_id") not in seen:
                    seen.add(image.get("image_id"))
                    lines.append(json.dumps({"step": event.get("step")} | image) + "\n")
    (folder / REPLACED_FILE).write_text("".join(lines), encoding="utf-8")
