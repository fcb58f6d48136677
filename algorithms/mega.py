"""MEGA: every task grows its own network out of shared modules, wired by a binary genotype.

"Model Evolution Framework with Genetic Algorithm for Multi-Task Reinforcement Learning",
arXiv 2502.13569. Genotypes, their weights and the genetic algorithm are in `algorithms.genetic`
(Eq. 5-9, Alg. 1-5); here are the network that they wire (Sec. 4.1), the growth of a task's stage
(Sec. 4.4), and which genotype acts, learns and is evaluated (Sec. 4.3).

Symbols: a task at *stage* N owns genotypes that wire the modules M_1 .. M_N; m_k is the output of
M_k, m_0 the embedded state, w_{i,j} the weight with which M_i reads m_j. T tasks, B rows per task,
W the width of every m, P genotypes per task.

    m_0 = embedding(s)                                                              (Eq. 3)
    m_i = M_i(sum_{j<i} w_{i,j} m_j)                                                (Eq. 4)
    pi(a|s): mean and log std = head(sum_{j<=N} w_{N+1,j} m_j)                      (Sec. 4.1)
    w_{i,j} = HalfSoftmax(d_{i,0} .. d_{i,i-1})_j                                   (Eq. 7-9)
    fitness of a genotype: the returns of the training episodes that it ran         (Sec. 4.3)
    stage N -> N + 1 where a task is neither solved nor making progress             (Sec. 4.4)

The task enters the actor through its genotype alone. Critics are D2R's (`algorithms.routing`).

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
 5. Evaluation runs each task's best genotype with the mean action and touches no population.
 6. D2R's critics draw routes for their own loss, at temperatures balanced by alpha, and take the
    largest logits otherwise, as in D2R's code.
 7. Only weights that are exactly zero in float32 are skipped. With rows of different genotypes in
    one task (``update_genotype=behaviour``, several environments) all of a task's rows run the
    modules of its deepest one: padding, which computes what the others weight by zero.
 8. ``relax`` is no part of the paper: `Relaxation` says what it does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from algorithms.agent import AgentConfig, Batch, Finding, History, Plan
from algorithms.genetic import (
    Align,
    Community,
    GeneticSettings,
    Genotype,
    Growth,
    Weighting,
    decode,
    encode,
    modules_reached,
    modules_used,
    stage_of,
    weight_intervals,
    weight_matrix,
)
from algorithms.nn import Init, LayerNorm, Linear, Scratch, TaskLinear, draw, initialise, mlp
from algorithms.routing import RoutedNetwork, route_temperature
from algorithms.sac import ARS, SAC, Extras, Phase, SACConfig, listed
from suites.base import Episode, SuiteSpec, stream

Rate = Annotated[float, Field(ge=0, le=1)]

MT10 = 10
"""Suites of at most so many tasks take the paper's values for MT10, others those for MT50."""


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
    """What ends a generation: N_P x max_evaluate_times episodes, or so many of each genotype."""
    fitness: Literal["generation", "running_mean", "last"] = "generation"
    """Mean return of this generation, of the genotype's life, or the latest (Sec. 4.3)."""
    best_selection_prob: Rate = 0.5
    """How often the best is taken once all are evaluated; otherwise one uniformly (Sec. 4.3)."""
    optimise: Literal["genetic", "random"] = "genetic"
    """``random``: each generation is drawn anew, without elite (Sec. 5.4, Fig. 8)."""
    abandon_rate: Rate = 0.5
    """r_a of Alg. 1, not published: 2 of 3 and 2 of 4 are dropped."""
    parents: Literal["survivors", "before_drop"] = "survivors"
    """Parents are chosen after the worst are dropped (the order of Alg. 1) or before."""
    clones: Literal["mutate", "keep"] = "mutate"
    """A child equal to a living genotype of its task is mutated until it differs, or kept."""
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
    """tau_b_m (Table 3, Alg. 4)."""

    # Model evolution (Sec. 4.4)
    start_stage: Annotated[int, Field(ge=1, le=256)] = 3
    """Stage of every task at the start (Table 3)."""
    evolve: bool = True
    """Whether stages increase; otherwise all tasks stay at the start stage (Sec. 5.4, Fig. 9)."""
    max_stage: Annotated[int, Field(ge=1, le=256)] = 24
    """No task grows beyond this stage; not in the paper, a guard of memory."""
    window: Annotated[int, Field(ge=1)] | None = None
    """Training episodes of a task over which its growth is decided (Departure 2). None: a 20th of
    those after the warm-up, and no less than a generation; that is 374 for the paper's MT10."""
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
    critic_top_k: Annotated[int, Field(ge=1)] = 2
    """Sources that each of its modules reads (D2R Sec. 3.1)."""
    router_width: Annotated[int, Field(ge=1)] = 256
    """Units of its router's two hidden layers (D2R Table 7)."""
    depth: Annotated[int, Field(ge=1)] = 5
    """Hidden layers of a plain critic (D2R Table 2, MT-SAC)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.genetic(self.population_size or 3, self.precision or 2)  # raises if it is not
        if self.weights == "softmax":
            self._unused("offset", because="weights is softmax")
        if self.critic != "module_level":
            because = f"the critic is {self.critic}"
            self._unused("critic_modules", "critic_top_k", because=because)
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
                "replace", because="evolve is false",
            )  # fmt: skip
        elif self.start_stage > self.max_stage:
            raise ValueError(f"start_stage {self.start_stage} exceeds max_stage {self.max_stage}")
        if self.optimise == "random":
            self._unused(
                "abandon_rate", "parents", "clones", "crossover_rate", "align", "mutation_rate",
                "crossover_cross_threshold", "mutation_cross_threshold", "mutation_best_threshold",
                because="optimise is random",
            )  # fmt: skip
        return self

    def _unused(self, *names: str, because: str) -> None:
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect: {because}")

    def genetic(self, population_size: int, precision: int) -> GeneticSettings:
        """The genetic algorithm's part of these settings."""
        mine = {field.name: getattr(self, field.name) for field in fields(GeneticSettings)}
        return GeneticSettings(
            **mine | {"population_size": population_size, "precision": precision}
        )

    def for_run(self, suite: SuiteSpec, plan: Plan) -> Self:
        """With precision, population size and window decided."""
        large = suite.num_tasks > MT10
        population = self.population_size or (4 if large else 3)
        values = self.model_dump() | {
            "precision": self.precision or (4 if large else 2),
            "population_size": population,
        }
        if self.evolve and self.window is None:
            counted = (plan.steps_per_task - plan.warmup_steps) // plan.horizon
            values["window"] = max(counted // 20, population * self.max_evaluate_times)
        return type(self)(**values)


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
        "offset0.9": {"offset": 0.9},
        "offset0.999": {"offset": 0.999},
        "offset1": {"offset": 1.0},
        # Where the paper is silent: the other readings.
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
        "trigger_patient": {"solved_threshold": 0.2, "progress_threshold": 0.0},
        "update_best": {"update_genotype": "best"},
        "update_behaviour": {"update_genotype": "behaviour"},
        "target_best": {"target_genotype": "best"},
        "residual": {"residual": True},
        "identity_embedding": {"task_identity": "embedding"},
        "identity_head": {"task_identity": "head"},
        "critic_mlp": {"critic": "mlp"},
        # The readers' open questions, and the authors' code base.
        "critic_genotype": {"critic": "genotype"},
        "hybrid": {"relax": True},
        "authors": {"time_limit": "terminal", "warmup_steps": 4000},
        "ars": ARS,
    }

    actor: GenotypeNetwork

    def __init__(
        self, suite: SuiteSpec, config: AgentConfig, plan: Plan, *, seed: int, device: str = "cpu"
    ) -> None:
        super().__init__(suite, config.for_run(suite, plan), plan, seed=seed, device=device)
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
        self.warming: set[tuple[int, int]] = set()
        """(task, env) whose episode under way began in the warm-up."""
        self.seconds["genetic"] = 0.0
        self._flying_wiring: Wiring | None = None
        self._best_wiring: Wiring | None = None
        self._flying_ids = np.zeros((tasks, 0), dtype=np.int32)
        self._drawn: dict[str, Wiring] = {}
        if config.update_genotype == "behaviour":
            self.extras_spec = {"genotype": ((), "int32")}
        self._balance_routes()

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

    def after_update(self, kept: Tensor) -> None:
        """Refresh the critics' route temperatures."""
        self._balance_routes()

    @torch.no_grad()
    def _balance_routes(self) -> None:
        for critic in (self.critic, self.target_critic):
            if isinstance(critic, RoutedNetwork):
                tau = route_temperature(self.log_alpha)
                critic.temperature.copy_(tau.expand_as(critic.temperature))

    # --------------------------------------------------------------------- which genotype is used

    def policy(self, obs: Tensor, phase: Phase, extras: Extras) -> tuple[Tensor, Extras]:
        """Gaussian parameters (T, B, 2A): exploring under each environment's genotype, greedy under
        each task's best, learning under those drawn for the update."""
        stored: Extras = {}
        if phase == "explore":
            wiring = self._flying(obs.shape[1])
            if self.extras_spec:
                stored = {"genotype": torch.from_numpy(self._flying_ids)}
        elif phase == "exploit":
            wiring = self._best()
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
        self._balance_routes()
        self.community.clear_fitness()
        self._forget()

    def step(self, loss: Tensor) -> None:
        """As SAC; relaxed decimals learn from the same backward pass."""
        super().step(loss)
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

    def _forget(self) -> None:
        """Populations or episodes changed: wirings made of them no longer hold."""
        self._flying_wiring = self._best_wiring = None

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
        warmup = self.steps < self.plan.warmup_steps
        with self._genetic():
            self.community.ask(task, env, warmup)
        (self.warming.add if warmup else self.warming.discard)((task, env))
        self._forget()

    def on_episode_end(self, episode: Episode) -> None:
        """Credit the genotype with its return; grow the task if it is stuck (Sec. 4.4)."""
        task, env = episode.task, episode.env
        with self._genetic():
            # First the growth: if this episode completes a generation, its offspring are longer.
            if self.evolution is not None and (task, env) not in self.warming:
                cause = self.evolution.record(task, episode.return_, episode.success)
                if cause is not None and self.community.stage[task] < self.config.max_stage:
                    self._lengthen(task, cause)
            learnt = None if self.relaxation is None else self.relaxation.rounded
            if self.community.tell(task, env, episode.return_, learnt):
                self._renew(task)
        self._forget()

    def _renew(self, task: int) -> None:
        """A task's genotypes are new: their decimals start from their bits."""
        if self.relaxation is not None:
            self.relaxation.renew(task)

    def _lengthen(self, task: int, cause: int) -> None:
        stage = self.community.lengthen(task)
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
        """Stages, their increases, populations, modules used, and the reachable weights."""
        stage = self.community.stage
        used = [
            modules_used(self.decoder.matrix(self.community.best(task).bits))
            for task in range(self.suite.num_tasks)
        ]
        return {
            "stage": stage.copy(),
            "stage_events": np.array(self.stage_events, dtype=np.int64).reshape(-1, 5),
            "cause_names": np.array(CAUSES),
            **self.community.probe(),
            "modules_used": np.array(used, dtype=np.float64),
            "weight_intervals": weight_intervals(
                int(stage.max()) + 1, self.precision, self.config.offset
            ),
            "precision": np.array(self.precision),
        }

    @classmethod
    def health(cls, history: History) -> list[Finding]:
        """SAC's verdicts, and whether genotypes and stages do what the paper means them to."""
        config = history.config
        assert isinstance(config, MEGAConfig)
        findings = super().health(history)
        if history.probes:
            last = history.probes[-1][1]
            late = [p for step, p in history.probes if step > history.plan.steps_per_task // 2]
            findings += [
                _diversity(history.tasks, late or [last]),
                *_clusters(last, config),
                _growth(history, last, config),
                *_after_growth(history, last, config),
                *_culled(last),
                *_dead_modules(late or [last], config),
                _clones(last),
            ]
        return findings

    def state_dict(self) -> dict[str, Any]:
        """SAC's state, the populations and the windows of growth."""
        evolution = None if self.evolution is None else self.evolution.state_dict()
        relaxed = None if self.relaxation is None else self.relaxation.state_dict()
        genetic = {
            "community": self.community.state_dict(),
            "evolution": evolution,
            "stage_events": self.stage_events,
            "warming": sorted(self.warming),
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
        self.warming = {(task, env) for task, env in genetic["warming"]}
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
        self.window, self.solved, self.progress = window, solved, progress
        self._episodes = [0] * tasks
        self._successes = [0] * tasks
        self._returns = [0.0] * tasks
        self._previous: list[float | None] = [None] * tasks
        self._resting = [False] * tasks

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


COLLAPSED = 0.05
"""Mean share of differing bits below which a population counts as one genotype; random: 0.5."""
SAME_NETWORK = 0.1
"""Mean difference of weights of tasks' best genotypes below which they are one network."""


def _diversity(tasks: tuple[str, ...], probes: list[dict[str, np.ndarray]]) -> Finding:
    """Whether the genotypes of a population still differ."""
    mean = np.mean([probe["hamming"] for probe in probes], axis=0)  # (T,)
    collapsed = mean < COLLAPSED
    share = 100 * mean.mean()
    words = f"genotypes of one task differ in {share:.0f} % of their bits (random ones: 50 %)"
    if not collapsed.any():
        return Finding("population", "good", words)
    return Finding(
        "population", "bad", f"collapsed in {listed(tasks, collapsed)}: {words}",
        "raise mutation_rate or population_size, or set clones=mutate",
    )  # fmt: skip


def _matrices(probe: dict[str, np.ndarray], config: MEGAConfig) -> list[NDArray[np.float64]]:
    """The weights of each task's best genotype, all of one size."""
    precision, rows = int(probe["precision"]), np.arange(len(probe["best"]))
    lengths = probe["lengths"][rows, probe["best"]]
    best = [
        bits[:size] for bits, size in zip(probe["genotypes"][rows, probe["best"]], lengths,
                                          strict=True)
    ]  # fmt: skip
    levels = max(stage_of(int(size), precision) for size in lengths) + 1
    return [weight_matrix(b, precision, config.weights, config.offset, levels) for b in best]


def _clusters(probe: dict[str, np.ndarray], config: MEGAConfig) -> Iterator[Finding]:
    """Whether the genotypes still tell the tasks apart."""
    flat = np.array([matrix.ravel() for matrix in _matrices(probe, config)])
    tasks, levels = len(flat), math.isqrt(flat.shape[1])
    if tasks < 2:
        return
    # Half the L1 distance of two levels is the share of their input that differs, 0 to 1.
    distance = np.abs(flat[:, None] - flat[None]).sum(-1) / 2 / levels
    mean = distance.sum() / (tasks * (tasks - 1))
    share = 100 * mean
    words = f"the best genotypes of two tasks weight {share:.0f} % of what modules read differently"
    if mean >= SAME_NETWORK:
        yield Finding("tasks apart", "good", words)
    elif config.task_identity != "genotype":
        yield Finding("tasks apart", "note", words)
    else:
        yield Finding(
            "tasks apart", "bad",
            f"all tasks are in one cluster: {words}, and the actor knows the task by nothing else",
            "raise crossover_cross_threshold and mutation_cross_threshold: tasks breed with each "
            "other less",
        )  # fmt: skip


def _growth(history: History, probe: dict[str, np.ndarray], config: MEGAConfig) -> Finding:
    """Whether stages come to rest."""
    stage, events = probe["stage"], probe["stage_events"]
    low, high = int(stage.min()), int(stage.max())
    words = f"stages {low} to {high}" if low < high else f"stage {low} in every task"
    if not config.evolve:
        return Finding("growth", "good", f"{words}, fixed")
    if (full := stage >= config.max_stage).any():
        return Finding(
            "growth", "bad", f"{listed(history.tasks, full)} stand at max_stage {config.max_stage}",
            "growth is unbounded: lower solved_threshold or progress_threshold, or lengthen window",
        )  # fmt: skip
    since = history.plan.steps_per_task * 3 // 4
    growing = np.isin(np.arange(len(stage)), events[events[:, 0] > since, 1])
    if growing.mean() > 0.5:
        return Finding(
            "growth", "note",
            f"{words}; {listed(history.tasks, growing)} grew in the last quarter of training",
            "no end of growth in sight; a larger window or a lower progress_threshold slows it",
        )  # fmt: skip
    return Finding(
        "growth", "good", f"{words}; {len(events)} increases, {growing.sum()} tasks grew late"
    )


def _after_growth(
    history: History, probe: dict[str, np.ndarray], config: MEGAConfig
) -> Iterator[Finding]:
    """What a stage increase did to training, a window of episodes before and after it."""
    span = (config.window or 1) * history.plan.horizon
    success, return_ = [], []
    for step, task, *_ in probe["stage_events"].tolist():
        before = (history.steps > step - span) & (history.steps <= step)
        after = (history.steps > step) & (history.steps <= step + span)
        if before.any() and after.any():
            success.append([np.nanmean(history.success[m, task]) for m in (before, after)])
            return_.append([np.nanmean(history.return_[m, task]) for m in (before, after)])
    if not success:
        return
    (s0, s1), (r0, r1) = np.mean(success, axis=0), np.mean(return_, axis=0)
    words = (
        f"over {len(success)} stage increases the success rate went from {s0:.2f} to {s1:.2f} and "
        f"the return from {r0:.0f} to {r1:.0f}, a window before to a window after"
    )
    dropped = s1 < s0 - 0.1 or (r0 > 0 and r1 < 0.8 * r0)
    yield Finding(
        "after growth", "bad" if dropped else "good", words,
        "growth=preserve keeps what was learnt" if dropped else "",
    )  # fmt: skip


def _culled(probe: dict[str, np.ndarray]) -> Iterator[Finding]:
    """Whether genotypes were replaced unseen."""
    if "gone" not in probe:  # runs of version 0.1 did not count them
        return
    gone, culled = int(probe["gone"].sum()), int(probe["culled"].sum())
    words = f"{culled} of {gone} replaced genotypes had run no episode that counted"
    if culled <= 0.05 * gone:
        yield Finding("evaluation", "good", words)
    else:
        yield Finding("evaluation", "bad", words, "use replace=at_optimise, or fewer environments")


def _dead_modules(probes: list[dict[str, np.ndarray]], config: MEGAConfig) -> Iterator[Finding]:
    """Whether some module is read by nobody."""
    used = np.zeros(int(probes[-1]["stage"].max()), dtype=bool)
    for probe in probes:
        for matrix in _matrices(probe, config):
            reached = modules_reached(matrix)
            used[: len(reached)] |= reached
    dead = [f"M_{k}" for k in np.flatnonzero(~used) + 1]
    if not dead:
        yield Finding("modules", "good", f"all {len(used)} modules feed some task's head")
    else:
        yield Finding(
            "modules", "note", f"{', '.join(dead)} of {len(used)} modules fed no task's head "
            "through weights above 0.01 in the second half of training",
        )  # fmt: skip


def _clones(probe: dict[str, np.ndarray]) -> Finding:
    """Whether breeding brings anything new."""
    rate = float(probe["clone_rate"].mean())
    words = f"{100 * rate:.0f} % of the children equalled a living genotype of their task"
    if rate <= 0.5:
        return Finding("clones", "good", words)
    advice = "a larger population_size or parents=before_drop gives crossover two parents"
    return Finding("clones", "note", words, advice)


class Wiring(NamedTuple):
    """Which modules run for which tasks, and what they read."""

    weights: Tensor
    """(T, G, L, L) for G = 1, or the B rows of each task. Of a task of depth D, row k - 1 weights
    m_0, m_1, .. (the columns) for M_k, and row D for the head: the last level (Departure 1)."""
    depth: tuple[int, ...]
    """(T,) modules of each task, largest first: the order of tasks inside the network."""
    order: Tensor | None
    """(T,) which task stands there; None: all in their own place."""
    place: Tensor | None
    """(T,) where each task stands; None: all in their own place."""
    idle: frozenset[int]
    """Modules that no head is connected with."""

    def reach(self, module: int) -> int:
        """How many tasks, from the first on, run M_module."""
        return sum(depth >= module for depth in self.depth)

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Runs of tasks of one depth: first, past the last, depth."""
        start = 0
        for stop in range(1, len(self.depth) + 1):
            if stop == len(self.depth) or self.depth[stop] != self.depth[start]:
                yield start, stop, self.depth[start]
                start = stop


class Decoder:
    """Genotypes by number to wirings; each genotype is decoded once."""

    def __init__(
        self, community: Community, function: Weighting, offset: float, device: torch.device
    ) -> None:
        self.community, self.function, self.offset = community, function, offset
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Forget all: the community's numbers mean other genotypes now."""
        self._known = np.zeros(0, dtype=bool)
        self._depth = np.zeros(0, dtype=np.int64)
        self._weights = np.zeros((0, 1, 1), dtype=np.float32)  # laid out as in `Wiring`
        self._needed = np.zeros((0, 1), dtype=bool)  # column k: is M_k connected with the head?

    def matrix(self, bits: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The weights of a genotype, (N + 1, N + 1), the head's last."""
        settings = self.community.settings
        return weight_matrix(bits, settings.precision, self.function, self.offset)

    def __call__(self, numbers: NDArray[np.integer[Any]]) -> Wiring:
        """The wiring of genotypes (T, G)."""
        for number in set(numbers.ravel().tolist()):
            if number >= len(self._known) or not self._known[number]:
                self._decode(number)
        depths = self._depth[numbers]  # (T, G)
        depth = depths.max(1)
        order = np.argsort(-depth, kind="stable")
        numbers, depths, depth = numbers[order], depths[order], depth[order]
        levels = int(depth[0]) + 1
        weights = self._weights[numbers][..., :levels, :levels]  # a copy
        needed = self._needed[numbers].any((0, 1))
        if (depths != depth[:, None]).any():  # shorter genotypes: their heads become the last level
            task, row = np.ogrid[: numbers.shape[0], : numbers.shape[1]]
            heads = weights[task, row, depths]
            weights[task, row, depths] = 0.0
            weights[task, row, depth[:, None]] = heads
        moved = bool((order != np.arange(len(order))).any())
        return Wiring(
            weights=torch.from_numpy(np.ascontiguousarray(weights)).to(self.device),
            depth=tuple(depth.tolist()),
            order=torch.from_numpy(order).to(self.device) if moved else None,
            place=torch.from_numpy(np.argsort(order)).to(self.device) if moved else None,
            idle=frozenset(k for k in range(1, levels) if not needed[k]),
        )

    def _decode(self, number: int) -> None:
        weights = self.matrix(self.community.table[number]).astype(np.float32)
        needed = weights[-1] > 0
        for module in range(len(weights) - 1, 0, -1):
            if needed[module]:
                needed |= weights[module - 1] > 0
        depth = int(np.flatnonzero(needed)[-1])
        weights[:-1][~needed[1:]] = 0.0
        weights[depth] = weights[-1]  # what lies between is connected with nothing
        self._make_room(number + 1, len(weights))
        levels = depth + 1
        self._weights[number, :levels, :levels] = weights[:levels, :levels]
        self._needed[number, :levels] = needed[:levels]
        self._depth[number] = depth
        self._known[number] = True

    def _make_room(self, count: int, levels: int) -> None:
        held, size = self._weights.shape[:2]
        more = max(count, 2 * held) - held if count > held else 0
        wider = max(levels - size, 0)
        if more or wider:
            self._weights = np.pad(self._weights, ((0, more), (0, wider), (0, wider)))
            self._needed = np.pad(self._needed, ((0, more), (0, wider)))
            self._depth = np.pad(self._depth, (0, more))
            self._known = np.pad(self._known, (0, more))


class Relaxation:
    """Real decimals of all living genotypes, trained beside the networks (Departure 8).

    A genotype's decimals d in [0, 2^p - 1] start from its bits; the actor's loss moves them through
    the weights of Eq. 7-9 whenever an update draws the genotype. Acting, evaluation and targets use
    them as they are. When a generation ends they are rounded to bits, on which the genetic
    algorithm goes on, and all start anew. A connection whose weight is exactly 0 is not there
    (Departure 7) and gets no gradient. An episode under way whose genotype was replaced ends with
    that genotype's bits.
    """

    def __init__(self, decoder: Decoder, lr: float) -> None:
        self.decoder, self.community = decoder, decoder.community
        self.precision = self.community.settings.precision
        self._optimizer = torch.optim.Adam([torch.zeros(0)], lr=lr)
        self._decimals: list[list[Tensor]] = [[] for _ in self.community.stage]
        for task in range(len(self._decimals)):
            self.renew(task)

    def renew(self, task: int) -> None:
        """Start a task's decimals from the bits of its genotypes."""
        for tensor in self._decimals[task]:
            self._optimizer.state.pop(tensor, None)
        self._decimals[task] = [
            torch.tensor(
                np.concatenate(decode(genotype.bits, self.precision)).astype(np.float32),
                device=self.decoder.device, requires_grad=True,
            )
            for genotype in self.community.population(task)
        ]  # fmt: skip
        self._optimizer.param_groups[0]["params"] = [t for ts in self._decimals for t in ts]

    @torch.enable_grad()
    def __call__(self, genotypes: list[list[Genotype]], wiring: Wiring) -> Wiring:
        """The wiring of genotypes [T][G], given that of their bits, with the decimals' weights."""
        weights = wiring.weights
        order = range(len(genotypes)) if wiring.order is None else wiring.order.tolist()
        values, places = [], []
        relaxed = torch.zeros(weights.shape[:2], dtype=torch.bool)
        for place, task in enumerate(order):
            for group, genotype in enumerate(genotypes[task]):
                decimals = self._of(task, genotype)
                stage = stage_of(len(genotype.bits), self.precision)
                if decimals is None or stage > wiring.depth[place]:  # its end is read by nothing
                    continue
                rows, columns = np.tril_indices(stage + 1)
                rows[rows == stage] = wiring.depth[place]  # the head's, as in `Wiring`
                relaxed[place, group] = True
                values.append(decimals)
                places.append(
                    np.ravel_multi_index((np.int64(place), np.int64(group), rows, columns),
                                         weights.shape)
                )  # fmt: skip
        if not values:
            return wiring
        table = torch.zeros(weights.numel(), dtype=torch.float64, device=weights.device)
        index = torch.from_numpy(np.concatenate(places)).to(weights.device)
        table = table.index_copy(0, index, torch.cat(values).double()).view_as(weights)
        new = self._normalised(table, weights > 0).to(weights.dtype)
        mask = relaxed[..., None, None].to(weights.device)
        return wiring._replace(weights=torch.where(mask, new, weights))

    def _of(self, task: int, genotype: Genotype) -> Tensor | None:
        for member, living in enumerate(self.community.population(task)):
            if living is genotype:
                return self._decimals[task][member]
        return None

    def _normalised(self, decimals: Tensor, present: Tensor) -> Tensor:
        """HalfSoftmax (Eq. 7-9) or Softmax along the last axis, over what is present; else zero."""
        largest = decimals.detach().amax(-1, keepdim=True)
        if self.decoder.function == "softmax":
            scaled = (decimals - largest).exp()
        else:
            # e^d - offset as (e^d - 1) + (1 - offset), divided by e^max: see `algorithms.genetic`.
            offset = self.decoder.offset
            scaled = -(decimals - largest).exp() * torch.expm1(-decimals)
            scaled = scaled + (1 - offset) * torch.exp(-largest)
            if offset == 1:
                scaled = torch.where(largest == 0, 1.0, scaled)
        scaled = scaled * present
        total = scaled.sum(-1, keepdim=True)
        return scaled / torch.where(total == 0, 1.0, total)

    @torch.no_grad()
    def step(self) -> None:
        """Learn from the gradients of the last backward pass."""
        self._optimizer.step()
        self._optimizer.zero_grad()
        for tensor in self._optimizer.param_groups[0]["params"]:
            tensor.clamp_(0, 2**self.precision - 1)

    def rounded(self, task: int, member: int) -> NDArray[np.uint8]:
        """The bits (L,) nearest to a living genotype's decimals."""
        decimals = self._decimals[task][member].detach().cpu().numpy()
        return encode(np.rint(decimals).astype(np.int64), self.precision)

    def state_dict(self) -> dict[str, Any]:
        """Decimals and their optimiser's state."""
        return {
            "decimals": [[t.detach() for t in task] for task in self._decimals],
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, after the community's."""
        with torch.no_grad():
            for task, saved in enumerate(state["decimals"]):
                self.renew(task)
                for tensor, values in zip(self._decimals[task], saved, strict=True):
                    tensor.copy_(values)
        self._optimizer.load_state_dict(state["optimizer"])


class GenotypeModule(nn.Module):
    """M_i: W -> module width -> W, ReLU after both (Sec. 4.1, Table 2)."""

    def __init__(self, width: int, module_width: int, *, copies: int, layer_norm: bool) -> None:
        super().__init__()
        self.inner = Linear(width, module_width, copies=copies)
        self.outer = Linear(module_width, width, copies=copies)
        self.inner_norm = LayerNorm(module_width, copies=copies) if layer_norm else None
        self.outer_norm = LayerNorm(width, copies=copies) if layer_norm else None


class TaskEmbedding(nn.Module):
    """A learned vector of each task."""

    def __init__(self, tasks: int, width: int, *, copies: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(copies, tasks, 1, width))

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw the parameters as those of a linear layer with T inputs and no bias."""
        _, tasks, _, width = self.weight.shape
        draw([self.weight], torch.empty(0), tasks, width, False, scheme, generator)


class GenotypeNetwork(nn.Module):
    """Eq. 3 and 4 and the head, for tasks whose genotypes differ in weights and depth.

    Tasks stand in order of depth, so that M_k runs once, on the slice of tasks that reach it: the
    time of a task is that of its own modules. Modules are evaluated by `_Stack`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        modules: int,
        *,
        tasks: int,
        copies: int = 1,
        width: int = 400,
        module_width: int = 128,
        residual: bool = False,
        task_identity: Literal["genotype", "embedding", "head"] = "genotype",
        layer_norm: bool = False,
    ) -> None:
        """Sizes as in MEGA Table 2. ``layer_norm``: a LayerNorm before every ReLU."""
        super().__init__()
        self.width, self.module_width, self.residual = width, module_width, residual
        self.copies, self.layer_norm = copies, layer_norm
        self.embedding = mlp(inputs, [width, width], None, copies=copies, layer_norm=layer_norm)
        self.task_embedding = (
            TaskEmbedding(tasks, width, copies=copies) if task_identity == "embedding" else None
        )
        self.stack = nn.ModuleList()
        for _ in range(modules):
            self.append()
        self.head: nn.Module = (
            TaskLinear(tasks, width, outputs, copies=copies, last=True)
            if task_identity == "head"
            else Linear(width, outputs, copies=copies, last=True)
        )
        self._scratch = Scratch()

    def append(self) -> nn.Module:
        """Add the next module, its parameters not yet drawn, and return it."""
        module = GenotypeModule(
            self.width, self.module_width, copies=self.copies, layer_norm=self.layer_norm
        )
        self.stack.append(module)
        self._scratch = Scratch()  # buffers of the old size will not be asked for again
        return module

    def forward(self, x: Tensor, wiring: Wiring) -> Tensor:
        """Outputs (C, T, B, outputs) at x (C or 1, T, B, inputs)."""
        if wiring.order is not None:
            x = x.index_select(1, wiring.order)
        first = self.embedding(x)  # (C, T, B, W), m_0, tasks in the wiring's order from here ...
        if self.task_embedding is not None:
            vectors = self.task_embedding.weight
            first = first + (
                vectors if wiring.order is None else vectors.index_select(1, wiring.order)
            )
        mixed: Tensor = _Stack.apply(  # type: ignore[no-untyped-call]
            first, wiring.weights, wiring, self._scratch, self.residual, torch.is_grad_enabled(),
            *(p for module in self.stack[: wiring.depth[0]] for p in module.parameters()),
        )  # fmt: skip
        output: Tensor = self.head(mixed)  # ... to here
        return output


class _Stack(torch.autograd.Function):
    """All modules and the head's mixture, with a backward pass by hand.

    Outputs m_0 .. m_N lie in one buffer ``m`` (L, C, T, B, W), so a mixture is one batched product
    of weights (1 x i) and outputs (i x B W) for each task. Inputs of M_1 .. M_N lie in ``x``; once
    the gradients of M_i are taken, its input gives way to the gradient at that input. The head's is
    the last level: of tasks of depth D, the gradient at their head's input stands in x[D]. So the
    gradient at m_j is again one product, with the levels after j; and that at the weight with which
    M_i reads m_j is the inner product of the gradient at M_i's input and m_j.
    """

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        weights: Tensor,
        wiring: Wiring,
        scratch: Scratch,
        residual: bool,
        learning: bool,
        *parameters: Tensor,
    ) -> Tensor:
        levels = wiring.depth[0] + 1
        shape = (levels, *first.shape)
        buffers = scratch.take(first, shape), scratch.take(first, shape)
        m, x = (b[: math.prod(shape)].view(shape) for b in buffers)
        m[0] = first
        modules = _modules(parameters, levels - 1)
        run: list[_Run | None] = []
        for i, (inner, outer) in enumerate(modules, start=1):
            n = wiring.reach(i)
            if i in wiring.idle:
                m[i, :, :n] = 0
                run.append(None)
                continue
            _mix(weights[:n, :, i - 1, :i], m[:i, :, :n], x[i - 1, :, :n])
            inputs, outputs = _rows(x[i - 1], n), _rows(m[i], n)
            h, normed_in = _dense(inputs, inner)
            _, normed_out = _dense(h, outer, out=outputs)
            active = outputs > 0 if residual and learning else None
            run.append(_Run(h, active, normed_in, normed_out))
            if residual:
                outputs += inputs
        mixed = torch.empty_like(first)
        for a, b, d in wiring.blocks():
            _mix(weights[a:b, :, d, : d + 1], m[: d + 1, :, a:b], mixed[:, a:b])
        if wiring.place is not None:
            mixed = mixed.index_select(1, wiring.place)
        if learning:
            ctx.save_for_backward(weights, *parameters)
            ctx.wiring, ctx.scratch, ctx.residual = wiring, scratch, residual
            ctx.buffers, ctx.m, ctx.x, ctx.run = buffers, m, x, run
        else:
            scratch.give(*buffers)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.buffers is None:
            raise RuntimeError("the modules' backward pass can run once only")
        weights, *parameters = ctx.saved_tensors
        wiring: Wiring = ctx.wiring
        m, x = ctx.m, ctx.x
        modules = _modules(parameters, len(m) - 1)
        g_weights = torch.zeros_like(weights) if ctx.needs_input_grad[1] else None
        if wiring.order is not None:
            gradient = gradient.index_select(1, wiring.order)
        for a, b, d in wiring.blocks():
            x[d, :, a:b] = gradient[:, a:b]
            if g_weights is not None:
                _credit(g_weights[a:b, :, d, : d + 1], m[: d + 1, :, a:b], x[d, :, a:b])

        def pull(source: int) -> Tensor:
            """The gradient at m_source, (C, n, B, W), from all levels after it."""
            pulled: Tensor = m.new_empty(m.shape[1], wiring.reach(source), *m.shape[3:])
            for a, b, d in wiring.blocks():
                if d >= source:
                    readers = weights[a:b, :, source : d + 1, source]
                    _mix(readers, x[source : d + 1, :, a:b], pulled[:, a:b])
            return pulled

        each = len(parameters) // max(len(modules), 1)
        learned: list[Tensor | None] = [None] * len(parameters)
        learning = any(ctx.needs_input_grad[6:])
        for i in range(len(modules), 0, -1):
            n, run = wiring.reach(i), ctx.run[i - 1]
            if run is None:
                x[i - 1, :, :n] = 0
                continue
            inner, outer = modules[i - 1]
            inputs, outputs = _rows(x[i - 1], n), _rows(m[i], n)
            arriving = pull(i).flatten(1, 2)  # (C, n B, W)
            if run.active is None:
                g_out = torch.ops.aten.threshold_backward(arriving, outputs, 0)
            else:
                g_out = arriving * run.active
            g_h, of_outer = _dense_backward(g_out, run.hidden, outer, run.normed_out, learning)
            g_h = torch.ops.aten.threshold_backward(g_h, run.hidden, 0)
            _, of_inner = _dense_backward(g_h, inputs, inner, run.normed_in, learning, out=inputs)
            # In the order in which a module lists its parameters: `_modules`.
            learned[each * (i - 1) : each * i] = [
                *of_inner[:2], *of_outer[:2], *of_inner[2:], *of_outer[2:]
            ]  # fmt: skip
            if ctx.residual:
                inputs += arriving
            if g_weights is not None:
                _credit(g_weights[:n, :, i - 1, :i], m[:i, :, :n], x[i - 1, :, :n])
        g_first = pull(0) if ctx.needs_input_grad[0] else None
        ctx.scratch.give(*ctx.buffers)
        ctx.buffers = ctx.m = ctx.x = None
        return g_first, g_weights, None, None, None, None, *learned


class _Layer(NamedTuple):
    """A linear layer's parameters, with those of the LayerNorm behind it where there is one."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None


_Normed = tuple[Tensor, Tensor, Tensor, Tensor]
"""What LayerNorm's backward pass needs: its input, the normalised input, mean and 1 / deviation."""


class _Run(NamedTuple):
    """What a module that ran leaves for its backward pass."""

    hidden: Tensor
    active: Tensor | None
    """Where its last ReLU let through; None: where its output is positive."""
    normed_in: _Normed | None
    normed_out: _Normed | None


def _modules(parameters: Sequence[Tensor], count: int) -> list[tuple[_Layer, _Layer]]:
    """The inner and the outer layer of each `GenotypeModule`, from their parameters in a row."""
    each = len(parameters) // max(count, 1)
    layers = []
    for start in range(0, len(parameters), each):
        w_in, b_in, w_out, b_out, *norms = parameters[start : start + each]
        inner, outer = (norms[:2], norms[2:]) if norms else ((None, None), (None, None))
        layers.append((_Layer(w_in, b_in, *inner), _Layer(w_out, b_out, *outer)))
    return layers


def _dense(
    inputs: Tensor, layer: _Layer, out: Tensor | None = None
) -> tuple[Tensor, _Normed | None]:
    """ReLU(LayerNorm(inputs W + b)) on rows (C, R, W)."""
    if layer.scale is None or layer.shift is None:
        pre = torch.baddbmm(layer.bias, inputs, layer.weight, out=out)
        return pre.relu_(), None
    pre = torch.baddbmm(layer.bias, inputs, layer.weight)
    hat, mean, deviation = torch.native_layer_norm(pre, [pre.shape[-1]], None, None, 1e-5)
    normed = torch.addcmul(layer.shift[:, 0], hat, layer.scale[:, 0], out=out)
    return normed.relu_(), (pre, hat, mean, deviation)


def _dense_backward(
    gradient: Tensor,
    inputs: Tensor,
    layer: _Layer,
    normed: _Normed | None,
    learning: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """From the gradient before the ReLU: that at the inputs, and those of the layer's parameters.

    ``out`` may be the inputs themselves.
    """
    of_norm: list[Tensor | None] = []
    if normed is not None and layer.scale is not None:
        pre, hat, mean, deviation = normed
        of_norm = [None, None]
        if learning:
            of_norm = [
                (gradient * hat).sum(1, keepdim=True)[:, None],
                gradient.sum(1, keepdim=True)[:, None],
            ]
        gradient = torch.ops.aten.native_layer_norm_backward(
            gradient * layer.scale[:, 0], pre, [pre.shape[-1]], mean, deviation,
            None, None, [True, False, False],
        )[0]  # fmt: skip
    of_linear: list[Tensor | None] = [None, None]
    if learning:
        of_linear = [
            torch.bmm(inputs.transpose(1, 2), gradient), gradient.sum(1, keepdim=True)
        ]  # fmt: skip
    return torch.bmm(gradient, layer.weight.transpose(1, 2), out=out), of_linear + of_norm


def _rows(level: Tensor, tasks: int) -> Tensor:
    """The rows of the first tasks: (C, T, B, W) -> (C, tasks * B, W), a view."""
    rows = level.shape[2]
    return level.flatten(1, 2)[:, : tasks * rows]


def _mix(weights: Tensor, sources: Tensor, out: Tensor) -> None:
    """out = sum over the first axis of sources (K, C, n, B, W), weighted (n, G, K), for G | B."""
    n, groups, k = weights.shape
    weights = weights.reshape(n * groups, 1, k)
    for c in range(out.shape[0]):
        stacked = sources[:, c].reshape(k, n * groups, -1).transpose(0, 1)
        torch.bmm(weights, stacked, out=out[c].view(n * groups, 1, -1))


def _credit(g_weights: Tensor, sources: Tensor, gradient: Tensor) -> None:
    """Write what `_mix`'s weights (n, G, K) are owed for a gradient at its output (C, n, B, W)."""
    n, groups, k = g_weights.shape
    owed = gradient.new_zeros(n * groups, 1, k)
    for c in range(gradient.shape[0]):
        stacked = sources[:, c].reshape(k, n * groups, -1).permute(1, 2, 0)
        owed.baddbmm_(gradient[c].reshape(n * groups, 1, -1), stacked)
    g_weights.copy_(owed.view(n, groups, k))
