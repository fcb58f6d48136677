"""Statistics of few seeds: pure functions of runs x tasks matrices, randomness passed in.

A score matrix is ``(n, T)``: ``n`` seeds (runs) by ``T`` tasks, each entry a success rate. Seeds
are the unit of every test. What a sample is too small to support is NaN, never a guess.

Sources: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice,
NeurIPS 2021 (interquartile mean, stratified bootstrap, probability of improvement); Welch 1947;
Holm 1979.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

Floats = NDArray[np.float64]

MIN_SEEDS = 3
"""Below this many seeds no interval is drawn."""
TOO_NARROW = "which draws seeds within each task, and so is too narrow where a whole seed is lucky"
"""What a reader must know of the stratified bootstrap where one network learns all tasks."""
CONFIDENCE = 0.95
REPLICATES = 2000


class Estimate(NamedTuple):
    """A value with its 95 % interval; the bounds are NaN where the sample supports none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    @property
    def has_interval(self) -> bool:
        """Whether both bounds are known."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of ``a`` minus mean of ``b`` over seeds, and how it was judged."""

    estimate: Estimate
    p: float
    """Two-sided p value, NaN where none can be had."""
    method: str


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def mean_std(seed_means: ArrayLike) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) over seeds; the deviation of one seed is NaN."""
    x = _floats(seed_means)
    if x.size == 0:
        return float("nan"), float("nan")
    return float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else float("nan")


def mean_interval(values: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Mean over axis 0 with its 95 % t interval; the bounds are NaN below three seeds, and where
    seeds are alike."""
    x = _floats(values)
    n = x.shape[0]
    mean = x.mean(axis=0)
    if n < MIN_SEEDS:
        unknown = np.full_like(mean, np.nan)
        return mean, unknown, unknown
    half = distributions.t.ppf((1 + CONFIDENCE) / 2, n - 1) * x.std(axis=0, ddof=1) / np.sqrt(n)
    half = np.where(np.ptp(x, axis=0) > 0, half, np.nan)
    return mean, mean - half, mean + half


def interquartile_mean(scores: ArrayLike) -> Floats:
    """Mean of the middle half of the last two axes ``(..., n, T)``, a quarter cut at each end.

    The cut is ``floor(size / 4)`` entries per end, as scipy's ``trim_mean`` and rliable have it.
    """
    x = _floats(scores)
    flat = np.sort(x.reshape(*x.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    middle = flat[..., cut : flat.shape[-1] - cut]
    return _floats(middle.mean(axis=-1))


def task_mean(scores: ArrayLike) -> Floats:
    """Mean over the last two axes ``(..., n, T)``."""
    return _floats(_floats(scores).mean(axis=(-2, -1)))


def task_median(scores: ArrayLike) -> Floats:
    """Median over tasks of the mean over seeds, of ``(..., n, T)``."""
    return _floats(np.median(_floats(scores).mean(axis=-2), axis=-1))


AGGREGATES: dict[str, Callable[[Floats], Floats]] = {
    "Median": task_median,
    "IQM": interquartile_mean,
    "Mean": task_mean,
}
"""The aggregates of Agarwal et al. 2021 by their names. Their optimality gap is 1 - mean for
success rates, which never exceed 1, and so is left out."""


def area_under_curve(steps: ArrayLike, values: ArrayLike) -> Floats:
    """Mean height of a curve: its trapezoid area over the range of ``steps`` ``(S,)``.

    ``values`` is ``(S, ...)``; a single point is its own height.
    """
    x, y = _floats(steps), _floats(values)
    if len(x) < 2 or x[-1] == x[0]:
        return _floats(y[-1])
    widths = np.diff(x).reshape(-1, *[1] * (y.ndim - 1))
    return _floats((widths * (y[1:] + y[:-1]) / 2).sum(axis=0) / (x[-1] - x[0]))


def _resample(scores: Floats, rng: np.random.Generator, replicates: int) -> Floats:
    """``(replicates, n, T)``: seeds drawn with replacement within each task (the strata)."""
    n, tasks = scores.shape
    index = rng.integers(n, size=(replicates, n, tasks))
    return np.take_along_axis(scores[None], index, axis=1)


def _percentiles(samples: Floats) -> tuple[Floats, Floats]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
    return _floats(low), _floats(high)


def _estimate(value: float, samples: Floats) -> Estimate:
    """With the interval of the samples; none where all are alike, which tells no spread."""
    if np.ptp(samples) == 0:
        return Estimate(value)
    low, high = _percentiles(samples)
    return Estimate(value, float(low), float(high))


def stratified_interval(
    scores: ArrayLike,
    statistic: Callable[[Floats], Floats],
    rng: np.random.Generator,
    replicates: int = REPLICATES,
) -> Estimate:
    """A statistic of ``(n, T)`` (and of ``(..., n, T)``) with its 95 % bootstrap interval.

    As rliable's: percentiles, seeds drawn within each task. Tasks count as independent, so it is
    too narrow where one network learns them all and a whole seed is lucky.
    """
    x = _floats(scores)
    value = float(statistic(x))
    if x.shape[0] < MIN_SEEDS:
        return Estimate(value)
    return _estimate(value, statistic(_resample(x, rng, replicates)))


def performance_profile(
    scores: ArrayLike,
    thresholds: ArrayLike,
    rng: np.random.Generator,
    replicates: int = REPLICATES,
) -> tuple[Floats, Floats, Floats]:
    """Share of the runs x tasks whose score exceeds each threshold ``(K,)``, with its 95 % band.

    The band is NaN below three seeds; it resamples seeds within each task.
    """
    x, taus = _floats(scores), _floats(thresholds)
    value = _floats((x[..., None] > taus).mean(axis=(0, 1)))
    if x.shape[0] < MIN_SEEDS:
        unknown = np.full_like(value, np.nan)
        return value, unknown, unknown
    drawn = np.sort(_resample(x, rng, replicates).reshape(replicates, -1), axis=-1)
    above = np.stack([1 - np.searchsorted(row, taus, side="right") / row.size for row in drawn])
    return value, *_percentiles(above)


def _wins(a: Floats, b: Floats) -> Floats:
    """Share of pairs (seed of a, seed of b) that a wins, ties half, mean over tasks: ``(...)``."""
    margin = a[..., :, None, :] - b[..., None, :, :]
    return _floats((0.5 * (1 + np.sign(margin))).mean(axis=(-3, -2, -1)))


def probability_of_improvement(
    a: ArrayLike, b: ArrayLike, rng: np.random.Generator, replicates: int = REPLICATES
) -> Estimate:
    """P(a > b): a random seed of ``a`` beats one of ``b`` on a random task, ties counted half.

    Both matrices have the same tasks as columns. The interval resamples each independently.
    """
    x, y = _floats(a), _floats(b)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"score matrices of {x.shape[1]} and {y.shape[1]} tasks")
    value = float(_wins(x, y))
    if min(len(x), len(y)) < MIN_SEEDS:
        return Estimate(value)
    return _estimate(value, _wins(_resample(x, rng, replicates), _resample(y, rng, replicates)))


def _varies(x: Floats, y: Floats) -> bool:
    """Whether seeds differ on either side by more than rounding does.

    Identical seeds on both sides carry no information about the spread of further ones.
    """
    rounding = 1e-12 * max(np.abs(x).max(), np.abs(y).max())
    return bool(max(np.ptp(x), np.ptp(y)) > rounding)


def difference(a: ArrayLike, b: ArrayLike) -> Difference:
    """Welch's t interval and p value of ``mean(a) - mean(b)`` for seed means ``(n,)``, ``(m,)``."""
    x, y = _floats(a), _floats(b)
    delta = float(x.mean() - y.mean())
    if min(x.size, y.size) < MIN_SEEDS:
        return Difference(
            estimate=Estimate(delta), p=float("nan"), method=f"fewer than {MIN_SEEDS} seeds"
        )
    if not _varies(x, y):
        return Difference(estimate=Estimate(delta), p=float("nan"), method="seeds do not vary")
    with warnings.catch_warnings():  # that one side's seeds are alike
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        test = distributions.ttest_ind(x, y, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return Difference(
        estimate=Estimate(delta, float(low), float(high)), p=float(test.pvalue), method="Welch t"
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values in the given order; NaN stays NaN and is not counted."""
    adjusted = [float("nan")] * len(p_values)
    order = sorted(
        (i for i, p in enumerate(p_values) if not np.isnan(p)), key=lambda i: p_values[i]
    )
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
