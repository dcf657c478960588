"""The lines that a meta-trained rule should get below: its start, the default rule, outputs of zero, and tuned Adam."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from learned_optim.checkpoint import load_rule
from learned_optim.meta_train.benchmark.cache import Cache, default_folder, rule_fingerprint
from learned_optim.meta_train.estimators.output_es import require_schedule_free, without_outputs
from learned_optim.meta_train.trainer.tuned_adam import TRIED
from learned_optim.meta_train.trainer.validation import ValidationSuite
from learned_optim.rules import UpdateRule

START, DEFAULT, ZERO, ADAM = "start", "default", "outputs of zero", "tuned Adam"
"""Names of the baselines, in the order in which they are shown."""


class Scored(NamedTuple):
    """What is known before the first meta-step."""

    scores: dict[str, float]
    """Validation scores by name."""
    seconds: float
    """What one validation of a rule takes."""


def score_baselines(start: UpdateRule, suite: ValidationSuite, tell: Callable[[str], None]) -> Scored:
    """Validation scores of the start and of what it should be compared with.

    Rules that do the same, such as a fresh rule and the default whose outputs are zero, are scored once. Of several
    processes all call it together.

    Args:
        start: the rule that meta-training starts from.
        suite: the tasks of validation.
        tell: is told how long it takes, before most of it is done.
    """
    rules = {START: start, DEFAULT: load_rule("default").to(next(start.parameters()))}  # its device and dtype
    if (zero := with_outputs_of_zero(start)) is not None:
        rules[ZERO] = zero
    identities = {name: identity(rule) for name, rule in rules.items()}
    by_identity: dict[str, float] = {}
    one = 0.0
    for name, rule in rules.items():
        if identities[name] in by_identity:
            continue
        began = time.monotonic()
        by_identity[identities[name]] = suite.score(rule)
        if name == START:
            one = time.monotonic() - began
            left = len(set(identities.values())) - 1 + TRIED.stop - TRIED.start
            tell(
                f"a validation takes {one:.1f} s; before the first meta-step the default rule and tuned Adam are "
                f"scored as well, which takes about {left * one:.0f} s (validation.baselines = false leaves it out)"
            )
    adam = suite.adam_score(Cache(default_folder()))
    return Scored({name: by_identity[identities[name]] for name in rules} | {ADAM: adam}, one)


def with_outputs_of_zero(rule: UpdateRule) -> UpdateRule | None:
    """The rule as it was designed by hand: a copy whose outputs are zero; None if it has none."""
    try:
        return without_outputs(require_schedule_free(rule)).requires_grad_(False)
    except ValueError:
        return None


@torch.no_grad()
def identity(rule: UpdateRule) -> str:
    """A hash that rules have in common if they do the same: with outputs of zero the other weights do not count."""
    zero = with_outputs_of_zero(rule)
    if zero is None or any(
        not torch.equal(rule.state_dict()[name], value) for name, value in zero.state_dict().items()
    ):
        return rule_fingerprint(rule)
    for parameter in zero.parameters():
        parameter.zero_()
    return rule_fingerprint(zero)
