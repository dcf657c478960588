"""The contract of test_contract.py, for torch.compile, capture and CUDA."""

import itertools
from collections.abc import Mapping
from functools import partial

import pytest
import torch
from torch.optim import Adam, Optimizer, lr_scheduler

from helpers.contract import Make, Net, each_optimizer, loss_of, train
from helpers.devices import needs_cuda
from helpers.periodic import Periodic
from helpers.rules import normal
from learned_optim import LearnedOptimizer


def compiled_pair(make: Make, backend: str, fullgraph: bool) -> None:
    torch._dynamo.reset()
    net, other = Net(), Net()
    eager, optimizer = make(net.parameters()), make(other.parameters())

    def step() -> None:
        optimizer.step()

    compiled = torch.compile(step, backend=backend, fullgraph=fullgraph)
    for _ in range(4):
        train(net, eager, steps=1)
        optimizer.zero_grad()
        loss_of(other).backward()
        compiled()
    # Compiled loops round differently; the steps move parameters by 1e-3 and more.
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        [t.float() for s in eager.state.values() for t in s.values()],
        [t.float() for s in optimizer.state.values() for t in s.values()],
        rtol=1e-2,  # bfloat16
        atol=1e-6,
    )


COMPILED: Mapping[str, tuple[Make, bool]] = {
    "Adam": (partial(Adam, lr=0.01), False),  # its decorator breaks the graph on purpose
    "rule-default": (LearnedOptimizer, True),
    "rule-default-capturable": (partial(LearnedOptimizer, capturable=True, weight_decay=1e-4), True),
    "rule-lstm-l2l": (partial(LearnedOptimizer, rule="lstm-l2l-quadratic", maximize=True), True),
    "rule-periodic": (partial(LearnedOptimizer, rule=Periodic()), True),
    "rule-periodic-capturable": (partial(LearnedOptimizer, rule=Periodic(), capturable=True), True),
    "rule-error": (partial(LearnedOptimizer, nonfinite="error"), False),  # asks whether to raise: breaks the graph
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("make", "fullgraph"), list(COMPILED.values()), ids=list(COMPILED))
def test_compiled_step_matches_eager(make: Make, fullgraph: bool) -> None:
    compiled_pair(make, "aot_eager", fullgraph)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensor_learning_rate_changes_without_recompiling() -> None:
    torch._dynamo.reset()
    net, other = Net(), Net()
    rate, eager = torch.tensor(1.0), LearnedOptimizer(net.parameters())
    optimizer = LearnedOptimizer(other.parameters(), lr=rate)
    compiled = torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            train(net, eager, steps=1)
            optimizer.zero_grad()
            loss_of(other).backward()
            compiled()
            rate.mul_(0.5)
            eager.param_groups[0]["lr"] *= 0.5
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "plain"])
def test_number_settings_change_with_one_recompile(fused: bool) -> None:
    torch._dynamo.reset()
    net, other = Net(), Net()
    eager = LearnedOptimizer(net.parameters(), fused=fused, weight_decay=1.0)
    optimizer = LearnedOptimizer(other.parameters(), fused=fused, weight_decay=1.0)
    compiled = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    # The first value is taken for a constant, the second shows that it is none; then there are no more graphs.
    with torch._dynamo.config.patch(recompile_limit=2):
        for step in range(5):
            for group in (*eager.param_groups, *optimizer.param_groups):
                group.update(lr=1.0 - 0.1 * step, weight_decay=1.0 + step)
            train(net, eager, steps=1)
            optimizer.zero_grad()
            loss_of(other).backward()
            compiled()
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", [partial(Adam, lr=0.01), LearnedOptimizer], ids=["Adam", "rule-default"])
def test_compiled_step_works_with_a_scheduler(make: Make) -> None:
    # Schedulers replace step by a wrapper that torch.compile does not follow: with fullgraph=True it says so.
    torch._dynamo.reset()
    net, other = Net(), Net()
    eager, optimizer = make(net.parameters()), make(other.parameters())
    schedulers = [lr_scheduler.ExponentialLR(each, 0.5) for each in (eager, optimizer)]
    compiled = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for _ in range(4):
        train(net, eager, 1, schedulers[0])
        optimizer.zero_grad()
        loss_of(other).backward()
        compiled()
        schedulers[1].step()
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiles C++: half a minute on a quiet machine
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_inductor_matches_eager() -> None:
    # In bfloat16 the last bit of an activation, which the two compute in different ways, would be a visible jump.
    compiled_pair(partial(LearnedOptimizer, state_dtype=torch.float32), "inductor", fullgraph=True)


@each_optimizer
def test_capturable_step_matches_the_plain_one(make: Make) -> None:
    if isinstance(make, partial) and make.func is Adam:
        pytest.skip("Adam refuses capturable=True on a CPU")
    net, other = Net(), Net()
    optimizer = make(other.parameters(), capturable=True)
    expected = train(net, make(net.parameters()), steps=5)
    for one, two in zip(train(other, optimizer, steps=5), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


# With a GPU.


@needs_cuda
@each_optimizer
def test_cuda_step_does_not_synchronize(make: Make) -> None:
    net = Net().cuda()
    optimizer = make(net.parameters())
    train(net, optimizer, steps=2)
    loss_of(net).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@each_optimizer
def test_replayed_cuda_graph_matches_eager(make: Make) -> None:
    net, other = Net().cuda(), Net().cuda()
    eager, optimizer = make(net.parameters(), capturable=True), make(other.parameters(), capturable=True)
    inputs, targets = normal(8, 4, seed=10).float().cuda(), normal(8, 4, seed=11).float().cuda()

    def step(module: Net, stepped: Optimizer) -> None:
        stepped.zero_grad(set_to_none=False)
        (module(inputs) - targets).square().mean().backward()
        stepped.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(other, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(other, optimizer)
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        step(net, eager)
    assert optimizer.state[other.first.weight]["step"].item() == 7
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-6)


@needs_cuda
@each_optimizer
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(["cpu", "cuda"])), ids=["to-gpu", "to-cpu"])
def test_state_moves_to_the_device_of_its_parameter(make: Make, first: str, second: str) -> None:
    net, other = Net().to(first), Net().to(second)
    optimizer, continued = make(net.parameters()), make(other.parameters())
    train(net, optimizer)
    other.load_state_dict(net.state_dict())
    continued.load_state_dict(optimizer.state_dict())
    expected = train(net, optimizer)
    for one, two in zip(train(other, continued), expected, strict=True):
        torch.testing.assert_close(one.cpu(), two.cpu(), rtol=1e-4, atol=1e-5)
