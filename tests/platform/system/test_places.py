"""The root of the code, and child processes that import it from there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from deta.platform.system import places
from deta.platform.system.places import PROJECT_ROOT, child_environment


def test_the_root_holds_the_package():
    assert (PROJECT_ROOT / "deta" / "platform" / "system" / "places.py").is_file()
    assert (PROJECT_ROOT / "deta" / "dashboards").is_dir()


def test_a_child_in_another_folder_imports_the_same_code(tmp_path: Path):
    code = "from deta.platform.system import places; print(places.__file__)"
    found = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=child_environment(base={}),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert os.path.samefile(found.stdout.strip(), places.__file__)


def test_changes_and_earlier_paths_are_in_the_environment():
    env = child_environment({"A": "new"}, base={"A": "old", "B": "1", "PYTHONPATH": "/x"})
    assert env == {"A": "new", "B": "1", "PYTHONPATH": f"{PROJECT_ROOT}{os.pathsep}/x"}
