"""Events are appended, read from an offset, and survive a process that died within a line."""

from __future__ import annotations

import math
from pathlib import Path

from deta.platform.journal import FILE_NAME, Journal, read_events


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
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"kind": "b", "st')
        file.flush()
        assert [event["kind"] for event, _ in read_events(tmp_path)] == ["a"]
        file.write('ep": 2}\n')
    assert [event["kind"] for event, _ in read_events(tmp_path)] == ["a", "b"]


def test_a_new_process_goes_on_behind_a_broken_line(tmp_path: Path):
    Journal(tmp_path).write("a", step=1)
    with (tmp_path / FILE_NAME).open("a") as file:
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
