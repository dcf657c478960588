"""Rules as users write them: which torch code is traced into a kernel, and the errors for code that is not."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.triton import HAS_TRITON
from learned_optim import LearnedOptimizer
from learned_optim.kernels.cpu import kernel as cpu_kernel
from learned_optim.meta_train.inner.training_kernels import FusedRule
from learned_optim.rules import NO_CONDITIONS, Conditions, RuleState, UpdateRule
from learned_optim.step import programs

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(cpu_kernel.compiler() is None, reason="needs a C compiler"),
]


class Written(UpdateRule):
    """Two averages, three weights and a network; sub-classes make an update of them."""

    name = "written"
    recurrent_state = frozenset()
    network: Callable[[], nn.Module] = nn.Identity

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3))
        self.net = type(self).network()

    @property
    def settings(self) -> dict[str, int]:
        return {}

    @property
    def state_features(self) -> dict[str, int]:
        return {"m": 2}

    def reset_parameters(self, seed: int) -> None:
        raise NotImplementedError

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        m = torch.stack([0.9 * state["m"][0] + 0.1 * grad, 0.99 * state["m"][1] + 0.01 * grad])
        return -0.01 * self.update(grad, m, step), {"m": m}

    def update(self, grad: Tensor, m: Tensor, step: Tensor) -> Tensor:
        return self.net(torch.stack([grad, *m], -1))[..., 0]  # type: ignore[no-any-return]


def perceptron(activation: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 1))


def in_place(m: Tensor) -> Tensor:
    moved = m.clone()
    moved.mul_(0.5).add_(m)
    return moved[0]


Update = Callable[[Written, Tensor, Tensor, Tensor], Tensor]
UPDATES: dict[str, Update] = {
    "in place": lambda self, g, m, t: in_place(m) * self.w[0],
    "einsum": lambda self, g, m, t: torch.einsum("f,f...->...", self.w[:2], m),
    "softmax of weights": lambda self, g, m, t: (self.w[:2].softmax(0).view(-1, *[1] * g.dim()) * m).sum(0),
    "softmax of features": lambda self, g, m, t: (m.softmax(0) * m).sum(0),
    "sign": lambda self, g, m, t: torch.lerp(g, m[0], self.w[0].sigmoid()).sign(),
    "power of the step": lambda self, g, m, t: m[0] / (1 - 0.9**t),
    "log1p": lambda self, g, m, t: g.sign() * torch.log1p(g.abs()) * self.w[0],
    "nan_to_num": lambda self, g, m, t: torch.nan_to_num(g) * self.w[0],
    "sine, cosine": lambda self, g, m, t: g * torch.cos(t / 100) * torch.sin(g),
    "float64 inside": lambda self, g, m, t: (m.double()[0] - g).to(g.dtype),
    "cumulated": lambda self, g, m, t: m.cumsum(0)[1],
    "largest, norm": lambda self, g, m, t: m.amax(0) * self.w[1] + m.norm(dim=0),
    "remainder": lambda self, g, m, t: g * (t % 2) + (m[0] % 0.7) * (m[1] % -0.3),
    "mean, addcmul": lambda self, g, m, t: torch.addcmul(m.mean(0), g, m[1], value=0.5),
}
NETWORKS = {name: perceptron(getattr(nn, name)) for name in ("Tanh", "ReLU", "SiLU", "GELU", "Softplus", "ELU")}
REFUSED: dict[str, tuple[Update, str]] = {
    "branch": (lambda self, g, m, t: g if t > 2 else -g, "a branch or a number .* depends on values of a tensor"),
    "mean of a tensor": (lambda self, g, m, t: g - g.mean(), "must be coordinatewise"),
    "sorted": (lambda self, g, m, t: g.flatten().sort().values.view_as(g), "aten.sort"),
    "in place, shared": (lambda self, g, m, t: m[0].mul_(2), "in place that others share"),
}


def stepped(rule: type[Written], fused: bool) -> Tensor:
    parameter = nn.Parameter(torch.zeros(4, 5))
    optimizer = LearnedOptimizer([parameter], rule(), fused=fused)
    for seed in range(3):
        parameter.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    return parameter.detach()


def rule_of(update: Update | None = None, network: Callable[[], nn.Module] = nn.Identity) -> type[Written]:
    members = {"network": staticmethod(network)} if update is None else {"update": update}
    return type("Own", (Written,), members)


@pytest.mark.parametrize(
    "rule",
    [
        *(pytest.param(rule_of(update), id=name) for name, update in UPDATES.items()),
        *(pytest.param(rule_of(network=network), id=name) for name, network in NETWORKS.items()),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of log1p, where it is not taken
def test_common_torch_code_is_traced(rule: type[Written], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plain, in_c = stepped(rule, fused=False), stepped(rule, fused=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    in_triton = stepped(rule, fused=True)
    torch.testing.assert_close(in_c, plain, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(in_triton, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_untraceable_code_is_refused_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    update, message = REFUSED[name]
    with pytest.raises(RuntimeError, match=f"{message}.*use fused=None"):
        stepped(rule_of(update), fused=True)


@pytest.mark.parametrize(
    "around",
    [
        pytest.param(lambda: torch.autocast("cpu", dtype=torch.bfloat16), id="autocast"),
        pytest.param(torch.inference_mode, id="inference"),
        pytest.param(lambda: torch.device("meta"), id="default-device"),
        pytest.param(torch.enable_grad, id="grad"),
    ],
)
def test_trace_is_independent_of_the_surrounding_mode(
    around: Callable[[], AbstractContextManager[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    product: Update = lambda self, g, m, t: (self.w[None, :2] @ m.flatten(1)).view_as(g)  # noqa: E731
    expected = stepped(rule_of(product), fused=True)
    rule = rule_of(product)  # of which nothing is known yet
    with around():
        assert programs.unsupported_reason(rule(), torch.device("cpu"), torch.float32) is None
        programs.plan_of(rule())
    assert torch.equal(stepped(rule, fused=True), expected)


def test_rules_with_different_functions_of_the_weights_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    alike = [rule_of(lambda self, g, m, t: self.w[1].square() * g), rule_of(lambda self, g, m, t: self.w[2].exp() * g)]
    for rule in alike:  # the sources do not differ in a letter
        torch.testing.assert_close(stepped(rule, fused=True), stepped(rule, fused=False), rtol=1e-5, atol=1e-8)


def test_rule_with_list_settings_is_stepped_by_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listed(Written):
        @property
        def settings(self) -> dict[str, Any]:
            return {"sizes": [3, 4]}

        def update(self, grad: Tensor, m: Tensor, step: Tensor) -> Tensor:
            return grad

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="its settings are not all numbers"):
        stepped(Listed, fused=True)
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    LearnedOptimizer([parameter], Listed()).step()
    assert torch.equal(parameter, torch.full((3,), -0.01))


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in ("abs", "cos", "erf", "exp", "expm1", "neg", "relu", "sigmoid", "sin", "tanh")
    },
    "log": lambda x: torch.log(x * x + 0.3),
    "root": lambda x: torch.sqrt(x * x + 0.3),
    "reciprocal root": lambda x: torch.rsqrt(x * x + 0.3),
    "reciprocal": lambda x: torch.reciprocal(x * x + 0.3),
    "remainder": lambda x: x % 0.7,
    "quotient": lambda x: x / (x.square() + 0.3),
    "power": lambda x: (x * x + 0.3) ** 1.7,
    "clamp": lambda x: x.clamp(-0.4, 0.6),
    "largest": lambda x: torch.maximum(x, 0.5 - x) - torch.minimum(x.square(), x),
    "choice": lambda x: torch.where(x > 0.2, x.square(), 3 * x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_match_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    function = FUNCTIONS[name]
    rule = rule_of(lambda self, g, m, t: function(self.w[0] * g) + function(m[0]) * self.w[1])()
    found = []
    for run in (rule, FusedRule(rule, torch.cat([parameter.flatten() for parameter in rule.parameters()]))):
        grad = torch.linspace(-1.9, 2.0, 23).requires_grad_()
        state = {"m": torch.linspace(2.0, -1.5, 46).view(2, 23).requires_grad_()}
        update, new = run(grad, state, torch.tensor(3.0))
        weights = torch.linspace(1.0, 2.0, 23)
        found.append(torch.autograd.grad((update * weights).sum() + new["m"].sum(), [grad, state["m"], rule.w]))
    for plain, made in zip(*found, strict=True):
        torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-5)


class SignDescent(Written):
    """A rule that remembers nothing."""

    @property
    def state_features(self) -> dict[str, int]:
        return {}

    def forward(self, grad: Tensor, state: RuleState, step: Tensor) -> tuple[Tensor, RuleState]:
        return -0.01 * self.w[0].abs() * grad.sign(), {}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("interpreted", [False, True], ids=["c", "triton"])
def test_rule_without_state_steps_tensors_of_every_layout(
    fused: bool, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    rule = SignDescent()
    values = [torch.ones(4, 5), torch.ones(5, 4).t(), torch.ones(8, 10)[::2, ::2], torch.ones(3), torch.ones(0)]
    parameters = [nn.Parameter(value) for value in values]
    for parameter in parameters:
        parameter.grad = -2 * torch.ones(parameter.shape)
    LearnedOptimizer(parameters, rule, fused=fused).step()
    for parameter in parameters:
        torch.testing.assert_close(parameter.detach(), (1 + 0.01 * rule.w[0].abs().detach()).expand(parameter.shape))


class Scheduled(Written):
    """A rule that multiplies what a coordinate has of its own by each condition, and keeps the step in its state."""

    name = "scheduled"
    uses_conditions = True

    def forward(
        self, grad: Tensor, state: RuleState, step: Tensor, conditions: Conditions = NO_CONDITIONS
    ) -> tuple[Tensor, RuleState]:
        moved = (grad * step - 0.1 * conditions.parameter) * (conditions.progress - 2)
        moved = (moved + state["m"][0]) * conditions.averaging
        return 0.01 * moved * conditions.lr, {"m": torch.stack([grad * 0 + step, grad])}


@pytest.mark.parametrize("interpreted", [False, True], ids=["c", "triton"])
def test_conditions_and_step_may_be_operands_of_any_operation(
    interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a number is the same for all coordinates, and no operation of its own makes it."""
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    stepped = []
    for fused in (False, True):
        parameter = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        optimizer = LearnedOptimizer([parameter], Scheduled(), lr=0.5, total_steps=8, fused=fused)
        for _ in range(3):
            parameter.grad = parameter.detach().clone()
            optimizer.step()
        stepped.append(parameter.detach().clone())
    torch.testing.assert_close(*stepped)
