"""Clips of a policy: one episode of each task, rendered off screen."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from bench.evaluate import Policy, evaluation_seeds
from suites.base import RenderError, VectorEnv

BACKENDS = ("egl", "osmesa")
SETTINGS = (*BACKENDS, "glfw", "glx", "cgl", "wgl", "enable", "enabled", "on", "true", "1")
OFF = ("disable", "disabled", "off", "false", "0")
"""What MuJoCo takes as MUJOCO_GL, and as having no renderer."""
ADVICE = "set it to egl, osmesa or glfw (which needs a screen), or unset it"
FORMATS = (".webp", ".gif", ".mp4")
EVERY = 4
"""Steps from one picture to the next."""
PICTURES_PER_SECOND = 12


def backend_setting() -> str:
    """MUJOCO_GL as MuJoCo reads it, empty where it is not set.

    Raises ValueError for a value with which MuJoCo cannot even be imported.
    """
    given = os.environ.get("MUJOCO_GL", "").lower().strip()
    if given and given not in (*SETTINGS, *OFF):
        raise ValueError(f"MUJOCO_GL is {given!r}, which MuJoCo does not know; {ADVICE}")
    return given


def renders(backend: str) -> bool:
    """Whether a picture can be had with this MUJOCO_GL; tried by a process of its own."""
    check = "import mujoco as m; m.Renderer(m.MjModel.from_xml_string('<mujoco/>'), 16, 16)"
    done = subprocess.run(
        [sys.executable, "-c", check],
        env=os.environ | {"MUJOCO_GL": backend}, capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode == 0


def choose_backend() -> str:
    """Set MUJOCO_GL to a renderer that works without a screen, before MuJoCo is imported.

    What the user has set stays. Raises RenderError if that, or neither EGL nor OSMesa, works, and
    ValueError if it is nothing that MuJoCo knows.
    """
    if given := backend_setting():
        if given in OFF or not renders(given):
            raise RenderError(
                f"no video: MUJOCO_GL is {given!r}, which renders nothing here\n{ADVICE}"
            )
        return given
    for backend in BACKENDS:
        if renders(backend):
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise RenderError(
        "no video: neither EGL nor OSMesa renders here\n"
        "install one of them (Debian and Ubuntu: apt-get install libosmesa6, or the EGL driver of "
        "the GPU), or train and evaluate without --video"
    )


def film(policy: Policy, envs: VectorEnv, seed: int) -> np.ndarray:
    """Pictures (T, N, H, W, 3) uint8 of the first evaluation episode of each task.

    Raises RenderError where no picture can be had.
    """
    names, positions = envs.spec.task_names, envs.spec.positions
    obs = envs.reset(evaluation_seeds(names, seed, [0] * envs.envs_per_task, positions))
    pictures = [envs.render()]
    for step in range(1, envs.spec.horizon + 1):
        obs = envs.step(policy(obs)).obs
        if step % EVERY == 0:
            pictures.append(envs.render())
    return np.stack(pictures, axis=1)


def mosaic(films: np.ndarray) -> np.ndarray:
    """All tasks' films (T, N, H, W, 3) side by side in one (N, rows H, columns W, 3)."""
    tasks, count, height, width, _ = films.shape
    columns = math.ceil(math.sqrt(tasks))
    rows = -(-tasks // columns)
    out = np.full((count, rows * height, columns * width, 3), 255, np.uint8)
    for task, pictures in enumerate(films):
        y, x = divmod(task, columns)
        out[:, y * height : (y + 1) * height, x * width : (x + 1) * width] = pictures
    return out


def check_format(path: Path) -> None:
    """Raises ValueError for a format that cannot be written here, and says what can."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: a clip is one of {', '.join(FORMATS)}")
    if path.suffix == ".mp4" and find_spec("imageio_ffmpeg") is None:
        raise ValueError(f"{path}: MP4 needs ffmpeg (pip install imageio-ffmpeg); .gif needs none")


def write(pictures: np.ndarray, path: Path) -> None:
    """Write pictures (N, H, W, 3) as WebP, GIF or MP4, by the suffix."""
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mp4":
        import imageio.v3  # optional, with its ffmpeg

        imageio.v3.imwrite(path, pictures, fps=PICTURES_PER_SECOND)
        return
    frames = [Image.fromarray(picture) for picture in pictures]
    milliseconds = 1000 // PICTURES_PER_SECOND
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
