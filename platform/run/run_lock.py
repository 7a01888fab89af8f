"""Who may use a run's folder: one supervisor at a time, and of its worker groups the newest.

Both are files in the folder, so that they hold on every machine that sees it. What has to happen
once happens by creating a file that must not exist yet, which local and network disks both do
for one process alone.

    run.lock           who supervises: host, process, when it began. Its time of change is the
                       heartbeat.
    .run.lock-after-T  who took over from the supervisor T, which had died
    fence.json         the newest worker group: number and owner
    .fence-N           number N has been given away
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
FENCE_FILE = "fence.json"
HEARTBEAT_S = 5.0
STALE_AFTER_S = 30.0
TAKEOVER_RECORDS_S = 3600.0  # far longer than anybody takes from reading a lock to acting on it
TICKETS_KEPT = 16


class RunLockedError(ValueError):
    """Another process supervises this run."""


@dataclass(frozen=True)
class _Owner:
    """Who holds a lock. Two processes with the same `machine` can see one another."""

    host: str
    machine: str  # host, boot and process namespace
    pid: int
    process_start: str  # since a number is given to another process later; empty if unknown
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
    """The right to supervise a run, kept alive by a thread. Ends with `release` or the process.

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
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        folder: Path,
        stale_after_s: float = STALE_AFTER_S,
        on_lost: Callable[[], None] | None = None,
    ) -> RunLock:
        """Take the lock of a run's folder, also from an owner that is dead.

        On this machine a dead process is known at once; elsewhere by a heartbeat that has been
        missing for `stale_after_s`.

        Args:
            on_lost: called once, from a thread, if somebody takes this lock over because this
                process was suspended for too long.

        Raises:
            RunLockedError: it is held; says by whom, since when, and what to do.
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
        _forget_takeovers(folder)
        return lock

    @property
    def lost(self) -> bool:
        """Whether somebody else has taken the lock over, or removed it."""
        if not self._lost and not self._released:
            try:
                self._lost = not os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
            except FileNotFoundError:
                self._lost = True
            except OSError:  # a disk that does not answer says nothing about the lock
                return False
        return self._lost

    def release(self) -> None:
        """Give the lock back. A second time, or in a child process, nothing happens."""
        if self._ended.is_set() or os.getpid() != self._owner.pid:
            return
        self._ended.set()
        if not self.lost:
            with contextlib.suppress(OSError):  # a disk that is read-only by now; it goes stale
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

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            if self.lost:
                if self._on_lost is not None and not self._ended.is_set():
                    self._on_lost()
                return
            with contextlib.suppress(OSError):  # of the file itself: never another owner's
                os.utime(self._descriptor)


def is_alive(folder: Path, stale_after_s: float = STALE_AFTER_S) -> bool:
    """Whether a process supervises the run in this folder."""
    owner, age_s = _holder(folder)
    return age_s is not None and not _is_dead(owner, age_s, stale_after_s)


def _take_over(folder: Path, owner: _Owner, stale_after_s: float) -> int:
    """The lock of an owner that is dead, as a descriptor.

    Only one process can create the record that it follows that very owner, so of several that
    see a dead owner one goes on.
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
        if _token(now) != owner.token:  # others have come and gone since the victim was read
            raise RunLockedError(_refusal(folder, now, 0.0, stale_after_s))
        os.replace(temporary, folder / LOCK_FILE)
    except BaseException:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
        _record(folder, _token(victim)).unlink(missing_ok=True)
        raise
    return descriptor


def _holder(folder: Path) -> tuple[_Owner | str, float | None]:
    """Who holds the lock, whoever took it over included, and the age of its last heartbeat.

    The owner is a mere token where the file cannot be parsed, since it is being written or its
    writer died. The age is None where there is no lock.
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
    """Create a file that says who we are, and return its descriptor; none if it exists."""
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


def _forget_takeovers(folder: Path) -> None:
    now_s = _time_of_disk(folder)
    for path in folder.glob(f".{LOCK_FILE}-*"):
        with contextlib.suppress(OSError):
            if now_s - path.stat().st_mtime > TAKEOVER_RECORDS_S:
                path.unlink()


def _refusal(folder: Path, owner: _Owner | str, age_s: float | None, stale_after_s: float) -> str:
    if isinstance(owner, str):
        return f"{folder}: another process is taking this run just now; try again in a minute"
    since = datetime.fromtimestamp(owner.since_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f"{folder}: is in use by process {owner.pid} on host {owner.host} since {since} (last sign "
        f"of life {age_s or 0:.0f} s ago). Wait for that run, end it (touch {folder / 'stop'}), or "
        f"choose another name=. If that machine is gone, try again after {stale_after_s:.0f} s."
    )


def _machine() -> str:
    """What two processes share if the number of one means the same process to the other."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """When a process of this machine began, in ticks since boot.

    None if there is no such process; empty where the system does not say when it began.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie has ended
    except (OSError, IndexError):  # another system, or one that hides other people's processes
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
    """Now, by the clock that dates the files in a folder: a server's, on a network disk."""
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
