"""The content of the report of a study or a sweep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from deta.platform.pages.number_format import num_of, signed
from deta.platform.study.power import PilotPlan, from_pilot
from deta.platform.study.study_types import Analysis, Anchor, Decomposition
from deta.platform.study.trial_record import TrialRecord


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The information that a person needs to run a study again."""

    command: str = ""
    code_commit: str = ""
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # key: (default, used)
    train_fingerprint: str = ""
    val_fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)  # package to version
    hardware: str = ""
    began: datetime | None = None
    ended: datetime | None = None
    run_url: str = ""  # of the parent run


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """Everything that a report shows. A sweep has trials but no statistical analysis."""

    title: str
    trials: Sequence[TrialRecord]
    analysis: Analysis | None = None
    summary: tuple[str, ...] = ()  # sentences at the top where there is no analysis
    method: str = ""  # how trials were chosen and stopped, in a sentence
    decomposition: Decomposition | None = None
    anchors: tuple[Anchor, ...] = ()
    relevant: float = 0.3  # the smallest difference that would matter, in points
    provenance: Provenance = Provenance()

    @property
    def metric(self) -> str:
        return self.analysis.metric if self.analysis else "AP"

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Return the sentences at the top."""
        if found := (*self.summary, *(self.analysis.verdicts if self.analysis else ())):
            return tuple(_sentence(text) for text in found)
        finished = [t for t in self.trials if t.status == "finished" and t.ap is not None]
        if not finished:
            return ("No trial has finished.",)
        best = max(finished, key=lambda t: t.ap or 0.0)
        return (
            f"Best of {num_of(len(finished), 'finished trial')}: "
            f"{best.name} with {signed(best.ap or 0.0, 2)} {self.metric}.",
        )

    @property
    def cell_names(self) -> list[str]:
        """Return the cells in the order of the design, or in that of a sweep's trials."""
        if self.analysis:
            return [cell.cell.key for cell in self.analysis.cells]
        return list(dict.fromkeys(trial.cell for trial in self.trials))

    @property
    def pilot(self) -> PilotPlan | None:
        """Return what the noise of this study means for the next one."""
        if self.analysis is None:
            return None
        try:
            num_cells = len([c for c in self.analysis.cells if c.values and not c.cell.same_as])
            return from_pilot(self.analysis.noise, max(2, num_cells))
        except ValueError:
            return None


def _sentence(text: str) -> str:
    """Add a capital and a full stop, and prevent line breaks within "± 0.3" or "p < 0.001"."""
    whole = text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
    return re.sub(r"(?<=[±<=]) | (?=[±<=])|(?<=\d) (?=AP\b|seeds?\b)", "\u00a0", whole)
