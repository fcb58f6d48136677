"""MEGA: every task grows its own network out of shared modules, wired by a binary genotype.

"Model Evolution Framework with Genetic Algorithm for Multi-Task Reinforcement Learning",
arXiv 2502.13569. Genotypes, their weights and the genetic algorithm are in `algorithms.genetic`
(Eq. 5-9, Alg. 1-5), the network that they wire in `algorithms.wiring` (Eq. 3 and 4); here are the
growth of a stage (Sec. 4.4), and which genotype acts, learns and is evaluated (Sec. 4.3); verdicts
on a run's genotypes and stages are in `algorithms.mega_health`.

Symbols: a task at *stage* N owns genotypes that wire the modules M_1 .. M_N; m_k is the output of
M_k, m_0 the embedded state, w_{i,j} the weight with which M_i reads m_j. T tasks, B rows per task,
W the width of every m, P genotypes per task.

    m_0 = embedding(s)                                                              (Eq. 3)
    m_i = M_i(sum_{j<i} w_{i,j} m_j)                                                (Eq. 4)
    pi(a|s): mean and log std = head(sum_{j<=N} w_{N+1,j} m_j)                      (Sec. 4.1)
    w_{i,j} = HalfSoftmax(d_{i,0} .. d_{i,i-1})_j                                   (Eq. 7-9)
    fitness of a genotype: the returns of the training episodes that it ran         (Sec. 4.3)
    stage N -> N + 1 where a task is neither solved nor making progress             (Sec. 4.4)

The task enters the actor through its genotype alone, unless ``task_identity`` says so. Critics are
D2R's (`algorithms.routing`).

**Departures** and readings where the paper is silent; those of the genetic algorithm are listed in
`algorithms.genetic`.

 1. The head counts as the last level of a genotype: its row follows that of M_N.
 2. The trigger of growth is not published. Ours, over a window of a task's training episodes: its
    success rate is below ``solved_threshold`` and its mean return grew by less than
    ``progress_threshold`` of the previous window's. One window of rest follows (`Evolution`).
 3. A module that no task reaches is not there: it is appended, freshly drawn, when the first
    task's stage reaches it, so the method has no largest size; ``max_stage`` guards memory alone.
 4. Which genotype drives an update is not published: each update draws one per task as episodes
    do, and uses it at s and s' (``update_genotype``, ``target_genotype``).
 5. Evaluation runs, with the mean action, the best genotype of each task's last complete
    generation: in the one under way some have a single return or none (``evaluate_genotype``).
    It touches no population.
 6. D2R's critics draw routes for their own loss, at temperatures balanced by alpha, and take the
    largest logits otherwise, as in D2R's code.
 7. Only weights that are exactly zero in float32 are skipped. With rows of different genotypes in
    one task (``update_genotype=behaviour``, several environments) all of a task's rows run the
    modules of its deepest one: padding, which computes what the others weight by zero.
 8. ``relax`` is no part of the paper: `algorithms.wiring.Relaxation` says what it does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from algorithms.agent import AgentConfig, Batch, Finding, History, Plan
from algorithms.genetic import (
    Align,
    Community,
    GeneticSettings,
    Genotype,
    Growth,
    Learnt,
    Weighting,
    hamming,
    modules_used,
    padded,
    weight_intervals,
)
from algorithms.mega_health import findings
from algorithms.nn import initialise, mlp
from algorithms.routing import RoutedNetwork, balance_routes
from algorithms.sac import ARS, SAC, Extras, Phase, SACConfig
from algorithms.wiring import Decoder, GenotypeNetwork, Relaxation, Wiring
from suites.base import Episode, SuiteSpec, stream

Rate = Annotated[float, Field(ge=0, le=1)]


class MEGAConfig(SACConfig):
    """Settings of MEGA. What none means is decided by the suite and the length of the run."""

    # Network (Sec. 4.1, Table 2)
    width: Annotated[int, Field(ge=1)] = 400
    """W: units of both embedding layers, of every module's input and output (Table 2)."""
    module_width: Annotated[int, Field(ge=1)] = 128
    """Units inside a module (Table 2, "module size"); the critic's modules alike."""
    weights: Weighting = "half_softmax"
    """From decimals to weights: HalfSoftmax (Eq. 7-9), or Softmax, its ablation (Sec. 5.4)."""
    offset: Annotated[float, Field(gt=0, le=1)] = 0.99
    """What HalfSoftmax subtracts from each e^d (Eq. 7)."""
    residual: bool = False
    """m_i = x + M_i(x) instead of M_i(x) (Eq. 4)."""
    task_identity: Literal["genotype", "embedding", "head"] = "genotype"
    """How the actor knows the task: by its genotype alone (Eq. 3), a learned vector of each task
    added to m_0, or a head of its own for each task."""

    # Genotypes and genetic algorithm (Sec. 4.2 and 4.3, Table 3, Alg. 1-5)
    precision: Annotated[int, Field(ge=1, le=8)] | None = None
    """p_w, bits per weight; none: 2 up to ten tasks, 4 above (Table 3)."""
    population_size: Annotated[int, Field(ge=2)] | None = None
    """N_P, genotypes per task; none: 3 up to ten tasks, 4 above (Table 3)."""
    max_evaluate_times: Annotated[int, Field(ge=1)] = 2
    """Episodes per genotype of a generation (Table 3)."""
    generation: Literal["episodes", "all_twice"] = "episodes"
    """What ends a generation (Sec. 4.3): N_P x max_evaluate_times episodes, or max_evaluate_times
    of each genotype."""
    fitness: Literal["generation", "running_mean", "last"] = "generation"
    """Mean return of this generation, of the genotype's life, or the latest (Sec. 4.3). Every
    generation evaluates its survivors anew, whichever it is."""
    best_selection_prob: Rate = 0.5
    """How often the best is taken once all are evaluated; otherwise one uniformly (Sec. 4.3)."""
    optimise: Literal["genetic", "random"] = "genetic"
    """``random``: each generation is drawn anew, without elite (Sec. 5.4, Fig. 8)."""
    abandon_rate: Rate = 0.5
    """r_a of Alg. 1, not published: the worst N_P r_a, rounded up, are dropped (2 of 3, 2 of 4);
    at least one, never the best."""
    parents: Literal["survivors", "before_drop"] = "survivors"
    """Parents are chosen after the worst are dropped (the order of Alg. 1) or before."""
    clones: Literal["mutate", "keep"] = "mutate"
    """A child equal to a living genotype of its task is mutated until it differs, or kept (Alg. 1,
    Departure 5 of `algorithms.genetic`)."""
    crossover_rate: Rate = 0.5
    """r_c (Table 3, Alg. 3)."""
    crossover_cross_threshold: Rate = 0.9
    """tau_cp_c (Table 3, Alg. 2)."""
    align: Align = "front"
    """Parents of different stages are aligned at their first bit (Alg. 3) or by segments."""
    mutation_rate: Rate = 0.15
    """r_m (Table 3, Alg. 5)."""
    mutation_cross_threshold: Rate = 0.95
    """tau_cp_m (Table 3, Alg. 4)."""
    mutation_best_threshold: Rate = 0.5
    """tau_b_m, at most tau_cp_m (Table 3, Alg. 4)."""

    # Model evolution (Sec. 4.4)
    start_stage: Annotated[int, Field(ge=1, le=256)] = 3
    """Stage of every task at the start (Table 3)."""
    evolve: bool = True
    """Whether stages increase; otherwise all tasks stay at the start stage (Sec. 5.4, Fig. 9)."""
    max_stage: Annotated[int, Field(ge=1, le=256)] = 24
    """No task grows beyond this stage; not in the paper, a guard of memory."""
    window: Annotated[int, Field(ge=1)] | None = None
    """Training episodes of a task over which its growth is decided (Departure 2). None: a 20th of
    those after the warm-up, 374 for the paper's MT10; in short runs 20 of them, or a fifth of all,
    because the mean return of fewer says little; and no less than a generation. Genotypes of a new
    stage act only after their generation's end, so a window should hold one, too."""
    solved_threshold: Rate = 0.5
    """Success rate in a window from which a task counts as completed (Departure 2)."""
    progress_threshold: float = 0.1
    """Relative growth of the mean return, window over window, that counts as significant progress
    (Departure 2)."""
    growth: Growth = "random"
    """Genotypes of a new stage are random (Sec. 4.4), or extend or preserve the old ones."""
    replace: Literal["at_optimise", "at_once"] = "at_optimise"
    """When genotypes of the old stage go: at the next optimisation (Sec. 4.4) or at once."""

    # Learning (Sec. 4.3, 5.3)
    update_genotype: Literal["population", "behaviour", "best"] = "population"
    """Genotype of an update: one of the population as for an episode, that which acted in the
    transition (stored with it), or the best (Departure 4)."""
    target_genotype: Literal["same", "best"] = "same"
    """Genotype at s': the same as at s, or the best (Departure 4)."""
    evaluate_genotype: Literal["champion", "best"] = "champion"
    """Genotype that evaluation runs: the best of the last complete generation, or the fittest so
    far in the one under way (Departure 5)."""
    relax: bool = False
    """Train each weight's decimal as a real number in [0, 2^p - 1] by the actor loss; it starts
    from the genotype's bits and is rounded back to bits when its generation ends, so that children
    inherit what was learnt. Not in the paper: an open question about it (Departure 8)."""
    relax_lr: Annotated[float, Field(gt=0)] = 1e-3
    """Adam learning rate of the decimals."""
    critic: Literal["module_level", "mlp", "genotype"] = "module_level"
    """D2R's critics (Sec. 4.3); plain ones that are told the task, as MT-SAC's; or the actor's
    network on [s, a], wired by the genotype that the update draws for the actor."""
    critic_modules: Annotated[int, Field(ge=2)] = 16
    """Modules of a module-level critic (D2R Table 7)."""
    critic_top_k: Annotated[int, Field(ge=2)] = 2
    """Sources that each of its modules reads (D2R Sec. 3.1); of one alone its router could not
    learn, whose weights add up to 1."""
    router_width: Annotated[int, Field(ge=1)] = 256
    """Units of its router's two hidden layers (D2R Table 7)."""
    depth: Annotated[int, Field(ge=1)] = 5
    """Hidden layers of a plain critic (D2R Table 2, MT-SAC)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        genetic = self.genetic(self.population_size or 3, self.precision or 2)
        if self.mutation_best_threshold > self.mutation_cross_threshold:
            raise ValueError(
                f"mutation_best_threshold={self.mutation_best_threshold} is above "
                f"mutation_cross_threshold={self.mutation_cross_threshold} (Alg. 4)"
            )
        if self.population_size and self.precision:
            genetic.check_room(self.start_stage)
        if self.weights == "softmax":
            self._unused("offset", because="weights is softmax")
            if self.growth == "preserve":
                raise ValueError(
                    "growth=preserve needs weights=half_softmax: Softmax gives a decimal of 0 a "
                    "weight that changes the policy"
                )
        if self.critic != "module_level":
            because = f"the critic is {self.critic}"
            self._unused("critic_modules", "critic_top_k", because=because)
        elif self.critic_top_k > self.critic_modules:
            raise ValueError(
                f"critic_top_k={self.critic_top_k}: there are {self.critic_modules} sources at most"
            )
        if self.update_genotype == "best":
            self._unused("target_genotype", because="update_genotype is best already")
        if not self.relax:
            self._unused("relax_lr", because="relax is false")
        elif self.update_genotype == "behaviour":
            raise ValueError(
                "relax needs update_genotype population or best: a transition keeps the bits of "
                "the genotype that acted, not its decimals"
            )
        if not self.evolve:
            self._unused(
                "max_stage", "window", "solved_threshold", "progress_threshold", "growth",
                "replace", "align", because="evolve is false",
            )  # fmt: skip
        elif self.start_stage >= self.max_stage:
            raise ValueError(
                f"start_stage {self.start_stage} leaves nothing to grow up to max_stage "
                f"{self.max_stage}: raise max_stage, or set evolve=false"
            )
        if self.optimise == "random":
            self._unused(
                "abandon_rate", "parents", "clones", "crossover_rate", "align", "mutation_rate",
                "crossover_cross_threshold", "mutation_cross_threshold", "mutation_best_threshold",
                because="optimise is random",
            )  # fmt: skip
            if self.replace == "at_optimise":
                self._unused("growth", because="optimise is random, and replace at_optimise")
        elif self.population_size and not genetic.crossed:
            self._unused(
                "crossover_rate", "crossover_cross_threshold",
                because="one genotype is dropped at a time, and what replaces it is a mutant",
            )  # fmt: skip
        return self

    def genetic(self, population_size: int, precision: int) -> GeneticSettings:
        """The genetic algorithm's part of these settings."""
        mine = {field.name: getattr(self, field.name) for field in fields(GeneticSettings)}
        return GeneticSettings(
            **mine | {"population_size": population_size, "precision": precision}
        )

    def for_run(self, suite: SuiteSpec, plan: Plan) -> Self:
        """With precision, population size and window decided."""
        population = self.population_size or (4 if suite.large else 3)
        values = super().for_run(suite, plan).model_dump() | {
            "precision": self.precision or (4 if suite.large else 2),
            "population_size": population,
        }
        if self.evolve and self.window is None:
            counted = (plan.steps_per_task - plan.warmup_steps) // plan.horizon
            generation = population * self.max_evaluate_times
            values["window"] = max(counted // 20, min(20, counted // 5), generation)
        return type(self)(**values)


PATIENT = {"solved_threshold": 0.2, "progress_threshold": 0.0}
"""A task grows only while it hardly ever succeeds and its return falls."""


class MEGA(SAC):
    """Genotype module-level actor, genetic algorithm and model evolution on multi-task SAC."""

    Config = MEGAConfig
    config: MEGAConfig
    PAPER: ClassVar[str] = "MEGA: model evolution framework with genetic algorithm, 2502.13569"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        # The paper's ablations (Sec. 5.4) and settings.
        "softmax": {"weights": "softmax"},
        "no_ga": {"optimise": "random"},
        "fixed{start_stage}": {"evolve": False},
        "stage{start_stage}": {},
        "precision{precision}": {},
        "population{population_size}": {},
        "offset{offset}": {},
        "precision{precision}_offset{offset}": {},
        # What came out not below the plain one on seeds of its own (results/studies/tuned).
        "tuned": PATIENT,
        # Where the paper is silent: the other readings.
        "max_stage{max_stage}": {},
        "window{window}": {},
        "select_best": {"best_selection_prob": 1.0},
        "select_any": {"best_selection_prob": 0.0},
        "drop_one": {"abandon_rate": 0.25},
        "isolated": {"crossover_cross_threshold": 1.0, "mutation_cross_threshold": 1.0},
        "mixing": {"crossover_cross_threshold": 0.5, "mutation_cross_threshold": 0.5},
        "mutation{mutation_rate}": {},
        "generation_all_twice": {"generation": "all_twice"},
        "fitness_running_mean": {"fitness": "running_mean"},
        "fitness_last": {"fitness": "last"},
        "parents_before_drop": {"parents": "before_drop"},
        "clones_keep": {"clones": "keep"},
        "align_segment": {"align": "segment"},
        "growth_preserve": {"growth": "preserve"},
        "growth_extend": {"growth": "extend"},
        "replace_at_once": {"replace": "at_once"},
        "trigger_eager": {"solved_threshold": 0.9, "progress_threshold": 0.5},
        "trigger_patient": PATIENT,
        "update_best": {"update_genotype": "best"},
        "update_behaviour": {"update_genotype": "behaviour"},
        "evaluate_best": {"evaluate_genotype": "best"},
        "target_best": {"target_genotype": "best"},
        "residual": {"residual": True},
        "identity_embedding": {"task_identity": "embedding"},
        "identity_head": {"task_identity": "head"},
        "critic_mlp": {"critic": "mlp"},
        # The readers' open questions, and the authors' code base.
        "critic_genotype": {"critic": "genotype"},
        "hybrid": {"relax": True},
        "gradient_only": {"relax": True, "max_evaluate_times": 10**6, "evolve": False},
        "authors": {"time_limit": "terminal", "warmup_steps": 4000, "extreme_loss_weighted": True},
        "ars": ARS,
    }

    actor: GenotypeNetwork

    def __init__(
        self, suite: SuiteSpec, config: AgentConfig, plan: Plan, *, seed: int, device: str = "cpu"
    ) -> None:
        super().__init__(suite, config, plan, seed=seed, device=device)
        config = self.config
        assert config.precision is not None
        assert config.population_size is not None
        tasks = suite.num_tasks
        self.precision = config.precision
        self.community = Community(
            [config.start_stage] * tasks,
            config.genetic(config.population_size, self.precision),
            np.random.default_rng(stream(seed, "genetic")),
        )
        self.evolution = (
            None if config.window is None else
            Evolution(tasks, config.window, config.solved_threshold, config.progress_threshold)
        )  # fmt: skip
        self.decoder = Decoder(self.community, config.weights, config.offset, self.device)
        self.relaxation = Relaxation(self.decoder, config.relax_lr) if config.relax else None
        self.stage_events: list[list[int]] = []
        """Rows (step, task, old stage, new stage, index into CAUSES)."""
        self.seconds["genetic"] = 0.0
        self._flying_wiring: Wiring | None = None
        self._best_wiring: Wiring | None = None
        self._evaluated_wiring: Wiring | None = None
        self._flying_ids = np.zeros((tasks, 0), dtype=np.int32)
        self._drawn: dict[str, Wiring] = {}
        if config.update_genotype == "behaviour":
            self.extras_spec = {"genotype": ((), "int32")}

    # --------------------------------------------------------------------------------- networks

    def make_actor(self) -> nn.Module:
        """s -> mean and log std of the action."""
        config, suite = self.config, self.suite
        return GenotypeNetwork(
            suite.obs_dim, 2 * suite.action_dim, config.start_stage,
            tasks=suite.num_tasks, width=config.width, module_width=config.module_width,
            residual=config.residual, task_identity=config.task_identity,
        )  # fmt: skip

    def make_critic(self) -> nn.Module:
        """[s, a] -> Q, twice."""
        config, tasks = self.config, self.suite.num_tasks
        inputs = self.suite.obs_dim + self.suite.action_dim
        if config.critic == "genotype":
            return GenotypeNetwork(
                inputs, 1, config.start_stage,
                tasks=tasks, copies=2, width=config.width, module_width=config.module_width,
                residual=config.residual, task_identity=config.task_identity,
                layer_norm=config.critic_layer_norm,
            )  # fmt: skip
        if config.critic == "mlp":
            return mlp(
                inputs, [config.width] * config.depth, 1,
                copies=2, one_hot=tasks, layer_norm=config.critic_layer_norm,
            )  # fmt: skip
        return RoutedNetwork(
            inputs, 1, tasks,
            copies=2, width=config.width, module_width=config.module_width,
            router_width=config.router_width, modules=config.critic_modules,
            top_k=config.critic_top_k, layer_norm=config.critic_layer_norm,
        )  # fmt: skip

    def value(self, critic: nn.Module, obs: Tensor, action: Tensor, phase: Phase) -> Tensor:
        """Q1 and Q2; module-level critics draw routes for their own loss (Departure 6)."""
        if isinstance(critic, GenotypeNetwork):
            wiring = self._drawn["target" if phase == "target" else "policy"]
            wiring = wiring._replace(weights=wiring.weights.detach())
            output: Tensor = critic(torch.cat([obs, action], -1)[None], wiring)
            return output
        if not isinstance(critic, RoutedNetwork):
            return super().value(critic, obs, action, phase)
        route: Literal["sample", "top_k"] = "sample" if phase == "value" else "top_k"
        q: Tensor = critic(torch.cat([obs, action], -1)[None], route, self.noise)[0]
        return q

    def on_new_alpha(self) -> None:
        """Refresh the critics' route temperatures (Departure 6)."""
        critics = (self.critic, self.target_critic)
        routed = (critic.temperature for critic in critics if isinstance(critic, RoutedNetwork))
        balance_routes(routed, self.log_alpha)

    # --------------------------------------------------------------------- which genotype is used

    def policy(self, obs: Tensor, phase: Phase, extras: Extras) -> tuple[Tensor, Extras]:
        """Gaussian parameters (T, B, 2A): exploring under each environment's genotype, greedy under
        that which is evaluated, learning under those drawn for the update."""
        stored: Extras = {}
        if phase == "explore":
            wiring = self._flying(obs.shape[1])
            if self.extras_spec:
                stored = {"genotype": torch.from_numpy(self._flying_ids)}
        elif phase == "exploit":
            wiring = self._evaluated()
        else:
            wiring = self._drawn[phase]
        output: Tensor = self.actor(obs[None], wiring)
        return output[0], stored

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """The shared update under genotypes that are drawn once, for s and s' (Departure 4)."""
        tasks = range(self.suite.num_tasks)
        if self.config.update_genotype == "behaviour":
            drawn = self.decoder(batch.extras["genotype"].cpu().numpy())
        elif self.config.update_genotype == "population":
            with self._genetic():
                chosen = [[self.community.draw(task)] for task in tasks]
            drawn = self._wire(chosen)
        else:
            drawn = self._best()
        same = self.config.target_genotype == "same"
        self._drawn = {"policy": drawn, "target": drawn if same else self._best()}
        return super().update(batch)

    def reset(self) -> None:
        """As SAC; stages and genotypes stay, what is known of their returns does not."""
        super().reset()
        self.community.clear_fitness()
        if self.evolution is not None:
            self.evolution.clear()
        if self.relaxation is not None:
            self.relaxation.restart()
        self._forget()

    def step(self) -> None:
        """As SAC; relaxed decimals learn from the same backward pass."""
        super().step()
        if self.relaxation is not None:
            self.relaxation.step()
            self._forget()

    def _wire(self, genotypes: list[list[Genotype]]) -> Wiring:
        """The wiring of genotypes [T][G]."""
        wiring = self.decoder(np.array([[g.id for g in row] for row in genotypes]))
        return wiring if self.relaxation is None else self.relaxation(genotypes, wiring)

    def _flying(self, envs: int) -> Wiring:
        """The genotypes under way in each task's environments."""
        if self._flying_wiring is None:
            flying = [
                [self.community.in_flight(task, env) for env in range(envs)]
                for task in range(self.suite.num_tasks)
            ]
            self._flying_ids = np.array([[g.id for g in row] for row in flying], dtype=np.int32)
            self._flying_wiring = self._wire(flying)
        return self._flying_wiring

    def _best(self) -> Wiring:
        """Each task's best genotype."""
        if self._best_wiring is None:
            best = [[self.community.best(task)] for task in range(self.suite.num_tasks)]
            self._best_wiring = self._wire(best)
        return self._best_wiring

    def _evaluated(self) -> Wiring:
        """Those of the genotypes that evaluation runs."""
        if self._evaluated_wiring is None:
            tasks = range(self.suite.num_tasks)
            self._evaluated_wiring = self._wire([[self.evaluated(task)] for task in tasks])
        return self._evaluated_wiring

    def evaluated(self, task: int) -> Genotype:
        """The genotype that evaluation runs (Departure 5)."""
        champion = self.config.evaluate_genotype == "champion"
        return self.community.champion(task) if champion else self.community.best(task)

    def _forget(self) -> None:
        """Populations or episodes changed: wirings made of them no longer hold."""
        self._flying_wiring = self._best_wiring = self._evaluated_wiring = None

    # ---------------------------------------------------------------------- evolution and growth

    @contextmanager
    def _genetic(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds["genetic"] += time.perf_counter() - started

    def on_episode_start(self, task: int, env: int) -> None:
        """Take a genotype for the episode (Sec. 4.3)."""
        with self._genetic():
            self.community.ask(task, env, warmup=self.steps < self.plan.warmup_steps)
        self._forget()

    def on_episode_end(self, episode: Episode) -> None:
        """Credit the genotype with its return; grow the task if it is stuck (Sec. 4.4)."""
        task, env = episode.task, episode.env
        with self._genetic():
            # First the growth: if this episode completes a generation, its offspring are longer.
            if self.evolution is not None and self.community.counts(task, env):
                cause = self.evolution.record(task, episode.return_, episode.success)
                if cause is not None and self.community.stage[task] < self.config.max_stage:
                    self.lengthen(task, cause)
            if self.community.tell(task, env, episode.return_, self._learnt):
                self._renew(task)
        self._forget()

    @property
    def _learnt(self) -> Learnt | None:
        return None if self.relaxation is None else self.relaxation.rounded

    def _renew(self, task: int) -> None:
        """A task's genotypes are new: their decimals start from their bits."""
        if self.relaxation is not None:
            self.relaxation.renew(task)

    def lengthen(self, task: int, cause: int) -> None:
        """Move a task up one stage, for that of `CAUSES` (Sec. 4.4)."""
        stage = self.community.lengthen(task, self._learnt)
        self.stage_events.append([self.steps, task, stage - 1, stage, cause])
        self._append_modules(stage)
        if self.config.replace == "at_once":
            self._renew(task)

    def _append_modules(self, stage: int) -> None:
        """Append fresh modules up to M_stage (Departure 3); others keep Adam's state."""
        while len(self.actor.stack) < stage:
            self._append_module(self.actor, self.actor_optimizer)
            if isinstance(self.critic, GenotypeNetwork):
                module = self._append_module(self.critic, self.critic_optimizer)
                assert isinstance(self.target_critic, GenotypeNetwork)
                slow = self.target_critic.append()
                slow.load_state_dict(module.state_dict())
                slow.to(self.device).requires_grad_(False)

    def _append_module(self, network: GenotypeNetwork, optimizer: torch.optim.Adam) -> nn.Module:
        module = network.append()
        initialise(module, self.config.init, self.init_generator)
        module.to(self.device)
        optimizer.param_groups[0]["params"].extend(module.parameters())
        return module

    # ------------------------------------------------------------------------------------ records

    def probe(self) -> dict[str, np.ndarray]:
        """Stages, their increases, populations (`Community.probe`), the genotypes that evaluation
        runs (T, L), their modules, and the reachable weights."""
        stage, community = self.community.stage, self.community.probe()
        acting = [self.evaluated(task) for task in range(self.suite.num_tasks)]
        bits = [genotype.bits for genotype in acting]
        if self.relaxation is not None:  # the bits nearest to the decimals that act
            bits = [self.relaxation.rounded(genotype) for genotype in acting]
            tasks = range(self.suite.num_tasks)
            living = [
                [self.relaxation.rounded(genotype) for genotype in self.community.population(task)]
                for task in tasks
            ]
            community["genotypes"] = padded(living, community["lengths"].shape)
            community["hamming"] = np.array([hamming(population) for population in living])
        used = [modules_used(self.decoder.matrix(each)) for each in bits]
        return {
            "stage": stage.copy(),
            "stage_events": np.array(self.stage_events, dtype=np.int64).reshape(-1, 5),
            "cause_names": np.array(CAUSES),
            **community,
            "evaluated": padded([[each] for each in bits], (len(bits), 1))[:, 0],
            "modules_used": np.array(used, dtype=np.float64),
            "weight_intervals": weight_intervals(
                int(stage.max()) + 1, self.precision, self.config.offset
            ),
            "precision": np.array(self.precision),
        }

    @classmethod
    def health(cls, history: History) -> list[Finding]:
        """SAC's verdicts, and whether genotypes and stages do what the paper means them to."""
        return super().health(history) + findings(history)

    def state_dict(self) -> dict[str, Any]:
        """SAC's state, the populations and the windows of growth."""
        evolution = None if self.evolution is None else self.evolution.state_dict()
        relaxed = None if self.relaxation is None else self.relaxation.state_dict()
        genetic = {
            "community": self.community.state_dict(),
            "evolution": evolution,
            "stage_events": self.stage_events,
            "modules": len(self.actor.stack),
        }
        return super().state_dict() | {"genetic": json.dumps(genetic), "relaxed": relaxed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; raises ValueError if this actor has grown beyond it."""
        genetic = json.loads(state["genetic"])
        if len(self.actor.stack) > genetic["modules"]:
            raise ValueError(
                f"the state holds {genetic['modules']} modules, this actor already has "
                f"{len(self.actor.stack)}: load into a new agent"
            )
        self._append_modules(genetic["modules"])
        super().load_state_dict(state)
        self.community.load_state_dict(genetic["community"])
        if self.evolution is not None:
            self.evolution.load_state_dict(genetic["evolution"])
        self.stage_events = genetic["stage_events"]
        self.decoder.clear()
        if self.relaxation is not None:
            self.relaxation.load_state_dict(state["relaxed"])
        self._forget()


CAUSES = ("unsolved, return stalled", "unsolved, return fell")
"""Why a stage increased."""


class Evolution:
    """Decides after each window of episodes whether a task's stage increases (Sec. 4.4).

    It does if the task was not completed (success rate below ``solved``) and made no significant
    progress (mean return up by less than the share ``progress`` of the previous window's). The
    first window has nothing to be compared with; the one after an increase is a rest.
    """

    def __init__(self, tasks: int, window: int, solved: float, progress: float) -> None:
        self.tasks, self.window, self.solved, self.progress = tasks, window, solved, progress
        self.clear()

    def clear(self) -> None:
        """Begin with first windows: nothing is known of the tasks."""
        self._episodes = [0] * self.tasks
        self._successes = [0] * self.tasks
        self._returns = [0.0] * self.tasks
        self._previous: list[float | None] = [None] * self.tasks
        self._resting = [False] * self.tasks

    def record(self, task: int, return_: float, success: bool) -> int | None:
        """Count an episode; an index into `CAUSES` if the stage is to increase now."""
        self._episodes[task] += 1
        self._successes[task] += success
        self._returns[task] += float(return_)
        if self._episodes[task] < self.window:
            return None
        rate, mean = self._successes[task] / self.window, self._returns[task] / self.window
        previous, resting = self._previous[task], self._resting[task]
        self._episodes[task], self._successes[task], self._returns[task] = 0, 0, 0.0
        self._previous[task], self._resting[task] = mean, False
        if previous is None or resting or rate >= self.solved:
            return None
        gain = (mean - previous) / max(abs(previous), 1e-8)
        if gain >= self.progress:
            return None
        self._resting[task] = True
        return 1 if gain < 0 else 0

    def state_dict(self) -> dict[str, Any]:
        """The windows under way, as numbers and lists."""
        return {
            "episodes": list(self._episodes),
            "successes": list(self._successes),
            "returns": list(self._returns),
            "previous": list(self._previous),
            "resting": list(self._resting),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._episodes = list(state["episodes"])
        self._successes = list(state["successes"])
        self._returns = list(state["returns"])
        self._previous = list(state["previous"])
        self._resting = list(state["resting"])
