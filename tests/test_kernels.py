"""The compiled loops give the same bits wherever in memory their arrays lie.

A compiler vectorises a loop that writes one array and reads another behind a check that they are
apart; small arrays that are neighbours can fail it. Elementwise arithmetic is the same bits in
either version of the loop, a sum is not, so a run resumed in another process would differ.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from algorithms import kernels

Arrays = list[NDArray[Any]]
WIDTHS = (3, 4, 8, 12, 16, 24, 32, 40, 64)


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def zeros(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


ABSENT, NO_MARKS = zeros(0, 0), np.zeros((0, 0), bool)
PLACES = np.array([[[[0], [0]], [[1], [0]], [[2], [0]]]], np.int32)
SOURCES = PLACES[0].transpose(0, 2, 1).astype("i8").repeat(3, 1)
BLOCKS = np.array([[0, 0, 2], [0, 2, 3]])
ALL, SOME = np.array([0, 6, 12]), np.array([0, 2, 5])  # of two layers' rows

CASES: dict[str, tuple[Callable[..., None], Callable[[int], Arrays]]] = {
    "activate": (
        kernels.activate,
        lambda d: [normal(2, d), normal(1, d), normal(1, d), normal(1, d), ABSENT, zeros(2),
                   zeros(2, d)],
    ),
    "activate_backward": (
        kernels.activate_backward,
        lambda d: [normal(2, d), ABSENT, normal(2, d), normal(1, d), normal(1, d),
                   np.abs(normal(2)), zeros(2, d), normal(1, d), normal(1, d), normal(1, d)],
    ),
    "push": (
        lambda *a: kernels.push(*a[:3], 0, *a[3:6], True, *a[6:]),
        lambda d: [normal(2, d), normal(2, d), normal(3, 2, d), np.array([[0, 1], [2, 0]], "i8"),
                   normal(2, 2), NO_MARKS, normal(3, 2, d), zeros(0, 0, 0), zeros(2, 2)],
    ),
    "run_modules": (
        lambda *a: kernels.run_modules(0, 2, BLOCKS, *a),
        lambda d: [normal(3, d), SOURCES, normal(3, 3, 2), normal(1, 2, d, d),
                   *(normal(1, 2, 1, d) for _ in range(3)), *(zeros(3, 3, d) for _ in range(3)),
                   zeros(3, 3), zeros(3, d)],
    ),
    "run_modules_backward": (
        lambda *a: kernels.run_modules_backward(0, 2, BLOCKS, *a[:4], False, *a[4:]),
        lambda d: [normal(3, d), SOURCES, normal(3, 3, 2), SOURCES == 0, normal(1, 2, d, d),
                   *(normal(1, 2, 1, d) for _ in range(2)), *(normal(3, 3, d) for _ in range(2)),
                   np.abs(normal(3, 3)), zeros(3, d), zeros(3, 3, 2), zeros(2, 3, 2, d)],
    ),
    "run_layer": (
        lambda x, w, b, s, h, *a: kernels.run_layer(x, w, b, s, h, True, *a),
        lambda d: [normal(1, 6, 5), normal(2, 5, d), normal(4, d), normal(2, d), normal(2, d),
                   zeros(2, 6, d), zeros(2, 6), zeros(2, 6, d)],
    ),
    "run_layer, linear": (
        lambda x, w, b, *a: kernels.run_layer(x, w, b, ABSENT, ABSENT, False, *a),
        lambda d: [normal(2, 6, d), normal(2, d, 1), normal(2, 1), zeros(2, 6, 1), zeros(2, 0),
                   zeros(2, 0, 1)],
    ),
    "run_layer_backward": (
        lambda g, x, w, s, h, *a: kernels.run_layer_backward(ALL, g, x, w, s, h, True, *a),
        lambda d: [normal(12, d), normal(1, 6, 5), normal(2, 5, d), normal(2, d), normal(2, d),
                   normal(12, d), np.abs(normal(12)), zeros(12, d), zeros(4, d), zeros(2, d),
                   zeros(2, d), zeros(2, 5, d), zeros(12, 5)],
    ),
    "run_layer_backward, linear": (
        lambda g, x, w, *a: kernels.run_layer_backward(
            ALL, g, x, w, ABSENT, ABSENT, False, zeros(12, 1), zeros(0), g, *a
        ),
        lambda d: [normal(12, 1), normal(2, 6, d), normal(2, d, 1), zeros(2, 1), ABSENT, ABSENT,
                   zeros(2, d, 1), zeros(12, d)],
    ),
    "run_layer_backward, some rows": (
        lambda g, w, s, h, *a: kernels.run_layer_backward(
            SOME, g, zeros(1, 6, 5), w, s, h, True, *a[:-1], zeros(0, 5, 0), a[-1]
        ),
        lambda d: [normal(5, d), normal(2, 5, d), normal(2, d), normal(2, d), normal(5, d),
                   np.abs(normal(5)), zeros(5, d), zeros(2, d), zeros(2, d), zeros(2, d),
                   zeros(5, 5)],
    ),
    "encode": (
        lambda x, b, s, h, task, *a: kernels.encode(x, b, s, h, task, True, *a),
        lambda d: [normal(2, d), *(normal(1, d) for _ in range(4)), zeros(2),
                   *(zeros(2, d) for _ in range(3))],
    ),
    "encode_backward": (
        lambda q, f, x, s, task, *a: kernels.encode_backward(q, f, x, s, task, True, *a),
        lambda d: [*(normal(2, d) for _ in range(3)), normal(1, d), normal(1, d),
                   np.abs(normal(2)), normal(2, d), zeros(2, d), *(normal(1, d) for _ in range(4))],
    ),
    "mix_orthonormal": (
        lambda *a: kernels.mix_orthonormal(*a[:2], 1e-8, *a[2:]),
        lambda d: [normal(1, 3, 2, d), normal(1, 1, 3), zeros(1, 3, 2, d), zeros(1, 3, 2),
                   zeros(1, 2, d)],
    ),
    "mix_orthonormal_backward": (
        lambda *a: kernels.mix_orthonormal_backward(*a[:3], 1e-8, *a[3:]),
        lambda d: [normal(1, 2, d), normal(1, 3, 2, d), normal(1, 1, 3), normal(1, 3, 2, d),
                   np.abs(normal(1, 3, 2)), zeros(1, 3, 2, d), zeros(1, 1, 3)],
    ),
    "blend": (
        lambda p, o, bias, out: kernels.blend(p, o, bias, True, out),
        lambda d: [normal(1, 2, 2, 3), normal(1, 3, 2, d), normal(1, 3, d), zeros(1, 2, 2, d)],
    ),
    "blend_backward": (
        lambda g, p, o, out, *of: kernels.blend_backward(g, p, o, True, out, *of),
        lambda d: [normal(1, 2, 2, d), normal(1, 2, 2, 3), normal(1, 3, 2, d), normal(1, 2, 2, d),
                   zeros(1, 2, 2, 3), zeros(1, 3, 2, d), zeros(1, 3, d)],
    ),
    "gate": (
        kernels.gate, lambda d: [normal(2, d), normal(1, d), normal(2, d), zeros(2, d)],
    ),
    "gate_backward": (
        kernels.gate_backward,
        lambda d: [normal(2, d), normal(2, d), normal(2, d), zeros(2, d), zeros(2, d),
                   normal(1, d)],
    ),
    "less_row_maximum": (kernels.less_row_maximum, lambda d: [normal(2, d), zeros(2, d)]),
    "divide_by_sum": (kernels.divide_by_sum, lambda d: [np.abs(normal(2, d))]),
    "softmax_backward": (
        kernels.softmax_backward, lambda d: [normal(2, d), np.abs(normal(2, d)), zeros(2, d)],
    ),
    "weigh_backward": (
        lambda g, places, powers, *a: kernels.weigh_backward(g, places, powers, False, *a),
        lambda d: [normal(3, d, 2), PLACES.repeat(d, -1), np.abs(normal(1, 6, d)),
                   normal(3, d, 2), zeros(1, 6, d)],
    ),
}  # fmt: skip


def placed(arrays: Arrays, rng: np.random.Generator) -> Arrays:
    """Copies in one stretch of memory, in any order, neighbours at most 48 bytes apart."""
    buffer = np.empty(sum(a.nbytes + 128 for a in arrays) + 64, np.uint8)
    copies, at = list(arrays), -buffer.ctypes.data % 64
    for index in rng.permutation(len(arrays)):
        array = arrays[index]
        at += -at % 16 + 16 * int(rng.integers(4))
        copy = buffer[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        copies[index], at = copy, at + array.nbytes
    return copies


@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_where_arrays_lie(name: str) -> None:
    kernel, arguments = CASES[name]
    for width in WIDTHS:
        results = set()
        for seed in range(60):
            arrays = placed(arguments(width), np.random.default_rng(seed))
            kernel(*arrays)
            results.add(b"".join(a.tobytes() for a in arrays))
        assert len(results) == 1, f"width {width}"


HISTORY = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bench.spec import RunSpec
from bench.store import RunStore
from bench.train import train
for place in map(Path, sys.argv[1:]):
    spec = RunSpec.resolve(place.name, "toy", 0, preset_name="smoke", overrides={
        "steps_per_task": 150, "horizon": 25, "warmup_steps": 50, "eval_every": 150,
        "eval_episodes": 2, "final_episodes": 2, "batch_per_task": 8,
    })
    train(spec, RunStore.create(place, spec, {}))
"""


@pytest.mark.slow
def test_what_a_process_has_trained_before_changes_no_byte(tmp_path: Path) -> None:
    """A compiled loop was linked with whichever of its parts had been loaded first."""
    measured = []
    for names in (["d2r"], ["mt_sac", "d2r"]):
        places = [str(tmp_path / "-".join(names) / name) for name in names]
        subprocess.run([sys.executable, "-c", HISTORY, *places], check=True, timeout=300)
        (metrics,) = Path(places[-1]).rglob("metrics.csv")
        measured.append(metrics.read_bytes())
    assert measured[0] == measured[1]
