"""The lock of a run: one supervisor at a time may use the folder of the run.

Files in that folder, so that the lock holds on every machine that sees the folder. They are created
exclusively, which local and network file systems allow to one process alone.

    run.lock      the owner: host, process, start. Its modification time is the heartbeat.
    .run.lock-N   the owner that took over from the dead owner of run.lock, or of .run.lock-(N-1)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from deta.platform.system.atomic_write import make_folder

LOCK_FILE = "run.lock"
HEARTBEAT_S = 5.0
STALE_AFTER_S = 30.0
CLOCK_TICK_S = 0.1  # the clock that dates files moves in ticks
_NAME = re.compile(r"run\.lock|\.run\.lock-(\d{1,6})")


class RunLockedError(ValueError):
    """Another process supervises this run."""


@dataclass(frozen=True)
class _Owner:
    """The owner of a lock. Processes with the same `machine` can see each other."""

    host: str
    machine: str  # host, boot and process namespace
    pid: int
    process_start: str  # pids are reused; empty if unknown
    token: str
    since_s: float


@dataclass(frozen=True)
class _Claim:
    """A lock file at one moment."""

    path: Path
    number: int  # of takeovers before it
    owner: _Owner | None  # None: the file is being written, or its writer died
    beat: tuple[int, int]  # inode and modification time: changes with each heartbeat
    age_s: float  # since the last heartbeat, by the clock of the disk

    def is_living(self) -> bool:
        """Return whether the owner is a process of this machine that exists and is not stopped."""
        owner = self.owner
        if owner is None or owner.machine != _machine() or not owner.process_start:
            return False
        return _process_start(owner.pid) == owner.process_start and not _is_stopped(owner.pid)

    def has_exited(self) -> bool:
        """Return whether the owner was a process of this machine that exists no more."""
        owner = self.owner
        if owner is None or owner.machine != _machine():
            return False
        return _process_start(owner.pid) not in (owner.process_start, "")


class RunLock:
    """The right to supervise a run, with a heartbeat thread. Ends with `release` or the process.

    with RunLock.acquire(folder):
        ...
    """

    def __init__(
        self, path: Path, number: int, descriptor: int, on_lost: Callable[[], None] | None
    ) -> None:
        """Use `acquire`."""
        self.path, self._number, self._descriptor = path, number, descriptor
        self._on_lost, self._pid = on_lost, os.getpid()
        self._lost = self._released = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="run-lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, folder: Path, on_lost: Callable[[], None] | None = None) -> RunLock:
        """Acquire the lock of a run's folder, also from a dead owner.

        An owner that lives or has exited on this machine is detected at once. Any other one is
        watched: its heartbeat must stand still by the clock of this process, so that a clock that
        was set, here or on the disk, takes the lock from nobody.

        Args:
            on_lost: called once, from a thread, if another process takes this lock over because
                this process was suspended for too long.

        Raises:
            RunLockedError: it is held; says by which process, since when, and what to do.
            OSError: the folder cannot be written.
        """
        make_folder(folder)
        watched: _Claim | None = None
        watched_since_s = 0.0
        while True:
            holder = _holder(folder)
            if holder is not None and not holder.has_exited():
                if holder.is_living():  # no clock says more about it than this
                    raise RunLockedError(_refusal(folder, holder))
                if watched is None or watched.beat != holder.beat:
                    if watched is not None or -CLOCK_TICK_S <= holder.age_s < 2 * HEARTBEAT_S:
                        raise RunLockedError(_refusal(folder, holder))
                    watched, watched_since_s = holder, time.monotonic()
                # A heartbeat that seems old may come from a clock that was set: wait for the next.
                needed_s = max(STALE_AFTER_S - max(0.0, watched.age_s), 1.5 * HEARTBEAT_S)
                if time.monotonic() - watched_since_s < needed_s:
                    time.sleep(0.1)
                    continue
            number = 0 if holder is None else holder.number + 1
            path = folder / (f".{LOCK_FILE}-{number}" if number else LOCK_FILE)
            descriptor = _create(path)
            if descriptor is None:
                continue
            # It holds the lock unless the victim awoke, or others took over and released since it
            # was read: then a process may already have begun again with the first name.
            claims = _claims(folder)
            beats = [claim.beat for claim in claims]
            if claims[-1].number == number and (holder is None or holder.beat in beats):
                break
            os.close(descriptor)
            path.unlink()
            time.sleep(0.05)
        for former in claims[:-1]:
            former.path.unlink(missing_ok=True)
        return cls(path, number, descriptor, on_lost)

    @property
    def lost(self) -> bool:
        """Return whether another process has taken the lock over or removed it."""
        if not self._lost and not self._released:
            try:
                newest = _holder(self.path.parent)
                self._lost = newest is None or newest.beat[0] != os.fstat(self._descriptor).st_ino
            except OSError:  # a disk that does not answer proves nothing about the lock
                return False
        return self._lost

    def release(self) -> None:
        """Release the lock. Does nothing the second time, or in a child process."""
        if self._ended.is_set() or os.getpid() != self._pid:
            return
        self._ended.set()
        if not self.lost:
            with contextlib.suppress(OSError):  # the disk is read-only now; the lock becomes stale
                self.path.unlink(missing_ok=True)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._released = True
        os.close(self._descriptor)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            if self.lost:
                if self._on_lost is not None and not self._ended.is_set():
                    self._on_lost()
                return
            with contextlib.suppress(OSError):  # by descriptor: never the file of another owner
                os.utime(self._descriptor)


def is_alive(folder: Path) -> bool:
    """Return whether a process supervises the run in this folder.

    A heartbeat of another machine that seems old, or to come, is watched until the next is due: the
    clock of the disk may have been set since.
    """
    holder = _holder(folder)
    if holder is None or holder.has_exited():
        return False
    if holder.is_living() or -CLOCK_TICK_S <= holder.age_s <= STALE_AFTER_S:
        return True
    due_s = time.monotonic() + 1.5 * HEARTBEAT_S
    while time.monotonic() < due_s:
        time.sleep(0.1)
        newest = _holder(folder)
        if newest is None or newest.beat != holder.beat:
            return newest is not None
    return False


def _holder(folder: Path) -> _Claim | None:
    claims = _claims(folder)
    return claims[-1] if claims else None


def _claims(folder: Path) -> list[_Claim]:
    """Return all lock files, the newest last."""
    found = []
    for match in filter(None, map(_NAME.fullmatch, os.listdir(folder) if folder.is_dir() else ())):
        path, owner = folder / match[0], None
        try:
            with path.open("rb") as file:  # a network disk shows the newest heartbeat at an opening
                status = os.fstat(file.fileno())
                owner = _Owner(**json.loads(file.read()))
        except FileNotFoundError:
            continue
        except (ValueError, TypeError):
            pass
        age_s = _time_of_disk(folder) - status.st_mtime
        beat = (status.st_ino, status.st_mtime_ns)
        found.append(_Claim(path, int(match[1] or 0), owner, beat, age_s))
    return sorted(found, key=lambda claim: claim.number)


def _create(path: Path) -> int | None:
    """Create a lock file of this process; return its descriptor, or None if it exists."""
    start = _process_start(os.getpid()) or ""
    owner = _Owner(
        socket.gethostname(), _machine(), os.getpid(), start, secrets.token_hex(8), time.time()
    )
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    try:
        os.write(descriptor, json.dumps(asdict(owner), indent=2).encode())
        os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    return descriptor


def _refusal(folder: Path, holder: _Claim) -> str:
    owner = holder.owner
    if owner is None:
        return f"{folder}: another process is starting this run right now; try again in a minute"
    since = datetime.fromtimestamp(owner.since_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f"{folder}: is in use by process {owner.pid} on host {owner.host} since {since} (last "
        f"heartbeat {max(0.0, holder.age_s):.0f} s ago). Wait for that run, stop it (touch "
        f"{folder / 'stop'}), or choose another name=. If that machine is lost, try again after "
        f"{STALE_AFTER_S:.0f} s."
    )


def _machine() -> str:
    """Return a text that is equal for processes with a common space of process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """Return when a process of this machine started, in ticks since boot.

    None if there is no such process; empty if the system does not report its start.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie has exited
    except (OSError, IndexError):  # no /proc, or it hides processes of other users
        with contextlib.suppress(ProcessLookupError):
            with contextlib.suppress(PermissionError):
                os.kill(pid, 0)
            return ""
        return None


def _is_stopped(pid: int) -> bool:
    """Return whether a process is stopped, by a signal or a debugger."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def _time_of_disk(folder: Path) -> float:
    """Return the time by the clock that dates files in a folder; on a network disk, a server's."""
    probe = folder / f".clock-{secrets.token_hex(8)}"
    try:
        probe.touch(0o600, exist_ok=False)
        now_s = probe.stat().st_mtime
        probe.unlink()
    except OSError:  # read-only
        return time.time()
    return now_s
