"""The replay buffer: a ring per task in one file, so that it is always as safe as the disk.

Transitions are packed rows in a memory-mapped file. Adding writes a few pages; a checkpoint stores
nothing but the position. The file holds more rows than the buffer's capacity (``slack``), so that
what an older checkpoint needs is not yet overwritten when a run is resumed from it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from algorithms.agent import Batch
from suites.base import Step, SuiteSpec


class ReplayBuffer:
    """Transitions of T tasks, sampled task-major, each task's rows independently."""

    def __init__(
        self,
        path: Path,
        suite: SuiteSpec,
        extras_spec: Mapping[str, tuple[tuple[int, ...], str]],
        *,
        capacity: int,
        slack: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """``capacity``: rows per task that can be sampled; ``slack``: rows per task beyond them.

        Raises OSError if the disk cannot hold the file.
        """
        self.capacity, self.device = capacity, device
        self.tasks, self.extras_spec = suite.num_tasks, dict(extras_spec)
        obs, action = suite.obs_dim, suite.action_dim
        self._fields = np.cumsum([0, obs, action, 1, obs, 1, 1]).tolist()
        self._extra_bytes = {
            name: int(np.prod(shape)) * np.dtype(dtype).itemsize
            for name, (shape, dtype) in self.extras_spec.items()
        }
        self._physical = capacity + slack
        size = self.bytes_needed(suite, extras_spec, self._physical)
        words = size // (4 * self._physical * self.tasks)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        try:
            with path.open("w+b" if new else "r+b") as file:
                _reserve(file.fileno(), size, path)
        except OSError:
            if new:  # what could be claimed is of no use
                path.unlink(missing_ok=True)
            raise
        self._rows = np.memmap(path, np.float32, "r+", shape=(self._physical, self.tasks, words))
        flat = self._rows.reshape(self._physical * self.tasks, words)
        self._flat = torch.from_numpy(flat)
        self._rng = np.random.default_rng(seed)
        self._added = 0
        self._reward_sum = np.zeros(self.tasks)

    @staticmethod
    def bytes_needed(
        suite: SuiteSpec, extras_spec: Mapping[str, tuple[tuple[int, ...], str]], rows: int
    ) -> int:
        """Size of the file for ``rows`` rows per task, capacity and slack together."""
        extra = sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d in extras_spec.values())
        words = 2 * suite.obs_dim + suite.action_dim + 3 + -(-extra // 4)
        return rows * suite.num_tasks * words * 4

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    def add(
        self, obs: np.ndarray, action: np.ndarray, step: Step, extras: Mapping[str, np.ndarray]
    ) -> None:
        """Append E rows per task: ``obs`` (T, E, O), ``action`` (T, E, A), extras (T, E, ...)."""
        envs = obs.shape[1]
        a, b, c, d, e, f, end = self._fields
        for env in range(envs):
            row = self._rows[self._added % self._physical]  # (T, words)
            if self._added >= self.capacity:
                evicted = self._rows[(self._added - self.capacity) % self._physical]
                self._reward_sum -= evicted[:, c]
            row[:, a:b] = obs[:, env]
            row[:, b:c] = action[:, env]
            row[:, c] = step.reward[:, env]
            row[:, d:e] = step.next_obs[:, env]
            row[:, e] = step.terminated[:, env]
            row[:, f] = step.truncated[:, env]
            if self._extra_bytes:
                tail, start = row[:, end:].view(np.uint8), 0
                for name, size in self._extra_bytes.items():
                    content = np.ascontiguousarray(extras[name][:, env])
                    tail[:, start : start + size] = content.view(np.uint8).reshape(self.tasks, size)
                    start += size
            self._reward_sum += row[:, c]
            self._added += 1

    def sample(self, rows: int) -> Batch:
        """``rows`` transitions of each task, drawn uniformly with replacement."""
        if not self._added:
            raise ValueError("the replay buffer is empty")
        age = self._rng.integers(1, len(self) + 1, size=(self.tasks, rows))
        position = (self._added - age) % self._physical
        index = torch.from_numpy(position * self.tasks + np.arange(self.tasks)[:, None])
        # To a GPU from pinned memory, or the copy would wait for what is computed there.
        pinned = self.device.type == "cuda"
        packed = torch.empty(self.tasks * rows, self._flat.shape[1], pin_memory=pinned)
        torch.index_select(self._flat, 0, index.view(-1), out=packed)
        packed = packed.view(self.tasks, rows, -1).to(self.device, non_blocking=True)
        a, b, c, d, e, f, end = self._fields
        mean = torch.from_numpy((self._reward_sum / len(self)).astype(np.float32))
        return Batch(
            obs=packed[..., a:b],
            action=packed[..., b:c],
            reward=packed[..., c:d],
            next_obs=packed[..., d:e],
            terminated=packed[..., e:f],
            truncated=packed[..., f:end],
            mean_reward=mean.to(self.device, non_blocking=True).view(-1, 1, 1),
            extras=self._unpack(packed[..., end:], rows),
        )

    def _unpack(self, words: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
        extras, start = {}, 0
        content = words.contiguous().view(torch.uint8) if self._extra_bytes else words
        for name, size in self._extra_bytes.items():
            shape, dtype = self.extras_spec[name]
            kind = torch.from_numpy(np.empty(0, dtype)).dtype
            part = content[..., start : start + size].contiguous().view(kind)
            extras[name] = part.view(self.tasks, rows, *shape)
            start += size
        return extras

    def flush(self) -> None:
        """Write everything added so far to the disk."""
        self._rows.flush()

    def state_dict(self) -> dict[str, Any]:
        """Position, generator and running sums; the rows are in the file already."""
        return {
            "added": self._added,
            "reward_sum": self._reward_sum.tolist(),
            "rng": self._rng.bit_generator.state,
            "physical": self._physical,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, for the file that it described."""
        if state["physical"] != self._physical:
            raise ValueError(
                f"the replay file has room for {self._physical} rows per task, "
                f"the checkpoint's had {state['physical']}"
            )
        self._added = state["added"]
        self._reward_sum = np.array(state["reward_sum"])
        self._rng.bit_generator.state = state["rng"]


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Claim the file's blocks now: a full disk must be an error here, not a SIGBUS in training."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS has no posix_fallocate; the file grows as it is written
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"no room for the replay buffer ({size / 1e9:.2f} GB)", str(path)
            ) from None
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, size)
