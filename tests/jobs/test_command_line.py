"""Words on a command line, in any order, become options, files and changes of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tyro.conf import Positional, UseAppendAction

from deta.jobs.command_line import DataOptions, read_command_line
from deta.platform.run.config import RunConfig


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
