"""A family that cannot be trained is refused with its reason before anything is spent on it."""

import pytest

from helpers.small_runs import plain
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.trainer.family_check import check_family

FAULTS = {
    "nan": r"the loss is not finite before the first step: \[nan, nan\]",
    "zero": r"the loss must be positive before the first step, got \[0.0, 0.0\]; add a constant to it",
    "negative": r"the loss must be positive before the first step, got \[-",
    "parameters": "the module has no parameters to train",
    "module": "the shapes of the module's parameters change from call to call",
    "first dimension": r"batch\(2, generator\) must give tensors \(2, ...\), ",
    "batches": "the shapes of batches change from step to step",
    "constant": "the loss does not depend on the module's parameters",
    "code": r"loss\(module, batch\), vectorised, fails: KeyError: 'targets'",
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.items(), ids=FAULTS)
def test_family_with_a_fault_is_refused_with_its_reason(fault: str, reason: str) -> None:
    config = plain(tasks=[{"family": "helpers.odd_families:OddFamily", "fault": fault}])
    with pytest.raises(ConfigError, match=rf"^mine(, split 'train')?: {reason}"):
        check_family(config, "mine")


@pytest.mark.parametrize(
    "task",
    [
        {"family": "helpers.odd_families:OddFamily"},
        {"family": "quadratic"},
        {"family": "helpers.user_tasks:DropoutFamily"},
    ],
)
def test_family_without_a_fault_is_accepted(task: dict[str, str]) -> None:
    check_family(plain(tasks=[task]), "mine")
