"""What every registered algorithm must do, whatever it is."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from begun import begun

import algorithms
import suites
from algorithms.agent import Action, Agent, Batch
from algorithms.mt_sac import MTSAC
from algorithms.sac import SAC, frozen, learned
from bench.evaluate import evaluate
from bench.spec import RunSpec, SpecError
from bench.store import RunStore
from bench.train import Interrupted, train

ToySpec = Callable[..., RunSpec]
Open = Callable[[Path, RunSpec], RunStore]
Measured = Callable[[RunStore], dict[str, bytes]]

LEARN = {
    "gamma": 0.9, "tau": 0.02, "reward_scale": 1.0, "actor_lr": 3e-3, "critic_lr": 3e-3,
    "alpha_lr": 3e-2, "batch_per_task": 32, "width": 64, "module_width": 32, "router_width": 32,
    "init": "torch", "critic_layer_norm": False, "reward_balance": None,
}  # fmt: skip
"""Settings under which the toy suite is learnt quickly."""


def fields(algorithm: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of ``values`` that the protocol or the algorithm has."""
    config = algorithms.load(algorithm).Config.model_fields
    return {k: v for k, v in values.items() if k in config or k == "batch_per_task"}


WITHOUT_EFFECT = [
    ("d2r@no_resrouting", {"resroute_threshold": "at_least"}),
    ("d2r@no_balance", {"tau_scale_by_T": False}),
    ("d2r@no_samplek", {"route_balance": False}),
    ("d2r@soft", {"target_routing": True}),
    ("d2r@soft", {"critic_route": "stored"}),
    ("moore@not_orthogonal", {"eps": 1e-6}),
    ("paco", {"extreme_loss": None, "reset_extreme": False}),
    ("mt_sac", {"reward_balance": None, "reward_balance_every": 50}),
    ("mt_sac", {"extreme_loss": None, "extreme_loss_weighted": True}),
    ("sac", {"loss_weight": "alpha"}),
    ("sac", {"extreme_loss": 10.0}),
    ("sac", {"extreme_loss_weighted": True}),
    ("d2r@printed", {"resrouting": False}),
    ("mega@softmax", {"offset": 0.5}),
]


@pytest.mark.parametrize(("label", "values"), WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(
    label: str, values: dict[str, Any], toy_spec: ToySpec
) -> None:
    with pytest.raises(SpecError, match="has no effect: "):
        toy_spec(label, **values)
    toy_spec(label)


@pytest.mark.parametrize("label", ["sac", "mt_sac", "mt_sac@ars"])
def test_what_is_off_may_be_said_to_be_off(label: str, toy_spec: ToySpec) -> None:
    toy_spec(label, extreme_loss=None, loss_weight="none", reward_balance=None)


def observations(rows: int, seed: int = 0) -> np.ndarray:
    """(3, rows, 39) as the toy suite's."""
    rng = np.random.default_rng(seed)
    obs = np.zeros((3, rows, 39), np.float32)
    obs[..., :2], obs[..., 36:38] = rng.uniform(-0.9, 0.9, (2, 3, rows, 2))
    return obs


def make_batch(agent: Agent, rows: int, seed: int = 0) -> Batch:
    """Random transitions, with what the agent itself stores beside them."""
    rng = np.random.default_rng(seed)
    obs, next_obs = observations(rows, seed), observations(rows, seed + 1)
    acts = [agent.act(obs[:, row : row + 1], explore=True) for row in range(rows)]
    extras = {
        name: torch.from_numpy(np.concatenate([act.extras[name] for act in acts], 1))
        for name in acts[0].extras
    }
    for name, (shape, dtype) in agent.extras_spec.items():
        assert extras[name].shape == (3, rows, *shape)
        assert extras[name].numpy().dtype == dtype
    assert extras.keys() == agent.extras_spec.keys()
    shape = (3, rows, 1)
    return Batch(
        obs=torch.from_numpy(obs),
        action=torch.from_numpy(rng.uniform(-1, 1, (3, rows, 4)).astype(np.float32)),
        reward=torch.from_numpy(rng.uniform(0, 10, shape).astype(np.float32)),
        next_obs=torch.from_numpy(next_obs),
        terminated=torch.zeros(shape),
        truncated=torch.from_numpy((rng.random(shape) < 0.1).astype(np.float32)),
        mean_reward=torch.tensor([5.0, 4.0, 3.0]).view(3, 1, 1),
        extras=extras,
    )


def same(a: Any, b: Any, where: str = "state") -> None:
    """Nested states are equal to the bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{number}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, err_msg=where)
    else:
        assert a == b, where


# --------------------------------------------------------------------------------- whole runs


@pytest.fixture
def undisturbed(algorithm: str, finished: Callable[[str], RunStore]) -> RunStore:
    """A small run of the algorithm from start to end."""
    return finished(algorithm)


def final_agent(store: RunStore) -> dict[str, Any]:
    loaded = store.load_checkpoint()
    assert loaded is not None
    state: dict[str, Any] = loaded[1]["agent"]
    return state


def test_an_interrupted_run_repeats_an_undisturbed_one_to_the_byte(
    algorithm: str, undisturbed: RunStore, toy_spec: ToySpec, open_store: Open,
    measured: Measured, tmp_path: Path,
) -> None:  # fmt: skip
    """Two runs are equal; stopping and going on changes nothing, nor does global randomness."""
    spec = toy_spec(algorithm)
    store = open_store(tmp_path, spec)
    boundaries = 0

    def stop() -> bool:
        nonlocal boundaries
        boundaries += 1
        return boundaries in (1, 4, 5, 9)  # also in the warm-up, and twice in a row

    for seed in range(5):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        if seed < 4:
            with pytest.raises(Interrupted):
                train(spec, store, stop=stop)
            assert store.status()["state"] == "interrupted"
        else:
            train(spec, store, stop=stop)
    assert store.done
    assert measured(store) == measured(undisturbed)
    same(final_agent(store), final_agent(undisturbed))


def test_evaluating_more_seldom_changes_nothing_else(
    algorithm: str, undisturbed: RunStore, toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    spec = toy_spec(algorithm, eval_every=250, eval_episodes=1, final_episodes=2)
    store = open_store(tmp_path, spec)
    train(spec, store)
    often, seldom = (pd.read_csv(s.path / "metrics.csv") for s in (undisturbed, store))
    assert set(often.kind) == {"train", "update", "eval", "final"}
    assert set(seldom.kind) == {"train", "update", "final"}
    of_training = ["train", "update"]
    pd.testing.assert_frame_equal(
        often[often.kind.isin(of_training)].reset_index(drop=True),
        seldom[seldom.kind.isin(of_training)].reset_index(drop=True),
    )
    same(final_agent(store), final_agent(undisturbed))


def test_another_seed_gives_another_run(algorithm: str, toy_spec: ToySpec) -> None:
    first, second = (begun(toy_spec(algorithm), seed=seed) for seed in (0, 1))
    obs = observations(1)
    assert not np.array_equal(first.act(obs, True).action, second.act(obs, True).action)
    assert not np.array_equal(first.act(obs, False).action, second.act(obs, False).action)


@pytest.mark.usefixtures("algorithm")
def test_the_run_has_what_reports_need(undisturbed: RunStore) -> None:
    metrics = pd.read_csv(undisturbed.path / "metrics.csv")
    assert np.isfinite(metrics["value"]).all()
    updates = metrics[metrics.kind == "update"]
    assert {"critic_loss", "actor_loss", "alpha", "entropy", "masked"} <= set(updates.metric)
    # Every update is counted once, for each metric and task.
    counted = updates.groupby(["metric", "task"])["count"].sum()
    assert (counted == 175).all()
    episodes = metrics[(metrics.kind == "train") & (metrics.metric == "success")]
    assert (episodes.groupby("task")["count"].sum() == 10).all()
    for path in undisturbed.probe_path.glob("*.npz"):
        with np.load(path) as arrays:
            assert all(arrays[name].dtype != object for name in arrays)


# ------------------------------------------------------------------------------- the agent alone


def test_saved_and_loaded_it_continues_as_if_never_stopped(
    algorithm: str, toy_spec: ToySpec
) -> None:
    agent = begun(toy_spec(algorithm))
    batches = [make_batch(agent, 8, seed) for seed in range(6)]
    for batch in batches[:3]:
        agent.update(batch)
    buffer = io.BytesIO()
    torch.save(agent.state_dict(), buffer)
    buffer.seek(0)
    other = begun(toy_spec(algorithm), seed=77)  # all that differs must come from the state
    other.load_state_dict(torch.load(buffer, weights_only=True))
    same(other.state_dict(), agent.state_dict())
    for number, batch in enumerate(batches[3:]):
        same(agent.update(batch), other.update(batch))
        obs = observations(1, number)
        same(agent.act(obs, True)._asdict(), other.act(obs, True)._asdict())
        same(agent.act(obs, False)._asdict(), other.act(obs, False)._asdict())
    same(agent.probe(), other.probe())
    same(other.state_dict(), agent.state_dict())


def test_resets_start_networks_anew_and_continue_exactly(algorithm: str, toy_spec: ToySpec) -> None:
    """Two resets over 250 steps: due from steps 84 and 167 on."""
    spec = toy_spec(algorithm, resets=2, critic_layer_norm=True)
    assert spec.protocol.steps_per_task == 250
    agent = begun(spec)
    batches = [make_batch(agent, 8, seed) for seed in range(4)]
    agent.steps = 83
    agent.update(batches[0])
    assert agent.resets_done == 0
    used = copy.deepcopy(agent.state_dict())
    agent.steps = 84
    agent.log_alpha.data -= 3
    agent.update(batches[1])
    assert agent.resets_done == 1
    for network in ("actor", "critic"):
        same_as_before = [
            torch.equal(parameter, used[network][name])
            for name, parameter in getattr(agent, network).named_parameters()
            if parameter.requires_grad
        ]
        assert not any(same_as_before)
    assert agent.log_alpha.abs().max() < 0.1
    steps = {int(s["step"]) for s in agent.actor_optimizer.state_dict()["state"].values()}
    assert steps == {1}

    other = begun(spec, seed=77)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    for each in (agent, other):
        each.update(batches[2])
        assert each.resets_done == 1
        each.steps = 249
        each.update(batches[3])
        assert each.resets_done == 2
        each.update(batches[0])
        assert each.resets_done == 2
    same(agent.state_dict(), other.state_dict())


def test_updates_that_follow_a_reset_are_made_before_the_new_actor_acts(
    toy_spec: ToySpec, open_store: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toy_spec("mt_sac", resets=2, reset_updates=40)
    acted_after: list[int] = []
    act = MTSAC.act

    def observed(self: MTSAC, obs: np.ndarray, explore: bool) -> Action:
        if explore:
            acted_after.append(self.updates)
        return act(self, obs, explore)

    monkeypatch.setattr(MTSAC, "act", observed)
    train(spec, open_store(tmp_path, spec))
    made = np.diff(acted_after)
    assert (made == 40).sum() == 2
    assert set(made.tolist()) == {0, 1, 40}  # none in the warm-up
    assert acted_after.index(acted_after[-1]) > 167


def test_acting_greedily_leaves_no_trace(algorithm: str, toy_spec: ToySpec) -> None:
    agent = begun(toy_spec(algorithm))
    before = copy.deepcopy(agent.state_dict())
    obs = observations(1)
    first = agent.act(obs, explore=False)
    agent.trace(observations(5))
    agent.probe()
    same(agent.act(obs, explore=False)._asdict(), first._asdict())
    same(agent.state_dict(), before)
    assert first.action.shape == (3, 1, 4)
    assert first.action.dtype == np.float32
    assert (np.abs(first.action) <= 1).all()


def test_no_parameter_is_left_out_of_training(algorithm: str, toy_spec: ToySpec) -> None:
    """Every parameter of actor and critic moves, unless the algorithm's paper freezes it."""
    agent = begun(toy_spec(algorithm))
    before = {n: copy.deepcopy(getattr(agent, n).state_dict()) for n in ("actor", "critic")}
    for seed in range(4):
        agent.update(make_batch(agent, 8, seed))
    for network, old in before.items():
        moved = {
            name: not torch.equal(p, old[name])
            for name, p in getattr(agent, network).named_parameters()
        }
        assert all(moved.values()), [name for name, yes in moved.items() if not yes]


def test_actor_gets_the_gradient_of_the_critic_that_a_row_has(
    algorithm: str, toy_spec: ToySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled loops leave the other one out; tensor operations take both back."""
    agent = begun(toy_spec(algorithm))
    assert isinstance(agent, SAC)
    batch, noise, found = make_batch(agent, 24), agent.noise.get_state(), []
    draws = torch.rand(2, 3, 24, 1, generator=torch.Generator().manual_seed(5))
    for compiled in (True, False):
        monkeypatch.setattr("algorithms.nn.COMPILED", compiled)
        agent.noise.set_state(noise)
        action = batch.action.clone().requires_grad_()
        with frozen(learned(agent.critic_optimizer)):
            q = agent.value(agent.critic, batch.obs, action, "policy")
        (q * (draws == draws.amin(0))).sum().backward()
        found.append(action.grad)
    ours, theirs = found
    assert theirs is not None
    largest = float(theirs.abs().max())
    assert largest > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * largest)


UPDATES = {"hard_routing": 1000}
"""Updates until the bandit is learnt, 200 elsewhere."""


def test_learns_a_bandit_per_task(algorithm: str, toy_spec: ToySpec) -> None:
    """The quick version of learning: episodes of one step, and another best action per task."""
    best = torch.tensor([[0.6, 0.0], [-0.3, 0.5], [-0.3, -0.5]]).view(3, 1, 2)

    def reward(action: torch.Tensor) -> torch.Tensor:
        return 5 - 5 * (action[..., :2] - best).square().sum(-1, keepdim=True)

    settings = {
        "init": "torch", "actor_lr": 1e-2, "critic_lr": 1e-2, "alpha_lr": 1e-2,
        "target_entropy": -8.0, "width": 32, "module_width": 16, "router_width": 16,
    }  # fmt: skip
    agent = begun(toy_spec(algorithm, **fields(algorithm, LEARN | settings)))
    batch = make_batch(agent, 32)._replace(terminated=torch.ones(3, 32, 1))

    def earned() -> torch.Tensor:
        greedy = [agent.act(batch.obs[:, n : n + 1].numpy(), False).action for n in range(8)]
        return reward(torch.from_numpy(np.concatenate(greedy, 1))).mean((1, 2))

    untrained, last = earned(), []
    g = torch.Generator().manual_seed(0)
    for left in range(UPDATES.get(algorithm, 200), 0, -1):
        action = 2 * torch.rand(3, 32, 4, generator=g) - 1
        agent.update(batch._replace(action=action, reward=reward(action)))
        if left in (41, 31, 21, 11, 1):  # at this rate one update more or less is 0.1
            last.append(earned())
    learnt = torch.stack(last).mean(0)
    assert (learnt > (untrained + 0.4).clamp(max=4.8)).all(), (
        f"{learnt} after {untrained}; the best is 5"
    )
    assert learnt.mean() > 4.2, "one action for all tasks earns 3.3"


@pytest.mark.slow
def test_learns_the_toy_suite(
    algorithm: str, toy_spec: ToySpec, open_store: Open, tmp_path: Path
) -> None:
    spec = toy_spec(
        algorithm, steps_per_task=3000, warmup_steps=100, eval_every=1500, eval_episodes=10,
        final_episodes=30, replay_per_task=3000, **fields(algorithm, LEARN),
    )  # fmt: skip
    suite = spec.make_suite()
    untrained = begun(spec)
    envs = suite.make(seed=0, autoreset=False)
    before = evaluate(lambda o: untrained.act(o, False).action, envs, 30, spec.protocol.eval_seed)
    store = open_store(tmp_path, spec)
    train(spec, store)
    metrics = pd.read_csv(store.path / "metrics.csv")
    final = metrics[(metrics.kind == "final") & (metrics.metric == "success")]
    rate = final["value"].sum() / final["count"].sum()
    print(f"{algorithm}: {before.success.mean():.2f} -> {rate:.2f}")
    assert before.success.mean() < 0.2
    assert rate > before.success.mean() + 0.4
    assert (final["value"] / final["count"] > 0.2).all(), "every task is learnt, not one alone"


# --------------------------------------------------------------------------------- parameters

PUBLISHED = {
    ("mt_sac", 10): (664_808, 663_601),
    ("mt_sac", 50): (680_808, 679_601),
    ("mtmh_sac", 10): (693_680, 667_210),
    ("mtmh_sac", 50): (838_000, 699_250),
    ("d2r", 10): (684_250, 684_947),
    ("d2r", 50): (700_290, 700_987),
    ("soft_module", 10): (792_444, 793_141),
    ("soft_module", 50): (808_444, 809_141),
    ("soft_module@shallow", 10): (691_022, 690_823),
    ("soft_module@shallow", 50): (707_022, 706_823),
    ("care", 10): (558_798, 672_535),
    ("care", 50): (574_798, 688_535),
    ("paco", 10): (1_700_090, 1_694_005),
    ("paco", 50): (1_700_290, 1_694_005),
    ("mega", 10): (488_392, 684_947),
    ("mega", 50): (488_392, 700_987),
    # No paper counts these; the README and the algorithms' files do.
    ("care@textbook", 10): (590_398, 704_135),
    ("care@original", 10): (397_114, 436_907),
    ("moore", 10): (1_379_320, 1_357_650),
    ("moore", 50): (2_181_500, 2_050_750),
    ("mixture_of_experts", 10): (2_738_852, 2_735_048),
    ("mixture_of_experts", 50): (2_813_092, 2_809_288),
    ("hard_routing", 10): (585_048, 585_585),
    ("hard_routing", 50): (601_688, 601_585),
    ("sac", 10): (3_400_080, 3_388_010),
}
"""Actor and one critic, at the papers' sizes: D2R Table 8, MEGA at stage 3."""


def test_the_readmes_table_of_algorithms_is_true() -> None:
    """Every algorithm has its row: its file, variants that exist, the number of parameters."""
    root = Path(__file__).resolve().parent.parent
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (root / "README.md").read_text(encoding="utf-8").splitlines()
        if "](algorithms/" in line
    ]
    found = [re.fullmatch(r"\[`(\w+)`\]\((algorithms/\w+\.py)\)", row[0]) for row in rows]
    named = {match[1]: match[2] for match in found if match}
    files = {
        n: t.partition(":")[0].replace(".", "/") + ".py" for n, t in algorithms.table().items()
    }
    assert named == {name: files[name] for name in named}
    assert set(named) == set(files)
    for name, (_, _, variants, parameters) in zip(named, rows, strict=True):
        for variant in re.findall(r"`(\w+)`", variants):
            RunSpec.resolve(f"{name}@{variant}", "mt10_rand", 0)
        for tasks, millions in zip((10, 50), re.findall(r"([\d.]+) M", parameters), strict=True):
            if (name, tasks) in PUBLISHED:
                exact = sum(PUBLISHED[name, tasks]) / 1e6
                assert abs(float(millions) - exact) <= 0.005, f"{name}: {exact}"


@pytest.mark.parametrize(("label", "tasks"), list(PUBLISHED))
def test_parameter_counts_are_the_published_ones(label: str, tasks: int) -> None:
    overrides = {"start_stage": 3} if label == "mega" else {}
    spec = RunSpec.resolve(label, f"mt{tasks}_rand", 0, preset_name="paper", overrides=overrides)
    agent = begun(spec)
    counts = agent.parameter_counts()
    assert (counts["actor"], counts["critic"]) == PUBLISHED[label, tasks]
    assert suites.load(f"mt{tasks}_rand").spec.num_tasks == tasks
