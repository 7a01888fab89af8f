"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("ops", "model", "platform", "jobs", "dashboards")
# An arrow of the layout: a room may import the rooms before it.
MAY_IMPORT = {
    "ops": set(),
    "model": {"ops"},
    "platform": {"ops", "model"},
    "jobs": {"ops", "model", "platform"},
    "dashboards": {"platform"},
}
RAY_FILES = {
    f"platform/{name}.py"
    for name in (
        *("worker", "attempt", "submit", "sweep", "serve"),
        *("ray_metrics", "ray_reservations", "bootstrap_tasks"),
    )
}
MLFLOW_FILES = {
    f"platform/{name}.py"
    for name in ("tracking", "registry", "registered_model", "leaderboard_data")
}
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path: Path):
    place = path.relative_to(ROOT).as_posix()
    room = place.split("/")[0]
    for name in imports_of(path):
        first, _, rest = name.partition(".")
        assert first not in ("model", "ops", "jobs", "dashboards"), f"{place}: write deta.{name}"
        if first == "deta":
            other = rest.split(".")[0]
            assert other == room or other in MAY_IMPORT[room], f"{place} imports {name}"
        if first == "ray":
            assert place in RAY_FILES, f"{place} imports {name}"
        if first == "mlflow":
            assert place in MLFLOW_FILES, f"{place} imports {name}"


def test_no_root_folder_is_a_regular_package():
    for folder in (*ROOMS, "tests", "deta"):
        assert not list((ROOT / folder).glob("__init__.py")), (
            f"{folder}/__init__.py shadows modules"
        )


def test_python_keeps_its_own_platform_module():
    code = "import platform; print(platform.system()); import deta.platform.data.sample_order"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip()


def test_deta_holds_nothing_but_links():
    links = sorted((ROOT / "deta").iterdir())
    assert [link.name for link in links if link.name != "__pycache__"] == sorted(ROOMS)
    assert all(link.is_symlink() and link.resolve() == ROOT / link.name for link in links)


def test_model_needs_neither_ray_nor_mlflow():
    code = (
        "import sys; import deta.model.detector, deta.model.criterion, deta.model.postprocess, "
        "deta.platform.learning.train_step; assert not {'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
