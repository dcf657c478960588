"""A rule without its idle parts takes the same steps, and an optimizer runs it."""

import copy

import pytest
import torch

from helpers.optimizers import Net, train
from helpers.rules import RULES, Build, each, randomised
from learned_optim import LearnedOptimizer, load_rule
from learned_optim.rules import ScheduleFreeLSTM


def idle(bias: float = 0.3) -> ScheduleFreeLSTM:
    """A rule whose LSTM has no say, and whose outputs are not zero."""
    rule = ScheduleFreeLSTM(2)
    with torch.no_grad():
        rule.output_bias.copy_(bias * torch.linspace(-1, 1, len(rule.output_bias)))
    return rule


@pytest.mark.parametrize("options", [{}, {"total_steps": 30}, {"averaging": False}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("fused", [False, None])
def test_steps_are_the_same(options: dict[str, object], fused: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    other = copy.deepcopy(net)
    pruned = LearnedOptimizer(net.parameters(), idle(), fused=fused, **options)  # type: ignore[arg-type]
    assert "hidden" not in pruned.rule.state_features
    monkeypatch.setattr(ScheduleFreeLSTM, "pruned", lambda self: self)
    whole = LearnedOptimizer(other.parameters(), idle(), fused=fused, **options)  # type: ignore[arg-type]
    assert "hidden" in whole.rule.state_features
    train(net, pruned, steps=20)
    train(other, whole, steps=20)
    for own, expected in zip(net.parameters(), other.parameters(), strict=True):
        # In torch operations to the bit; compilers may contract other products and sums.
        tolerance = 0 if fused is False else 1e-5
        torch.testing.assert_close(own, expected, rtol=tolerance, atol=tolerance)


@each(RULES)
def test_nothing_is_left_out_that_has_a_say(build: Build) -> None:
    rule = randomised(build())
    assert rule.pruned() is rule


def test_what_is_left_out_has_no_part_in_the_state() -> None:
    default = load_rule("default")
    assert isinstance(default, ScheduleFreeLSTM)
    assert default.hidden_size == 4  # what meta-training starts from
    pruned = default.pruned()
    assert pruned.state_features == {"momentum": 2, "second_moment": 2, "displacement": 1, "log_rate": 1}
    assert pruned.settings == {"hidden_size": 0, "rate": default.rate}
    assert [name for name, _ in pruned.named_parameters()] == ["output_bias"]
    assert pruned.pruned() is pruned


def test_a_class_of_ones_own_keeps_its_parts() -> None:
    class Own(ScheduleFreeLSTM):
        pass

    rule = Own(2)
    assert rule.pruned() is rule


def test_state_that_was_saved_with_the_lstm_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    with monkeypatch.context() as patch:
        patch.setattr(ScheduleFreeLSTM, "pruned", lambda self: self)
        earlier = LearnedOptimizer(net.parameters(), fused=False)
        train(net, earlier)
    other = copy.deepcopy(net)
    later = LearnedOptimizer(other.parameters(), fused=False)
    later.load_state_dict(earlier.state_dict())
    assert all(set(state) == {*later.rule.state_features, "step", "scale"} for state in later.state.values())
    train(net, earlier)
    train(other, later)
    assert all(map(torch.equal, net.parameters(), other.parameters()))
