"""Hundreds of generated mistakes on the command line and in grid files: each is named, clearly and
once, and nothing is begun."""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import Done, bench

import algorithms
from bench.spec import RunSpec, SpecError, folder, preset_names
from bench.sweep import Request, expand, read_grid, told
from suites.base import SuiteSpec

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30)
WORDS = st.text(string.ascii_lowercase + string.digits + "_@:.-", min_size=1, max_size=12)


def typo(name: str) -> st.SearchStrategy[str]:
    """A name with a letter missing, twice, or wrong."""

    def change(place: int, how: str) -> str:
        place %= len(name)
        middle = {"drop": "", "double": name[place] * 2, "wrong": "q"}[how]
        return name[:place] + middle + name[place + 1 :]

    return st.builds(change, st.integers(0, 30), st.sampled_from(["drop", "double", "wrong"]))


def unlike(names: list[str]) -> Callable[[str], bool]:
    """Whether a text is none of the names, alone or in a list, whatever spaces are about it."""
    return lambda text: bool(text.strip()) and "," not in text and text.strip() not in names


ALGORITHMS = algorithms.names()
MISTAKES: dict[str, st.SearchStrategy[str]] = {
    "--algos": st.one_of(
        st.sampled_from(ALGORITHMS).flatmap(typo).filter(unlike(ALGORITHMS)),
        typo("mega@softmax").filter(unlike(["mega@softmax", *ALGORITHMS])),
        TEXT.filter(unlike(ALGORITHMS)),
        st.sampled_from(["mega,mega", ",", "", "mega@", "@", "mega@@", "../mega", "/etc"]).filter(
            lambda text: text != "mega@"
        ),
    ),
    "--suite": st.one_of(
        st.sampled_from(["mt10_rand", "mt50_fixed", "toy_opposite"]).flatmap(typo)
        .filter(lambda s: s not in ("mt10_rand", "mt50_fixed", "toy_opposite")),
        st.sampled_from(["toy0", "toy501", "mt1_rand:", "..", "toy,toy"]),
        st.just("custom_rand:reach-v3+reach-v3"),
        TEXT.filter(lambda text: not text.strip().startswith("toy")).filter(unlike(["mt10_rand"])),
    ),
    "--seeds": st.one_of(
        TEXT.filter(lambda text: not any(c.isdigit() for c in text)),
        st.sampled_from(["0", "-1", "3,3", "5-2", "1.5", "1e3", "10001", "0-99999", ",", "9" * 20]),
    ),
    "--preset": st.one_of(
        st.sampled_from(preset_names()).flatmap(typo).filter(lambda s: s not in preset_names()),
        TEXT.filter(lambda text: text != "" and text not in preset_names()),
    ),
    "--set": st.one_of(
        typo("critic_lr").filter(lambda s: s != "critic_lr").map(lambda s: f"{s}=1"),
        st.sampled_from([
            "gamma=2", "gamma=nan", "gamma=inf", "gamma=[1]", "gamma=x", "gamma", "=3", "horizon=0",
            "horizon=501", "steps_per_task=301", "batch_per_task=1e9", "replay_per_task=-1",
            "goals=none", "eval_seed=-1", "d2r.gamma=0.9", "megga.gamma=0.9", "width=0", "a.b.c=1",
            "warmup_steps=999999999", "gamma={a=1}", "gamma=0.9\ngamma=0.8",
        ]),
        WORDS.map(lambda s: f"z{s}z=1"),
    ),
    "--steps": st.integers(1, 10**9).filter(lambda n: n % 200).map(str),
    "--workers": TEXT.filter(lambda text: text != "auto" and not text.isdigit()),
    "--device": TEXT.filter(lambda text: text not in ("auto", "cpu", "cuda")),
    "--launcher": TEXT.filter(lambda text: text not in ("local", "ray", "slurm")),
    "--launcher-set": TEXT,
    "--grid": st.sampled_from(["missing.toml", "/", "bench", "README.md"]),
    "--threads": st.sampled_from(["0", "-3", "two", "1.5", ""]),
    "--retries": st.sampled_from(["-1", "x"]),
}  # fmt: skip
"""Option -> values each of which alone is a mistake."""


def judge(done: Done, out: Path) -> None:
    """Exit code 2, a few lines that say each thing once, and nothing begun."""
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines
    told_lines = [line for line in lines if line.startswith("bench: ")]
    assert len(set(told_lines)) == len(told_lines), done.stderr
    assert not out.exists(), "a sweep was begun"


@settings(max_examples=300)
@given(data=st.data())
def test_mistakes_on_the_command_line(data: st.DataObject) -> None:
    arguments = {"--algos": "mega,mt_sac", "--suite": "mt10_rand", "--seeds": "2"}
    wrong = data.draw(
        st.lists(st.sampled_from(list(MISTAKES)), min_size=1, max_size=3, unique=True)
    )
    for option in wrong:
        arguments[option] = data.draw(MISTAKES[option], label=option)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        given = [f"{option}={value}" for option, value in arguments.items()]
        judge(bench("run", *given, "--out", str(out)), out)


COMMANDS: dict[str, st.SearchStrategy[list[str]]] = {
    "ablate": typo("halfsoftmax").filter(lambda s: s != "halfsoftmax").map(lambda s: [s]),
    "list": TEXT.filter(lambda s: s not in ("algos", "variants", "suites", "presets", "ablations"))
    .map(lambda s: ["--", s]),
    "show": st.sampled_from(ALGORITHMS).flatmap(typo).filter(unlike(ALGORITHMS)).map(lambda s: [s]),
    "params": MISTAKES["--suite"].map(lambda s: [f"--suite={s}"]),
    "doctor": TEXT.map(lambda s: ["--", f"no run {s}"]),
    "status": st.sampled_from([["--outt", "x"], ["extra"], ["--json=1"]]),
}  # fmt: skip


@settings(max_examples=60)
@given(data=st.data())
def test_mistakes_with_the_other_commands(data: st.DataObject) -> None:
    command = data.draw(st.sampled_from(list(COMMANDS)))
    arguments = data.draw(COMMANDS[command])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        more = ["--out", str(out)] if command in ("ablate", "doctor") else []
        judge(bench(command, *more, *arguments), out)


# ----------------------------------------------------------------------------------------- grids


def toml(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


WRONG_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "algos": st.one_of(st.integers(), st.booleans(), st.just([]), st.just({}), st.just(["mega", 3]),
                       st.sampled_from(["megga", ["mega@softmx"], ["mega", "mega"]])),
    "suite": st.one_of(st.integers(), st.just(["mt10_rnd"]), st.just(""), st.just([["toy"]])),
    "seeds": st.one_of(st.booleans(), st.just(0), st.just(-1), st.just("4-2"), st.just([1, 1]),
                       st.just(["a"]), st.just(1.5), st.just({})),
    "preset": st.one_of(st.integers(), st.just("cpuu"), st.just([])),
    "set": st.one_of(st.integers(), WORDS, st.just([1]), st.just({"gama": 1}),
                     st.just({"mega": {"gama": 1}}), st.just({"gamma": 7}),
                     st.just({"horizon": {}})),
}  # fmt: skip


@settings(max_examples=200)
@given(data=st.data())
def test_mistakes_in_grids(data: st.DataObject) -> None:
    """Every mistake of the file is told, with its place, in one go."""
    good = {"algos": ["mega"], "suite": "mt10_rand", "seeds": 2, "preset": "cpu", "set": {}}
    entries = [dict(good) for _ in range(data.draw(st.integers(1, 3)))]
    places: set[str] = set()
    for _ in range(data.draw(st.integers(1, 4))):
        number = data.draw(st.integers(0, len(entries) - 1))
        key = data.draw(st.sampled_from([*WRONG_VALUES, "unknown"]))
        if key == "unknown":
            entries[number][data.draw(WORDS.map(lambda s: f"x{s}"))] = 1
        else:
            entries[number][key] = data.draw(WRONG_VALUES[key], label=f"{number}.{key}")
        places.add(f"runs[{number + 1}]")
    text = "".join(
        "[[runs]]\n" + "".join(f"{json.dumps(k)} = {toml(v)}\n" for k, v in entry.items())
        for entry in entries
    )
    with tempfile.TemporaryDirectory() as folder:
        grid, out = Path(folder) / "grid.toml", Path(folder) / "out"
        grid.write_text(text, encoding="utf-8")
        done = bench("run", "--grid", str(grid), "--out", str(out))
        judge(done, out)
        for place in places:
            assert place in done.stderr, f"nothing is told of {place} in\n{text}\n{done.stderr}"


def test_an_empty_table_is_no_value(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    top = 'algos = ["mega"]\nsuite = "toy"\nseeds = 1\n'
    path.write_text(f"{top}set = {{ horizon = {{}} }}\n")
    with pytest.raises(SpecError, match="horizon"):
        expand(*read_grid(path))
    path.write_text(f"{top}[set.mega]\n# nothing yet\n")
    assert len(expand(*read_grid(path))) == 1


def test_one_mistake_is_told_once() -> None:
    request = Request(["mega", "d2r", "mt_sac"], ["toy", "toy4"], [0], "smoke",
                      {"steps_per_task": 301, "gama": 1, "gamma": 7})  # fmt: skip
    with pytest.raises(SpecError) as caught:
        expand([request])
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mega, d2r, mt_sac: unknown field 'gama'; did you mean 'gamma'?")
    with pytest.raises(SpecError) as caught:
        expand([Request(request.algorithms, ["toy"], [0], "smoke",
                        {"steps_per_task": 301, "gamma": 7})])  # fmt: skip
    lines = str(caught.value).splitlines()
    assert len(lines) == 3, lines
    assert lines[0].startswith("protocol: steps_per_task=301 is not a whole number of episodes")
    assert lines[1].startswith("protocol: warmup_steps=400 leaves nothing of steps_per_task=301")
    assert lines[2].startswith("mega, d2r, mt_sac: gamma=7:")


def test_a_grids_own_mistakes_and_its_values_mistakes_come_together(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'sute = "toy"\n[[runs]]\nalgos = ["megga"]\nsuite = "toy"\nseeds = "4-2"\n'
        '[[runs]]\nalgos = ["d2r"]\nsuite = "tooy"\nseeds = 1\npreset = "cpuu"\n'
    )
    requests, mistakes = read_grid(path)
    with pytest.raises(SpecError) as caught:
        expand(requests, mistakes)
    text = str(caught.value)
    for words in ("'sute'", "runs[1]: unknown algorithm 'megga'", "runs[1]: seeds '4-2'",
                  "runs[2]: unknown suite 'tooy'", "runs[2]: unknown preset 'cpuu'"):  # fmt: skip
        assert words in text, text
    assert len(text.splitlines()) == 5, text
    assert told([]) == ""


@given(TEXT)
def test_no_name_leads_out_of_the_output_directory(name: str) -> None:
    for text in (name, f"../{name}", f"/{name}", f"{name}/..", name * 20):
        part = folder(text)
        assert len(Path(part).parts) == 1
        assert part not in (".", "..")
        assert "/" not in part
        assert "\\" not in part
        assert len(part.encode()) <= 200
        assert (Path("/out") / part).resolve().parent == Path("/out")


def test_different_names_have_different_folders() -> None:
    names = ["a/b", "a_b", "a\\b", "../a", ".a", "é", "x" * 160, "x" * 161, "mega@fixed8", "toy"]
    assert len({folder(name) for name in names}) == len(names)
    assert folder("custom_rand:reach-v3+push-v3") == "custom_rand:reach-v3+push-v3"


def test_all_mistakes_of_a_command_are_told_at_once() -> None:
    done = bench("run", "--algos", "mgea,d2r@topp1", "--suite", "mt10_rnd", "--seeds", "x",
                 "--preset", "cpuu")  # fmt: skip
    assert done.returncode == 2
    for wrong, meant in [
        ("mgea", "mega"), ("topp1", "top1"), ("mt10_rnd", "mt10_rand"), ("cpuu", "cpu"),
        ("'x'", "0-9"),
    ]:  # fmt: skip
        (line,) = [line for line in done.stderr.splitlines() if wrong in line.partition(";")[0]]
        assert meant in line


def test_a_grid_is_read_as_people_save_it_and_told_all_that_is_wrong(tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    good = 'algos = "mega"\nsuite = "toy"\npreset = "smoke"\nseeds = [0]\n'
    grid.write_bytes(b"\xef\xbb\xbf" + good.replace("\n", "\r\n").encode())
    assert bench("run", "--grid", str(grid), "--dry-run", "--out", str(tmp_path)).returncode == 0
    for text, words in {
        good.replace("[0]", "1" * 5000): ["not TOML"],
        good.replace("[0]", '[true, "a", 1.5, -3]'): ["True, 'a', 1.5, -3 is not a seed"],
        good.replace("[0]", "[3, 3]"): ["seeds=[3, 3]: 3 is named twice"],
        good.replace("mega", "megaa") + '[set]\nhorizon = "x"\nsteps_per_task = -1\n': [
            "unknown algorithm 'megaa'", "horizon='x'", "steps_per_task=-1",
        ],
        good + "[set]\nhorizon = {x = 1}\n": ["set horizon.x: horizon is a value and no table"],
        good + "description = 5\n": ["description=5: expected text"],
    }.items():  # fmt: skip
        grid.write_text(text)
        done = bench("run", "--grid", str(grid), "--dry-run", "--out", str(tmp_path))
        assert done.returncode == 2
        assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--threads", "100000"), ("--workers", "99999999999"), ("--workers", "\u0661"),
        ("--hang-seconds", "inf"), ("--hang-seconds", "1e-9"), ("--disk-budget", "0"),
        ("--seeds", "\u0661"), ("--preset", ""), ("--set", "reward_scale=Infinity"),
        ("--set", "goals=benchmark50"),
    ],
)  # fmt: skip
def test_what_no_machine_can_do_is_refused_before_anything_is_made(
    option: str, value: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    seeds = [] if option == "--seeds" else ["--seeds", "1"]
    done = bench("run", "--algos", "mega", "--suite", "toy", "--preset", "smoke", *seeds,
                 "--out", str(out), option, value)  # fmt: skip
    assert done.returncode == 2
    named = value.partition("=")[0] if option == "--set" else option.strip("-")
    assert named in done.stderr
    assert not out.exists()


def test_workers_are_for_this_machine(tmp_path: Path) -> None:
    done = bench("run", "--algos", "mega", "--suite", "toy", "--seeds", "1", "--workers", "4",
                 "--out", str(tmp_path / "out"), "--launcher", "slurm")  # fmt: skip
    assert done.returncode == 2
    assert "--workers 4 is for this machine" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["push, pull", "../x", "", "a\nb", ".hidden"])
def test_a_tasks_name_fits_in_a_file(name: str) -> None:
    with pytest.raises(ValueError, match="is no name for a task"):
        SuiteSpec(name="mine", task_names=(name,), obs_dim=1, action_dim=1, horizon=1)


def test_a_number_in_a_variants_name_is_written_one_way() -> None:
    with pytest.raises(SpecError, match="unknown variant 'mega@fixed016'"):
        RunSpec.resolve("mega@fixed016", "toy", 0)
