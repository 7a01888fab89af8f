"""The linear model of a study, value = cell + seed + noise, and its contrasts."""

# C cells that were observed   S seeds   R observations   P = C + S - 1 parameters   K contrasts

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri, fdtrc, stdtr, stdtrit

from deta.platform.pages.number_format import Interval
from deta.platform.study.study_types import Estimate

Array = NDArray[np.float64]
AnyEstimate = TypeVar("AnyEstimate", bound=Estimate)
# A standard deviation below this share of the values' size is rounding, not noise.
ROUNDING = 1e-10

NO_NOISE = "every seed gave exactly the same; the noise cannot be estimated from that"
NO_DF = "one seed (or as many unknowns as results) cannot separate a difference from noise"


def t_estimate(value: float, standard_error: float, df: int, confidence: float) -> Estimate:
    """Return the t interval and p value of an estimate with a standard error of `df` degrees."""
    half = float(stdtrit(df, (1 + confidence) / 2)) * standard_error
    return Estimate(
        estimate=value,
        standard_error=standard_error,
        df=df,
        interval=Interval(value - half, value + half),
        p=2 * float(stdtr(df, -abs(value) / standard_error)),
    )


def mean_estimate(values: Array, confidence: float) -> tuple[float | None, Estimate]:
    """Return the standard deviation of a sample (None below two values), and its mean."""
    if len(values) == 0:
        return None, Estimate(estimate=None, note="no values")
    mean, df = float(values.mean()), len(values) - 1
    if df == 0:
        return None, Estimate(estimate=mean, note="one value has no interval")
    sd = float(values.std(ddof=1))
    if sd <= rounding_of(values):
        return 0.0, Estimate(estimate=mean, standard_error=0.0, df=df, note=NO_NOISE)
    return sd, t_estimate(mean, sd / math.sqrt(len(values)), df, confidence)


def rounding_of(values: Array) -> float:
    return ROUNDING * max(1.0, float(np.abs(values).max(initial=0.0)))


def sd_interval(sd: float, df: int, confidence: float) -> Interval:
    """Return the chi-square interval of a standard deviation, for normal noise."""
    low, high = (sd * math.sqrt(df / float(chdtri(df, tail)))
                 for tail in ((1 - confidence) / 2, (1 + confidence) / 2))  # fmt: skip
    return Interval(low, high)


def with_holm(estimates: Sequence[AnyEstimate]) -> tuple[AnyEstimate, ...]:
    """Correct p values for multiple comparisons (Holm 1979). Unknown ones are not counted.

    Own code, because `multipletests` of statsmodels takes 50 ms of CPU a call for the same numbers.
    """
    known = sorted((e.p, place) for place, e in enumerate(estimates) if e.p is not None)
    corrected = list(estimates)
    highest = 0.0
    for rank, (p, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        corrected[place] = replace(estimates[place], p_holm=highest)
    return tuple(corrected)


class Fit:
    """Ordinary least squares of the values on cells and seeds.

    With gaps, a difference between two cells is compared within seeds as far as these connect the
    cells, if need be through others.
    """

    def __init__(self, values: Mapping[str, Mapping[int, float]], confidence: float) -> None:
        """
        Args:
            values: by cell and seed. Cells without any are left out.
        """
        self.confidence = confidence
        self.cells = [key for key, by_seed in values.items() if by_seed]
        self.seeds = sorted({seed for by_seed in values.values() for seed in by_seed})
        rows = [(key, seed, y) for key in self.cells for seed, y in values[key].items()]
        self._y = np.array([y for *_, y in rows], dtype=np.float64)  # R
        cells = np.array([[key == cell for cell in self.cells] for key, *_ in rows], np.float64)
        seeds = np.array([[seed == s for s in self.seeds] for _, seed, _ in rows], np.float64)
        # Seeds sum to zero: the last one is minus the others.
        design = np.hstack([cells, seeds[:, :-1] - seeds[:, -1:]]) if rows else np.zeros((0, 0))
        inverse = np.linalg.pinv(design)  # P R
        self._parameters = inverse @ self._y  # P
        self._unscaled = inverse @ inverse.T  # P P, the covariance for noise of variance 1
        self._estimable = inverse @ design  # P P, leaves a contrast as it is if data determine it
        self.df = len(rows) - round(float(np.trace(self._estimable)))
        self.residual_sd: float | None = None
        if self.df > 0:
            residuals = self._y - design @ self._parameters
            sd = math.sqrt(float(residuals @ residuals) / self.df)
            self.residual_sd = 0.0 if sd <= rounding_of(self._y) else sd

    def _row(self, weights: Mapping[str, float]) -> Array | None:
        """Return a contrast of cells as one of parameters; None if the data do not determine it."""
        row = np.zeros(len(self._parameters))  # P
        for key, weight in weights.items():
            if weight == 0:
                continue
            if key not in self.cells:
                return None
            row[self.cells.index(key)] = weight
        return row if np.abs(row @ self._estimable - row).max(initial=0.0) < 1e-8 else None

    def contrast(self, weights: Mapping[str, float]) -> Estimate:
        """Estimate a sum of cells, weighted by key; the weights sum to zero."""
        row = self._row(weights)
        if row is None:
            return Estimate(estimate=None, note=self._why_not(weights))
        value = float(row @ self._parameters)
        if not row.any():
            return Estimate(estimate=0.0, note="they train exactly alike")
        if self.residual_sd is None:
            return Estimate(estimate=value, note=NO_DF)
        if self.residual_sd == 0:
            return Estimate(estimate=value, standard_error=0.0, df=self.df, note=NO_NOISE)
        error = self.residual_sd * math.sqrt(float(row @ self._unscaled @ row))
        return t_estimate(value, error, self.df, self.confidence)

    def covariance(self, one: Mapping[str, float], other: Mapping[str, float]) -> float:
        """Return the covariance of two contrasts that the data determine."""
        row, column = self._row(one), self._row(other)
        assert row is not None
        assert column is not None
        assert self.residual_sd is not None
        return self.residual_sd**2 * float(row @ self._unscaled @ column)

    def f_test(
        self, contrasts: Sequence[Mapping[str, float]]
    ) -> tuple[int, float | None, float | None, str]:
        """Test whether all contrasts are zero: degrees of freedom, F, p, and a note if unknown."""
        rows = [self._row(weights) for weights in contrasts]
        for weights, row in zip(contrasts, rows, strict=True):
            if row is None:
                return len(rows), None, None, self._why_not(weights)
        matrix = np.array(rows, dtype=np.float64)  # K P
        covariance = matrix @ self._unscaled @ matrix.T  # K K
        rank = int(np.linalg.matrix_rank(covariance, tol=1e-8, hermitian=True)) if rows else 0
        if rank == 0:
            return 0, None, None, "its cells train exactly alike"
        if not self.residual_sd:
            return rank, None, None, NO_DF if self.residual_sd is None else NO_NOISE
        values = matrix @ self._parameters  # K
        inverse = np.linalg.pinv(covariance, rcond=1e-8, hermitian=True)
        f = float(values @ inverse @ values) / rank / self.residual_sd**2
        return rank, f, float(fdtrc(rank, self.df, f)), ""

    def _why_not(self, weights: Mapping[str, float]) -> str:
        empty = [key for key, weight in weights.items() if weight and key not in self.cells]
        if empty:
            return f"no result of {'; '.join(empty)}"
        return "no seed connects these cells: they were not run with the same seeds"
