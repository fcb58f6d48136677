"""Updates of public implementations beside ours, for docs/benchmarks.md.

    git clone https://github.com/DarkDawn233/D2R_MTRL             and check out 48d3ed5
    git clone https://github.com/RchalYang/Soft-Module            ... e6d7c8a
    git clone https://github.com/rainx0r/metaworld-algorithms     ... 30c9991
    pip install gym==0.26.2 jax flax optax distrax orbax-checkpoint jaxtyping wandb
    python docs/benchmarks/peers.py D2R_MTRL Soft-Module metaworld-algorithms

Each argument is a folder of that name. Its networks and its update function are called as they are,
at the papers' sizes, on 1,280 rows of MT10, and take turns with ours, five rounds; a figure is the
least of five medians. A process each, bound to as many cores as it may use threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

TASKS, ROWS, STATE, ACTION = 10, 128, 39, 4
"""MT10's tasks, rows of each, numbers in a state (without the task's id) and in an action."""


class Peer(NamedTuple):
    """What is compared with one of our algorithms."""

    what: str
    label: str
    """Ours."""
    parameters: int
    """Of its actor and one critic."""
    update: Callable[[], Any]
    act: Callable[[], Any] | None = None
    """On one observation of each task."""


def batch() -> dict[str, Any]:
    """Rows of every task, (rows, tasks, ...), as the PyTorch implementations store them."""
    import numpy as np

    rng = np.random.default_rng(0)
    one_hot = np.broadcast_to(np.eye(TASKS), (ROWS, TASKS, TASKS))

    def states() -> Any:
        return np.concatenate([rng.random((ROWS, TASKS, STATE)), one_hot], -1).astype(np.float32)

    return {
        "obs": states(), "next_obs": states(), "embedding_inputs": one_hot.astype(np.float32),
        "acts": rng.uniform(-1, 1, (ROWS, TASKS, ACTION)).astype(np.float32),
        "rewards": rng.random((ROWS, TASKS, 1)).astype(np.float32),
        "terminals": np.zeros((ROWS, TASKS, 1), np.float32),
        "task_idxs": np.tile(np.arange(TASKS)[:, None], (ROWS, 1, 1)),
    }  # fmt: skip


def size(*networks: Any) -> int:
    """Parameters."""
    return sum(p.numel() for network in networks for p in network.parameters())


def d2r_mtrl(folder: Path) -> list[Peer]:
    """D2R by its authors."""
    import torch
    from torchrl import networks, policies
    from torchrl.algo import MTSAC

    given = json.loads((folder / "config/mt10/depthroute_rand.json").read_text())
    net = given["net"] | {"base_type": networks.MLPBase}
    actor = policies.DepthRoutePolicy(input_shape=[STATE, TASKS], output_shape=2 * ACTION, **net)
    critics = [
        networks.FlattenDepthRouteNet(input_shape=[STATE + ACTION, TASKS], output_shape=1, **net)
        for _ in range(2)
    ]
    agent = MTSAC(
        "depthroute", env_info={"task_nums": TASKS, "action_shape": (ACTION,)}, pf=actor,
        qf1=critics[0], qf2=critics[1], save_dir=tempfile.gettempdir(), **given["sac"],
        **given["general_setting"],
    )  # fmt: skip
    rows = batch()
    obs, tasks = torch.from_numpy(rows["obs"]), torch.from_numpy(rows["task_idxs"])[..., 0]
    with torch.no_grad():
        rows["gates_onehot"] = actor.explore(obs, tasks)["gates_onehot"].numpy()

    def act() -> None:
        with torch.no_grad():
            actor.explore(obs[:1], tasks[:1])

    return [Peer("D2R", "d2r", size(actor, critics[0]), partial(agent.update, rows), act)]


def soft_module(folder: Path) -> list[Peer]:
    """Soft Module and MT-SAC by the authors of the first."""
    import gym
    from torchrl import networks, policies
    from torchrl.algo import MTSAC

    rows = batch()
    box = gym.spaces.Box(-1.0, 1.0, (ACTION,))

    def peer(what: str, label: str, config: str, **change: Any) -> Peer:
        given = json.loads((folder / f"meta_config/mt10/{config}.json").read_text())
        net = given["net"] | change | {"base_type": networks.MLPBase}
        if routed := "num_modules" in net:
            policy, value = (
                policies.ModularGuassianGatedCascadeCondContPolicy,
                networks.FlattenModularGatedCascadeCondNet,
            )
            net |= {"em_input_shape": TASKS}
        else:
            policy, value = policies.GuassianContPolicy, networks.FlattenNet
        width = STATE if routed else STATE + TASKS
        actor = policy(input_shape=width, output_shape=2 * ACTION, **net)
        critics = [value(input_shape=width + ACTION, output_shape=1, **net) for _ in range(2)]
        kept = {"discount", "target_hard_update_period", "use_soft_update", "tau"}
        agent = MTSAC(
            task_nums=TASKS, env=SimpleNamespace(action_space=box), pf=actor, qf1=critics[0],
            qf2=critics[1], save_dir=tempfile.gettempdir(), **given["sac"],
            **{key: value for key, value in given["general_setting"].items() if key in kept},
        )  # fmt: skip
        mine = rows | {key: rows[key][..., :width] for key in ("obs", "next_obs")}
        return Peer(what, label, size(actor, critics[0]), partial(agent.update, mine))

    return [
        peer("Soft Module, deep", "soft_module", "modular_4_4_2_128_reweight_rand"),
        peer("Soft Module, shallow", "soft_module@shallow", "modular_2_2_2_256_reweight_rand"),
        peer("MT-SAC, 5 x 400", "mt_sac", "mtsac_rand", hidden_shapes=[400] * 5),
    ]


def metaworld_algorithms(_: Path) -> list[Peer]:
    """JAX's, one compiled function an update."""
    import gymnasium as gym
    import jax
    import numpy as np
    from metaworld_algorithms.config import networks, nn
    from metaworld_algorithms.config.optim import OptimizerConfig
    from metaworld_algorithms.rl.algorithms import MTSACConfig
    from metaworld_algorithms.types import ReplayBufferSamples

    rows = {key: value.reshape(TASKS * ROWS, -1) for key, value in batch().items()}
    data = ReplayBufferSamples(
        *(rows[key] for key in ("obs", "acts", "next_obs", "terminals", "rewards"))
    )
    world = SimpleNamespace(
        observation_space=gym.spaces.Box(-1, 1, (STATE + TASKS,), np.float32),
        action_space=gym.spaces.Box(-1, 1, (ACTION,), np.float32),
    )
    clip = {"optimizer": OptimizerConfig(max_grad_norm=1.0)}
    many = clip | {"num_tasks": TASKS}

    def peer(what: str, label: str, net: Any, *, weighted: bool = False) -> Peer:
        config = MTSACConfig(
            num_tasks=TASKS,
            actor_config=networks.ContinuousActionPolicyConfig(network_config=net),
            critic_config=networks.QValueFunctionConfig(network_config=net),
            use_task_weights=weighted,
        )
        agent = config.spawn(world, 0)
        counts = agent.get_num_params()

        def update() -> None:
            nonlocal agent
            agent, _ = agent.update(data)
            jax.block_until_ready((agent.actor, agent.critic, agent.alpha))

        def act() -> None:
            nonlocal agent
            agent, _ = agent.sample_action(data.observations[:TASKS])

        parameters = counts["actor_num_params"] + counts["critic_num_params"] // 2
        return Peer(what, label, parameters, update, act)

    deep = nn.SoftModulesConfig(depth=4, num_modules=4, module_width=128, **many)
    shallow = nn.SoftModulesConfig(depth=2, num_modules=2, module_width=256, **many)
    return [
        peer("MT-SAC, 5 x 400", "mt_sac", nn.VanillaNetworkConfig(depth=5, **clip)),
        peer("MTMH-SAC, 5 x 400", "mtmh_sac", nn.MultiHeadConfig(depth=5, **many)),
        peer("Soft Module, deep", "soft_module", deep, weighted=True),
        peer("Soft Module, shallow", "soft_module@shallow", shallow, weighted=True),
        peer("PaCo", "paco", nn.PaCoConfig(**many)),
        peer("MOORE", "moore", nn.MOOREConfig(**many)),
        peer("CARE, width 50", "care@original", nn.CAREConfig(**many)),
    ]


SOURCES: dict[str, Callable[[Path], list[Peer]]] = {
    "D2R_MTRL": d2r_mtrl, "Soft-Module": soft_module, "metaworld-algorithms": metaworld_algorithms,
}  # fmt: skip


def measure(folder: Path, threads: int) -> list[dict[str, Any]]:
    """A row per peer of a folder, in turns with ours, on so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    sys.path.insert(0, str(folder))
    import torch

    from bench import machine
    from bench.spec import RunSpec
    from bench.speed import ROUNDS, example_batch, median_seconds

    torch.set_num_threads(threads)
    machine.keep_freed_memory()
    rows = []
    for peer in SOURCES[folder.name](folder):
        spec = RunSpec.resolve(peer.label, "mt10_rand", 0, preset_name="paper")
        agent = spec.make_agent("cpu")
        for task in range(TASKS):
            agent.on_episode_start(task, 0)
        obs = torch.rand(TASKS, 1, agent.suite.obs_dim).numpy()
        ours = example_batch(agent, ROWS, agent.act(obs, explore=True).extras)
        timed = {
            "theirs_ms": peer.update, "ours_ms": partial(agent.update, ours),
            "theirs_act_ms": peer.act, "ours_act_ms": partial(agent.act, obs, explore=True),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name, action in timed.items() if action}
        for _ in range(ROUNDS):
            for name, found in times.items():
                found.append(1e3 * median_seconds(timed[name], 0.5))
        counts = agent.parameter_counts()
        rows.append(
            {
                "peer": folder.name, "what": peer.what, "algorithm": peer.label,
                "threads": threads,
                "their_parameters": peer.parameters,
                "our_parameters": counts["actor"] + counts["critic"],
                **{name: min(found) for name, found in times.items()},
            }
        )  # fmt: skip
    return rows


def in_process(folder: Path, threads: int) -> list[dict[str, Any]]:
    """`measure` in a process of its own: two of the packages have one name."""
    print(folder.name, threads, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(folder), str(threads)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return list(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        import measure as page

        folders = [Path(name).resolve() for name in sys.argv[1:]]
        if not folders or any(folder.name not in SOURCES for folder in folders):
            raise SystemExit(__doc__)
        where = page.where()
        rows = [row for n in (1, page.ALL) for folder in folders for row in in_process(folder, n)]
        page.record("peers", where, rows)
        page.show()
