"""S5, S9, S10: no product code runs the content of a file or unpacks an archive to the disk.

The test finds calls by their names in the source. It catches mistakes, not code that hides a call.
tests/platform/weights/test_hostile_weights.py opens hostile files.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("ops", "model", "platform", "jobs", "dashboards", "benchmarks")
MODULES = sorted(
    [path for room in ROOMS for path in (ROOT / room).rglob("*.py")] + [ROOT / "setup.py"]
)

# Modules whose loading functions run code, follow paths out of a folder, or both.
NEVER_IMPORTED = {
    "dill", "joblib", "cloudpickle", "shelve", "marshal", "pickle", "_pickle", "tarfile", "yaml",
    "telnetlib", "xmlrpc", "jsonpickle", "pandas.io.pickle",
}  # fmt: skip
# Files that import one of them all the same, and why.
IMPORTED_WITH_CARE = {
    (
        "platform/weights/restricted_unpickler.py",
        "pickle",
    ): "an unpickler that calls only its own functions",
    (
        "platform/weights/torch_files.py",
        "zipfile",
    ): "reads members into memory, sizes checked before",
}
NEVER_CALLED = {
    "eval", "exec", "compile", "__import__",
    "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.hub.load",
    "torch.hub.load_state_dict_from_url", "torch.export.load", "torch.jit.load",
    "torch.distributed.checkpoint.load", "shutil.unpack_archive", "tempfile.mktemp",
    "ssl._create_unverified_context", "mlflow.pytorch.load_model", "pd.read_pickle",
    "pandas.read_pickle",
}  # fmt: skip
NEVER_CALLED_METHODS = {"extractall", "extract", "get_pickled_error", "read_pickle"}
CALLED_WITH_CARE = {
    (
        "platform/weights/torch_files.py",
        "read_pickle",
    ): "that of platform/weights/restricted_unpickler.py",
    (
        "platform/inference/exported_model.py",
        "torch.export.load",
    ): "only files that jobs/export.py has just written",
}
# Literals that must not be passed to any function, by the argument's name.
NEVER_GIVEN = {
    "shell": True,
    "weights_only": False,
    "allow_pickle": True,
    "verify": False,
    "check_hostname": False,
}


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` of a called function, or its last part where the first is no plain name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


def faults(source: str, place: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first = name.partition(".")[0]
            if {name, first} & (NEVER_IMPORTED | {"zipfile"}) and (
                (place, first) not in IMPORTED_WITH_CARE
            ):
                found.append(f"line {node.lineno}: imports {name}")
            if name in NEVER_CALLED:
                found.append(f"line {node.lineno}: imports {name}")
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        last = called.rpartition(".")[2]
        is_method = isinstance(node.func, ast.Attribute)
        forbidden = called in NEVER_CALLED and not (is_method and "." not in called)
        forbidden = forbidden or last in NEVER_CALLED_METHODS
        if forbidden and not {(place, called), (place, last)} & set(CALLED_WITH_CARE):
            found.append(f"line {node.lineno}: calls {called}")
        given = {part.arg: part.value for part in node.keywords if part.arg}
        for name, never in NEVER_GIVEN.items():
            value = given.get(name)
            if isinstance(value, ast.Constant) and value.value is never:
                found.append(f"line {node.lineno}: {called}({name}={never})")
        if called == "torch.load" and "weights_only" not in given:
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_can_bring_code_with_it(path: Path):
    assert faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)", "import yaml", "import tarfile",
        "import zipfile", "zipped.extractall(folder)", "import shutil\nshutil.unpack_archive(a)",
        "eval(text)", "exec(text)", "import os\nos.system(c)", "run(c, shell=True)",
        "np.load(path, allow_pickle=True)", "requests.get(u, verify=False)",
        "from torch.hub import load", "import joblib", "trial.get_pickled_error()",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(source: str):
    assert faults(source, "platform/other.py")


@pytest.mark.parametrize(
    "source", ["model.eval()", "re.compile(x)", "torch.load(f, weights_only=True)", "a.execute(q)"]
)
def test_the_search_does_not_report_harmless_code(source: str):
    assert faults(source, "platform/other.py") == []


def test_every_exception_in_the_lists_is_needed():
    for place, name in [*IMPORTED_WITH_CARE, *CALLED_WITH_CARE]:
        assert name in (ROOT / place).read_text(encoding="utf-8"), (place, name)


def test_mlflow_may_not_unpickle_in_our_processes():
    importing = [
        path
        for path in MODULES
        if "mlflow" in {name.partition(".")[0] for name in imports_at_top(path)}
        and path.name != "pyfunc_model.py"  # programs of other people load it
    ]
    assert len(importing) >= 2
    for path in importing:
        text = path.read_text(encoding="utf-8")
        if "from deta.platform.registry.mlflow_client import" in text:
            continue  # which sets it at its import
        setting = text.find('os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"')
        assert 0 < setting < text.find("\nfrom mlflow"), path


def imports_at_top(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    return names | {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
