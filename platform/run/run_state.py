"""The position of a run in its training."""

from __future__ import annotations

from dataclasses import dataclass, field

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands."""

    step: int  # updates made
    samples_seen: int  # the position in training; all that is random follows from it
    epoch: float
    metrics: dict[str, float] = field(
        default_factory=dict
    )  # AP and its kin in 0..100, if evaluated
    best_ap: float | None = None  # of this run so far, in 0..100
    # Of every evaluation of this run so far, in order; early stopping follows from it alone.
    ap_history: list[float] = field(default_factory=list)
    data_fingerprint: str = ""
    code_commit: str = ""
    skipped_steps: int = 0  # whose loss or gradient was not finite
    skipped_in_a_row: int = 0  # of these, the last ones
    # Image id, as text, to what is wrong with the picture; others are shown in their place.
    broken_images: dict[str, str] = field(default_factory=dict)
    useful_s: float = 0.0  # seconds of training up to here, without what had to be done again
    config_sha256: str = ""
    format_version: int = FORMAT_VERSION
