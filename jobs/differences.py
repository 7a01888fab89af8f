"""Compare our configuration with the published one, key by key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deta.jobs.published import Published
from deta.platform.run.config import RunConfig, flatten

# Keys that say where and how a run is executed, which published code does differently or not at
# all.
OF_THE_RUN = (
    "name", "storage", "experiment", "cluster.gpu", "cluster.cpus_per_worker",
    "cluster.max_failures", "data.train_", "data.val_", "data.lenient", "data.max_pixels",
    "data.loader_workers", "evaluation.", "log_every_steps", "evaluate_every_epochs",
    "num_pictures",
)  # fmt: skip


@dataclass(frozen=True)
class DifferenceRow:
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
    def verdict(self) -> str:
        return "same" if self.is_same else self.why or "DIFFERS, NOT EXPLAINED"


def compare_configs(config: RunConfig, published: Published) -> list[DifferenceRow]:
    """Compare every key that was published, and every other key that the recipe sets.

    A key that is not published must keep its default, which means "as published code does".

    Raises:
        KeyError: the table of published values names an unknown key.
    """
    ours = flatten(config)
    own_model = {f"model.{key}": value for key, value in flatten(type(config.model)()).items()}
    defaults = flatten(RunConfig()) | own_model
    rows = []
    for key, fact in published.facts.items():
        if key not in ours:
            raise KeyError(f"published.toml has a fact for {key!r}, which is no key of this model")
        rows.append(DifferenceRow(key, ours[key], fact.value, fact.source, fact.why))
    rows += [
        DifferenceRow(key, value, defaults.get(key), "no published counterpart; our default", "")
        for key, value in ours.items()
        if key not in published.facts
        and not key.startswith(OF_THE_RUN)
        and value != defaults.get(key)
    ]
    order = list(ours)
    return sorted(rows, key=lambda row: order.index(row.key))


def unexplained(rows: Sequence[DifferenceRow]) -> list[str]:
    """Return the keys that differ without a reason."""
    return [row.key for row in rows if not (row.is_same or row.why)]


def as_text(rows: Sequence[DifferenceRow], published: Published) -> str:
    """Format the comparison for a terminal: differences first, then equal values."""
    width = max(len(row.key) for row in rows)
    different, same = [], []
    for row in rows:
        key, ours, source = f"{row.key:<{width}}", value_text(row.ours), f"[{row.source}]"
        if row.is_same:
            same.append(f"{key}  {ours} {source}")
        else:
            different.append(f"{key}  ours {ours}, published {value_text(row.published)}")
            different.append(f"{'':<{width}}  {row.verdict} {source}")
    remarks = [
        f"- published: {remark.published}\n  ours: {remark.ours} [{remark.source}]"
        for remark in published.remarks
    ]
    head = f"{published.system} ({published.origin}, {published.url})"
    return "\n".join(
        (head, "", *different, "", f"the same ({len(same)}):", *same,
         "", "beyond the configuration:", *remarks)
    )  # fmt: skip


def value_text(value: Any) -> str:
    """Format a value for people."""
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(value_text, value)) or "nothing"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
