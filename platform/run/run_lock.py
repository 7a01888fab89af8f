"""The lock of a run: one supervisor at a time may use the folder of the run.

The lock is a file in that folder, so that it holds on every machine that sees the folder. Files
are created exclusively, which local and network file systems allow to one process alone.

    run.lock           the owner: host, process, start. Its modification time is the heartbeat.
    .run.lock-after-T  the owner that took over from the dead owner with token T
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

LOCK_FILE = "run.lock"
HEARTBEAT_S = 5.0
STALE_AFTER_S = 30.0
TAKEOVER_RECORDS_S = 3600.0  # far longer than any process takes from reading a lock to acting on it


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

    @classmethod
    def this_process(cls) -> _Owner:
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()) or "",
            token=secrets.token_hex(8),
            since_s=time.time(),
        )


class RunLock:
    """The right to supervise a run, with a heartbeat thread. Ends with `release` or the process.

    with RunLock.acquire(folder):
        ...
    """

    def __init__(
        self, folder: Path, owner: _Owner, descriptor: int, on_lost: Callable[[], None] | None
    ) -> None:
        """Use `acquire`."""
        self.folder, self.path = folder, folder / LOCK_FILE
        self._owner, self._descriptor, self._on_lost = owner, descriptor, on_lost
        self._lost = self._released = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="run-lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        folder: Path,
        stale_after_s: float = STALE_AFTER_S,
        on_lost: Callable[[], None] | None = None,
    ) -> RunLock:
        """Acquire the lock of a run's folder, also from a dead owner.

        A dead owner on this machine is detected at once; on another machine, when its heartbeat
        is older than `stale_after_s`.

        Args:
            on_lost: called once, from a thread, if another process takes this lock over because
                this process was suspended for too long.

        Raises:
            RunLockedError: it is held; says by which process, since when, and what to do.
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        owner = _Owner.this_process()
        descriptor = _create(folder / LOCK_FILE, owner)
        if descriptor is None:
            descriptor = _take_over(folder, owner, stale_after_s)
        lock = cls(folder, owner, descriptor, on_lost)
        if lock.lost:  # a file system that lets two processes create one file
            lock.release()
            raise RunLockedError(_refusal(folder, *_holder(folder), stale_after_s))
        _delete_old_takeovers(folder)
        return lock

    @property
    def lost(self) -> bool:
        """Return whether another process has taken the lock over or removed it."""
        if not self._lost and not self._released:
            try:
                self._lost = not os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
            except FileNotFoundError:
                self._lost = True
            except OSError:  # a disk that does not answer proves nothing about the lock
                return False
        return self._lost

    def release(self) -> None:
        """Release the lock. Does nothing the second time, or in a child process."""
        if self._ended.is_set() or os.getpid() != self._owner.pid:
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            if self.lost:
                if self._on_lost is not None and not self._ended.is_set():
                    self._on_lost()
                return
            with contextlib.suppress(OSError):  # by descriptor: never the file of another owner
                os.utime(self._descriptor)


def is_alive(folder: Path, stale_after_s: float = STALE_AFTER_S) -> bool:
    """Return whether a process supervises the run in this folder."""
    owner, age_s = _holder(folder)
    return age_s is not None and not _is_dead(owner, age_s, stale_after_s)


def _take_over(folder: Path, owner: _Owner, stale_after_s: float) -> int:
    """Take the lock over from a dead owner; return its descriptor.

    Only one process can create the record of following that owner, so exactly one of several
    processes that see a dead owner succeeds.
    """
    deadline_s = time.monotonic() + 2
    while True:
        victim, age_s = _holder(folder)
        if age_s is None:  # released meanwhile
            descriptor = _create(folder / LOCK_FILE, owner)
            if descriptor is not None:
                return descriptor
        elif isinstance(victim, _Owner) and not _is_dead(victim, age_s, stale_after_s):
            raise RunLockedError(_refusal(folder, victim, age_s, stale_after_s))
        elif isinstance(victim, _Owner) or age_s > stale_after_s:
            record = _create(_record(folder, _token(victim)), owner)
            if record is not None:
                os.close(record)
                break
        if time.monotonic() > deadline_s:
            raise RunLockedError(_refusal(folder, victim, age_s, stale_after_s))
        time.sleep(0.05)

    temporary = folder / f".{LOCK_FILE}-{owner.token}"
    descriptor = _create(temporary, owner)
    assert descriptor is not None
    try:
        now, _ = _holder(folder)
        if _token(now) != owner.token:  # others took over and released since the victim was read
            raise RunLockedError(_refusal(folder, now, 0.0, stale_after_s))
        os.replace(temporary, folder / LOCK_FILE)
    except BaseException:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
        _record(folder, _token(victim)).unlink(missing_ok=True)
        raise
    return descriptor


def _holder(folder: Path) -> tuple[_Owner | str, float | None]:
    """Return the owner of the lock, after all takeovers, and the age of its last heartbeat.

    The owner is only a token if the file cannot be parsed, because it is being written or its
    writer died. The age is None if there is no lock.
    """
    owner, age_s = _read(folder / LOCK_FILE)
    while age_s is not None:
        successor, its_age_s = _read(_record(folder, _token(owner)))
        if its_age_s is None:
            break
        owner, age_s = successor, its_age_s
    return owner, age_s


def _read(path: Path) -> tuple[_Owner | str, float | None]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read()
    except FileNotFoundError:
        return "", None
    owner: _Owner | str
    try:
        owner = _Owner(**json.loads(text))
    except (ValueError, TypeError):
        owner = f"{status.st_ino:x}-{status.st_mtime_ns:x}"
    is_ours = isinstance(owner, _Owner) and owner.machine == _machine()
    now_s = time.time() if is_ours else _time_of_disk(path.parent)
    return owner, max(0.0, now_s - status.st_mtime)


def _is_dead(owner: _Owner | str, age_s: float, stale_after_s: float) -> bool:
    if age_s > stale_after_s:
        return True
    if isinstance(owner, str) or owner.machine != _machine():
        return False
    return _process_start(owner.pid) not in (owner.process_start, "")


def _create(path: Path, owner: _Owner) -> int | None:
    """Create a file that names the owner; return its descriptor, or None if it exists."""
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


def _record(folder: Path, token: str) -> Path:
    return folder / f".{LOCK_FILE}-after-{token}"


def _token(owner: _Owner | str) -> str:
    return owner.token if isinstance(owner, _Owner) else owner


def _delete_old_takeovers(folder: Path) -> None:
    now_s = _time_of_disk(folder)
    for path in folder.glob(f".{LOCK_FILE}-*"):
        with contextlib.suppress(OSError):
            if now_s - path.stat().st_mtime > TAKEOVER_RECORDS_S:
                path.unlink()


def _refusal(folder: Path, owner: _Owner | str, age_s: float | None, stale_after_s: float) -> str:
    if isinstance(owner, str):
        return f"{folder}: another process is starting this run right now; try again in a minute"
    since = datetime.fromtimestamp(owner.since_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f"{folder}: is in use by process {owner.pid} on host {owner.host} since {since} (last "
        f"heartbeat {age_s or 0:.0f} s ago). Wait for that run, stop it (touch {folder / 'stop'}), "
        "or choose another name=. If that machine is lost, try again after "
        f"{stale_after_s:.0f} s."
    )


def _machine() -> str:
    """Return a text that is equal for processes with a common space of process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
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
        return "" if _exists(pid) else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _time_of_disk(folder: Path) -> float:
    """Return the time by the clock that dates files in a folder; on a network disk, a server's."""
    probe = folder / f".clock-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:  # read-only
        return time.time()
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)
