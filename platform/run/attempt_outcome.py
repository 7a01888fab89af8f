"""What the Ray driver and the workers leave in a run's folder for the supervisor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STOP_FILE = "stop"  # in the run's folder: save and leave at the next step


OUTCOME_FILE = "attempt.json"
FAILURES = "failures"  # one file a rank, of its last failure


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, by its driver."""

    # refused: the cluster can never give what is asked for. unreachable: there is none.
    kind: Literal["ended", "refused", "unreachable", "lost"]
    message: str = ""
