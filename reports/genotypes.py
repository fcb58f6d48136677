"""MEGA's genotypes as weight matrices, and how they cluster by task.

A genotype of stage N holds N + 1 segments of 1, 2, ..., N + 1 weights of ``precision`` bits each,
most significant first; segment k feeds module k, the last feeds the action head (MEGA Sec. 4.2,
Fig. 11). Written anew here because the reports know nothing of the algorithms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reports.embedding import RANDOM_STATE, plane, silhouette

MIN_POINTS = 10

Bits = NDArray[np.int8]
Floats = NDArray[np.float64]


class Coding(NamedTuple):
    """How a run reads its genotypes."""

    precision: int
    """Bits per weight."""
    function: str = "half_softmax"
    """From decimals to weights: half_softmax or softmax."""
    offset: float = 0.99
    """HalfSoftmax's (MEGA Eq. 7)."""

    def __str__(self) -> str:
        return "Softmax" if self.function == "softmax" else f"HalfSoftmax, offset {self.offset:g}"

    def weights(self, decimals: Floats) -> Floats:
        """w_j = (e^{d_j} - offset) / sum_n (e^{d_n} - offset) on one segment (MEGA Eq. 7-9);
        without the offset where the function is Softmax."""
        offset = 0.0 if self.function == "softmax" else self.offset
        top = decimals.max()
        shifted = np.exp(decimals - top) - offset * np.exp(-top)
        if not shifted.any():  # all decimals 0 at an offset of 1: the limit
            shifted = np.ones_like(shifted)
        return np.asarray(shifted / shifted.sum(), dtype=np.float64)


def stage_of(length: int, precision: int) -> int:
    """Stage N of a genotype of ``(N + 1)(N + 2) / 2 * precision`` bits.

    Raises:
        ValueError: no stage has that length.
    """
    stage, bits = 0, precision
    while bits < length:
        stage += 1
        bits += (stage + 1) * precision
    if bits != length or precision < 1:
        raise ValueError(f"a genotype of {length} bits fits no stage at precision {precision}")
    return stage


def segments(bits: Bits, precision: int) -> list[Floats]:
    """The N + 1 segments' decimals of one genotype ``(L,)``, head last."""
    stage = stage_of(len(bits), precision)
    powers = 2.0 ** np.arange(precision - 1, -1, -1)
    decimals = bits.reshape(-1, precision) @ powers
    return list(np.split(decimals, np.cumsum(np.arange(1, stage + 1))))


def weight_matrix(bits: Bits, coding: Coding, max_stage: int) -> Floats:
    """``(max_stage + 1, max_stage + 1)``: row k - 1 feeds module k, the last row the head.

    Rows of modules beyond the genotype's stage are zero, so that genotypes of different length
    share a grid and their heads a row.
    """
    grid = np.zeros((max_stage + 1, max_stage + 1))
    *modules, head = segments(bits, coding.precision)
    for row, decimals in [*enumerate(modules), (max_stage, head)]:
        grid[row, : len(decimals)] = coding.weights(decimals)
    return grid


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Genotypes of one run in the plane."""

    points: Floats
    """(n, 2) t-SNE coordinates, without unit."""
    task: NDArray[np.int64]
    """(n,) task indices."""
    stage: NDArray[np.int64]
    """(n,)"""
    perplexity: float
    silhouette_task: float
    """Of the weight matrices (not of the plane), labelled by task."""
    silhouette_stage: float
    """The same, labelled by stage alone."""


def collect(
    snapshots: list[tuple[Bits, NDArray[np.int64]]], precision: int
) -> list[tuple[int, Bits]]:
    """Distinct (task, genotype) pairs of populations ``(T, P, L)`` padded, with lengths ``(T, P)``.

    A survivor of several generations counts once: repeated points would pass for clusters.
    """
    seen: dict[tuple[int, bytes], tuple[int, Bits]] = {}
    for genotypes, lengths in snapshots:
        for task, (population, sizes) in enumerate(zip(genotypes, lengths, strict=True)):
            for padded, size in zip(population, sizes, strict=True):
                bits = np.ascontiguousarray(padded[: int(size)], dtype=np.int8)
                stage_of(len(bits), precision)
                seen.setdefault((task, bits.tobytes()), (task, bits))
    return list(seen.values())


def embed(sample: list[tuple[int, Bits]], coding: Coding, max_points: int = 300) -> Embedding:
    """t-SNE of the weight matrices, fixed seed, perplexity fitted to the sample.

    Raises:
        ValueError: fewer than ten distinct genotypes.
    """
    if len(sample) < MIN_POINTS:
        raise ValueError(f"only {len(sample)} distinct genotypes, t-SNE needs {MIN_POINTS}")
    if len(sample) > max_points:
        rng = np.random.default_rng(RANDOM_STATE)
        sample = [sample[i] for i in np.sort(rng.permutation(len(sample))[:max_points])]
    task = np.array([t for t, _ in sample], dtype=np.int64)
    stage = np.array([stage_of(len(b), coding.precision) for _, b in sample], dtype=np.int64)
    grids = np.stack([weight_matrix(b, coding, int(stage.max())) for _, b in sample])
    flat = grids.reshape(len(sample), -1)
    points, perplexity = plane(flat)
    return Embedding(
        points=points,
        task=task,
        stage=stage,
        perplexity=perplexity,
        silhouette_task=silhouette(flat, task),
        silhouette_stage=silhouette(flat, stage),
    )
