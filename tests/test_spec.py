"""Resolution of what to run, and every way to ask for it wrongly."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

import algorithms
from algorithms.d2r import D2R, D2RConfig
from bench.spec import (
    Protocol,
    RunSpec,
    SpecError,
    parse_overrides,
    parse_seeds,
    parse_value,
    preset,
    preset_names,
)


def resolve(algorithm: str = "mt_sac", suite: str = "toy", seed: int = 0, **more: Any) -> RunSpec:
    preset_name = more.pop("preset", "cpu")
    return RunSpec.resolve(algorithm, suite, seed, preset_name=preset_name, overrides=more)


# ----------------------------------------------------------------------------------- resolution


def test_the_papers_values_are_the_defaults() -> None:
    spec = resolve(preset="paper")
    assert spec.protocol == Protocol()
    assert spec.agent_config == algorithms.load("mt_sac").Config()
    assert spec.sources == {}
    assert spec.changed == {}
    p = spec.protocol
    assert (p.steps_per_task, p.horizon, p.batch_per_task) == (1_500_000, 200, 128)
    assert (p.warmup_steps, p.replay_per_task, p.eval_episodes) == (2_000, 100_000, 32)
    large = resolve(suite="toy50", preset="paper").protocol
    assert (large.steps_per_task, large.replay_per_task) == (1_000_000, 200_000)


def parameters(label: str, suite: str, preset: str, **overrides: Any) -> int:
    """Of actor and one critic."""
    spec = RunSpec.resolve(label, suite, 0, preset_name=preset, overrides=overrides)
    shape = spec.make_suite().spec
    agent = spec.agent(shape, spec.agent_config, spec.protocol.plan, seed=0)
    return sum(agent.parameter_counts().values())


def test_wide_networks_are_as_much_wider_at_every_scale() -> None:
    """Soft Modularization Table 2: 600 units beside 400, so 192 beside the cpu preset's 128."""
    for scale, width in (("paper", 600), ("cpu", 192)):
        wide = parameters("mtmh_sac@wide4", "mt10_rand", scale)
        assert wide == parameters("mtmh_sac", "mt10_rand", scale, depth=4, width=width)


@pytest.mark.parametrize("preset", ["paper", "cpu"])
@pytest.mark.parametrize("suite", ["mt10_rand", "mt50_rand"])
def test_plain_networks_of_matched_size(preset: str, suite: str) -> None:
    """The width is found when the run is specified, and recorded with where it came from."""

    for variant, reference in (("match_mega16", "mega@fixed16"), ("match_d2r", "d2r")):
        spec = RunSpec.resolve(f"mtmh_sac@{variant}", suite, 0, preset_name=preset)
        assert spec.sources["width"] == f"variant {variant}"
        assert isinstance(spec.config["width"], int)
        assert spec.label == f"mtmh_sac@{variant}"
        target = parameters(reference, suite, preset)
        assert parameters(spec.label, suite, preset) == pytest.approx(target, rel=0.02)
    by_hand = RunSpec.resolve(
        "mtmh_sac@match_d2r", suite, 0, preset_name=preset, overrides={"width": 32}
    )
    assert by_hand.config["width"] == 32


def test_a_variant_that_changes_nothing_shares_the_plain_runs() -> None:
    plain, by_name = resolve("mega"), resolve("mega@precision2")
    assert by_name.directory == plain.directory  # 2 bits are MT10's precision ...
    assert resolve("mega@precision2", suite="mt50_rand").label == "mega@precision2"  # not MT50's


def test_preset_then_variant_then_user() -> None:
    def warmup(algorithm: str, preset_name: str, **user: Any) -> tuple[int, str]:
        spec = resolve(algorithm, preset=preset_name, **user)
        return spec.protocol.warmup_steps, spec.sources.get("warmup_steps", "paper")

    assert warmup("d2r", "paper") == (2000, "paper")
    assert warmup("d2r", "metaworld_plus") == (4000, "preset metaworld_plus")
    with pytest.raises(SpecError, match="warmup_steps=4000 leaves nothing"):
        warmup("d2r@authors", "smoke")
    assert warmup("d2r@authors", "cpu") == (4000, "variant authors")
    assert warmup("d2r@authors", "metaworld_plus")[1] == "variant authors"
    assert warmup("d2r@authors", "cpu", warmup_steps=500) == (500, "user")

    def limit(algorithm: str, **user: Any) -> tuple[str, str]:
        spec = resolve(algorithm, **user)
        return spec.config["time_limit"], spec.sources.get("time_limit", "paper")

    assert limit("d2r") == ("bootstrap", "paper")
    assert limit("d2r@authors") == ("terminal", "variant authors")
    assert limit("d2r@authors", time_limit="bootstrap") == ("bootstrap", "user")


def test_values_for_one_algorithm_leave_the_others_alone() -> None:
    overrides = {"d2r.gamma": 0.9, "tau": 0.1}
    assert resolve("d2r", **overrides).config["gamma"] == 0.9
    assert resolve("mt_sac", **overrides).config["gamma"] == 0.99
    assert resolve("mt_sac", **overrides).config["tau"] == 0.1
    for both in ({"d2r.gamma": 0.9, "gamma": 0.8}, {"gamma": 0.8, "d2r.gamma": 0.9}):
        assert resolve("d2r", **both).config["gamma"] == 0.9
        assert resolve("mt_sac", **both).config["gamma"] == 0.8


def test_presets_apply_to_all_algorithms_alike() -> None:
    for name in preset_names():
        assert preset(name).description
        specs = [resolve(a, preset=name) for a in algorithms.names()]
        assert len({spec.protocol for spec in specs}) == 1
        for key, value in preset(name).algorithm.items():
            assert {spec.config[key] for spec in specs if key in spec.config} == {value}
            assert any(key in spec.config for spec in specs), f"no algorithm has {key}"


def test_a_presets_base_is_laid_below_it() -> None:
    cpu, smoke = preset("cpu"), preset("smoke")
    assert smoke.algorithm["actor_lr"] == cpu.algorithm["actor_lr"]
    assert smoke.protocol["steps_per_task"] < cpu.protocol["steps_per_task"]


# ------------------------------------------------------------------------------------- identity


def test_the_id_hashes_values_not_labels() -> None:
    by_variant, by_hand = resolve("d2r@no_balance"), resolve("d2r", route_balance=False)
    assert by_variant.id == by_hand.id
    assert by_variant.directory == by_hand.directory
    assert by_hand.label == "d2r@no_balance"
    assert by_hand.changed == {}
    numbered, by_hand = resolve("d2r@modules4"), resolve("d2r", modules=4)
    assert numbered.id == by_hand.id
    assert by_hand.label == "d2r@modules4"
    # The same values under another preset's name are the same run.
    values = {k: v for k, v in preset("cpu").protocol.items() if k in Protocol.model_fields}
    config = {k: v for k, v in preset("cpu").algorithm.items() if k in resolve().config}
    assert resolve(preset="paper", **values, **config).id == resolve(preset="cpu").id


def test_none_may_be_the_name_of_a_choice() -> None:
    typed = resolve("mt_sac", **parse_overrides(["loss_weight=none", "grad_clip=none"]))
    assert typed.config["loss_weight"] == "none"
    assert typed.config["grad_clip"] is None
    assert typed.id == resolve("mt_sac@no_balance", grad_clip=None).id


def test_everything_that_changes_a_number_changes_the_id() -> None:
    specs = [
        resolve(), resolve(seed=1), resolve("mtmh_sac"), resolve(suite="toy2"),
        resolve(preset="smoke"), resolve(gamma=0.9), resolve(eval_every=40_000),
        resolve(eval_seed=1), resolve(horizon=100), resolve(alpha_max=None),
    ]  # fmt: skip
    assert len({spec.id for spec in specs}) == len(specs)
    assert resolve(gamma=0.99).id == resolve().id  # said explicitly, it is the same value
    assert resolve().with_seed(1) == resolve(seed=1)


def test_what_no_label_tells_is_in_the_title() -> None:
    assert resolve().title == "mt_sac"
    assert resolve(gamma=0.9, tau=0.1).title == "mt_sac[gamma=0.9,tau=0.1]"
    assert resolve("d2r@soft", gamma=0.9).title == "d2r@soft[gamma=0.9]"
    assert resolve(eval_every=40_000).title == "mt_sac"  # the sweep's protocol, not the algorithm's


def test_a_field_added_later_with_a_neutral_default_keeps_old_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = resolve("d2r").id

    class LaterConfig(D2RConfig):
        """With a new field."""

        novelty: Annotated[float, Field(ge=0)] = 0.0
        """New."""

    monkeypatch.setattr(D2R, "Config", LaterConfig)
    assert resolve("d2r").config["novelty"] == 0.0
    assert resolve("d2r").id == before
    assert resolve("d2r", novelty=1.0).id != before


@given(
    gamma=st.floats(0.01, 0.99), steps=st.integers(100, 5000), cap=st.none() | st.floats(0.1, 10)
)
def test_a_specification_survives_its_file(gamma: float, steps: int, cap: float | None) -> None:
    spec = resolve(gamma=gamma, steps_per_task=200 * steps, alpha_max=cap)
    again = RunSpec(**json.loads(json.dumps(spec.model_dump(mode="json"))))
    assert again == spec
    assert again.conflict(spec) == ""
    assert again.agent_config == spec.agent_config


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("request_", "parts"),
    [
        (lambda: resolve("mt_sax"), ["algorithm 'mt_sax'", "mtmh_sac, ", "did you mean 'mt_sac'"]),
        (lambda: resolve(""), ["algorithm ''"]),
        (lambda: resolve("d2r@top2"), ["variant 'd2r@top2'", "d2r@top1", "did you mean"]),
        (lambda: resolve("sac@x"), ["sac@x", "no variants"]),
        (lambda: resolve("d2r@modules"), ["variant", "modules{modules}"]),
        (lambda: resolve("d2r@modules1"), ["modules=1", "greater than or equal to 2"]),
        (lambda: resolve("d2r@modules" + "9" * 5000), ["unknown variant"]),
        (lambda: resolve(suite="mt10_rnd"), ["suite 'mt10_rnd'", "did you mean 'mt10_rand'"]),
        (lambda: resolve(suite="mt1_rand:reech-v3"), ["reech-v3", "reach-v3"]),
        (lambda: resolve(suite="toy0"), ["suite 'toy0'"]),
        (lambda: resolve(preset="papr"), ["preset 'papr'", "cpu", "did you mean 'paper'"]),
        (lambda: resolve(gama=0.9), ["field 'gama'", "gamma", "did you mean 'gamma'"]),
        (lambda: resolve("mt_sac", modules=3), ["mt_sac", "unknown field 'modules'"]),
        (lambda: resolve(**{"d3r.gamma": 0.9}), ["algorithm 'd3r'", "did you mean 'd2r'"]),
        (lambda: resolve(**{".gamma": 0.9}), ["algorithm ''"]),
        (lambda: resolve(gamma=1.5), ["gamma=1.5", "less than 1"]),
        (lambda: resolve(gamma="much"), ["gamma='much'", "number"]),
        (lambda: resolve(tau=0), ["tau=0", "greater than 0"]),
        (lambda: resolve(horizon=501), ["horizon=501", "less than or equal to 500"]),
        (lambda: resolve(steps_per_task=0), ["steps_per_task=0", "greater than or equal to 1"]),
        (lambda: resolve(steps_per_task=30_100), ["steps_per_task=30100", "30000 or 30200"]),
        (lambda: resolve(warmup_steps=600_000), ["warmup_steps=600000", "leaves nothing"]),
        (lambda: resolve(goals="old"), ["goals='old'", "'fresh' or 'benchmark50'"]),
        (lambda: resolve(loss_weight="alfa"), ["loss_weight='alfa'", "'log_alpha'"]),
        (lambda: resolve(critic_layer_norm="perhaps"), ["critic_layer_norm='perhaps'"]),
        (lambda: resolve(target_entropy=float("nan")), ["target_entropy=nan", "finite"]),
        (lambda: resolve(actor_lr=float("inf")), ["actor_lr=inf", "finite"]),
        (lambda: resolve(gamma=[0.9]), ["gamma=[0.9]"]),
        (lambda: resolve(seed=-1), ["seed -1"]),
    ],
)  # fmt: skip
def test_errors_name_the_value_and_what_is_allowed(
    request_: Callable[[], RunSpec], parts: list[str]
) -> None:
    with pytest.raises(SpecError) as error:
        request_()
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(SpecError, match=r"(?s)gamma=2.*tau=-1"):
        resolve(gamma=2, tau=-1)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("5", [0, 1, 2, 3, 4]), ("1", [0]), ("0-9", list(range(10))), ("3,7", [3, 7]),
        ("3-3", [3]), ("7,3", [7, 3]), ("0-2,5", [0, 1, 2, 5]), (" 2 ", [0, 1]), ("0,0007", [0, 7]),
    ],
)  # fmt: skip
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "no seed named"), ("3,3", "3 is named twice"), ("0-4,2", "2 is named twice"),
        ("4-2", "runs backwards"), ("", "neither a seed nor a range"), ("-1", "neither"),
        ("1.5", "neither"), ("a", "neither"), ("1,", "neither"), (",", "neither"),
        ("0-", "neither"), ("0..4", "neither"), ("99999999999", "at most"),
        ("0-99999999999", "at most"), ("9" * 5000, "neither"), ("0-5000,6000-13000", "at most"),
    ],
)  # fmt: skip
def test_bad_seeds(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5), ("1e-3", 1e-3), ("7", 7), ("1_000", 1000), ("true", True), ("none", None),
        ("None", None), ("null", None), ("softmax", "softmax"), ('"7"', "7"), ("", ""),
        ("1\ngamma = 2", "1\ngamma = 2"), ("[" * 5000, "[" * 5000),
    ],
)  # fmt: skip
def test_values_typed_on_the_command_line(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_overrides_typed_on_the_command_line() -> None:
    assert parse_overrides(["gamma=0.9", " mega.start_stage = 4 "]) == {
        "gamma": 0.9, "mega.start_stage": 4,
    }  # fmt: skip
    for bad in ("gamma", "=3", " =3", ""):
        with pytest.raises(SpecError, match="expected key=value"):
            parse_overrides([bad])
    with pytest.raises(SpecError, match="given twice"):
        parse_overrides(["gamma=1", "gamma=2"])


GARBAGE = st.text(max_size=20) | st.text("0123456789-,.@:+_abmt{}[]=\n ", max_size=15)
KEYS = st.sampled_from([*Protocol.model_fields, *D2RConfig.model_fields]) | GARBAGE
VALUES = (
    GARBAGE.map(parse_value) | st.none() | st.booleans() | st.integers() | st.floats()
    | st.lists(st.integers(), max_size=2)
)  # fmt: skip


@given(text=GARBAGE)
@example("1-1-1")
@example("٣")
def test_garbage_seeds(text: str) -> None:
    try:
        seeds = parse_seeds(text)
    except SpecError:
        return
    assert len(set(seeds)) == len(seeds) > 0
    assert min(seeds) >= 0


@given(
    algorithm=st.sampled_from(["mt_sac", "d2r"]) | GARBAGE,
    variant=st.just("") | GARBAGE.map(lambda text: f"@{text}"),
    suite=st.sampled_from(["toy", "toy2"]) | GARBAGE | GARBAGE.map(lambda text: f"mt{text}"),
    preset_name=st.sampled_from(["paper", "cpu"]) | GARBAGE,
    overrides=st.dictionaries(KEYS, VALUES, max_size=3),
)
def test_garbage_is_a_spec_error_or_a_specification(
    algorithm: str, variant: str, suite: str, preset_name: str, overrides: dict[str, Any]
) -> None:
    try:
        spec = RunSpec.resolve(
            algorithm + variant, suite, 0, preset_name=preset_name, overrides=overrides
        )
    except SpecError:
        return
    assert RunSpec(**json.loads(json.dumps(spec.model_dump(mode="json")))) == spec


@given(key=KEYS, value=VALUES)
def test_garbage_values_of_real_fields(key: str, value: Any) -> None:
    try:
        spec = resolve("d2r", **{"preset": "paper", key: value}) if key != "preset" else resolve()
    except SpecError:
        return
    assert RunSpec(**json.loads(json.dumps(spec.model_dump(mode="json")))) == spec
    assert spec.conflict(spec) == ""


@given(items=st.lists(GARBAGE | GARBAGE.map(lambda text: f"gamma={text}"), max_size=3))
def test_garbage_overrides(items: list[str]) -> None:
    with contextlib.suppress(SpecError):
        parse_overrides(items)
