"""Words on a command line, in any order, become options, files and changes of the configuration."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tyro.conf import Positional, UseAppendAction

from deta.jobs.command_line import (
    DataOptions,
    StorageOptions,
    read_command_line,
    read_options,
)
from deta.platform.run.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    weights: Positional[str]  # a run
    images: Positional[tuple[str, ...]] = ()  # files
    output: Path  # a folder
    floor: UseAppendAction[tuple[str, ...]] = ()  # CLASS=AP
    check: tuple[str, ...] = ()  # several files
    no_pictures: bool = False  # draw none


@pytest.mark.parametrize(
    ("line", "images", "floor", "check", "changes"),
    [
        ("run a.jpg --output x b.jpg", "a.jpg b.jpg", "", "", {}),
        ("--output x run a=b.jpg seed=3", "a=b.jpg", "", "", {"seed": "3"}),
        ("run --floor seed=0.4 --floor=b=1 --output x c", "c", "seed=0.4 b=1", "", {}),
        ("run --check a b seed=3 --output x c", "c", "", "a b", {"seed": "3"}),
        ("run --no-pictures a --output x --optim.lr 1", "a", "", "", {"optim.lr": "1"}),
        ("run --output x --seed=7 --model.dim=8", "", "", "", {"seed": "7", "model.dim": "8"}),
    ],
)
def test_words_may_be_mixed(line: str, images: str, floor: str, check: str, changes: dict):
    options, found = read_command_line(FileOptions, "", RunConfig(), arguments=line.split())
    assert (options.weights, options.output) == ("run", Path("x"))
    assert options.images == tuple(images.split())
    assert options.floor == tuple(floor.split())
    assert options.check == tuple(check.split())
    assert found == changes


@pytest.mark.parametrize("line", ["a", "--storage a", "--storage=a", "storage=a"])
def test_the_storage_may_be_named(line: str):
    options = read_options(StorageOptions, "", arguments=line.split())
    assert options.storage == Path("a")


def test_unknown_keys_are_left_to_the_configuration_where_no_files_are_named():
    options, changes = read_command_line(
        DataOptions, "", RunConfig(), arguments=["lr=1", "--val-images", "a=b", "optim.lr=a=b"]
    )
    assert options.changes() == {"data.val_images": "a=b"}
    assert changes == {"lr": "1", "optim.lr": "a=b"}


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("run --output x --outptu y", 2, "--outptu"),
        ("run", 2, "--output"),
        ("run --output x --optim.lr", 2, "--optim.lr needs a value"),
        ("--help", 0, "draw none"),
        ("--keys", 0, "AdamW"),
    ],
)
def test_what_is_refused_or_explained(line: str, code: int, message: str, capsys):
    with pytest.raises(SystemExit) as ended:
        read_command_line(FileOptions, "", RunConfig(), program="x.py", arguments=line.split())
    assert ended.value.code == code
    shown = capsys.readouterr()
    assert message in (shown.err if code else shown.out)


@pytest.mark.parametrize("option", ["--help", "--keys"])
def test_a_reader_may_leave(option: str):
    """`--help | head -1` ends without a traceback."""
    command = [sys.executable, "jobs/deta_r50.py", option]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


def test_help_has_the_lines_of_the_docstring(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    doc = "Do it.\n\n  do it --now\n  do it --later\n\n" + "All words of a paragraph. " * 4
    with pytest.raises(SystemExit):
        read_command_line(FileOptions, doc, arguments=["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == ["Do it.", "", "  do it --now", "  do it --later", ""]
    paragraph = lines[5 : lines.index("", 5)]
    assert len(paragraph) > 1
    assert max(map(len, paragraph)) <= 40
