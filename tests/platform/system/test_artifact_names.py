"""Only plain relative paths are names of artifacts."""

from __future__ import annotations

import pytest

from deta.platform.system.artifact_names import MAX_PARTS, artifact_fault


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("../secret", "is not a path"),
        ("a/./b", "is not a path"),
        ("a//b", "is not a path"),
        ("/etc/passwd", "is not a path"),
        ("a%2fb", "is not a path"),
        ("ü.png", "is not a path"),
        ("x" * 129, "at most 128"),
        ("/".join("a" * (MAX_PARTS + 1)), f"over {MAX_PARTS} folders"),
        (7, "is not text"),
        (None, "is not text"),
    ],
)
def test_the_fault_of_a_name_is_stated(path: object, fault: str):
    found = artifact_fault(path)
    assert found is not None
    assert fault in found
    assert len(found) < 250  # a long name is cut


@pytest.mark.parametrize(
    "path", ["report.html", "a/b_c/D-0.json", "x" * 128, "..a", "a" + "/a" * 7]
)
def test_a_plain_name_has_no_fault(path: str):
    assert artifact_fault(path) is None
