"""Every test that docs/SAFETY.md names as a proof exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    match[1]: re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", match[0])
    for match in re.finditer(
        r"^\| (S\d+) \|.*$", (ROOT / "docs" / "SAFETY.md").read_text(encoding="utf-8"), re.MULTILINE
    )
}


def test_all_fifteen_rows_name_tests():
    assert list(ROWS) == [f"S{number}" for number in range(1, 16)]
    assert all(ROWS.values())


def test_every_test_that_is_named_exists():
    for number, tests in ROWS.items():
        for place, name in tests:
            tree = ast.parse((ROOT / place).read_text(encoding="utf-8"))
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in names, f"{number}: {place} has no {name}"
