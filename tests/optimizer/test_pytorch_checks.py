"""PyTorch's own checks of its optimizers (test/test_optim.py), each under its name there, on Adam and on every rule.

Left out are those that do not apply: sparse gradients and complex parameters, which LearnedOptimizer refuses
(test_optimizer.py), and what fused kernels alone must do. Adam passing shows that a check is right.
"""

import copy
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from helpers.contract import adam_inputs, optimizer_inputs
from helpers.devices import needs_cuda
from helpers.rules import few_examples, normal
from learned_optim import LearnedOptimizer, available_rules

# PyTorch tests tiny rates.
pytestmark = pytest.mark.filterwarnings("ignore:lr=.* makes every learned step:UserWarning")


class Configuration(NamedTuple):
    """A kind of optimizer with options, and the rate that these checks may set."""

    kind: type[Optimizer]
    options: Mapping[str, Any]
    rate: float

    def make(self, params: Any, **options: Any) -> Optimizer:
        merged: dict[str, Any] = {**copy.deepcopy(dict(self.options)), **options}
        return self.kind(params, **merged)

    @property
    def direction(self) -> int:
        return 1 if self.options.get("maximize", False) else -1


SHORT = ("default", "maximize", "capturable", "differentiable", "state_dtype")
"""Options that rules other than the default are checked with: the others do not reach the rule."""
LRS = {rule: 0.1 if rule.startswith("lstm-l2l") else 1.0 for rule in available_rules()}
"""The paper's rules see the scale of the gradient, which is hundreds of times that of their own tasks here."""
CONFIGURATIONS = {
    **{f"Adam-{each.desc}": Configuration(Adam, each.kwargs, 0.001) for each in adam_inputs("cpu")},
    "Adam-foreach": Configuration(Adam, {"foreach": True}, 0.001),
    "Adam-fused": Configuration(Adam, {"fused": True}, 0.001),
    **{
        f"{rule}-{each.desc}": Configuration(
            LearnedOptimizer, {"rule": rule, "lr": LRS[rule], **each.kwargs}, LRS[rule]
        )
        for rule in available_rules()
        for each in optimizer_inputs("cpu")
        if rule == "default" or each.desc in SHORT
    },
}
# A step that autograd records may not write to a leaf; PyTorch leaves it out of most checks, too.
UNRECORDED = {name: each for name, each in CONFIGURATIONS.items() if not each.options.get("differentiable")}
KINDS = {name: UNRECORDED[name] for name in ("Adam-default", *(f"{rule}-default" for rule in available_rules()))}


def over(configurations: Mapping[str, Configuration]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("configuration", list(configurations.values()), ids=list(configurations))


# Those that PyTorch's Adam is checked with, and one with a warm restart.
SCHEDULES: Mapping[str, Callable[[Optimizer], list[Any]]] = {
    "none": lambda o: [],
    "exponential": lambda o: [lr_scheduler.ExponentialLR(o, 0.9)],
    "linear": lambda o: [lr_scheduler.LinearLR(o, 0.4, total_iters=4)],
    "constant-exponential": lambda o: [
        lr_scheduler.ConstantLR(o, 0.4, total_iters=4),
        lr_scheduler.ExponentialLR(o, 0.9),
    ],
    "exponential-plateau": lambda o: [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ReduceLROnPlateau(o)],
    "polynomial": lambda o: [lr_scheduler.PolynomialLR(o, power=0.9, total_iters=4)],
    "step-plateau": lambda o: [lr_scheduler.StepLR(o, step_size=10, gamma=0.9), lr_scheduler.ReduceLROnPlateau(o)],
    "restarts": lambda o: [lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=7)],
}


class Problem:
    """PyTorch's: the sum of squares of ``weight @ inputs + bias``."""

    def __init__(self, contiguous: bool = True, device: str = "cpu", bias_device: str | None = None) -> None:
        weight, bias = normal(10, 5, 2, seed=1).float(), normal(10, 2, seed=2).float()
        weight, bias = weight[..., 0], bias[..., 0]
        if contiguous:
            weight, bias = weight.contiguous(), bias.contiguous()
        self.weight = nn.Parameter(weight.to(device))
        self.bias = nn.Parameter(bias.to(bias_device or device))
        self.inputs = normal(5, seed=3).float().to(device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    @property
    def named(self) -> list[tuple[str, nn.Parameter]]:
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self) -> Tensor:
        loss: Tensor = ((self.weight @ self.inputs).to(self.bias.device) + self.bias).square().sum()
        return loss

    def backward(self) -> float:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss()
        loss.backward()
        return loss.item()

    def train(self, optimizer: Optimizer, steps: int, schedulers: Sequence[Any] = ()) -> None:
        for _ in range(steps):
            loss = optimizer.step(self.backward)
            for scheduler in schedulers:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    assert loss is not None
                    scheduler.step(loss)
                else:
                    scheduler.step()

    def copy(self) -> "Problem":
        return copy.deepcopy(self)


def assert_went(problem: Problem, before: float, direction: int) -> None:
    assert direction * (problem.loss().item() - before) > 0


def assert_equal(one: Any, other: Any) -> None:
    """Nested dictionaries and lists are equal, tensors to the bit, dtypes and devices included."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


# The update.


@pytest.mark.slow
@over(UNRECORDED)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_forloop_goes_right_direction(configuration: Configuration, contiguous: bool) -> None:
    for make_schedulers in SCHEDULES.values():
        problem = Problem(contiguous)
        optimizer = configuration.make(problem.parameters)
        before = problem.loss().item()
        problem.train(optimizer, 20, make_schedulers(optimizer))
        assert_went(problem, before, configuration.direction)


@over(KINDS)
@pytest.mark.parametrize("make_schedulers", list(SCHEDULES.values()), ids=list(SCHEDULES))
def test_param_group_with_lrscheduler_goes_right_direction(
    configuration: Configuration, make_schedulers: Callable[[Optimizer], list[Any]]
) -> None:
    problem = Problem()
    optimizer = configuration.make([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
    before = problem.loss().item()
    problem.train(optimizer, 20, make_schedulers(optimizer))
    assert_went(problem, before, -1)


@over(UNRECORDED)
def test_tensor_lr(configuration: Configuration) -> None:
    if configuration.options.get("foreach") or configuration.options.get("fused"):
        pytest.skip("Adam with foreach or fused takes a tensor as its rate only if it is capturable, on a GPU")
    problem, other = Problem(), Problem()
    # A power of two: the same number in single precision.
    problem.train(configuration.make(problem.parameters, lr=2.0**-8), 5)
    other.train(configuration.make(other.parameters, lr=torch.tensor(2.0**-8)), 5)
    torch.testing.assert_close(problem.parameters, other.parameters, rtol=1e-6, atol=1e-7)


@over(UNRECORDED)
def test_param_groups_weight_decay(configuration: Configuration) -> None:
    problem, other = Problem(), Problem()
    groups = [{"params": [problem.weight]}, {"params": [problem.bias], "weight_decay": 0.0}]
    before = problem.loss().item()
    problem.train(configuration.make(groups), 20)
    assert_went(problem, before, configuration.direction)
    other.train(configuration.make(other.parameters, weight_decay=0.0), 20)
    decay = configuration.options.get("weight_decay")  # None: the rule's own
    decays = decay > 0 if decay is not None else configuration.options.get("rule") == "default"
    assert torch.equal(problem.weight, other.weight) != decays


@over(UNRECORDED)
def test_param_groups_lr(configuration: Configuration) -> None:
    problem, irrelevant = Problem(), nn.Parameter(normal(2).float())
    still = irrelevant.detach().clone()
    inner = {"lr": configuration.options.get("lr", configuration.rate)}
    groups = [{"params": problem.parameters, **inner}, {"params": [irrelevant]}]
    optimizer = configuration.make(groups, lr=1e-28)
    before = problem.loss().item()
    for step in range(20):
        problem.backward()
        irrelevant.grad = normal(2, seed=step).float()
        optimizer.step()
    assert_went(problem, before, configuration.direction)
    assert torch.equal(irrelevant, still)


@over(CONFIGURATIONS)
def test_step_is_noop_when_params_have_no_grad(configuration: Configuration) -> None:
    params = [normal(2, 3, seed=index).float() for index in range(2)]
    before = copy.deepcopy(params)
    optimizer = configuration.make(params)
    assert optimizer.step(lambda: 7.0) == 7.0
    assert_equal(params, before)
    assert not any(optimizer.state.values())


@over(CONFIGURATIONS)
def test_step_is_noop_for_zero_grads(configuration: Configuration) -> None:
    if str(configuration.options.get("rule", "")).startswith("lstm-l2l"):
        pytest.skip("the rule of the 2016 paper moves coordinates without a gradient, and is kept as it is")
    values = normal(5, 1).float()
    before = values.clone()
    values.grad = torch.zeros_like(values)
    optimizer = configuration.make([values], weight_decay=0.0)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(values, before)


@over(KINDS)
def test_compare_between_implementations(configuration: Configuration) -> None:
    """PyTorch's ``_compare_between``: a step without gradients, a layer frozen for a while, an empty last parameter."""
    reference, fast = ({"foreach": False}, {"foreach": True}) if configuration.kind is Adam else (None, {})
    runs = []
    for options in (reference, fast):
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=index))
        empty = nn.Parameter(torch.empty(0))
        empty.grad = torch.empty(0)
        params: list[Tensor] = [*model.parameters(), empty]
        stepped = params
        if options is None:  # one call of the rule for each tensor, the ground truth: where autograd records
            stepped = [parameter.detach() for parameter in params]  # shares the memory, is no leaf of the loss
            options = {"differentiable": True}
        runs.append((model, params, stepped, configuration.make(stepped, **options)))
    for step in range(7):
        for model, params, stepped, optimizer in runs:
            for parameter in model.parameters():
                parameter.grad = None
            if step in (3, 5):
                model[2].requires_grad_(step == 5)
            if step != 2:
                model(torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])).sum().backward()
            for values, like in zip(stepped, params, strict=True):
                values.grad = like.grad
            optimizer.step()
        (_, params, stepped, slow), (_, others, _, quick) = runs
        for one, two, key in zip(params, others, stepped, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
            for entry, value in slow.state[key].items():
                torch.testing.assert_close(value.float(), quick.state[two][entry].float(), rtol=1e-2, atol=1e-6)
        assert [state["step"] for state in slow.state.values()] == [state["step"] for state in quick.state.values()]


@pytest.mark.parametrize("scale", [False, True], ids=["without-scale", "with-scale"])
@pytest.mark.parametrize(
    "configuration",
    [
        Configuration(Adam, {"fused": True}, 0.001),
        *(Configuration(LearnedOptimizer, {"rule": rule, "capturable": True}, 1.0) for rule in available_rules()),
    ],
    ids=["Adam-fused", *available_rules()],
)
def test_fused_does_not_step_if_foundinf(configuration: Configuration, scale: bool) -> None:
    params = [torch.ones(1) for _ in range(5)]
    for values in params:
        values.grad = torch.ones(1)
    optimizer: Any = configuration.make(params)
    optimizer.grad_scale = torch.ones(1) if scale else None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(values.item() == 1.0 for values in params)
    assert all(optimizer.state[values]["step"] == 0 for values in params)


# Saving, loading, copying.


@over(CONFIGURATIONS)
def test_optimizer_can_be_printed(configuration: Configuration) -> None:
    text = repr(configuration.make(Problem().parameters))
    assert text.startswith(f"{configuration.kind.__name__} (\nParameter Group 0\n")
    assert all(f"{key}: " in text for key in configuration.options if key not in ("rule", "state_dtype"))


@over(CONFIGURATIONS)
def test_non_empty_state(configuration: Configuration) -> None:
    values = torch.ones(3)
    values.grad = torch.ones(3)
    optimizer = configuration.make([values])
    optimizer.step()
    assert [len(state) > 0 for state in optimizer.state.values()] == [True]


@over(CONFIGURATIONS)
def test_deepcopy_copies_all_public_attrs(configuration: Configuration) -> None:
    problem = Problem()
    optimizer = configuration.make(problem.parameters)
    if not configuration.options.get("differentiable"):
        problem.train(optimizer, 3)

    def public(thing: Optimizer) -> set[str]:
        return {name for name in vars(thing) if not name.startswith("_")}

    copied = copy.deepcopy(optimizer)
    assert public(copied) == public(optimizer)
    assert_equal(copied.state_dict(), optimizer.state_dict())


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@pytest.mark.slow
@over(UNRECORDED)
@pytest.mark.parametrize(
    ("named", "then_named"), list(itertools.product([False, True], repeat=2)), ids=lambda on: "named" if on else "plain"
)
def test_state_dict_deterministic(configuration: Configuration, named: bool, then_named: bool) -> None:
    problem = Problem()
    optimizer = configuration.make(problem.named if named else problem.parameters)
    problem.train(optimizer, 10)
    other = problem.copy()
    continued = configuration.make(other.named if then_named else other.parameters)
    saved = copy.deepcopy(optimizer.state_dict())
    continued.load_state_dict(saved)
    assert_equal(saved, optimizer.state_dict())  # loading does not change what is loaded
    for _ in range(10):
        problem.train(optimizer, 1)
        other.train(continued, 1)
        assert_equal(problem.parameters, other.parameters)
    assert_equal(without_names(optimizer.state_dict()), without_names(continued.state_dict()))
    # test_can_load_from_to_named_state_dict: names stay known if one of the two knew them.
    names = continued.state_dict()["param_groups"][0].get("param_names")
    assert names == (["weight", "bias"] if named or then_named else None)
    # A parameter that occurs again is the same number again.
    continued.param_groups.extend(continued.param_groups)
    groups = continued.state_dict()["param_groups"]
    assert groups[0]["params"] == groups[1]["params"]


@over(UNRECORDED)
def test_can_load_older_state_dict(configuration: Configuration) -> None:
    problem = Problem()
    optimizer = configuration.make(problem.parameters)
    problem.train(optimizer, 3)
    older = copy.deepcopy(optimizer.state_dict())
    newer = {"foreach", "fused", "differentiable", "maximize", "capturable", "nonfinite", "decoupled_weight_decay"}
    for group in older["param_groups"]:
        for option in newer & group.keys():
            del group[option]
    optimizer.load_state_dict(older)
    problem.train(optimizer, 1)
    assert optimizer.state[problem.weight]["step"] == 4


@over(UNRECORDED)
@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
def test_save_load_equality_with_weights_only(configuration: Configuration, named: bool) -> None:
    problem = Problem()
    optimizer = configuration.make(problem.named if named else problem.parameters)
    problem.train(optimizer, 3)
    for weights_only in (False, True):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        assert_equal(torch.load(file, weights_only=weights_only), optimizer.state_dict())


@over(UNRECORDED)
def test_load_nontensor_step(configuration: Configuration) -> None:
    problem, other = Problem(), Problem()
    optimizer, plain = configuration.make(problem.parameters), configuration.make(other.parameters)
    problem.train(optimizer, 3)
    other.train(plain, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    problem.train(optimizer, 1)
    assert_equal(problem.parameters, other.parameters)


# Hooks.


@over(KINDS)
def test_state_dict_hooks(configuration: Configuration) -> None:
    def before(optimizer: Optimizer) -> None:
        optimizer.state["test"] = 1  # type: ignore[index]  # PyTorch's own check does so

    def after(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "seen": state_dict["state"].pop("test", None)}

    problem = Problem()
    optimizer = configuration.make(problem.parameters)
    handle = optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["seen"] is None
    optimizer.register_state_dict_pre_hook(before)
    state_dict = optimizer.state_dict()
    assert state_dict["seen"] == 1
    assert "test" not in state_dict["state"]
    handle.remove()
    assert optimizer.state_dict()["state"]["test"] == 1
    configuration.make(problem.parameters).load_state_dict(optimizer.state_dict())  # does not fail over it


@over(KINDS)
def test_load_state_dict_hooks_and_prepend(configuration: Configuration) -> None:
    def in_place(_: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["lr"] = 0.002

    def by_copy(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        changed["param_groups"][0]["lr"] = 0.003
        return changed

    rates: list[float] = []
    optimizer = configuration.make(Problem().parameters)
    optimizer.register_load_state_dict_post_hook(lambda loaded: rates.append(loaded.param_groups[0]["lr"]))
    state_dict = optimizer.state_dict()
    optimizer.load_state_dict(state_dict)
    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(state_dict)
    first = optimizer.register_load_state_dict_pre_hook(by_copy, prepend=True)
    optimizer.load_state_dict(state_dict)
    first.remove()
    optimizer.register_load_state_dict_pre_hook(by_copy)
    optimizer.load_state_dict(state_dict)
    assert rates == [configuration.rate, 0.002, 0.002, 0.003]


@over(KINDS)
def test_step_all_hooks(configuration: Configuration) -> None:
    calls: list[int] = []

    def note(number: int) -> Callable[..., None]:
        return lambda *_: calls.append(number)

    params = [torch.tensor([1.0, 1.0])]
    optimizers = [configuration.make(params), SGD(params)]
    handles = [register_optimizer_step_pre_hook(note(0)), register_optimizer_step_post_hook(note(5))]
    for optimizer in optimizers:
        handles += [optimizer.register_step_pre_hook(note(1)), optimizer.register_step_post_hook(note(2))]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    assert calls == [0, 1, 2, 5] * 4
    for handle in handles:
        handle.remove()
    for optimizer in optimizers:
        optimizer.step()
    assert len(calls) == 16


# Laws: a trajectory is independent of the partition of parameters into groups, optimizers and tensors.


def small(*shape: int, seed: int = 0) -> Tensor:
    """Values as small as updates, so that a parameter shows the last bits of its updates."""
    return 1e-3 * normal(*shape, seed=seed).float()


@pytest.mark.slow
@over(KINDS)
@few_examples
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    cuts=st.sets(st.integers(1, 5)),
)
def test_partition_gives_the_same_trajectory(
    configuration: Configuration, shapes: list[tuple[int, ...]], order: Any, cuts: set[int]
) -> None:
    """One group, many groups, separate optimizers, any order: equal to the bit."""

    def train(partition: Callable[[list[Tensor]], list[Any]]) -> list[Tensor]:
        params = [small(*shape, seed=index) for index, shape in enumerate(shapes)]
        optimizers = [configuration.make(part, weight_decay=1e-4) for part in partition(params)]
        for step in range(3):
            for index, values in enumerate(params):
                values.grad = normal(*values.shape, seed=100 * step + index).float()
            for optimizer in optimizers:
                optimizer.step()
        return params

    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        places = [0, *sorted(cut for cut in cuts if cut < len(params)), len(params)]
        return [{"params": params[start:end]} for start, end in itertools.pairwise(places)]

    expected = train(lambda params: [params])
    assert_equal(train(lambda params: [groups(params)]), expected)
    assert_equal(train(lambda params: [[group] for group in groups(params)]), expected)
    assert_equal(train(lambda params: [[values] for values in params]), expected)
    assert_equal(train(lambda params: [order.sample(params, len(params))]), expected)


@pytest.mark.slow
@over({name: each for name, each in KINDS.items() if each.kind is LearnedOptimizer})
@few_examples
@given(sizes=st.lists(st.integers(0, 90), min_size=1, max_size=6), order=st.randoms(use_true_random=False))
def test_cutting_and_shuffling_coordinates_gives_the_same_trajectory(
    configuration: Configuration, sizes: list[int], order: Any
) -> None:
    """To the bit; Adam's last bits depend on whether a coordinate falls into a vector register or the remainder."""
    total = sum(sizes)
    places = torch.tensor(order.sample(range(total), total), dtype=torch.int64)
    values, grads = small(total), normal(3, total, seed=1).float()

    def train(params: list[Tensor], grads: Tensor) -> Tensor:
        optimizer = configuration.make(params, weight_decay=1e-4)
        for grad in grads:
            parts = grad.split([values.numel() for values in params])
            for values, part in zip(params, parts, strict=True):
                values.grad = part.view(values.shape)
            optimizer.step()
        return torch.cat([values.flatten() for values in params])

    whole = train([values.clone()], grads)
    assert_equal(train([part.clone() for part in values.split(sizes)], grads), whole)
    assert_equal(train([values[places]], grads[:, places]), whole[places])
    if configuration.options["rule"] != "default":  # that one depends on the shape of matrices
        assert_equal(train([values.clone().view(1, total, 1)], grads), whole)


# With a GPU.


@needs_cuda
@over(UNRECORDED)
def test_cpu_matches_cuda(configuration: Configuration) -> None:
    problem, other = Problem(), Problem(device="cuda")
    problem.train(configuration.make(problem.parameters), 7)
    other.train(configuration.make(other.parameters), 7)
    for one, two in zip(problem.parameters, other.parameters, strict=True):
        torch.testing.assert_close(one, two.cpu(), rtol=1e-4, atol=1e-5)


@needs_cuda
@over(KINDS)
def test_mixed_device(configuration: Configuration) -> None:
    problem, other = Problem(device="cuda", bias_device="cpu"), Problem(device="cuda")
    problem.train(configuration.make(problem.parameters), 5)
    other.train(configuration.make(other.parameters), 5)
    for one, two in zip(problem.parameters, other.parameters, strict=True):
        torch.testing.assert_close(one.cpu(), two.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@over(KINDS)
def test_forloop_goes_right_direction_multigpu(configuration: Configuration) -> None:
    problem = Problem(device="cuda:0", bias_device="cuda:1")
    optimizer = configuration.make(problem.parameters)
    before = problem.loss().item()
    problem.train(optimizer, 20)
    assert_went(problem, before, configuration.direction)


@needs_cuda
@over(KINDS)
def test_cpu_load_state_dict(configuration: Configuration) -> None:
    """A state that was moved to the CPU goes on, capturable, on the GPU; its step count returns there."""
    values = torch.tensor([0.1, 0.2])
    values.grad = torch.ones(2)
    optimizer = configuration.make([values])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["capturable"] = True
    moved = values.cuda()
    continued = configuration.make([moved], capturable=True)
    continued.load_state_dict(saved)
    moved.grad = torch.ones(2, device="cuda")
    continued.step()
    assert continued.state[moved]["step"].device.type == "cuda"
