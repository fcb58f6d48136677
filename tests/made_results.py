"""Frames made up by a seeded generator: they exercise the reports and stand for no result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from reports import Results

MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
CAUSES = np.array(["no progress", "unsolved"])
ABLATIONS = {
    "halfsoftmax": {
        "description": "HalfSoftmax against Softmax", "paper": "MEGA Fig. 8 (c)",
        "algos": ["mega", "mega@softmax"],
    },
    "fixed": {
        "description": "Fixed stages", "paper": "MEGA Fig. 9", "algos": ["mega", "mega@fixed3"],
    },
}  # fmt: skip


def _genotypes(
    rng: np.random.Generator, stage: np.ndarray, population: int, precision: int
) -> tuple[np.ndarray, np.ndarray]:
    """Padded populations around a centre per task, and their lengths."""
    lengths = (stage + 1) * (stage + 2) // 2 * precision
    out = np.full((len(stage), population, int(lengths.max())), -1, dtype=np.int8)
    for task, length in enumerate(lengths):
        centre = np.random.default_rng(task).integers(2, size=length)
        flips = rng.random((population, length)) < 0.12
        out[task, :, :length] = centre ^ flips
    return out, np.repeat(lengths[:, None], population, axis=1)


def _mega_probes(rng: np.random.Generator, steps: np.ndarray, tasks: int) -> list[Any]:
    stage = np.full(tasks, 3)
    events: list[list[int]] = []
    levels = np.array([[k, 0.1 / k, 1 - 0.1 / k, 0.001 / k, 1.0] for k in range(1, 40)])
    snapshots = []
    for step in steps:
        if step > 0:
            for task in np.flatnonzero(rng.random(tasks) < np.linspace(0, 0.2, tasks)):
                events.append([step, task, stage[task], stage[task] + 1, int(rng.integers(2))])
                stage[task] += 1
        genotypes, lengths = _genotypes(rng, stage, 3, 2)
        snapshots.append(
            (
                int(step),
                {
                    "stage": stage.copy(),
                    "stage_events": np.array(events, dtype=int).reshape(-1, 5),
                    "cause_names": CAUSES,
                    "genotypes": genotypes,
                    "lengths": lengths,
                    "modules_used": stage - rng.random(tasks),
                    "weight_intervals": levels[: stage.max() + 1],  # it grows
                    "precision": np.array(2),
                    "hamming": 0.3 + 0.2 * rng.random(tasks),
                    "clone_rate": 0.4 * rng.random(tasks),
                    "generation": np.full(tasks, int(step) // 2000),
                },
            )
        )
    return snapshots


def make_results(
    algorithms: tuple[str, ...] = ("mega", "d2r", "mt_sac"),
    seeds: int = 5,
    suite: str = "mt10_rand",
    tasks: tuple[str, ...] = MT10[::3],
    preset: str = "cpu",
    steps_per_task: int = 100_000,
    states: dict[tuple[str, int], str] | None = None,
) -> Results:
    """Plausible frames of every kind that the store hands over."""
    steps = np.linspace(0, steps_per_task, 11).astype(int)
    runs, metrics, timing = [], [], []
    health: list[dict[str, str]] = []
    probes: dict[str, Any] = {}
    traces: dict[str, Any] = {}
    for a, algorithm in enumerate(algorithms):
        for seed in range(seeds):
            rng = np.random.default_rng([a, seed])
            run = f"{suite}/{algorithm}/{seed}-{a:02x}"
            state = (states or {}).get((algorithm, seed), "done")
            key = {"run": run, "suite": suite, "algorithm": algorithm, "seed": seed}
            seen = steps if state == "done" else steps[: 0 if state in ("pending",) else 6]
            reached = int(seen[-1]) if len(seen) else 0
            error = "Traceback:\n  x\nFloatingPointError: critic loss is NaN in task push-v3"
            runs.append(
                key
                | {
                    "state": state,
                    "preset": preset,
                    "full_scale": preset == "paper" and steps_per_task >= 1_500_000,
                    "step": reached,
                    "steps_per_task": steps_per_task,
                    "parameters_actor": 488_392 + 1000 * a,
                    "parameters_critic": 684_947,
                    "seconds": 3000.0 + 100 * seed,
                    "updates_per_second": 30.0,
                    "error": error if state == "failed" else "",
                    "protocol.horizon": 200,
                    "protocol.eval_episodes": 10,
                    "config.gamma": 0.99,
                    "config.actor_lr": 1e-3,
                    "config.window": 40,
                    "hardware.cpu": "AMD EPYC",
                    "versions.torch": "2.13.0",
                    "command": f"bench run --algos {algorithm} --seeds {seed}-{seed}",
                }
            )
            skill = np.clip(np.linspace(0.95, -0.3, len(tasks)) + 0.12 * (1 - a), 0, 1)
            for step in np.linspace(0, reached, 101)[1:].astype(int) if reached else ():
                for task, rate in zip(tasks, skill * step / steps_per_task, strict=True):
                    row = key | {"step": int(step), "kind": "train", "task": task, "count": 5}
                    metrics.append(row | {"metric": "success", "value": rng.binomial(5, rate)})
                    metrics.append(row | {"metric": "return", "value": 1500 * rate})
            for step in seen:
                grown = skill * (1 - np.exp(-3.5 * step / steps_per_task))
                kinds = [("eval", 10)]
                if step == steps[-1] and state == "done":
                    kinds.append(("final", 50))
                for kind, episodes in kinds:
                    for task, rate in zip(tasks, grown, strict=True):
                        level = np.clip(rate + 0.07 * rng.standard_normal(), 0, 1)
                        row = key | {"step": int(step), "kind": kind, "task": task}
                        wins = round(float(level) * episodes)
                        metrics.append(
                            row | {"metric": "success", "value": wins, "count": episodes}
                        )
                        mean = 1500 * float(level) + 50 * rng.random()
                        metrics.append(row | {"metric": "return", "value": mean, "count": episodes})
                parts = {
                    "simulator": 0.3,
                    "update": 0.5,
                    "act": 0.08,
                    "evaluation": 0.07,
                    "checkpoint": 0.01,
                    "genetic": 0.005 if algorithm.startswith("mega") else 0.0,
                    "total": 1.0,
                }
                timing += [
                    key | {"step": int(step), "section": name, "seconds": share * step * 0.03}
                    for name, share in parts.items()
                ]
            if algorithm.startswith("mega"):
                probes[run] = _mega_probes(rng, seen, len(tasks))
                result, words = ("bad", "collapsed") if seed == 1 else ("good", "lively")
                health.append(
                    {"run": run, "check": "population", "result": result, "verdict": words}
                    | {"advice": "breed more" if seed == 1 else ""}
                )
            elif algorithm.startswith("d2r"):
                probes[run] = [
                    (int(s), {"route_temperature": 1 + rng.random(len(tasks)) * s / 1e5})
                    for s in seen
                ]
                traces[run] = {
                    "modules_used": rng.integers(4, 14, (len(tasks), 8)),
                    "routes": np.tril(rng.random((len(tasks), 8, 5, 5))).astype(np.float32),
                }
            elif algorithm.startswith("soft_module"):
                weights = rng.random((len(tasks), 8, 3, 4, 4))
                traces[run] = {"soft_routes": weights / weights.sum(-1, keepdims=True)}
    for name, rate in (("expert", 1.0), ("random", 0.02)):
        runs.append(runs[0] | {"run": f"{suite}/{name}", "algorithm": name, "seed": 0})
        metrics += [
            {"run": f"{suite}/{name}", "suite": suite, "algorithm": name, "seed": 0, "step": 0}
            | {"kind": "reference", "task": task, "metric": "success"}
            | {"value": round(rate * 50), "count": 50}
            for task in tasks
        ]
    return Results(
        runs=pd.DataFrame(runs),
        metrics=pd.DataFrame(metrics),
        timing=pd.DataFrame(timing),
        health=pd.DataFrame(health),
        probes=probes,
        traces=traces,
        ablations=ABLATIONS,
    )


def without_curves(results: Results) -> Results:
    """The same without evaluations during training: quick to draw."""
    kept = results.metrics[results.metrics["kind"] != "eval"]
    return replace(results, metrics=kept, probes={}, traces={})
