"""Configurations: what is wrong in one is refused at once, with the place and the remedy on one line."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.paths import ROOT
from helpers.small_configs import SMALLEST, refusal, write
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.config.load import Config, TaskConfig, config_from_tables, load_config, shipped_configs
from learned_optim.meta_train.config.settings import (
    CurriculumConfig,
    MetaOptimizerConfig,
    RuleConfig,
    SuiteConfig,
    UnrollConfig,
    ValidationConfig,
)
from learned_optim.meta_train.estimators import ESTIMATORS, Estimator, TruncatedBPTT
from learned_optim.meta_train.tasks import FAMILIES, MLPFamily, QuadraticFamily
from learned_optim.rules import ARCHITECTURES, LSTML2L, ScheduleFreeLSTM


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configuration_loads_and_says_what_it_is(name: str) -> None:
    config = load_config(name)
    assert config.description
    assert config.steps >= 1
    assert len([task.build() for task in config.tasks]) >= 1


def test_shipped_configurations_are_all_found() -> None:
    folder = ROOT / "meta_train" / "configs"
    assert set(shipped_configs()) == {path.stem for path in folder.iterdir() if path.suffix == ".toml"}
    assert {"default", "demo"} <= set(shipped_configs())


@pytest.mark.parametrize("name", shipped_configs())
def test_json_round_trip_gives_an_equal_configuration(name: str) -> None:
    config = load_config(name)
    again = config_from_tables(json.loads(config.to_json()))
    assert again == config
    assert again.to_json() == config.to_json()
    assert [task.build() for task in again.tasks] == [task.build() for task in config.tasks]


def test_smallest_configuration_has_the_documented_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALLEST))
    assert config == Config(tasks=(TaskConfig("quadratic"),), steps=3)
    assert config.tasks[0].build() == QuadraticFamily()
    assert isinstance(config.rule.build(config.seed), ScheduleFreeLSTM)
    assert config.unroll.truncation == 20
    assert config.estimator == TruncatedBPTT(meta_loss="mean", replay_coordinates=None)


def test_toml_values_reach_their_settings(tmp_path: Path) -> None:
    text = """
        steps = 1_000
        seed = 7
        [rule]
        architecture = "lstm-l2l"
        settings = { hidden_size = 3, layers = 1 }
        [[tasks]]
        family = "mlp"
        weight = 2.5
        width = [4, 8]
        activations = ["relu", "tanh"]
        [unroll]
        horizon = [10, 30]
        [meta_optimizer]
        clip_norm = 0.5
    """
    config = load_config(write(tmp_path, text))
    rule = config.rule.build(config.seed)
    assert isinstance(rule, LSTML2L)
    assert (rule.hidden_size, rule.layers) == (3, 1)
    assert config.tasks[0].weight == 2.5
    assert config.tasks[0].build() == MLPFamily(width=(4, 8), activations=("relu", "tanh"))
    assert (config.seed, config.unroll.horizon, config.meta_optimizer.clip_norm) == (7, (10, 30), 0.5)


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("stepz = 4\n" + SMALLEST, "stepz", "steps"),
        (SMALLEST + "[unrol]\npool = 2", "unrol", "unroll"),
        (SMALLEST + "[unroll]\ntruncaton = 5", "unroll.truncaton", "truncation"),
        (SMALLEST + "[rule]\narchitektur = 'lstm-l2l'", "rule.architektur", "architecture"),
        (SMALLEST + "[estimator]\nmetaloss = 'log'", "estimator.metaloss", "meta_loss"),
        (SMALLEST + "[meta_optimizer]\nclipnorm = 1", "meta_optimizer.clipnorm", "clip_norm"),
        (SMALLEST + "[validation]\nevry = 1", "validation.evry", "every"),
        (SMALLEST + "[unroll.truncation_growth]\nupto = 9\nover = 3", "unroll.truncation_growth.upto", None),
        (SMALLEST + "[unroll.truncation_growth]\njiter = 0\nover = 3", "unroll.truncation_growth.jiter", "jitter"),
        (SMALLEST + "[[validation.suites]]\nname = 'a'\nhorizn = 3", "validation.suites.0.horizn", "horizon"),
        (SMALLEST + "[curriculum]\nhorizon = [3, 4]", "curriculum.horizon", "horizons"),
        (SMALLEST + "dimenson = [2, 3]", "dimenson", "dimensions"),
        (SMALLEST + "wieght = 2", "wieght", None),  # not among the family's options
        (SMALLEST + "options = {}\nwieght = 2", "tasks.0.wieght", "weight"),
    ],
)
def test_unknown_key_is_refused_at_every_level(text: str, key: str, suggestion: str | None, tmp_path: Path) -> None:
    message = refusal(text, tmp_path)
    assert f"unknown key {key!r}" in message
    assert suggestion is None or f"did you mean {suggestion!r}?" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps: Input should be greater than or equal to 1, got 0"),
        ("steps=many", "steps: Input should be a valid integer.*got 'many'"),
        ("steps=2.5", "steps: .*integer"),
        ("seed=-1", "seed: .*greater than or equal to 0"),
        ("tasks=[]", "at least one"),
        ("tasks=quadratic", "tasks: "),
        ("tasks[0].weight=0", r"tasks\.0\.weight: .*greater than 0"),
        ("tasks[0].dimensions=3", r"tasks\[quadratic\]: dimensions: "),
        ("tasks[0].dimensions=[5,2]", r"tasks\[quadratic\]: dimensions must be a range .* got \[5, 2\]"),
        ("tasks[0].condition=[0.1,2]", r"tasks\[quadratic\]: condition must be a range"),
        ("tasks[0].noise=-1", r"tasks\[quadratic\]: noise must not be negative, got -1"),
        ("unroll.truncation=0", r"unroll\.truncation: "),
        ("unroll.horizon=[200,100]", r"unroll: horizon must be a range .* got \[200, 100\]"),
        ("unroll.horizon=[10]", r"unroll\.horizon"),
        ("unroll.rescale=1.5", r"unroll\.rescale: "),
        ("unroll.rescale_range=[0,1]", r"unroll\.rescale_range\.0: .*greater than 0"),
        ("unroll.rescale_range=[2,1]", "unroll: rescale_range must be a range"),
        ("unroll.windows_per_step=2", "unroll: windows_per_step cannot exceed pool, got 2 and 1"),
        ("unroll=3", "unroll: "),
        ("estimator.name=uoro", r"estimator\.name: .*truncated-bptt.*got 'uoro'"),
        ("estimator.meta_loss=sum", r"estimator\.meta_loss: .*mean.*log.*got 'sum'"),
        ("estimator.replay_coordinates=0", r"estimator\.replay_coordinates: "),
        ("meta_optimizer.lr=0", r"meta_optimizer\.lr: .*greater than 0"),
        ("meta_optimizer.average=1", r"meta_optimizer\.average: .*less than 1"),
        ("meta_optimizer.schedule=quadratic", r"meta_optimizer\.schedule: "),
        ("meta_optimizer.clip_norm=-1", r"meta_optimizer\.clip_norm: "),
        ("validation.every=0", r"validation\.every: "),
        ("validation.suites=[]", "validation: at least one suite is needed"),
        ('validation.suites=[{name="a"},{name="a"}]', "validation: suites need names of their own, got a, a"),
        ('validation.suites=[{name="a b"}]', r"validation\.suites\.0\.name: .*pattern"),
        ('validation.suites=[{name="a",horizon=0}]', r"validation\.suites\.0\.horizon: .*greater than or equal to 1"),
        ("validation.select=far", "validation: select: unknown name 'far'; known: mixture"),
        ("curriculum.horizons=[]", r"curriculum\.horizons: .*at least 1 item"),
        ("curriculum.horizons=[3,3]", r"curriculum: horizons must increase from stage to stage, got \[3, 3\]"),
        ("unroll.truncation_up_to=5", r"unroll: truncation and truncation_up_to must be a range .* got \[20, 5\]"),
        ("unroll.truncation_growth={to=5}", r"unroll\.truncation_growth\.over: "),
        ("unroll.truncation_growth={to=5,over=2,jitter=1}", r"unroll\.truncation_growth\.jitter: .*less than 1"),
        ("estimator.clamp=0", r"estimator\.clamp: .*greater than 0"),
        ("estimator.outer_batches=-1", r"estimator\.outer_batches: "),
        ("estimator.outer_split=test", r"estimator\.outer_split: .*train.*validation.*got 'test'"),
        ("estimator.outer_split=validation", 'outer_split = "validation" needs outer_batches = 1 or more'),
        (
            "estimator.meta_loss=speedup",
            "estimator: meta_loss 'speedup' .* take the estimator 'es' or 'output-es', got 'truncated-bptt'",
        ),
        ("meta_optimizer.name=lion", r"meta_optimizer\.name: .*adam.*got 'lion'"),
        ("meta_optimizer.momentum=0.9", "meta-optimizer 'adam' has no option 'momentum'; it has betas, lr"),
        ("meta_optimizer.weight_decay=0.1", "meta-optimizer 'adam' has no option 'weight_decay'"),
        ("meta_optimizer.betas=[0.5,1]", r"meta_optimizer\.betas\.1: .*less than 1"),
        ("meta_optimizer.final_fraction=0.1", 'final_fraction needs schedule = "cosine", "linear" or "exponential"'),
        ("meta_optimizer.schedule=exponential", "needs a final_fraction above 0"),
        ("rule.settings.hidden_size=-1", r"rule\.settings: hidden_size must be at least 0, got -1"),
        ("rule.settings.hidden_sise=4", r"rule\.settings: .*hidden_sise"),
        ("rule.settings=4", r"rule\.settings: "),
        ("description=3", "description: "),
        ("meta_optimizer.clip_norm=inf", "only finite numbers"),  # JSON, in weights files, knows no others
        ("tasks[0].noise=inf", "only finite numbers"),
        ("rule.settings.day=2026-01-01", r"rule\.settings: "),
    ],
)
def test_wrong_value_is_refused_with_its_place(override: str, message: str, tmp_path: Path) -> None:
    assert re.search(message, refusal(SMALLEST, tmp_path, [override]))


@pytest.mark.parametrize(
    ("heading", "settings"),
    [
        ("Top level", Config),
        ("`[rule]`", RuleConfig),
        ("`[unroll]`", UnrollConfig),
        ("`[estimator]`", None),
        ("`[meta_optimizer]`", MetaOptimizerConfig),
        ("`[validation]`", ValidationConfig),
        ("`[[validation.suites]]`", SuiteConfig),
        ("`[curriculum]`", CurriculumConfig),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_option_is_documented_with_its_default(heading: str, settings: Any) -> None:
    """An option that several estimators have stands there once, with the default of the first."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    section = re.split(r"^##", text.split(f"### {heading}\n")[1], flags=re.MULTILINE)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in section.splitlines() if line.startswith("| `")]
    documented = {name.strip("`"): default.strip("`") for name, default in rows}
    if settings is None:
        assert documented.pop("name") == json.dumps(TruncatedBPTT.name)
        options = [*map(dataclasses.fields, reversed(ESTIMATORS.values())), dataclasses.fields(Estimator)]
        fields = {field.name: field for each in options for field in each}
        assert set(documented) == set(fields)
    else:
        fields = {field.name: field for field in dataclasses.fields(settings)}
        assert list(documented) == list(fields)
    for name, default in documented.items():
        factory: Any = fields[name].default_factory
        value = fields[name].default if factory is dataclasses.MISSING else factory()
        if default == "required":
            assert value is dataclasses.MISSING, name
        elif not dataclasses.is_dataclass(value) and default != "the mixture":
            assert default == ("none" if value is None else json.dumps(value)), name


def test_missing_key_is_named(tmp_path: Path) -> None:
    assert "steps: " in refusal('[[tasks]]\nfamily = "quadratic"', tmp_path)
    assert "tasks: " in refusal("steps = 3", tmp_path)
    assert "tasks.0.family: " in refusal("steps = 3\n[[tasks]]\nweight = 1", tmp_path)


def test_option_of_another_estimator_is_refused(tmp_path: Path) -> None:
    text = SMALLEST + '[estimator]\nname = "pes"\nreplay_coordinates = 4'
    assert "estimator: estimator 'pes' has no option 'replay_coordinates'; it has sigma, pairs" in refusal(
        text, tmp_path
    )


FORMER = {"sigma": 0.01, "pairs": 1, "groups": None, "perturbed": None, "caution": 8.0, "covariance": True}
"""Options that earlier versions recorded with every estimator."""


def test_configuration_that_an_earlier_version_recorded_is_understood() -> None:
    tables = json.loads(load_config("default").to_json())
    tables["unroll"] |= {"truncation": 2000, "truncation_up_to": 2000}
    tables["estimator"] |= {**FORMER, "pairs": 8, "sigma": 0.1, "replay_coordinates": None, "second_derivatives": False}
    assert config_from_tables(tables) == load_config("default")
    tables["estimator"]["covariance"] = False
    with pytest.raises(ConfigError, match="estimator 'output-es' has no option 'covariance'; it has sigma, pairs"):
        config_from_tables(tables)


def test_window_is_a_number_of_steps_or_the_whole_training(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALLEST), ["unroll.truncation=whole"])
    assert config.unroll.window(0, 73, np.random.default_rng(0)) == 73
    for override in ("unroll.truncation_up_to=30", "unroll.truncation_growth={to=30,over=5}"):
        message = refusal(SMALLEST, tmp_path, ["unroll.truncation=whole", override])
        assert 'truncation = "whole" leaves nothing to truncation_up_to and truncation_growth' in message
    assert "unroll.truncation: " in refusal(SMALLEST, tmp_path, ["unroll.truncation=half"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "pes"\ngroups = 3', "estimator.groups must divide unroll.instances, got 3 and 16"),
        ('name = "combined"\ngroups = 1', "the combined estimator needs two pairs or more"),
    ],
)
def test_invalid_groups_are_refused_before_training(text: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(SMALLEST + f"[estimator]\n{text}", tmp_path)


def test_conflicting_settings_are_refused(tmp_path: Path) -> None:
    text = SMALLEST + "[unroll]\ntruncation_up_to = 30\ntruncation_growth = { to = 30, over = 5 }"
    assert "truncation_growth and truncation_up_to exclude each other" in refusal(text, tmp_path)
    text = SMALLEST + "[unroll]\nhorizon = [5, 10]\n[curriculum]\nhorizons = [5, 10]"
    assert "curriculum.horizons replace unroll.horizon" in refusal(text, tmp_path)


def test_sampled_second_derivatives_are_refused_before_training(tmp_path: Path) -> None:
    text = SMALLEST + "[estimator]\nsecond_derivatives = true\nreplay_coordinates = 4"
    assert "estimator: replay_coordinates needs constant inner gradients" in refusal(text, tmp_path)


@pytest.mark.parametrize("weight", [1.0, 0.001])
def test_evaluation_data_is_refused_for_training(weight: float, tmp_path: Path) -> None:
    text = SMALLEST + f'[[tasks]]\nfamily = "mlp"\ndataset = "fashion-mnist"\nweight = {weight}\n'
    message = refusal(text, tmp_path)
    assert "tasks[mlp]: not for meta-training: data set 'fashion-mnist', evaluation only" in message


def test_evaluation_data_is_refused_for_validation(tmp_path: Path) -> None:
    suite = '[[validation.suites]]\nname = "far"\n[[validation.suites.families]]\nfamily = "mlp"\n'
    assert load_config(write(tmp_path, SMALLEST + suite + "width = [3, 4]")).families[1].options == {"width": [3, 4]}
    message = refusal(SMALLEST + suite + 'dataset = "fashion-mnist"', tmp_path)
    assert "not for meta-training: data set 'fashion-mnist', evaluation only" in message


def test_training_data_is_accepted(tmp_path: Path) -> None:
    load_config(write(tmp_path, SMALLEST + '[[tasks]]\nfamily = "mlp"\ndataset = "cifar10"\n'))


def test_unknown_name_error_lists_the_known(tmp_path: Path) -> None:
    message = refusal(SMALLEST, tmp_path, ["tasks[0].family=quadratik"])
    assert "unknown name 'quadratik' (did you mean 'quadratic'?)" in message
    assert all(name in message for name in FAMILIES)
    assert "package.module:Class" in message
    message = refusal(SMALLEST, tmp_path, ["rule.architecture=lstm"])
    assert message.startswith("rule.architecture: unknown name 'lstm'")
    assert all(name in message for name in ARCHITECTURES)
