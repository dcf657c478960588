"""Contenders of a benchmark: names, rates and rules are parsed, or refused before anything is run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from learned_optim import LearnedOptimizer, save_rule
from learned_optim.meta_train.benchmark.contenders import baseline, baselines, rules
from learned_optim.meta_train.benchmark.evaluation import BASELINES
from learned_optim.rules import ScaleFreeLSTM


def test_baseline_is_tuned_unless_it_has_a_rate() -> None:
    assert baseline("SGD").is_tuned
    reference = baseline("Adam@1e-3")
    assert (reference.name, reference.rate, reference.is_tuned) == ("Adam@0.001", 1e-3, False)
    optimizer = reference.for_module(nn.Linear(1, 1), reference.rate, 10)
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_baselines_include_the_reference_once() -> None:
    assert [found.name for found in baselines(["SGD", "Adam@0.1", "SGD"])] == ["Adam", "SGD", "Adam@0.1"]
    assert [found.name for found in baselines(list(BASELINES))] == list(BASELINES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Adamax", "unknown name 'Adamax'.*known: Adam, AdamW"),
        ("adam", "did you mean 'Adam'"),
        ("Adam@fast", "'Adam@fast'.*positive rate, for example Adam@1e-3"),
        ("SGD@-1", "positive rate"),
        ("SGD@nan", "positive rate"),
        ("SGD@inf", "positive rate"),
        ("SGD@", "positive rate"),
    ],
)
def test_invalid_baseline_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        baselines([text])


def test_rules_of_the_same_file_name_get_distinct_names(tmp_path: Path) -> None:
    paths = [tmp_path / "runs" / run / f"{name}.safetensors" for run in ("a", "b") for name in ("best", "latest")]
    for seed, path in enumerate(paths):
        rule = ScaleFreeLSTM(2)
        rule.reset_parameters(seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_rule(rule, path)
    assert [found.name for found in rules(paths[:2])] == ["best", "latest"]
    found = rules(["default", *paths, paths[0]])
    assert [rule.name for rule in found] == ["default", "a/best", "a/latest", "b/best", "b/latest"]
    assert len({str(rule.identity) for rule in found}) == 5
    assert all(rule.is_rule and not rule.is_tuned for rule in found)
    assert isinstance(found[1].for_module(nn.Linear(1, 1), None, 10), LearnedOptimizer)
    assert rules([]) == []


def test_rule_named_like_a_baseline_is_shown_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "Adam.safetensors"
    path.parent.mkdir()
    save_rule(ScaleFreeLSTM(2), path)
    assert [found.name for found in rules([path])] == ["mine/Adam"]


def test_missing_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown rule 'nobody'"):
        rules(["nobody"])
    with pytest.raises(FileNotFoundError, match=r"no rule file at a/b\.safetensors"):
        rules(["a/b.safetensors"])
