"""The cost of trainings in hours, GPU-hours and money, and the Pareto front of AP over cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType

from deta.platform.pages.number_format import duration


@dataclass(frozen=True)
class Price:
    """The price of one GPU for an hour."""

    per_gpu_hour: float | None  # none: not set
    currency: str = "EUR"
    note: str = ""  # whose price it is, and from when

    def __post_init__(self) -> None:
        price = self.per_gpu_hour
        if price is not None and not (math.isfinite(price) and price >= 0):
            raise ValueError(f"per_gpu_hour={price} must be a number of at least 0, or none")


# Prices differ tenfold between contracts and change by the month, so none is given here. Set your
# own: estimate(…, prices=PRICES | {"H200": Price(2.5, "EUR", "our contract, 2026-11")}). A name
# matches a device whose name contains it ("NVIDIA H200" has "H200"); of several, the longest.
PRICES: Mapping[str, Price] = MappingProxyType(
    {
        name: Price(None, note="set your own")
        for name in ("RTX 6000", "V100", "A100", "L4", "L40S", "H100", "H200", "B200", "CPU")
    }
)


def price_of(gpu_name: str, prices: Mapping[str, Price] = PRICES) -> Price | None:
    """Return the price for a device's name as the driver reports it; None if the table has none.

    Whole words count, so that "L4" does not fit an L40S.
    """
    words = f" {_words(gpu_name)} "
    fitting = [name for name in prices if f" {_words(name)} " in words]
    return prices[max(fitting, key=len)] if fitting else None


def _words(name: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


@dataclass(frozen=True)
class CostEstimate:
    """The expected cost of a training."""

    hours: float  # of wall time
    gpu_hours: float  # hours times workers; without a GPU these are worker-hours
    price: float | None  # none where no price is set
    currency: str
    unit: str = "GPU-hours"  # of gpu_hours, for people

    def eta(self, now: datetime | None = None) -> datetime:
        """Return when it ends if it begins now, as local time with its zone."""
        return (now or datetime.now().astimezone()) + timedelta(hours=self.hours)

    def times(self, num_trials: int, at_once: int = 1) -> CostEstimate:
        """Return the cost of `num_trials` such trainings, `at_once` of them at a time."""
        if num_trials < 0 or at_once < 1:
            raise ValueError(f"num_trials={num_trials}, at_once={at_once}: at least 0 and 1")
        return CostEstimate(
            self.hours * math.ceil(num_trials / at_once),
            self.gpu_hours * num_trials,
            None if self.price is None else self.price * num_trials,
            self.currency,
            self.unit,
        )

    def __str__(self) -> str:
        price = "price not set" if self.price is None else f"{self.price:.2f} {self.currency}"
        decimals = 1 if self.gpu_hours < 100 else 0
        return f"{duration(3600 * self.hours)}, {self.gpu_hours:,.{decimals}f} {self.unit}, {price}"


def estimate(
    images_per_s: float,
    samples: int,
    num_workers: int,
    gpu_name: str,
    prices: Mapping[str, Price] = PRICES,
    *,
    overhead_s: float = 0.0,
) -> CostEstimate:
    """Estimate the cost of a training from its measured speed.

    Args:
        images_per_s: over all workers, at the real image size and number of workers.
        samples: images to train on in all, `Design.samples_seen`.
        num_workers: GPUs that are occupied; without a GPU, workers.
        gpu_name: as the driver gives it, "NVIDIA H200".
        overhead_s: wall time besides the training steps: start and evaluations.

    Raises:
        ValueError: a speed that is not positive, or a negative count.
    """
    if not (math.isfinite(images_per_s) and images_per_s > 0):
        raise ValueError(f"images_per_s={images_per_s} must be positive; measure it with a probe")
    if samples < 0 or num_workers < 1 or overhead_s < 0:
        raise ValueError(
            f"samples={samples}, num_workers={num_workers}, overhead_s={overhead_s}: at least 0, "
            "1 and 0"
        )
    hours = (samples / images_per_s + overhead_s) / 3600
    found = price_of(gpu_name, prices)
    price = None if found is None or found.per_gpu_hour is None else found.per_gpu_hour
    gpu_hours = hours * num_workers
    return CostEstimate(
        hours,
        gpu_hours,
        None if price is None else price * gpu_hours,
        found.currency if found else "",
    )


@dataclass(frozen=True)
class CostPoint:
    """One training in the plot of AP over cost."""

    label: str
    ap: float
    cost: float  # GPU-hours as a rule; any unit that all points share


def pareto(points: Iterable[CostPoint]) -> list[CostPoint]:
    """Return the points that no other point beats: as cheap and better, or as good and cheaper.

    The cheapest comes first. Points that are equal in both are all kept; one without a finite AP or
    cost is left out.
    """
    finite = [p for p in points if math.isfinite(p.ap) and math.isfinite(p.cost)]
    front: list[CostPoint] = []
    for point in sorted(finite, key=lambda p: (p.cost, -p.ap, p.label)):
        best = front[-1] if front else None
        if best is None or point.ap > best.ap or (point.ap, point.cost) == (best.ap, best.cost):
            front.append(point)
    return front
