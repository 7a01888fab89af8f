"""The design of a study: crossed factors, additional named cells, and seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from deta.platform.run.config import RunConfig, flatten, override
from deta.platform.study.study_types import Cell

# Keys that a cell may not change: they name the run, or say how to execute it,
# or would change what is measured.
KEYS_OUTSIDE_CELLS = ("name", "storage", "experiment", "seed", "cluster.", "checkpoint.",
                 "evaluation.", "data.train_", "data.val_", "data.evaluation_size.",
                 "log_every_steps", "num_pictures")  # fmt: skip
# Keys that do not affect the numbers of a training: changing them does not make a new trial.
NEUTRAL_KEYS = ("name", "storage", "experiment", "cluster.", "checkpoint.", "evaluation.",
                      "data.loader_workers", "log_every_steps", "num_pictures",
                      "max_skipped_steps", "compare_weights_every_steps",
                      "data.max_broken_share")  # fmt: skip


@dataclass(frozen=True)
class Level:
    """One setting of a factor."""

    label: str  # "8", "2×"
    changes: Mapping[str, Any]  # dotted key of the configuration to value; may be empty

    def __post_init__(self) -> None:
        if not self.label.strip():
            raise ValueError(f"the level that changes {dict(self.changes)} has no label")


@dataclass(frozen=True)
class Factor:
    """Something that a study varies independently of its other factors."""

    name: str  # "batch"
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        labels = [level.label for level in self.levels]
        if len(labels) < 2:
            raise ValueError(f"factor {self.name!r} has {len(labels)} levels; it needs two")
        if len(set(labels)) < len(labels):
            raise ValueError(f"factor {self.name!r} has two levels of one label: {labels}")

    @property
    def keys(self) -> set[str]:
        return {key for level in self.levels for key in level.changes}


def batch_factor(sizes: Sequence[int]) -> Factor:
    """Return a factor of the total batch size (images per update)."""
    return Factor("batch", tuple(Level(str(n), {"total_batch_size": n}) for n in sizes))


def rate_factor(lr: float, multiples: Sequence[float] = (1, 2)) -> Factor:
    """Return a factor of the learning rate, in multiples of `lr`, independent of the batch."""
    return Factor("rate", tuple(Level(f"{m:g}×", {"optim.lr": lr * m}) for m in multiples))


@dataclass(frozen=True)
class Trial:
    """One training: a cell with a seed."""

    id: str  # 12 hexadecimal digits; equal for trainings with equal numbers, on every machine
    cell: Cell
    seed: int
    changes: Mapping[str, Any]  # over the base configuration, the seed among them

    @property
    def name(self) -> str:
        return f"{self.cell.key}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Design:
    """The cells of a study and the seeds that each of them runs with."""

    base: RunConfig
    factors: tuple[Factor, ...]
    seeds: tuple[int, ...]  # the blocks
    # Beside the crossed cells: name to changes over the base, such as a recipe as it was published.
    named_cells: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: two factors of one name or with a key in common, a seed twice, a key that a
                cell cannot change, a value that the configuration refuses, or cells that do not see
                equally many samples or are evaluated at other positions; names what is at fault.
        """
        for one, other in itertools.combinations(self.factors, 2):
            if one.name == other.name:
                raise ValueError(f"two factors have one name: {one.name}")
            if both := one.keys & other.keys:
                raise ValueError(
                    f"the factors {one.name!r} and {other.name!r} both change "
                    f"{', '.join(sorted(both))}; make them one factor"
                )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} must be at least one, each of them once")
        if not self.factors and not self.named_cells:
            raise ValueError("the design has neither factors nor named cells")
        for cell in self.cells():
            self._check(cell)

    def cells(self) -> list[Cell]:
        """Return the crossed cells (the last factor varies fastest), then the named ones."""
        raw: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        crossed = itertools.product(*(factor.levels for factor in self.factors))
        for levels in crossed if self.factors else ():
            labels = {f.name: lv.label for f, lv in zip(self.factors, levels, strict=True)}
            changes = {key: value for level in levels for key, value in level.changes.items()}
            raw.append((cell_key(labels), labels, changes))
        raw += [(name, {}, dict(changes)) for name, changes in self.named_cells.items()]
        cells: dict[str, Cell] = {}
        first_key: dict[str, str] = {}
        for key, labels, changes in raw:
            if key in cells:
                raise ValueError(f"two cells are called {key!r}")
            number = numbers_id(self._resolve(key, changes))
            cells[key] = Cell(key, labels, changes, same_as=first_key.get(number, ""))
            first_key.setdefault(number, key)
        return list(cells.values())

    def trials(self) -> list[Trial]:
        """Return the trials seed by seed, so that a study that stops early leaves complete blocks.

        A cell that trains exactly as an earlier one has no trials of its own.
        """
        cells = [cell for cell in self.cells() if not cell.same_as]
        return [
            Trial(
                numbers_id(override(self.config(cell), {"seed": seed})),
                cell,
                seed,
                dict(cell.changes) | {"seed": seed},
            )
            for seed in self.seeds
            for cell in cells
        ]

    def config(self, cell: Cell) -> RunConfig:
        """Return the base configuration with the changes of a cell."""
        return self._resolve(cell.key, cell.changes)

    def _resolve(self, key: str, changes: Mapping[str, Any]) -> RunConfig:
        try:
            return override(self.base, changes)
        except ValueError as error:
            raise ValueError(f"cell {key!r}: {error}") from error

    def _check(self, cell: Cell) -> None:
        if bad := [key for key in cell.changes if is_in(key, KEYS_OUTSIDE_CELLS)]:
            raise ValueError(
                f"cell {cell.key!r} changes {', '.join(bad)}; that belongs to the base, which is "
                "the same for all cells"
            )
        config = self.config(cell)
        values, wanted = flatten(config), flatten(self.base)
        for key in ("schedule.epochs", "evaluate_every_epochs"):
            if values[key] != wanted[key]:
                raise ValueError(
                    f"cell {cell.key!r} has {key}={values[key]}, the base {wanted[key]}: all cells "
                    "must see equally many samples and be evaluated after equally many"
                )
        if config.schedule.patience is not None:
            raise ValueError(
                f"cell {cell.key!r} stops early (schedule.patience={config.schedule.patience}), "
                "so cells would see unequally many samples; set schedule.patience=none"
            )


def cell_key(labels: Mapping[str, str]) -> str:
    """Return the key of a crossed cell: "batch=8, rate=2×"."""
    return ", ".join(f"{factor}={label}" for factor, label in labels.items())


def numbers_of(config: RunConfig) -> dict[str, Any]:
    """Return the values that decide what a training computes, by dotted key.

    The learning rate is the one that its rule works out, so that two ways to write one training
    are the same.
    """
    flat = {key: value for key, value in flatten(config).items() if not is_in(key, NEUTRAL_KEYS)}
    flat["optim.lr"] = float(f"{config.optim.lr_for(config.total_batch_size):.12g}")
    del flat["optim.lr_rule"], flat["optim.lr_base_batch"]
    return flat


def numbers_id(config: RunConfig) -> str:
    """Return a name for what a training computes: 12 hexadecimal digits."""
    text = json.dumps(numbers_of(config), sort_keys=True, default=asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_in(key: str, names: Sequence[str]) -> bool:
    """Return whether a key is one of the names, or begins with one that ends in "." or "_"."""
    return any(key.startswith(name) if name[-1] in "._" else key == name for name in names)
