"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ops", "model", "platform", "jobs", "dashboards")
# The folders of the root that each may import.
MAY_IMPORT = {
    "ops": set(),
    "model": {"ops"},
    "platform": {"ops", "model"},
    "jobs": {"ops", "model", "platform"},
    "dashboards": {"platform"},
}
# The rooms of platform/, lowest first: a room imports only rooms before it.
ROOMS = (
    *("system", "data", "shards", "learning", "run", "checkpoint", "weights", "evaluation"),
    *("pages", "analysis", "inference", "tracking", "training", "launch", "cluster", "registry"),
    *("study", "study_report", "sweep", "comparison", "leaderboard", "serving"),
)
MAY_IMPORT_RAY = (
    "platform/cluster/",
    "platform/sweep/tune_sweep.py",
    "platform/serving/ray_serve.py",
)
MAY_IMPORT_MLFLOW = (
    "platform/tracking/mlflow_store.py",
    "platform/registry/",
    "platform/leaderboard/mlflow_source.py",
)
MAX_FILES = 13  # in a room, so that a list of them is read at a glance
# Old places of two files, kept for one release. MLflow stores a loader with each version, and older
# loaders import from here (tests/platform/registry/test_pyfunc_model.py).
ALIASES = (ROOT / "platform" / "predict.py", ROOT / "platform" / "images.py")
MODULES = sorted(
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path not in ALIASES
)
TESTS = sorted((ROOT / "tests" / "platform").glob("*/test_*.py"))


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def room_of(path: Path) -> str:
    """Return the room of a file of platform/."""
    return path.relative_to(ROOT / "platform").parts[0]


def id_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=id_of)
def test_a_file_imports_only_what_its_place_allows(path: Path):
    place = id_of(path)
    folder = place.split("/")[0]
    for name in imports_of(path):
        first, *rest = name.split(".")
        assert first not in ("model", "ops", "jobs", "dashboards"), f"{place}: write deta.{name}"
        if first == "deta":
            assert rest[0] == folder or rest[0] in MAY_IMPORT[folder], f"{place} imports {name}"
        if folder == "platform" and rest[:1] == ["platform"]:
            assert ROOMS.index(rest[1]) <= ROOMS.index(room_of(path)), (
                f"{place} imports {name}, of a room that comes after its own"
            )
        if first == "ray":
            assert place.startswith(MAY_IMPORT_RAY), f"{place} imports {name}"
        if first == "mlflow":
            assert place.startswith(MAY_IMPORT_MLFLOW), f"{place} imports {name}"


def test_no_files_import_each_other_in_a_circle():
    known = {".".join(["deta", *path.relative_to(ROOT).with_suffix("").parts]) for path in MODULES}
    graph = {}
    for path in MODULES:
        module = ".".join(["deta", *path.relative_to(ROOT).with_suffix("").parts])
        graph[module] = imports_of(path) & known - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_every_file_of_platform_is_in_a_room_of_few_files():
    files = [path for path in MODULES if id_of(path).startswith("platform/")]
    assert {room_of(path) for path in files} == set(ROOMS)
    sizes = Counter(room_of(path) for path in files if path.name != "__init__.py")
    assert max(sizes.values()) <= MAX_FILES, sizes


@pytest.mark.parametrize("path", ALIASES, ids=id_of)
def test_an_alias_holds_one_import_and_only_old_loaders_use_it(path: Path):
    docstring, imported = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(imported, ast.ImportFrom)
    old = f"deta.platform.{path.stem}"
    assert not [id_of(other) for other in MODULES + TESTS if old in imports_of(other)]


@pytest.mark.parametrize("room", ROOMS)
def test_the_package_of_a_room_is_one_sentence(room: str):
    tree = ast.parse((ROOT / "platform" / room / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize("room", ROOMS)
def test_the_tests_of_a_room_import_each_of_its_files(room: str):
    imported = set().union(*(imports_of(path) for path in TESTS if path.parent.name == room))
    for path in sorted((ROOT / "platform" / room).glob("[!_]*.py")):
        module = f"deta.platform.{room}.{path.stem}"
        own = ROOT / "tests" / "platform" / room / f"test_{path.stem}.py"
        assert own.is_file() or module in imported, (
            f"no file in tests/platform/{room} tests {module}"
        )


def test_no_root_folder_is_a_regular_package():
    for folder in (*FOLDERS, "tests"):
        assert not list((ROOT / folder).glob("__init__.py")), (
            f"{folder}/__init__.py shadows modules"
        )


def test_python_keeps_its_own_platform_module():
    code = "import platform; print(platform.system()); import deta.platform.data.sample_order"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip()


def test_deta_holds_links_and_its_own_module():
    entries = [entry for entry in sorted((ROOT / "deta").iterdir()) if entry.name != "__pycache__"]
    links = [entry for entry in entries if entry.name != "__init__.py"]
    assert [link.name for link in links] == sorted(FOLDERS)
    assert all(link.is_symlink() and link.resolve() == ROOT / link.name for link in links)
    assert len(entries) == len(links) + 1


def test_nothing_is_imported_from_an_older_copy_on_the_path(tmp_path: Path):
    """A cluster image has the package installed, and a job brings its own working directory."""
    newer, older = tmp_path / "newer", tmp_path / "older"
    for copy in (newer, older):
        for folder in (*FOLDERS, "deta"):
            shutil.copytree(
                ROOT / folder, copy / folder, symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "*.so"),
            )  # fmt: skip
    (newer / "platform" / "data" / "transforms.py").unlink()
    (older / "platform" / "data" / "removed_since.py").write_text("", encoding="utf-8")
    (older / "platform" / "removed_room").mkdir()
    (older / "platform" / "removed_room" / "module.py").write_text("", encoding="utf-8")
    code = f"""
import importlib, sys
sys.path[:0] = [{str(newer)!r}, {str(older)!r}]
import deta.platform.data.sample_order as module
assert module.__file__.startswith({str(newer)!r}), module.__file__
for name in ("data.transforms", "data.removed_since", "removed_room.module"):
    try:
        importlib.import_module("deta.platform." + name)
    except ModuleNotFoundError:
        continue
    sys.exit(name + " came from the older copy")
import platform
assert platform.system()
"""
    # -I leaves out the folder of the checkout; the installed package is still on the path.
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


def test_model_needs_neither_ray_nor_mlflow():
    code = (
        "import sys; import deta.model.detector, deta.model.criterion, deta.model.postprocess, "
        "deta.platform.learning.train_step; assert not {'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
