"""Events are appended and read from an offset, whatever disks, crashes and rivals do."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from deta.platform.run.fence import Fence, FencedOffError
from deta.platform.run.journal import JOURNAL_FILE, Journal, read_events

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
