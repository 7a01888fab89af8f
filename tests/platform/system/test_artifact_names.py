"""Only plain relative paths are names of artifacts."""

from __future__ import annotations

import pytest

from deta.platform.system.artifact_names import artifact_fault


@pytest.mark.parametrize(
    "path",
    [
        "../secret", "..", "a/.", "a/./b", "a/..", "a//b", "a/", "a\n", "", "/etc/passwd", "a%2fb",
        "ü.png", "x" * 129, "a" + "/a" * 8, 7, None,
    ],
)  # fmt: skip
def test_the_fault_of_a_name_is_stated(path: object):
    found = artifact_fault(path)
    assert found is not None
    assert "is not a path" in found
    assert len(found) < 250  # a long name is cut


@pytest.mark.parametrize(
    "path", ["report.html", "a/b_c/D-0.json", "x" * 128, "..a", "a" + "/a" * 7]
)
def test_a_plain_name_has_no_fault(path: str):
    assert artifact_fault(path) is None
