"""CARE: contextual attention over a mixture of state encoders, with task metadata.

Sodhani et al. 2021, "Multi-Task Reinforcement Learning with Context-based Representations"; sizes
of D2R Table 4, in the layout whose parameters count to D2R Table 8.

Symbols: v_tau a sentence about task tau as a vector of 768; E_1 .. E_k the state encoders.

    z = context(v_tau);   p = softmax(gate(z))                     which encoders a task attends to
    e(s) = sum_j p_j E_j(s)
    output = trunk([e(s), s, (a,) onehot(tau)])                                    ``layout=table``
    output = trunk([e(s), z, (a)])                                      ``layout=textbook`` (Fig. 2)

The context network belongs to the critics and learns from their loss alone; the actor reads it (as
in the authors' code). Critics' encoders see the state, the action enters at the trunk.

Parameters, actor and one critic: 1.23 M on MT10, 1.26 M on MT50 (D2R Table 8); `textbook` 1.29 M;
`original`, whose encoders and context are as narrow as CARE's (50), 0.83 M.

**Departures**
 1. The sentences (`algorithms/data`) are ours, for the v3 tasks, embedded once by all-MiniLM-L6-v2
    (384 numbers, unit length) and brought to RoBERTa's 768 by a fixed matrix of N(0, 1) entries,
    seed 0. A task without a sentence, of another suite, gets a fixed vector drawn from its name.
 2. Each critic has a context network of its own; the actor reads the first one's.
 3. The encoders' targets follow with the critics', at 0.005; the authors' at 0.05.
 4. Attention is the gate's of z alone, as in the authors' code; the paper prints
    softmax_j(<E_j(s), sg(z)>), and in Alg. 1 a network after the mixture.
 5. Actor and critics have encoders and gates of their own, one of many layouts of D2R's count. The
    authors' actor reads the critics' encoders, which its loss does not train.
 6. The context is the targets' own, which follows slowly; the authors' is the trained one.
 7. Output layers of context network and gate start near zero, as every network's here, so attention
    starts uniform; the authors draw them as every layer of theirs (Xavier).
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from algorithms.nn import Init, ModuleLinear, mlp
from algorithms.sac import SAC, Extras, Phase, SACConfig
from suites.base import stream

SENTENCE_WIDTH = 768
"""Numbers of a task's vector, RoBERTa's (CARE Sec. 4)."""


class CAREConfig(SACConfig):
    """Settings of CARE."""

    width: Annotated[int, Field(ge=1)] = 400
    """Units of each of the trunk's layers (D2R Table 4)."""
    depth: Annotated[int, Field(ge=1)] = 3
    """Layers of the trunk (D2R Table 4)."""
    encoders: Annotated[int, Field(ge=1)] = 6
    """k (D2R Table 4; CARE uses 10 on MT50)."""
    encoder_width: Annotated[int, Field(ge=1)] = 128
    """Units of both layers of an encoder (D2R Table 4)."""
    context_width: Annotated[int, Field(ge=1)] = 128
    """Units of both layers of the context network, and of the gate's (D2R Table 4)."""
    widen: Annotated[float, Field(gt=0)] = 1.0
    """Times these two widths: CARE's own are 50 (its Sec. 5)."""
    layout: Literal["table", "textbook"] = "table"
    """What the trunk reads: e(s), s and the one-hot id, with which D2R's count comes out, or e(s)
    and z (CARE Fig. 2)."""
    metadata: Literal["sentence", "learned"] = "sentence"
    """v_tau: a sentence's embedding, or a vector learned for each task."""


class CARE(SAC):
    """Contextual attention-based representations."""

    Config = CAREConfig
    config: CAREConfig
    PAPER: ClassVar[str] = "Sodhani et al. 2021, CARE (sizes: D2R Table 4)"
    VARIANTS: ClassVar[dict[str, dict[str, Any]]] = {
        "textbook": {"layout": "textbook"},
        "original": {"layout": "textbook", "widen": 50 / 128},
        "learned": {"metadata": "learned"},
        "encoders{encoders}": {},
    }

    actor: AttentiveNetwork
    critic: AttentiveCritic

    def make_actor(self) -> nn.Module:
        """s and z -> mean and log std of the action."""
        return AttentiveNetwork(
            self.suite.obs_dim, 0, 2 * self.suite.action_dim, self.suite.num_tasks, self.config,
            copies=1, layer_norm=False,
        )  # fmt: skip

    def make_critic(self) -> nn.Module:
        """[s, a] -> Q, twice."""
        return AttentiveCritic(
            self.suite.obs_dim, self.suite.action_dim, self.suite.task_names, self.config
        )

    def policy(self, obs: Tensor, phase: Phase, extras: Extras) -> tuple[Tensor, Extras]:
        """Gaussian parameters; the context is the first critic's and learns nothing here."""
        output: Tensor = self.actor(obs[None], self.critic.context()[:1].detach())
        return output[0], {}

    @torch.no_grad()
    def probe(self) -> dict[str, np.ndarray]:
        """``attention`` (T, k), the actor's p."""
        weights = self.actor.attention(self.critic.context()[:1])
        return {"attention": weights[0, :, 0].cpu().numpy()}

    def trace(self, obs: np.ndarray) -> dict[str, np.ndarray]:
        """The same attention for every state."""
        return self.probe()


class ContextNetwork(nn.Module):
    """z = context(v_tau): two layers, in C independent copies (Departure 2)."""

    def __init__(self, tasks: tuple[str, ...], config: CAREConfig, *, copies: int) -> None:
        super().__init__()
        width = round(config.context_width * config.widen)
        self.layers = mlp(SENTENCE_WIDTH, [width], width, copies=copies)
        self.vectors: Tensor
        if config.metadata == "sentence":
            vectors = torch.from_numpy(sentence_vectors(tasks))
            self.register_buffer("vectors", vectors[None, :, None], persistent=False)
        else:
            self.vectors = nn.Parameter(torch.empty(copies, len(tasks), 1, SENTENCE_WIDTH))

    def initialise(self, scheme: Init, generator: torch.Generator) -> None:
        """Draw learned vectors of the sentences' scale; the layers draw their own parameters."""
        if isinstance(self.vectors, nn.Parameter):
            with torch.no_grad():
                self.vectors.normal_(generator=generator)

    def forward(self) -> Tensor:
        """(C, T, 1, width)."""
        z: Tensor = self.layers(self.vectors)
        return z


class AttentiveNetwork(nn.Module):
    """Encoders, gate and trunk, in C independent copies."""

    def __init__(
        self, states: int, actions: int, outputs: int, tasks: int, config: CAREConfig, *,
        copies: int, layer_norm: bool,
    ) -> None:  # fmt: skip
        """``layer_norm``: before each ReLU of encoders and trunk."""
        super().__init__()
        c, table = config, config.layout == "table"
        encoder, context = round(c.encoder_width * c.widen), round(c.context_width * c.widen)
        self.states, self.table = states, table
        self.encoders = mlp(
            states, [encoder], None, copies=copies, modules=c.encoders, layer_norm=layer_norm
        )
        self.encoders.append(ModuleLinear(c.encoders, encoder, encoder, copies=copies))
        self.gate = mlp(context, [context] * 2, c.encoders, copies=copies)
        more = states if table else context
        self.trunk = mlp(
            encoder + more + actions, [c.width] * c.depth, outputs,
            copies=copies, one_hot=tasks if table else 0, layer_norm=layer_norm,
        )  # fmt: skip

    def attention(self, context: Tensor) -> Tensor:
        """p (C, T, 1, k) at z (C, T, 1, context width)."""
        return torch.softmax(self.gate(context), -1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[s, (a)] (1, T, B, inputs) and z -> (C, T, B, outputs)."""
        copies, rows = len(context), x.shape[2]
        encoded = self.encoders(x[:, None, ..., : self.states])  # (C, k, T, B, encoder width)
        mixed = torch.einsum("ctk,cktbw->ctbw", self.attention(context)[:, :, 0], encoded)
        x = x.expand(copies, -1, -1, -1)
        if not self.table:
            x = torch.cat([context.expand(-1, -1, rows, -1), x[..., self.states :]], -1)
        output: Tensor = self.trunk(torch.cat([mixed, x], -1))
        return output


class AttentiveCritic(nn.Module):
    """Twin critics and their context networks."""

    def __init__(
        self, states: int, actions: int, tasks: tuple[str, ...], config: CAREConfig
    ) -> None:
        super().__init__()
        self.context = ContextNetwork(tasks, config, copies=2)
        self.network = AttentiveNetwork(
            states, actions, 1, len(tasks), config, copies=2, layer_norm=config.critic_layer_norm
        )

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, B, states + actions) -> (2, T, B, 1)."""
        output: Tensor = self.network(x, self.context())
        return output


def sentence_vectors(tasks: tuple[str, ...]) -> NDArray[np.float32]:
    """v_tau of each task, (T, 768) float32 (Departure 1)."""
    known = _embedded()
    project = np.random.default_rng(0).standard_normal((384, SENTENCE_WIDTH))
    vectors = [
        known[task] @ project
        if task in known
        else np.random.default_rng(stream(0, task)).standard_normal(SENTENCE_WIDTH)
        for task in tasks
    ]
    return np.stack(vectors).astype(np.float32)


@cache
def _embedded() -> dict[str, NDArray[np.float32]]:
    with (
        as_file(files("algorithms") / "data" / "task_sentences.npz") as path,
        np.load(path) as file,
    ):
        return dict(zip(file["tasks"].tolist(), file["vectors"], strict=True))
