"""Measure the differences from published code with the parity tests.

    python benchmarks/parity.py [pytest arguments, such as -k "parity and not full_size"]

It runs the tests that have "parity" in their names, about 90 seconds on two cores. It prints a
Markdown table: for each group of shared cases the largest difference of any tensor, relative to its
largest element, and the largest share of indices (proposals, matches) that differ. It needs the
shared cases, in the folder given by the environment variable DETA_SHARED.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import cast

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Differences:
    """A pytest plugin that collects the (group, name, value) of each recorded `difference`."""

    def __init__(self) -> None:
        self.tests: dict[str, set[str]] = defaultdict(set)  # by group
        self.failed: set[str] = set()
        self.tensors: dict[str, list[tuple[float, str]]] = defaultdict(list)
        self.indices: dict[str, list[float]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        for key, recorded in report.user_properties:
            if key == "difference" and report.when == "call":
                group, name, value = cast(tuple[str, str, float], recorded)
                self.tests[group].add(report.nodeid)
                if name.startswith("share of other"):
                    self.indices[group].append(value)
                else:
                    self.tensors[group].append((value, name))

    def table(self) -> str:
        lines = [
            "| group | tests | failed | largest difference | of | other indices |",
            "|---|---|---|---|---|---|",
        ]
        for group in sorted(self.tests):
            failed = len(self.tests[group] & self.failed)
            name, shown = "", ""
            if self.tensors[group]:
                value, name = max(self.tensors[group])
                shown = f"{value:.1e}"
            others = f"{max(self.indices[group]):.1%}" if self.indices[group] else ""
            lines.append(
                f"| {group} | {len(self.tests[group])} | {failed} | {shown} | {name} | {others} |"
            )
        return "\n".join(lines)


def main(arguments: list[str]) -> int:
    differences = Differences()
    options = ["-q", "-k", "parity", *arguments, "--rootdir", str(ROOT), str(ROOT / "tests")]
    status = pytest.main(options, plugins=[differences])
    print(f"\n{differences.table()}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
