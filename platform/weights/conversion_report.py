"""Convert weights from one layout to another, with a report on every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from deta.model.architectures import layouts_of, make_detector, without_download
from deta.model.published_names import STEPS
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig
from deta.platform.weights.class_mapping import (
    ClassPlan,
    FileClasses,
    InitClasses,
    own_classes,
    plan_classes,
)
from deta.platform.weights.model_file import ModelFile, is_class_head

SEED = 0  # for initialising tensors that may be missing, and new classes
NUM_SHOWN = 40  # names listed in the printed report; the JSON has all


@dataclass(frozen=True)
class ConversionReport:
    """The result for each tensor, under our names; unused ones have names of the file."""

    layout: str
    used: dict[str, list[str]]  # our name -> its source names in the file, including copies
    computed: list[str]  # names of the file: computed here and compared, or without effect
    missing: list[str]
    allowed_missing: list[str]
    left_over: list[str]
    allowed_unused: list[str]
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # found, expected
    num_values: dict[str, int]  # of each used tensor

    @property
    def is_complete(self) -> bool:
        """True if no tensor is missing, unused or of another shape, except allowed ones."""
        return not (self.missing or self.left_over or self.wrong_shape)

    def table(self) -> str:
        """Return a text with counts per part of the model, then the names of all other tensors."""
        used = {
            name: (1, self.num_values[name], len(sources), 0, 0)
            for name, sources in self.used.items()
        }
        absent = dict.fromkeys([*self.missing, *self.allowed_missing], (0, 0, 0, 1, 0))
        rows: dict[str, list[tuple[int, ...]]] = {}
        counted = used | absent | dict.fromkeys(self.wrong_shape, (0, 0, 0, 0, 1))
        for name, counts in counted.items():
            first, *rest = name.split(".")
            part = f"{first}.{rest[0]}" if first == "pyramid" else first
            rows.setdefault(part, []).append(counts)
        rows["all"] = list(counted.values())
        heads = ("tensors", "values", "from", "missing", "other shape")
        lines = [f"{'part':<22}" + "".join(f"{head:>13}" for head in heads)]
        for part, counts_of_part in rows.items():
            sums = [sum(column) for column in zip(*counts_of_part, strict=True)]
            lines.append(f"{part:<22}" + "".join(f"{count:>13,}" for count in sums))
        shapes = [
            f"{name} {found} instead of {wanted}"
            for name, (found, wanted) in self.wrong_shape.items()
        ]
        for title, names in (
            ("computed here, or without effect", self.computed),
            ("missing, allowed: start untrained", self.allowed_missing),
            ("left over, allowed: not used", self.allowed_unused),
            ("MISSING", self.missing),
            ("LEFT OVER", self.left_over),
            ("OTHER SHAPE", shapes),
        ):
            shown = names if title.isupper() else names[:NUM_SHOWN]
            if names:
                lines += ["", f"{title}: {len(names)}", *(f"  {name}" for name in shown)]
            if len(shown) < len(names):
                lines.append(f"  … and {len(names) - len(shown)} more")
        return "\n".join(lines)


def compare_with_model(
    file: ModelFile, allow_missing: Sequence[str] = (), allow_unused: Sequence[str] = ()
) -> ConversionReport:
    """Compare the tensors of a file with those of its model.

    Args:
        allow_missing: patterns of our names that may be missing; `*` matches any text.
        allow_unused: patterns of the file's names that may be unused.
    """
    expected = layouts_of(file.config.model).shapes_of(file.config.model)
    own_extra = [name for name in file.tensors if name not in expected and not name.endswith(STEPS)]
    left_over = [*file.unknown, *(source for name in own_extra for source in file.sources[name])]
    counters = [n for n in file.tensors if n.endswith(STEPS) and n not in expected]
    missing = [n for n in expected if n not in file.tensors and not n.endswith(STEPS)]
    shapes = {
        n: (tuple(t.shape), tuple(expected[n])) for n, t in file.tensors.items() if n in expected
    }
    fits = [name for name, (found, wanted) in shapes.items() if found == wanted]
    return ConversionReport(
        layout=file.layout,
        used={name: file.sources[name] for name in fits},
        computed=[*file.computed, *counters],
        missing=[name for name in missing if not _matches(name, allow_missing)],
        allowed_missing=[name for name in missing if _matches(name, allow_missing)],
        left_over=[name for name in left_over if not _matches(name, allow_unused)],
        allowed_unused=[name for name in left_over if _matches(name, allow_unused)],
        wrong_shape={name: both for name, both in shapes.items() if name not in fits},
        num_values={name: file.tensors[name].numel() for name in fits},
    )


def complete_state(file: ModelFile, report: ConversionReport) -> dict[str, Tensor]:
    """Return every tensor of the model under our names; allowed missing ones start untrained.

    Raises:
        ValueError: the report is not complete.
    """
    if not report.is_complete:
        what = {
            "missing": report.missing, "left over": report.left_over,
            "of another shape": list(report.wrong_shape),
        }  # fmt: skip
        counts = [f"{len(names)} tensors {kind}" for kind, names in what.items() if names]
        raise ValueError(
            f"{file.path}: {', '.join(counts)}, listed above. If that is correct, allow them by "
            "name with --allow-missing and --allow-unused; a tensor of another shape needs another "
            "--variant or model.* setting"
        )
    state = {name: file.tensors[name] for name in report.used}
    if report.allowed_missing:
        untrained = _new_model(file.config)
        state |= {name: untrained[name] for name in report.allowed_missing}
    return layouts_of(file.config.model).fit(state, file.config.model)


def adapt_classes(
    file: ModelFile, state: Mapping[str, Tensor], categories: Sequence[Category], how: InitClasses
) -> tuple[dict[str, Tensor], RunConfig, FileClasses, ClassPlan]:
    """Return tensors, configuration and classes for a data set, and the origin of each class.

    Raises:
        ValueError: the file's classes have no names, or do not fit `how`.
    """
    plan = plan_classes(file.classes, categories, how)
    model = replace(file.config.model, num_classes=len(categories))
    config = replace(file.config, model=model)
    untrained = {name: t for name, t in _new_model(config).items() if is_class_head(name)}
    if how == "drop":
        changed = {**state, **untrained}
    else:
        changed = layouts_of(model).select_classes(state, plan.rows, untrained)
    classes = own_classes(categories, f"the {len(categories)} classes of a data set")
    return layouts_of(model).fit(changed, model), config, classes, plan


def _new_model(config: RunConfig) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return make_detector(without_download(config.model)).state_dict()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
