"""Command lines that only read, print or refuse import nothing slow, and so answer at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLOW = {
    "torch", "torchvision", "timm", "ray", "mlflow", "pandas", "scipy", "pyarrow", "plotly",
    "hotcoco", "jinja2", "requests", "aiohttp", "transformers",
}  # fmt: skip
JOBS = sorted(
    path.name for path in (ROOT / "jobs").glob("*.py") if '"__main__"' in path.read_text()
)
NO_DATA = (
    "--train-images nowhere --train-annotations nowhere.json --val-images nowhere "
    "--val-annotations nowhere.json"
)


def imported_by(line: str, folder: Path) -> tuple[int, str, set[str]]:
    """Return exit code, stderr without the list of imports, and the modules that were imported."""
    script, *arguments = line.split()
    run = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "jobs" / script, *arguments],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = run.stderr.splitlines()
    modules = {one.rpartition("|")[2].strip() for one in lines if one.startswith("import time:")}
    return run.returncode, "\n".join(one for one in lines if "import time" not in one), modules


@pytest.mark.parametrize("script", JOBS)
def test_help_imports_nothing_slow(script: str, tmp_path: Path):
    code, errors, modules = imported_by(f"{script} --help", tmp_path)
    assert (code, errors) == (0, "")
    assert "deta.jobs" in modules
    allowed = {"jinja2"} if script == "recipe_pages.py" else set()
    assert modules & SLOW <= allowed


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("deta_r50.py --show", 0, ""),
        ("deta_r50.py --keys", 0, ""),
        ("deta_r50.py optim.learning_rate=1", 2, "did you mean optim.lr"),
        ("deta_r50.py --varient small", 2, "--variant"),
        ("deta_r50.py", 2, "data.train_images is not set"),
        (f"deta_r50.py {NO_DATA}", 2, "data.train_images=nowhere: no such"),
        (f"deta_r50.py --variant demo {NO_DATA}", 2, "data.train_images=nowhere: no such"),
        (f"deta_r50.py finetune --init gone {NO_DATA}", 2, "data.train_images=nowhere: no such"),
        ("deta_swin_l.py init_checkpoint=gone", 2, "data.train_images is not set"),
        ("predict.py gone a.jpg --out out", 2, "gone: no such"),
        ("evaluate.py gone --images gone --annotations gone.json", 2, "gone: no such"),
        ("compare.py gone gone-too", 2, "gone: no such"),
        ("convert.py gone", 2, "gone: no such"),
        ("export.py gone --check-images a.jpg --out out", 2, "gone: no such"),
        ("pack.py --images gone --annotations gone.json --out out", 2, "--images=gone: no such"),
        ("register.py gone", 2, "gone: no such"),
        ("serve.py gone", 2, "gone: no such"),
    ],
)
def test_an_answer_without_work_imports_nothing_slow(
    line: str, code: int, words: str, tmp_path: Path
):
    found, errors, modules = imported_by(line, tmp_path)
    assert found == code, errors
    assert words in errors
    assert modules & SLOW == set()
