"""One contract for every optimizer: torch.optim.Adam passes each check, which shows that the check is right.

The arguments and errors are those that PyTorch tests its own optimizers with.
"""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    get_error_inputs_for_all_optims,
)

from helpers.contract import Make, Net, adam_inputs, each_optimizer, loss_of, optimizer_inputs, train
from helpers.optimizers import same
from helpers.paths import ROOT
from helpers.rules import normal, randomised
from learned_optim import LearnedOptimizer, save_rule
from learned_optim.rules import ScaleFreeLSTM, ScheduleFreeLSTM

INFOS = [  # OptimizerInfo takes a class; its annotation says an instance
    OptimizerInfo(Adam, optim_inputs_func=adam_inputs),  # type: ignore[arg-type]
    OptimizerInfo(LearnedOptimizer, optim_inputs_func=optimizer_inputs),  # type: ignore[arg-type]
]
each_configuration = pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(info.optim_cls, options.kwargs, id=f"{info.name}-{options.desc}")
        for info in INFOS
        for options in info.optim_inputs_func("cpu")
    ],
)


# Arguments.


@each_configuration
def test_step_goes_in_the_right_direction(kind: type[Optimizer], options: dict[str, Any]) -> None:
    options = copy.deepcopy(options)
    values = nn.Parameter(torch.tensor([1.0, -2.0]))
    # As PyTorch's own test of differentiable optimizers does: the step may not write to a leaf that autograd follows.
    stepped = values.detach().clone() if options.get("differentiable") else values
    optimizer = kind([stepped], **options)
    for _ in range(20):
        stepped.grad = stepped.detach().clone()  # of half the square
        optimizer.step()
    grew = stepped.detach().abs() > values.new_tensor([1.0, 2.0])
    assert grew.tolist() == [options.get("maximize", False)] * 2


@each_optimizer
@pytest.mark.parametrize(
    "error",
    [pytest.param(e, id=e.optimizer_error_input.desc) for e in get_error_inputs_for_all_optims("cpu", torch.float32)],
)
def test_pytorchs_constructor_errors_are_raised(make: Make, error: ErrorOptimizerInput) -> None:
    given = error.optimizer_error_input
    params = [nn.Parameter(torch.ones(1))] if given.params is None else given.params
    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            make(params, **given.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            make(params, **given.kwargs)


@each_optimizer
@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
def test_groups_keep_their_own_settings(make: Make, named: bool) -> None:
    still, moving, decaying = Net(), Net(), Net()

    def params(net: Net) -> list[Any]:
        return list(net.named_parameters() if named else net.parameters())

    before = [parameter.detach().clone() for parameter in still.parameters()]
    optimizer = make(
        [
            {"params": params(still), "lr": 0.0},
            {"params": params(moving)},
            {"params": params(decaying), "weight_decay": 0.01},
        ]
    )
    for _ in range(3):  # Adam's first step follows the sign alone, which its decay does not change
        optimizer.zero_grad()
        (loss_of(still) + loss_of(moving) + loss_of(decaying)).backward()
        optimizer.step()
    assert same([parameter.detach() for parameter in still.parameters()], before)
    assert not any(torch.equal(one, two) for one, two in zip(moving.parameters(), before, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(moving.parameters(), decaying.parameters(), strict=True))
    names = [group.get("param_names") for group in optimizer.state_dict()["param_groups"]]
    assert names == [[name for name, _ in still.named_parameters()] if named else None] * 3


# Parameters.


@each_optimizer
def test_tied_parameter_is_stepped_once(make: Make) -> None:
    net = Net(tied=True)
    optimizer = make(net.parameters())
    train(net, optimizer, steps=2)
    assert net.second.weight is net.first.weight
    assert len(optimizer.state) == 3
    assert optimizer.state[net.first.weight]["step"] == 2


@each_optimizer
def test_accumulated_gradients_step_as_their_sum(make: Make) -> None:
    net, other = Net(), Net()
    optimizer, other_optimizer = make(net.parameters()), make(other.parameters())
    for seed in (20, 30):
        (loss_of(net, seed) / 2).backward()
    for parameter, like in zip(other.parameters(), net.parameters(), strict=True):
        assert like.grad is not None
        parameter.grad = like.grad.clone()
    optimizer.step()
    other_optimizer.step()
    assert same(list(net.parameters()), list(other.parameters()))


@each_optimizer
def test_added_group_leaves_the_others_unchanged(make: Make) -> None:
    net, joining, other = Net(), Net(), Net()
    optimizer, alone = make(net.parameters()), make(other.parameters())
    train(net, optimizer)
    optimizer.add_param_group({"params": joining.parameters(), "lr": 0.5 * optimizer.param_groups[0]["lr"]})
    before = [parameter.detach().clone() for parameter in joining.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(net) + loss_of(joining)).backward()
        optimizer.step()
    assert same(list(net.parameters()), train(other, alone, steps=6))
    assert not any(torch.equal(one, two) for one, two in zip(joining.parameters(), before, strict=True))
    assert [optimizer.state[each.first.weight]["step"].item() for each in (net, joining)] == [6, 3]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [net.first.weight]})


@each_optimizer
def test_parameter_without_gradient_keeps_value_and_step_count(make: Make) -> None:
    net = Net()
    optimizer = make(net.parameters(), weight_decay=0.1)
    train(net, optimizer)
    frozen = net.first.weight
    before, state = frozen.detach().clone(), copy.deepcopy(optimizer.state[frozen])
    frozen.requires_grad_(False)
    train(net, optimizer)
    assert torch.equal(frozen, before)
    assert same(list(optimizer.state[frozen].values()), list(state.values()))
    assert optimizer.state[net.first.bias]["step"] == 6


@each_optimizer
def test_closure_is_called_once_with_gradients_enabled(make: Make) -> None:
    net, losses = Net(), []
    optimizer = make(net.parameters())

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        losses.append(loss.item())
        return loss.item()

    with torch.no_grad():
        returned = [optimizer.step(closure) for _ in range(3)]
    assert losses == returned
    assert len(set(losses)) == 3


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 2, 2)], ids=str)
def test_dtype_and_shape_of_parameters_are_kept(make: Make, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # Near zero, where a step is far above the spacing of bfloat16.
    values = nn.Parameter(1e-4 * normal(*shape).to(dtype))
    before = values.detach().clone()
    optimizer = make([values])
    for seed in range(4):
        values.grad = normal(*shape, seed=seed).to(dtype)
        optimizer.step()
    assert (values.dtype, values.shape) == (dtype, before.shape)
    assert values.isfinite().all()
    assert (values != before).all()
    for entry, value in optimizer.state[values].items():
        assert entry in ("step", "scale") or value.shape[-len(shape) :] == shape or shape == ()


@each_optimizer
@pytest.mark.parametrize("options", [{}, {"maximize": True, "weight_decay": 0.1}], ids=["plain", "options"])
def test_parameters_on_the_meta_device_are_accepted(make: Make, options: dict[str, Any]) -> None:
    # Models on the meta device are stepped to find out what a training will need.
    values = nn.Parameter(torch.ones(3, 200, device="meta"))
    optimizer = make([values], **options)
    for _ in range(2):
        values.grad = torch.ones_like(values)
        optimizer.step()
    tensors = {entry: tensor for entry, tensor in optimizer.state[values].items() if entry != "step"}
    assert all(tensor.is_meta for tensor in tensors.values())
    assert all(tensor.shape[-2:] == (3, 200) for entry, tensor in tensors.items() if entry != "scale")
    assert optimizer.state[values]["step"] == 2


@each_optimizer
def test_channels_last_gives_the_same_update(make: Make) -> None:
    plain = nn.Parameter(normal(4, 3, 2, 2).float())
    last = nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    for values in (plain, last):
        optimizer = make([values])
        for seed in range(3):
            values.grad = normal(4, 3, 2, 2, seed=seed).float().to(memory_format=torch.channels_last)
            optimizer.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, plain)


@each_optimizer
def test_memory_layouts_give_the_same_update(make: Make) -> None:
    def views() -> list[Tensor]:
        wide = normal(6, 8).float()
        return [wide.clone(), wide.t().contiguous().t(), wide.repeat_interleave(2, 1)[:, ::2]]

    values = [nn.Parameter(view) for view in views()]
    for value, grad in zip(values, reversed(views()), strict=True):
        value.grad = grad
        make([value]).step()
    assert all(torch.equal(value, values[0]) for value in values)


@each_optimizer
def test_nan_stays_in_its_coordinate(make: Make) -> None:
    first, second = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))
    optimizer = make([first, second])
    first.grad, second.grad = torch.ones(5), torch.ones(3)
    first.grad[2] = float("nan")
    optimizer.step()
    assert first[[0, 1, 3, 4]].isfinite().all()
    assert second.isfinite().all()


# Hooks.


@each_optimizer
def test_hooks_are_called_until_removed(make: Make) -> None:
    net, calls = Net(), []
    optimizer = make(net.parameters())

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    handles = [
        register_optimizer_step_pre_hook(note("global-pre")),
        register_optimizer_step_post_hook(note("global-post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_state_dict_pre_hook(note("state-pre")),
        optimizer.register_state_dict_post_hook(note("state-post")),
        optimizer.register_load_state_dict_pre_hook(note("load-pre")),
        optimizer.register_load_state_dict_post_hook(note("load-post")),
    ]
    train(net, optimizer, steps=1)
    assert calls == ["global-pre", "pre", "post", "global-post"]
    calls.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["state-pre", "state-post", "load-pre", "load-post"]
    calls.clear()
    for handle in handles:
        handle.remove()
    train(net, optimizer, steps=1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == []


@each_optimizer
def test_profiler_records_step_and_zero_grad(make: Make) -> None:
    net = Net()
    optimizer = make(net.parameters())
    with torch.autograd.profiler.profile() as profile:
        train(net, optimizer, steps=1)
    names = [event.name for event in profile.function_events or []]
    kind = type(optimizer).__name__
    assert names.count(f"Optimizer.step#{kind}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{kind}.zero_grad") == 1


# Saving.

CONTINUE = """
import sys, torch
sys.path[:0] = sys.argv[3:]
from helpers.contract import Net, train
from torch.optim import Adam
from learned_optim import LearnedOptimizer

results = {}
for name, saved in torch.load(sys.argv[1], weights_only=True).items():
    net = Net()
    net.load_state_dict(saved["net"])
    optimizer = Adam(net.parameters()) if name == "Adam" else LearnedOptimizer(net.parameters(), saved["rule"])
    optimizer.load_state_dict(saved["optimizer"])
    results[name] = train(net, optimizer)
torch.save(results, sys.argv[2])
"""


@pytest.mark.slow
def test_resume_in_another_process_is_bit_exact(tmp_path: Path) -> None:
    rules = {"Adam": "", "default": "default"}
    for rule in (ScaleFreeLSTM(), ScheduleFreeLSTM()):
        rules[rule.name] = str(tmp_path / f"{rule.name}.safetensors")
        save_rule(randomised(rule).float(), rules[rule.name])
    saved, expected = {}, {}
    for name, file in rules.items():
        net = Net()
        optimizer = Adam(net.parameters(), lr=0.01) if name == "Adam" else LearnedOptimizer(net.parameters(), file)
        train(net, optimizer)
        saved[name] = copy.deepcopy(
            {"rule": file, "net": net.state_dict(), "optimizer": optimizer.state_dict()},
        )
        expected[name] = train(net, optimizer)
    torch.save(saved, tmp_path / "saved.pt")
    tests = ROOT / "tests"
    arguments = [str(tmp_path / "saved.pt"), str(tmp_path / "results.pt"), str(tests), str(ROOT)]
    subprocess.run([sys.executable, "-c", CONTINUE, *arguments], check=True, timeout=240)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert results.keys() == expected.keys()
    for name, parameters in expected.items():
        assert same(results[name], parameters), name
