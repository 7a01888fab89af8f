"""The published numbers of each system, in the terms of our configuration, from published.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fact:
    """One number that was published."""

    value: Any  # in the terms of our key; text where our key cannot hold it
    source: str
    why: str = ""  # why ours differs, if it does


@dataclass(frozen=True)
class Remark:
    """A difference that no key of the configuration expresses."""

    published: str
    ours: str
    source: str


@dataclass(frozen=True)
class Published:
    """One published system."""

    system: str
    origin: str  # who published it
    url: str
    ap: str  # box AP on COCO val2017; – where none was published
    facts: Mapping[str, Fact]
    remarks: tuple[Remark, ...]
    weights: str = ""  # address of published weights


def _read(path: Path) -> dict[str, Published]:
    content = tomllib.loads(path.read_text(encoding="utf-8"))

    def facts_of(entry: dict[str, Any]) -> dict[str, Fact]:
        facts: dict[str, Fact] = {}
        for group in entry.pop("of", ()):
            facts |= facts_of(dict(content["groups"][group]))
        for one in entry.pop("facts", ()):
            for key, value in _flat(one["values"]):
                facts[key] = Fact(value, one["source"], one.get("why", ""))
        return facts

    def remarks_of(entry: dict[str, Any]) -> tuple[Remark, ...]:
        groups = (content["remarks"][group] for group in entry.pop("remarks"))
        return tuple(Remark(**one) for group in groups for one in group)

    return {
        name: Published(facts=facts_of(entry), remarks=remarks_of(entry), **entry)
        for name, entry in content["systems"].items()
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            plain = tuple(value) if isinstance(value, list) else value
            yield prefix + name, None if plain == "none" else plain


# By recipe and variant.
PUBLISHED: Mapping[str, Published] = _read(Path(__file__).with_name("published.toml"))
