"""What MEGA's choice of a genotype by noisy returns costs: every living genotype, evaluated.

    python results/studies/reference/champion.py [DIRECTORY]

At the end of a run each task has the champion of its last complete generation, which the final
evaluation runs, and the children that were bred from it since, which nothing has selected. Here all
of them act on the first EPISODES evaluation episodes, with the mean action; the champion also with
sampled actions, as in training. Needs the runs' last checkpoints, in DIRECTORY; writes
champion.csv beside this file and prints the table of the page.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from algorithms.genetic import Genotype
from algorithms.mega import MEGA
from algorithms.nn import split_gaussian
from bench.evaluate import evaluate
from bench.store import RunStore, find

HERE = Path(__file__).parent
EPISODES = 10


class Chosen(MEGA):
    """MEGA evaluated by the champions, or by the living genotypes of another place."""

    place = 0

    def evaluated(self, task: int) -> Genotype:
        """The champion for place 0, otherwise that of the living others."""
        champion = self.community.champion(task)
        others = [g for g in self.community.population(task) if g is not champion]
        return [champion, *others][self.place]

    def greedy(self, obs: np.ndarray) -> np.ndarray:
        """Their mean actions (T, E, A)."""
        return self.act(obs, explore=False).action

    @torch.no_grad()
    def sampled(self, obs: np.ndarray) -> np.ndarray:
        """Actions (T, E, A) drawn from the policy of the genotype that is evaluated."""
        mean, std = split_gaussian(self.policy(torch.from_numpy(obs), "exploit", {})[0])
        return torch.tanh(mean + std * self.normal(mean.shape)).numpy()


LABELS = ("mega", "mega@tuned", "mega@softmax", "mega@fixed16")
"""What breeds from a champion."""
PLACES = ("champion", "child 1", "child 2")
COLUMNS = ["algorithm", "seed", "task", "genotype", "actions", "successes", "episodes", "return"]


def measured(store: RunStore) -> pd.DataFrame:
    """A row per task, genotype and way of acting of a finished run."""
    spec = store.spec()
    suite, found = spec.make_suite(), store.load_checkpoint()
    assert found is not None, f"{store.path} has no checkpoint"
    rows = []
    with closing(suite.make(seed=spec.seed, autoreset=False)) as envs:
        for place, actions in ((0, "mean"), (0, "sampled"), (1, "mean"), (2, "mean")):
            agent = Chosen(suite.spec, spec.agent_config, spec.protocol.plan, seed=spec.seed)
            agent.place = place
            agent.load_state_dict(found[1]["agent"])
            act = agent.sampled if actions == "sampled" else agent.greedy
            outcome = evaluate(act, envs, EPISODES, spec.protocol.eval_seed)
            for i, task in enumerate(suite.spec.task_names):
                successes, return_ = outcome.success[i].sum(), outcome.return_[i].mean()
                values = (int(successes), EPISODES, round(float(return_), 1))
                rows.append((spec.label, spec.seed, task, PLACES[place], actions, *values))
    return pd.DataFrame(rows, columns=COLUMNS)


def main() -> None:
    """Measure runs that are not in the table yet, and print it."""
    torch.set_num_threads(1)
    path = HERE / "champion.csv"
    tables = [pd.read_csv(path)] if path.exists() else []
    known = {pair for table in tables for pair in table.groupby(["algorithm", "seed"]).groups}
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for label in LABELS:
        for store in find(out, f"mt10_rand/{label}/"):
            new = store.done and (label, store.spec().seed) not in known
            if new and store.checkpoint_files():
                tables.append(measured(store))
                pd.concat(tables).to_csv(path, index=False)
    table = pd.concat(tables)
    rate = table.assign(success=table["successes"] / table["episodes"])
    by_seed = rate.pivot_table("success", ["algorithm", "seed"], ["genotype", "actions"])
    print(by_seed.round(2).to_string())
    print(by_seed.groupby("algorithm").mean().round(3).to_string())
    means = table[table["actions"] == "mean"]
    rank = means.pivot_table("return", ["algorithm", "seed", "task"], "genotype").rank(axis=1)
    champion = rank["champion"]
    places = pd.DataFrame({"lowest return": champion == 1, "highest": champion == 3})
    print("Of seeds and tasks, the champion has the")
    print(places.groupby("algorithm").agg(["sum", "size"]).to_string())


if __name__ == "__main__":
    main()
