"""Injects real faults into the training of a tiny DETA and reports how it recovers.

  python -m tests.chaos A1 B5            some scenarios of the scorecard
  python -m tests.chaos --core           the scorecard; about 40 minutes on two cores
  python -m tests.chaos --quick          the quick ones; about ten minutes
  python -m tests.chaos --core --stock --json chaos.jsonl --table
  python -m tests.chaos --tabulate chaos.jsonl

Each scenario prints one line of JSON, {"id", "passed", "figure", "unit", "goal", "stock"}, and
logs its progress to stderr. --stock also runs plain Ray Train, torch.save and MLflow, where a
script for the fault exists. Results of the earlier study are marked as such. Some scenarios mount
file systems and create network namespaces, which needs root.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tests.chaos.catalogue import BY_ID, SCENARIOS
from tests.chaos.runs import Place, log_progress
from tests.chaos.scenario import Options, Scenario


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ids", nargs="*", metavar="ID")
    parser.add_argument("--list", action="store_true", help="list all scenarios and goals")
    parser.add_argument("--core", action="store_true", help="run the scorecard")
    parser.add_argument("--quick", action="store_true", help="run the quick subset")
    parser.add_argument("--stock", action="store_true", help="also run plain Ray and MLflow")
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="faults per scenario; the scorecard has 20"
    )
    parser.add_argument("--slack", type=float, default=1.0, help="multiply limits in seconds")
    parser.add_argument("--soak-s", type=float, default=90.0, help="duration of G5 in seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the lines to a file")
    parser.add_argument("--table", action="store_true", help="print a Markdown table at the end")
    parser.add_argument(
        "--tabulate", type=Path, metavar="FILE", help="only print the table of a --json file"
    )
    parser.add_argument("--keep", action="store_true", help="leave runs and logs on the disk")
    arguments = parser.parse_args()
    if arguments.list:
        for scenario in SCENARIOS:
            mark = "quick" if scenario.quick else "     "
            print(f"{scenario.id:<4} {mark}  {scenario.fault}  [{scenario.goal}]")
        return 0
    if arguments.tabulate:
        lines = arguments.tabulate.read_text(encoding="utf-8").splitlines()
        latest = {row["id"]: row for row in map(json.loads, lines)}
        print(table([latest[scenario.id] for scenario in SCENARIOS if scenario.id in latest]))
        return 0
    unknown = [name for name in arguments.ids if name.upper() not in BY_ID]
    if unknown:
        parser.error(f"no scenario {', '.join(unknown)}; --list shows them")
    chosen = choose(arguments.ids, core=arguments.core, quick=arguments.quick)
    if not chosen:
        parser.error("name some scenarios, or give --core or --quick")
    alone = (Path(tempfile.gettempdir()) / "deta-chaos.lock").open("a")
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error("another chaos run is active here; two at once would distort their results")
    # After SIGTERM, too, it kills the processes it started and unmounts its disks.
    signal.signal(signal.SIGTERM, _leave)
    options = Options(arguments.repeats, arguments.slack, arguments.soak_s)
    rows = play(chosen, options, arguments.stock, arguments.json, keep=arguments.keep)
    if arguments.table:
        print(table(rows))
    return 0 if all(row["passed"] for row in rows) else 1


def _leave(number: int, frame: FrameType | None) -> None:
    log_progress(f"stopped by signal {number}")
    sys.exit(128 + number)


def choose(ids: list[str], *, core: bool = False, quick: bool = False) -> list[Scenario]:
    """Return the chosen scenarios in the order of the scorecard."""
    names = {name.upper() for name in ids}
    return [s for s in SCENARIOS if s.id in names or (core and s.core) or (quick and s.quick)]


def play(
    chosen: list[Scenario],
    options: Options,
    with_stock: bool = False,
    file: Path | None = None,
    *,
    keep: bool = False,
) -> list[dict[str, Any]]:
    """Run the scenarios in sequence and print a line after each."""
    place = Place.make()
    place.patience = max(1.0, options.slack)
    place.shared["requested"] = {scenario.id for scenario in chosen}
    began_s = time.monotonic()
    rows = []
    try:
        for scenario in chosen:
            row = scenario.play(place, options, with_stock=with_stock)
            rows.append(row)
            line = json.dumps(row, ensure_ascii=False)
            print(line, flush=True)
            if file is not None:
                with file.open("a", encoding="utf-8") as output:
                    output.write(line + "\n")
    finally:
        if keep:
            log_progress(f"left on the disk: {place.folder}")
        else:
            place.remove()
    passed = sum(row["passed"] for row in rows)
    log_progress(f"{passed} of {len(rows)} passed in {(time.monotonic() - began_s) / 60:.1f} min")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the results."""
    lines = ["| id | fault | ours | goal | plain Ray and MLflow |", "|---|---|---|---|---|"]
    for row in rows:
        mark = "" if row["passed"] else "**not reached** "
        figure = f"{mark}{row['figure']} {row['unit']}".strip()
        figure += f" ({row['note']})" if row.get("note") else ""
        cells = [row["id"], BY_ID[row["id"]].fault, figure, row["goal"], row.get("stock", "–")]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
