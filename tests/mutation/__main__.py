"""Report which mutants the tests have killed, after `mutmut run`.

  python -m tests.mutation            a table by module, and every survivor with its change
  python -m tests.mutation journal    the same for modules whose path contains a word

A mutant is a copy of a function with one small change; a test that fails with it kills it. A change
that no test could notice is listed in `equivalent.toml` with the reason, and does not count. The
exit code is 1 if fewer than 90 % of the others are killed, or if `equivalent.toml` lists what is no
survivor any more.
"""

from __future__ import annotations

import fnmatch
import json
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

FOLDER = Path("mutants")  # where mutmut works
LEAST_KILLED = 0.9
KILLED = ("killed", "timeout", "suspicious", "segfault")


@dataclass(frozen=True)
class Equivalent:
    """A change of a function that no test could notice."""

    function: str  # with its module, and its class; * stands for any
    change: str  # a part of a changed line
    reason: str

    def covers(self, function: str, added: str) -> bool:
        return fnmatch.fnmatchcase(function, self.function) and self.change in added


@dataclass(frozen=True)
class Mutant:
    name: str
    status: str
    source: Path

    @property
    def function(self) -> str:
        """Return its module, class and function, without mutmut's marks."""
        module, _, mangled = self.name.rpartition("__mutmut_")[0].rpartition(".")
        words = mangled.removeprefix("x").strip("_" if mangled.startswith("x_") else "ǁ")
        name = mangled.removeprefix("x_") if mangled.startswith("x_") else words.replace("ǁ", ".")
        return f"{module}.{name}"

    def changes(self) -> tuple[str, str]:
        """Return the removed and the added lines."""
        lines = get_diff_for_mutant(self.name, path=self.source).splitlines()[2:]
        removed = [line[1:].strip() for line in lines if line.startswith("-")]
        added = [line[1:].strip() for line in lines if line.startswith("+")]
        return " ".join(removed), " ".join(added)


def read_mutants(words: list[str]) -> list[Mutant]:
    found = []
    for path in sorted(FOLDER.rglob("*.py.meta")):
        source = path.relative_to(FOLDER).with_suffix("")
        if words and not any(word in str(source) for word in words):
            continue
        for name, code in json.loads(path.read_text())["exit_code_by_key"].items():
            found.append(Mutant(name, status_by_exit_code[code], source))
    return found


def main() -> int:
    mutants = read_mutants(sys.argv[1:])
    listed = tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text("utf-8"))
    equivalents = [Equivalent(**one) for one in listed["equivalent"]]
    unseen = set(equivalents)
    counts: dict[str, Counter[str]] = {}
    for mutant in mutants:
        count = counts.setdefault(str(mutant.source).removeprefix("deta/"), Counter())
        if mutant.status == "not checked":  # this run was interrupted
            count["open"] += 1
            continue
        count["all"] += 1
        if mutant.status in KILLED:
            count["killed"] += 1
            continue
        removed, added = mutant.changes()
        same = [e for e in equivalents if e.covers(mutant.function, added)]
        unseen -= set(same)
        if same:
            count["equivalent"] += 1
        else:
            count["left"] += 1
            print(f"{mutant.status}: {mutant.name}\n  - {removed}\n  + {added}")
    total = sum(counts.values(), Counter())
    print("\n| module | mutants | killed | equivalent | left | killed of what counts |")
    print("|---|---|---|---|---|---|")
    for name, count in [*counts.items(), ("all", total)]:
        numbers = [count[key] for key in ("all", "killed", "equivalent", "left")]
        print(f"| {name} | {' | '.join(map(str, numbers))} | {100 * share(count):.1f} % |")
    if total["open"]:
        print(f"{total['open']} mutants are still to be run: make mutants goes on")
    if not sys.argv[1:] and not total["open"]:
        for one in unseen:
            print(f"equivalent.toml lists what is no survivor: {one.function}: {one.change}")
        if unseen:
            return 1
    return 0 if share(total) >= LEAST_KILLED and not total["open"] else 1


def share(count: Counter[str]) -> float:
    return count["killed"] / max(1, count["killed"] + count["left"])


if __name__ == "__main__":
    sys.exit(main())
