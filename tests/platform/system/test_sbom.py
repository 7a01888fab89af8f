"""The bill of materials lists what is installed; altered files and missing hashes are found."""

from __future__ import annotations

import base64
import hashlib
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

from deta.platform.system.sbom import altered_files, bill_of_materials, canonical, hash_lines


def test_every_package_is_listed_once_with_its_version():
    bill = bill_of_materials()
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    parts = {part["name"]: part for part in bill["components"]}
    assert len(parts) == len(bill["components"]) > 30
    installed = {canonical(d.name): d.version for d in distributions() if d.metadata["Name"]}
    assert {name: part["version"] for name, part in parts.items()} == {
        name: version for name, version in installed.items() if name != "deta-platform"
    }
    assert parts["torch"]["purl"] == f"pkg:pypi/torch@{installed['torch']}"
    assert sum("licenses" in part for part in parts.values()) > 0.9 * len(parts)


def test_one_changed_byte_of_a_package_is_found(tmp_path: Path):
    wheel = tmp_path / "thing-1.0.dist-info"
    wheel.mkdir()
    (tmp_path / "thing.py").write_text("x = 1\n")
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    digest = hashlib.sha256(b"x = 1\n").digest()
    right = "sha256=" + base64.urlsafe_b64encode(digest).decode().rstrip("=")
    (wheel / "RECORD").write_text(f"thing.py,{right},6\nthing-1.0.dist-info/RECORD,,\n")
    package = Distribution.at(wheel)

    assert list(altered_files([package])) == []
    (tmp_path / "thing.py").write_text("x = 2\n")
    assert list(altered_files([package])) == [f"thing: {tmp_path / 'thing.py'} has changed"]
    (tmp_path / "thing.py").unlink()
    assert "is missing" in next(altered_files([package]))


def test_a_package_without_a_hash_is_refused_by_name():
    item = {"metadata": {"name": "A_b", "version": "1"}, "download_info": {"vcs_info": {}}}
    with pytest.raises(ValueError, match=r"a-b 1: pip reports no SHA-256"):
        hash_lines({"install": [item]})
    item["metadata"]["name"] = "deta-platform"  # this project needs none
    assert hash_lines({"install": [item]}) == []
