"""Events are appended and read from an offset, whatever disks, crashes and rivals do."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deta.platform.run.fence import Fence, FencedOffError
from deta.platform.run.journal import JOURNAL_FILE, MAX_BUFFERED, Journal, read_events

ROOT = Path(__file__).resolve().parents[3]


def test_events_come_back_in_order_and_from_an_offset(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.write("progress", step=1, metrics={"loss": 2.5})
    journal.write("progress", step=2, metrics={"loss": 1.5})
    events = list(read_events(tmp_path))
    assert [event["step"] for event, _ in events] == [1, 2]
    journal.write("end", step=2)
    later = list(read_events(tmp_path, events[-1][1]))
    assert [event["kind"] for event, _ in later] == ["end"]
    journal.close()


def test_a_line_half_written_is_left_for_later(tmp_path: Path):
    Journal(tmp_path).write("a", step=1)
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write('{"kind": "b", "st')
        file.flush()
        assert [event["kind"] for event, _ in read_events(tmp_path)] == ["a"]
        file.write('ep": 2, "time_s": 1.0}\n')
    assert [event["kind"] for event, _ in read_events(tmp_path)] == ["a", "b"]


def test_a_new_process_goes_on_behind_a_broken_line(tmp_path: Path):
    Journal(tmp_path).write("a", step=1)
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write('{"kind": "torn')
    journal = Journal(tmp_path)
    journal.write("c", step=3)
    assert [event["kind"] for event, _ in read_events(tmp_path)] == ["a", "c"]


def test_numbers_that_are_not_finite_are_left_out_by_name(tmp_path: Path):
    Journal(tmp_path).write("progress", step=1, metrics={"good": 1.0, "bad": math.nan})
    ((event, _),) = read_events(tmp_path)
    assert event["metrics"] == {"good": 1.0}
    assert event["metrics_not_finite"] == ["bad"]


def test_no_journal_means_no_events(tmp_path: Path):
    assert list(read_events(tmp_path)) == []


def test_bytes_that_are_no_event_are_passed_over(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.write("a", step=1)
    with (tmp_path / JOURNAL_FILE).open("ab") as file:
        for line in (b"\xff\xfe\x00not text", b"3", b"null", b'{"kind": 7}', b"[" * 100_000):
            file.write(line + b"\n")
        file.write(b'{"kind": "late", "time_s": NaN}\n' + b"\0" * 512)  # a hole of zeros
    journal.write("b", step=2)
    journal.close()
    events = list(read_events(tmp_path))
    assert [event["kind"] for event, _ in events] == ["a", "b"]
    assert events[-1][1] == (tmp_path / JOURNAL_FILE).stat().st_size
    assert list(read_events(tmp_path, events[-1][1])) == []


def test_a_disk_that_is_full_stops_nothing_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / JOURNAL_FILE).symlink_to("/dev/full")  # takes nothing, like a full disk
    journal = Journal(tmp_path)
    for step in range(5):
        journal.write("progress", step=step)
    assert "Make room on the disk" in caplog.text
    (tmp_path / JOURNAL_FILE).unlink()
    journal.write("checkpoint", step=5)
    assert [event["step"] for event, _ in read_events(tmp_path)] == [0, 1, 2, 3, 4, 5]
    journal.close()


def test_a_line_that_the_disk_took_in_part_is_written_again(tmp_path: Path):
    # A limit on the size of files is real ENOSPC's twin: the write that meets it is cut short.
    code = f"""
import resource, signal
from pathlib import Path
from deta.platform.run.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path({str(tmp_path)!r}))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for step in range(60):
    if step in (10, 30):
        resource.setrlimit(resource.RLIMIT_FSIZE, (700 + 50 * step, hard))
    if step in (25, 50):
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.write("progress", step=step)
journal.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert [event["step"] for event, _ in read_events(tmp_path)] == list(range(60))
    num_lines = (tmp_path / JOURNAL_FILE).read_bytes().count(b"\n")
    assert num_lines > 60  # a part of a line stayed


def test_the_buffer_has_a_bound_and_the_loss_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deta.platform.run.journal.MAX_BUFFERED", 10)
    (tmp_path / JOURNAL_FILE).symlink_to("/dev/full")
    journal = Journal(tmp_path)
    for step in range(100):
        journal.write("progress", step=step)
    (tmp_path / JOURNAL_FILE).unlink()
    journal.write("progress", step=100)
    first, *others = [event for event, _ in read_events(tmp_path)]
    assert first["kind"] == "journal_lost"
    assert "91 events are lost" in first["message"]
    assert [event["step"] for event in others] == list(range(91, 101))


def test_a_worker_that_was_given_up_writes_nothing(tmp_path: Path):
    old = Journal(tmp_path, Fence.acquire(tmp_path, "old"))
    old.write("begin", step=0)
    new = Journal(tmp_path, Fence.acquire(tmp_path, "new"))
    with pytest.raises(FencedOffError):
        old.write("progress", step=1)
    new.write("begin", step=0)
    assert len(list(read_events(tmp_path))) == 2


def test_lines_of_several_processes_never_mix(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
from deta.platform.run.journal import Journal
journal = Journal(Path({str(tmp_path)!r}))
for number in range(300):
    journal.write("progress", who=int(sys.argv[1]), number=number, text="x" * (number * 31))
journal.close()
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(who)], cwd=ROOT) for who in range(3)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    numbers: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for event, _ in read_events(tmp_path):
        numbers[event["who"]].append(event["number"])
    assert numbers == {who: list(range(300)) for who in range(3)}


def test_numbers_deep_inside_that_are_not_finite_become_null(tmp_path: Path):
    Journal(tmp_path).write("progress", losses=[1.0, math.inf], images=[{"loss": math.nan}])
    ((event, _),) = read_events(tmp_path)
    assert event["losses"] == [1.0, None]
    assert event["images"] == [{"loss": None}]


def kinds(folder: Path) -> list[str]:
    return [event["kind"] for event, _ in read_events(folder)]


def full_disk(folder: Path) -> Journal:
    """Return a journal on a disk that takes nothing."""
    (folder / JOURNAL_FILE).symlink_to("/dev/full")
    return Journal(folder)


def test_a_journal_needs_its_run(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path / 'none'}: there is no such run$"):
        Journal(tmp_path / "none")


def test_the_log_says_once_that_the_disk_is_full_and_once_that_it_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / JOURNAL_FILE
    journal = full_disk(tmp_path)
    for step in range(3):
        journal.write("progress", step=step)
    path.unlink()
    journal.write("progress", step=3)
    journal.write("progress", step=4)
    full = (
        f"{path} cannot be written ([Errno 28] No space left on device); the run continues and "
        f"keeps the last {MAX_BUFFERED} events in memory. Make room on the disk."
    )
    assert caplog.messages == [full, f"{path} is written again, with all buffered events"]
    # Again full: told again.
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")
    journal._release()
    journal.write("progress", step=5)
    assert caplog.messages[2:] == [full]


def test_events_that_are_lost_at_the_end_are_counted_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    journal = full_disk(tmp_path)
    journal.write("progress", step=1)
    journal.write("end", step=2)
    journal.close()
    path = tmp_path / JOURNAL_FILE
    assert caplog.messages[-1] == f"{path}: 2 events could not be written and are lost"
    caplog.clear()
    path.unlink()
    journal = Journal(tmp_path)
    journal.write("a")
    journal.close()
    assert caplog.messages == []


def test_the_losses_of_two_times_without_a_disk_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deta.platform.run.journal.MAX_BUFFERED", 2)
    path = tmp_path / JOURNAL_FILE
    journal = full_disk(tmp_path)
    for step in range(5):
        journal.write("progress", step=step)
    path.unlink()
    journal.write("progress", step=5)
    for step in (6, 7):
        journal.write("progress", step=step)
    events = [event for event, _ in read_events(tmp_path)]
    assert [event["kind"] for event in events] == ["journal_lost"] + ["progress"] * 4
    assert events[0]["message"] == "the disk accepted nothing for too long: 4 events are lost"
    assert events[0]["time_s"] == pytest.approx(time.time(), abs=60)
    assert [event["step"] for event in events[1:]] == [4, 5, 6, 7]


class Disk:
    """Records which files and folders are forced to the disk, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forced: list[str] = []
        self.error: OSError | None = None
        true_fsync = os.fsync

        def fsync(descriptor: int) -> None:
            self.forced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            if self.error is not None:
                raise self.error
            true_fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")


@needs_proc
def test_what_must_outlive_the_machine_is_forced_to_the_disk_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = Disk(monkeypatch)
    journal = Journal(tmp_path)
    journal.write("progress", step=1)
    journal.write("evaluation", step=1)
    assert disk.forced == []
    journal.write("checkpoint", step=1)
    assert disk.forced == [JOURNAL_FILE, tmp_path.name]  # and the name of the new file, once
    for kind in ("end", "ended"):
        journal.write(kind)
    journal.write("progress", step=2)
    assert disk.forced[2:] == [JOURNAL_FILE] * 2
    journal.close()
    assert disk.forced[4:] == [JOURNAL_FILE]
    journal.close()  # closed already: nothing to force
    assert disk.forced[5:] == []


@needs_proc
def test_a_checkpoint_that_waited_for_the_disk_is_forced_with_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = Disk(monkeypatch)
    journal = full_disk(tmp_path)
    journal.write("checkpoint", step=1)
    (tmp_path / JOURNAL_FILE).unlink()
    assert disk.forced == []
    journal.write("progress", step=2)
    assert disk.forced == [JOURNAL_FILE, tmp_path.name]


@needs_proc
def test_a_disk_that_cannot_be_forced_is_named_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    disk = Disk(monkeypatch)
    disk.error = OSError(5, "Input/output error")
    journal = Journal(tmp_path)
    journal.write("checkpoint", step=1)
    assert caplog.messages == [
        f"{tmp_path / JOURNAL_FILE} could not be forced to the disk: [Errno 5] Input/output error"
    ]
    disk.error = None
    journal.write("end")  # the name of the file is not yet safe
    assert disk.forced == [JOURNAL_FILE, JOURNAL_FILE, tmp_path.name]


@needs_proc
def test_a_journal_lets_go_of_its_file(tmp_path: Path):
    def is_open() -> bool:
        files = (os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.exists())
        return str(tmp_path / JOURNAL_FILE) in files

    journal = Journal(tmp_path)
    journal.write("a")
    assert is_open()
    journal.close()
    assert not is_open()


def test_a_file_that_was_closed_behind_its_back_is_no_error_when_it_is_let_go(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.write("a")
    assert journal._descriptor is not None
    os.close(journal._descriptor)
    journal._release()
    journal.write("b")
    assert kinds(tmp_path) == ["a", "b"]


def test_the_file_is_for_all_to_read_and_for_its_owner_to_write(tmp_path: Path):
    before = os.umask(0)
    try:
        Journal(tmp_path).write("a")
    finally:
        os.umask(before)
    assert (tmp_path / JOURNAL_FILE).stat().st_mode & 0o777 == 0o644


def test_a_line_is_text_with_one_newline_between_events(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.write("a", step=1)
    journal.write("b", step=2)
    first, second, rest = (tmp_path / JOURNAL_FILE).read_bytes().split(b"\n")
    assert [json.loads(first)["step"], json.loads(second)["step"], rest] == [1, 2, b""]
    with (tmp_path / JOURNAL_FILE).open("ab") as file:
        file.write(b"x")
    journal.write("c", step=3)
    lines = (tmp_path / JOURNAL_FILE).read_bytes().split(b"\n")
    assert lines[2] == b"x"
    assert json.loads(lines[3])["kind"] == "c"
    assert lines[4:] == [b""]


@pytest.mark.parametrize(("missing", "num_copies"), [(1, 1), (2, 2)])
def test_a_line_that_lacks_only_its_newline_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int, num_copies: int
):
    true_write, cut = os.write, [missing]

    def write(descriptor: int, line: bytes) -> int:
        return true_write(descriptor, line[: len(line) - cut.pop()] if cut else line)

    monkeypatch.setattr(os, "write", write)
    journal = Journal(tmp_path)
    journal.write("first")
    journal.write("second")
    assert kinds(tmp_path) == ["first", "second"]
    text = (tmp_path / JOURNAL_FILE).read_text()
    assert text.count('"first"') == num_copies


def test_what_a_disk_took_of_a_line_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(os, "write", lambda _descriptor, _line: 3)
    monkeypatch.setattr(time, "time", lambda: 1.5)
    Journal(tmp_path).write("a")
    num_bytes = len('{"kind": "a", "time_s": 1.5}\n')
    assert f"([Errno 28] only 3 of {num_bytes} bytes were written)" in caplog.text


def test_a_worker_that_was_given_up_writes_nothing_at_its_end(tmp_path: Path):
    fence = Fence.acquire(tmp_path, "old")
    (tmp_path / JOURNAL_FILE).symlink_to("/dev/full")
    journal = Journal(tmp_path, fence)
    journal.write("progress", step=1)  # waits for the disk
    Fence.acquire(tmp_path, "new")
    (tmp_path / JOURNAL_FILE).unlink()
    with pytest.raises(FencedOffError):
        journal.close()
    assert not (tmp_path / JOURNAL_FILE).exists()


def test_a_worker_that_was_given_up_and_has_written_all_may_close(tmp_path: Path):
    journal = Journal(tmp_path, Fence.acquire(tmp_path, "old"))
    journal.write("progress", step=1)
    Fence.acquire(tmp_path, "new")
    journal.close()
    assert kinds(tmp_path) == ["progress"]


def test_zeros_that_a_power_failure_left_before_a_line_do_not_cost_the_line(tmp_path: Path):
    line = b'{"kind": "a", "time_s": 1.0}\n'
    (tmp_path / JOURNAL_FILE).write_bytes(line + b"\0" * 100 + line + b"XX" + line)
    assert kinds(tmp_path) == ["a", "a"]
