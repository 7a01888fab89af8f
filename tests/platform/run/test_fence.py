"""Only the newest group of workers passes the fence of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deta.platform.run.fence import Fence, FencedOffError
from deta.platform.system.places import PROJECT_ROOT

ACQUIRE_25 = """
import sys
from pathlib import Path
from deta.platform.run.fence import Fence
for _ in range(25):
    print(Fence.acquire(Path(sys.argv[1]), sys.argv[2]).number)
"""


def test_only_the_newest_group_passes_the_fence(tmp_path: Path):
    first = Fence.acquire(tmp_path, "group of host a")
    first.check()
    second = Fence.acquire(tmp_path, "group of host b")
    second.check()
    assert (first.number, second.number) == (1, 2)
    with pytest.raises(FencedOffError, match=r"group of host a.*group of host b"):
        first.check()
    record = json.loads((tmp_path / "fence.json").read_text())
    assert (record["number"], record["owner"]) == (2, "group of host b")


@pytest.mark.parametrize("content", [None, "", '{"number": 1'])
def test_a_fence_whose_record_is_lost_still_holds(tmp_path: Path, content: str | None):
    fences = [Fence.acquire(tmp_path, str(number)) for number in range(3)]
    (tmp_path / "fence.json").unlink()
    if content is not None:
        (tmp_path / "fence.json").write_text(content)
    fences[2].check()
    with pytest.raises(FencedOffError):
        fences[1].check()
    assert Fence.acquire(tmp_path, "next").number == 4


def test_groups_that_start_at_once_get_different_numbers(tmp_path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ACQUIRE_25, str(tmp_path), name],
            cwd=PROJECT_ROOT, text=True, stdout=subprocess.PIPE,
        )
        for name in "abcd"
    ]  # fmt: skip
    numbers = [int(n) for process in processes for n in process.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 101))
    Fence(tmp_path, 100, "last").check()
    with pytest.raises(FencedOffError):
        Fence(tmp_path, 99, "last but one").check()
    assert len(list(tmp_path.iterdir())) < 40
