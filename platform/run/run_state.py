"""The position of a run in its training."""

from __future__ import annotations

from dataclasses import dataclass, field

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run besides its tensors."""

    step: int  # updates made
    samples_seen: int  # the position in training, which determines all randomness
    epoch: float
    # AP and related metrics in 0..100, if evaluated.
    metrics: dict[str, float] = field(default_factory=dict)
    best_ap: float | None = None  # of this run so far, in 0..100
    # AP of every evaluation so far, in order; early stopping depends on nothing else.
    ap_history: list[float] = field(default_factory=list)
    data_fingerprint: str = ""
    code_commit: str = ""
    skipped_steps: int = 0  # with a loss or gradient that was not finite
    skipped_in_a_row: int = 0  # how many of the last steps in a row
    # Image id, as text, to its fault; other images replace them.
    broken_images: dict[str, str] = field(default_factory=dict)
    useful_s: float = 0.0  # seconds of training so far, without repeated work
    config_sha256: str = ""
    format_version: int = FORMAT_VERSION
