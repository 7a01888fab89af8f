"""Our configuration beside the published one, field by field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deta.jobs.published import Published
from deta.platform.run.config import RunConfig, flatten

# Keys that say where and how a run is carried out; published code has other ways, or none.
OF_THE_RUN = (
    "name", "storage", "experiment", "cluster.gpu", "cluster.cpus_per_worker",
    "cluster.max_failures", "data.train_", "data.val_", "data.lenient", "data.max_pixels",
    "data.loader_workers", "log_every_steps", "evaluate_every_epochs", "num_pictures",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One key of the configuration."""

    key: str
    ours: Any
    published: Any
    source: str
    why: str  # why the two differ, where they do

    @property
    def is_same(self) -> bool:
        return _plain(self.ours) == _plain(self.published)

    @property
    def is_explained(self) -> bool:
        return self.is_same or bool(self.why)

    @property
    def verdict(self) -> str:
        if self.is_same:
            return "same"
        return self.why or "DIFFERS, NOT EXPLAINED"


def compare(config: RunConfig, published: Published) -> list[Row]:
    """Every key that was published, and every other one that the recipe sets.

    A key that nobody published has to keep its default, which means "as published code does".

    Raises:
        KeyError: a fact names a key that the configuration has not; the table is wrong.
    """
    ours = flatten(config)
    own_model = {f"model.{key}": value for key, value in flatten(type(config.model)()).items()}
    defaults = flatten(RunConfig()) | own_model
    rows = []
    for key, fact in published.facts.items():
        if key not in ours:
            raise KeyError(f"published.py has a fact for {key!r}, which is no key of this model")
        rows.append(Row(key, ours[key], fact.value, fact.source, fact.why))
    rows += [
        Row(key, value, defaults.get(key), "no published counterpart; our default", "")
        for key, value in ours.items()
        if key not in published.facts
        and not key.startswith(OF_THE_RUN)
        and value != defaults.get(key)
    ]
    order = list(ours)
    return sorted(rows, key=lambda row: order.index(row.key))


def unexplained(rows: Sequence[Row]) -> list[str]:
    """The keys that differ without a reason."""
    return [row.key for row in rows if not row.is_explained]


def as_text(rows: Sequence[Row], published: Published) -> str:
    """For a terminal: differences first, then what is the same."""
    lines = [f"{published.system} ({published.origin}, {published.url})", ""]
    different = [row for row in rows if not row.is_same]
    width = max(len(row.key) for row in rows)
    for row in different:
        lines += [
            f"{row.key:<{width}}  ours {show(row.ours)}, published {show(row.published)}",
            f"{'':<{width}}  {row.verdict} [{row.source}]",
        ]
    lines += ["", f"the same ({len(rows) - len(different)}):"]
    lines += [f"{row.key:<{width}}  {show(row.ours)} [{row.source}]" for row in rows if row.is_same]
    lines += ["", "beyond the configuration:"]
    lines += [
        f"- published: {remark.published}\n  ours: {remark.ours} [{remark.source}]"
        for remark in published.remarks
    ]
    return "\n".join(lines)


def show(value: Any) -> str:
    """A value as a person writes it."""
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(show, value)) or "nothing"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
