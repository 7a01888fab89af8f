"""S13: every dependency has one exact version and a known hash, and the versions are compatible."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name as canonical

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.+!_-]+)(?:\s*;.*)?")


HASHED = re.compile(r"([a-z0-9-]+)==(\S+)( ; [^\\]+?)?(\s+--hash=sha256:[0-9a-f]{64})+")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            pin = PIN.fullmatch(line.strip())
            assert pin, f"constraints.txt: {line!r} is not NAME==VERSION"
            found[canonical(pin[1])] = pin[2]
    return found


def test_every_dependency_of_every_group_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    named = {
        canonical(re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0])
        for group in groups
        for requirement in group
    } - {"deta-platform"}
    assert len(named) > 15
    assert named - set(pins()) == set()


def test_every_package_that_jobs_need_is_known_by_its_content():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"]]
    groups += [
        group
        for name, group in project["optional-dependencies"].items()
        if name not in ("dev", "docs", "mutation", "release")
    ]
    named = {
        canonical(re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0])
        for group in groups
        for requirement in group
    } - {"deta-platform"}
    text = (ROOT / "hashes.txt").read_text(encoding="utf-8").replace("\\\n", "")
    hashed = {}
    for line in text.splitlines():
        found = HASHED.fullmatch(line)
        assert found, f"hashes.txt: {line!r}"
        hashed[found[1]] = found[2]
    assert named - set(hashed) == set()
    # Packages of other systems only are not among the pins.
    assert {name: pins()[name] for name in hashed.keys() & pins().keys()} == {
        name: version for name, version in hashed.items() if name in pins()
    }  # else run `make hashes`


def test_a_package_that_differs_in_one_byte_is_not_installed(tmp_path: Path):
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    files = {
        "thing.py": "x = 1\n",
        "thing-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
        "thing-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "thing-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    listed = tmp_path / "hashes.txt"
    listed.write_text(f"thing==1.0 \\\n    --hash=sha256:{digest}\n")

    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(tmp_path)]
    command += ["--require-hashes", "--no-deps", "--requirement", str(listed), "--target"]
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    original = run([*command, str(tmp_path / "original")])
    assert original.returncode == 0, original.stderr
    content = bytearray(wheel.read_bytes())
    content[content.index(b"x = 1") + 4] ^= 1
    wheel.write_bytes(content)
    altered = run([*command, str(tmp_path / "altered")])
    assert altered.returncode != 0
    assert "DO NOT MATCH THE HASHES" in altered.stderr
    assert not (tmp_path / "altered" / "thing.py").exists()


def test_the_installed_packages_are_compatible():
    checked = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_no_file_names_a_package_index():
    for name in ("constraints.txt", "hashes.txt", "pyproject.toml", "Makefile", "setup.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for word in ("index-url", "find-links", "--trusted-host", "git+", "extra-index"):
            assert word not in text, f"{name}: {word}"


@pytest.mark.parametrize("room", ["platform", "jobs", "model", "ops"])
def test_nothing_is_installed_during_a_run(room: str):
    for path in (ROOT / room).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in ('"pip":', '"conda":', '"uv":', '"pip", "install"', "ensurepip"):
            assert word not in text, f"{path}: {word}"
