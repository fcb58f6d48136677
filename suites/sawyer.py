"""A step of Meta-World's robot without the detours, bit for bit what metaworld computes.

Physics is a fifth to a third of metaworld's step. Its classes, rewards and rules of success are
used as they are; replaced is what stands around them and is the same in every task: applying the
action, assembling the observation, orientations as quaternions, and the search through the contacts
for those of the fingers. The tests compare all tasks, step by step.
"""

from __future__ import annotations

import math
from types import FunctionType, MethodType
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Vector = NDArray[np.float64]


class SwiftSawyer:
    """Steps an environment of metaworld's. Everything else is still asked of the environment."""

    def __init__(self, env: Any) -> None:
        self._env, self._model, self._data = env, env.model, env.data
        data = env.data
        # Views of the simulator's own memory.
        self._hand = data.xpos[data.body("hand").id]
        self._fingers = tuple(data.xpos[data.body(f"{side}claw").id] for side in ("right", "left"))
        self._mocap = data.mocap_pos[0]
        self._mocap_quat = np.array([1, 0, 1, 0])
        space = env.sawyer_observation_space
        self._low, self._high = space.low, space.high
        self._pads = tuple(data.geom(f"{side}pad_geom").id for side in ("left", "right"))
        self._length = env._obs_obj_max_len
        env.touching_object = self._touching_object
        _simplify_orientation(env)

    def step(self, action: NDArray[np.float32]) -> tuple[Vector, float, dict[str, Any]]:
        """As metaworld's: observation, reward and what the reward's function found out."""
        env, data = self._env, self._data
        if env.curr_path_length >= env.max_path_length:
            raise ValueError("the episode has ended: reset the environment")
        moved = self._mocap + _clip(action[:3], _MINUS_ONE, _ONE) * env.action_scale
        self._mocap[:] = _clip(moved, env.mocap_low, env.mocap_high)
        data.mocap_quat[:] = self._mocap_quat
        data.ctrl[0], data.ctrl[1] = action[-1], -action[-1]
        mujoco.mj_step(self._model, data, nstep=env.frame_skip)
        mujoco.mj_rnePostConstraint(self._model, data)
        env.curr_path_length += 1
        mujoco.mj_forward(self._model, data)  # also of what follows from the last substep
        obs = self._observation()
        env._last_stable_obs = obs
        reward, info = env.evaluate_state(obs, action)
        return obs, reward, info

    def _observation(self) -> Vector:
        """This moment, the one before and the goal (39,), within the bounds of the space."""
        env = self._env
        apart = self._fingers[0] - self._fingers[1]
        now = np.zeros(4 + self._length)
        now[:3] = self._hand
        now[3] = min(max(math.sqrt(apart.dot(apart)) / 0.1, 0.0), 1.0)
        positions, orientations = env._get_pos_objects(), env._get_quat_objects()
        for k in range(len(positions) // 3):
            start = 4 + 7 * k
            now[start : start + 3] = positions[3 * k : 3 * k + 3]
            now[start + 3 : start + 7] = orientations[4 * k : 4 * k + 4]
        obs = np.concatenate((now, env._prev_obs, env._get_pos_goal()))
        env._prev_obs = now
        return _clip(obs, self._low, self._high)

    def _touching_object(self, geom: int) -> bool:
        """Whether both fingers press on the object of this number."""
        contact, forces = self._data.contact, self._data.efc_force
        first, second = contact.geom1, contact.geom2
        of_object = (first == geom) | (second == geom)
        if not of_object.any():
            return False
        # Summed one by one, as there: another order would round otherwise.
        return all(
            sum(forces[contact.efc_address[of_object & ((first == pad) | (second == pad))]]) > 0
            for pad in self._pads
        )


_ONE = np.float32(1)
_MINUS_ONE = np.float32(-1)


def _clip(x: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    """As np.clip, which takes five times as long at this size."""
    clipped: NDArray[Any] = np.minimum(np.maximum(x, low), high)
    return clipped


def _simplify_orientation(env: Any) -> None:
    """Let an environment turn matrices into quaternions by `_Orientation`."""
    method = env._get_quat_objects.__func__
    if "Rotation" in method.__code__.co_names:
        known = {**method.__globals__, "Rotation": _Orientation}
        changed = FunctionType(method.__code__, known, method.__name__, method.__defaults__)
        env._get_quat_objects = MethodType(changed, env)


class _Orientation:
    """What metaworld needs of scipy's Rotation, at a tenth of its time."""

    def __init__(self, quaternion: Vector) -> None:
        self._quaternion = quaternion

    @staticmethod
    def from_matrix(matrix: Vector) -> Any:
        """Of a rotation matrix (3, 3)."""
        (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
        orthonormal = (
            abs(a * a + b * b + c * c - 1) < 1e-9 and abs(a * d + b * e + c * f) < 1e-13
            and abs(d * d + e * e + f * f - 1) < 1e-9 and abs(a * g + b * h + c * i) < 1e-13
            and abs(g * g + h * h + i * i - 1) < 1e-9 and abs(d * g + e * h + f * i) < 1e-13
            and a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g) > 0
        )  # fmt: skip
        if not orthonormal:  # scipy finds the nearest rotation, or raises
            return Rotation.from_matrix(matrix)
        trace = a + e + i
        largest = max(a, e, i, trace)
        if a == largest:
            q = [1 - trace + 2 * a, d + b, g + c, h - f]
        elif e == largest:
            q = [d + b, 1 - trace + 2 * e, h + f, c - g]
        elif i == largest:
            q = [g + c, h + f, 1 - trace + 2 * i, d - b]
        else:
            q = [h - f, c - g, d - b, 1 + trace]
        norm = math.sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
        return _Orientation(np.array([x / norm for x in q]))

    def as_quat(self) -> Vector:
        """(4,), the scalar last."""
        return self._quaternion
