"""Rivals are run as their packages run them: in true shapes, each run by itself, looked at where they are to be."""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from helpers.benchmarks import run, suite
from helpers.user_tasks import DropoutFamily, OverflowingFamily
from learned_optim.meta_train.benchmark import rivals as rivals_module
from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import (
    Contender,
    baseline,
    baselines,
    installed,
    rival_names,
)
from learned_optim.meta_train.benchmark.evaluation import DECAYED, train
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.rivals import FACTORS, RIVALS, MuonWithAdamW, hidden_matrices, missing
from learned_optim.meta_train.benchmark.stepping import ForEach, Model
from learned_optim.meta_train.benchmark.suites import load_suite
from learned_optim.meta_train.common.seeds import fixed_global_state
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.reports.comparison import compare
from learned_optim.meta_train.tasks import Task
from learned_optim.meta_train.tasks.mlp import MLPTask
from learned_optim.meta_train.tasks.quadratic import QuadraticTask

INSTANCES, STEPS, SEED = 3, 24, 5
ROUNDING = 1e-9  # relative; float64, but Adam divides by roots of small second moments
COARSE = 1e-3  # of these: Muon orthogonalises in bfloat16, and SOAP's first eigenvectors, of a matrix of rank one, are
# any basis of the rest, which the last bit decides


def need(name: str) -> None:
    """Skip where the package of a rival is missing."""
    if absent := missing([name]):
        pytest.skip(f"{', '.join(absent)} not installed: pip install 'learned-optim[rivals]'")


def perceptrons() -> Task:
    images = torch.rand(30, 4, generator=generator())
    return MLPTask((images, torch.arange(30) % 3), 6, [5, 4], "tanh", initial="torch", gain=1.0, layer_norm=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_in_readme(name: str, module: nn.Module) -> Optimizer:
    """A rival as its users write it, at the first of its untuned rates."""
    parameters = list(module.parameters())
    optimizer: Any
    match name:
        case "Schedule-Free":
            optimizer = importlib.import_module("schedulefree").AdamWScheduleFree(parameters, warmup_steps=1)
            optimizer.train()
        case "Prodigy":
            optimizer = importlib.import_module("prodigyopt").Prodigy(parameters, lr=1.0)
        case "D-Adaptation":
            optimizer = importlib.import_module("dadaptation").DAdaptAdam(parameters, lr=1.0)
        case "SOAP":
            soap = importlib.import_module("pytorch_optimizer").SOAP
            optimizer = soap(parameters, lr=3e-3, betas=(0.95, 0.95), weight_decay=0.01, precondition_frequency=10)
        case "AdEMAMix":
            ademamix = importlib.import_module("pytorch_optimizer").AdEMAMix
            optimizer = ademamix(
                parameters, lr=1e-3, alpha=8.0, t_alpha_beta3=STEPS, weight_decay=0.1, weight_decouple=True
            )
        case _:
            raise NotImplementedError(name)
    made: Optimizer = optimizer
    return made


class MuonLoop:
    """Two optimizers, as PyTorch's documents have it: Muon for the one hidden matrix of :func:`perceptrons`."""

    def __init__(self, module: nn.Module) -> None:
        hidden = [tensor for name, tensor in module.named_parameters() if name == "2.weight"]
        assert [tuple(matrix.shape) for matrix in hidden] == [(4, 5)]
        others = [tensor for name, tensor in module.named_parameters() if name != "2.weight"]
        self.both: tuple[Any, ...] = (
            torch.optim.Muon(hidden, lr=0.003, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=0.003),
        )

    def step(self) -> None:
        for optimizer in self.both:
            optimizer.step()


def own_loop(name: str, task: Task, index: int) -> list[float]:
    """Losses of one training, module and optimizer as they come, each where its authors evaluate it."""
    with fixed_global_state(SEED):
        module = [task.module() for _ in range(INSTANCES)][index]
    optimizer: Any = MuonLoop(module) if name == "Muon" else as_in_readme(name, module)
    batches, losses = generator(), []
    for step in range(STEPS + 1):
        batch = tree_map(lambda tensor: tensor[index], task.batch(INSTANCES, batches))
        if hasattr(optimizer, "eval"):
            kept = [tensor.detach().clone() for tensor in module.parameters()]
            optimizer.eval()
            losses.append(float(task.loss(module, batch).detach()))
            optimizer.train()
            with torch.no_grad():
                for tensor, value in zip(module.parameters(), kept, strict=True):
                    tensor.copy_(value)
        module.zero_grad()
        loss = task.loss(module, batch)
        loss.backward()
        if not hasattr(optimizer, "eval"):
            losses.append(float(loss.detach()))
        if step < STEPS:
            optimizer.step()
    return losses


def untuned(name: str) -> Contender:
    return baseline(f"{name}@{RIVALS[name].untuned[0]:g}")


def losses_of(contender: Contender, task: Task, **options: Any) -> np.ndarray:
    return train(
        VectorizedTask(task, INSTANCES, SEED), contender.maker(contender.rate, STEPS), STEPS, generator(), **options
    )


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", RIVALS)
def test_every_run_is_what_the_package_does_in_a_loop_of_its_own(name: str) -> None:
    need(name)
    task = perceptrons()
    losses = losses_of(untuned(name), task)
    expected = np.array([own_loop(name, task, index) for index in range(INSTANCES)]).T
    np.testing.assert_allclose(losses, expected, rtol=COARSE if name in ("Muon", "SOAP") else ROUNDING)
    assert not np.allclose(losses[-1], losses_of(baseline("SGD@1e-9"), task)[-1], rtol=1e-6)  # it moves


@pytest.mark.parametrize("name", ["Prodigy", "D-Adaptation", "Muon", "SOAP"])
def test_runs_do_not_depend_on_those_beside_them(name: str) -> None:
    need(name)
    together = losses_of(untuned(name), perceptrons())
    alone = VectorizedTask(perceptrons(), INSTANCES, SEED).part(slice(1, 2))
    contender = untuned(name)
    losses = train(alone, contender.maker(contender.rate, STEPS), STEPS, generator())
    np.testing.assert_allclose(losses[:, 0], together[:, 1], rtol=COARSE)


class Counting:
    """Takes gradients at the parameters and is to be evaluated one above them, by methods like Schedule-Free's."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.training, self.seen = list(tensors.values()), True, [float("nan")]

    @torch.no_grad()
    def eval(self) -> None:
        assert self.training
        self.training = False
        for tensor in self.tensors:
            tensor.add_(1.0)

    @torch.no_grad()
    def train(self) -> None:
        assert not self.training
        self.training = True
        for tensor in self.tensors:
            tensor.sub_(0.9)  # not quite where it came from

    def step(self) -> None:
        assert self.training
        self.seen = [float(tensor.detach().flatten()[0]) for tensor in self.tensors]


def test_losses_are_taken_at_the_average_and_training_goes_on_from_where_it_was() -> None:
    task = VectorizedTask(QuadraticTask(4, None, 0.0, 1.0), INSTANCES, SEED)
    made: list[Any] = []

    def build(model: Model) -> Any:
        made.append(Counting(model.tensors))
        return made[-1]

    looks: list[Tensor] = []
    losses = train(task, ForEach(build), 3, generator(), look=lambda step, parameters: looks.append(parameters.clone()))
    expected = task.losses(task.initial_parameters + 1.0, task.batch(generator()))
    np.testing.assert_allclose(losses, expected.expand(4, -1), rtol=1e-6)
    assert all(torch.equal(look, task.initial_parameters + 1.0) for look in looks)
    assert [optimizer.seen[0] for optimizer in made] == task.initial_parameters[:, 0].tolist()


def test_dropout_is_the_same_where_gradients_and_where_losses_are_taken() -> None:
    """So that looking at the average changes no training: the next step draws what it would have drawn."""
    task = VectorizedTask(DropoutFamily().sample(np.random.default_rng(0), "test"), INSTANCES, SEED)

    def adam(model: Model) -> Optimizer:
        return torch.optim.Adam(model.tensors.values(), lr=0.01)

    def looked_at(model: Model) -> Any:
        optimizer: Any = adam(model)
        optimizer.eval = optimizer.train = lambda: None  # at the parameters themselves
        return optimizer

    runs = []
    for build in (adam, looked_at):
        with fixed_global_state(SEED):
            runs.append(train(task, ForEach(build), STEPS, generator()))
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-5)


def test_run_that_is_not_finite_is_not_stepped_and_the_others_go_on() -> None:
    """A matrix that is not finite would be an error in SOAP's decomposition."""
    task = VectorizedTask(OverflowingFamily().sample(np.random.default_rng(0), "test"), INSTANCES, SEED)

    class Strict(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            assert all(bool(each.grad.isfinite().all()) for group in self.param_groups for each in group["params"])
            return super().step(closure)

    losses = train(task, ForEach(lambda model: Strict(model.tensors.values(), lr=1e-9)), 30, generator())
    infinite = np.isinf(losses)
    assert infinite[-1].any()
    assert np.array_equal(infinite, np.maximum.accumulate(infinite))


class Words(nn.Module):
    """Embeddings, positions, two hidden matrices, a norm over a matrix and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(3, 4))
        self.embedding = nn.Embedding(7, 4)
        self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm([3, 4])
        self.second, self.output = nn.Conv1d(4, 4, 1), nn.Linear(4, 7)


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ParameterList([torch.zeros(3, 4), torch.zeros(3, 3), torch.zeros(4, 3)])


@pytest.mark.parametrize(
    ("module", "hidden"),
    [
        (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), []),
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)), ["1.weight"]),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Linear(2, 3)), ["1.weight"]),
        (Words(), ["first.weight", "second.weight"]),
        (Factors(), ["factors.1"]),
        (nn.Linear(4, 5), []),
    ],
    ids=["one hidden layer", "two hidden layers", "filters", "embeddings", "factors", "one layer"],
)
def test_muon_gets_neither_input_nor_output_layer(module: nn.Module, hidden: list[str]) -> None:
    assert hidden_matrices(module, dict(module.named_parameters())) == hidden


def test_muon_sees_filters_as_matrices_and_changes_them_in_place() -> None:
    filters, bias = torch.ones(3, 2, 2, 2), torch.ones(3)
    optimizer = MuonWithAdamW([filters], [bias], 0.01, "match_rms_adamw")
    assert [tuple(matrix.shape) for matrix in optimizer.matrices] == [(3, 8)]
    filters.grad, bias.grad = torch.rand(3, 2, 2, 2, generator=generator()), torch.ones(3)
    optimizer.step()
    assert (filters != 1).all()
    assert (bias != 1).all()
    filters.grad = bias.grad = None
    before = filters.clone()
    optimizer.step()
    assert torch.equal(filters, before)


@pytest.mark.parametrize("name", RIVALS)
def test_rival_is_timed_on_a_real_module(name: str) -> None:
    need(name)
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3))
    contender = untuned(name)
    optimizer = contender.for_module(module, contender.rate, STEPS)
    before = [tensor.detach().clone() for tensor in module.parameters()]
    for _ in range(2):  # SOAP takes its first gradient for its basis alone
        module(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if these packages of rivals were missing and all others were there."""
    monkeypatch.setattr(rivals_module, "is_installed", lambda module: module not in packages)


def test_missing_package_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "schedulefree", "pytorch_optimizer")
    words = (
        r"Schedule-Free, SOAP, AdEMAMix: no schedulefree, pytorch_optimizer here: pip install 'learned-optim\[rivals\]'"
    )
    with pytest.raises(ValueError, match=words):
        rival_names("untuned")
    with pytest.raises(ValueError, match=r"SOAP: no pytorch_optimizer here: pip install 'learned-optim\[rivals\]'"):
        baseline("SOAP")
    assert baseline("Muon").is_tuned  # PyTorch itself has it
    assert installed(["Schedule-Free@0.01", "Muon@0.01", "Adam"]) == (["Muon@0.01", "Adam"], ["Schedule-Free@0.01"])


@pytest.mark.slow
def test_suite_shows_its_rivals_where_their_packages_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = suite(rivals=["Muon@0.01", "Schedule-Free@0.0025"], baselines=["Adam@0.1"], rules=[])

    def shown(**others: Any) -> list[str]:
        results = compare(chosen, [], out=tmp_path, cache=Cache(None), settings={}, **others)
        return [result.optimizer for result in results["noisy"]]

    without(monkeypatch, "schedulefree")
    assert shown() == ["Adam", "Adam@0.1", "Muon@0.01"]
    assert "without Schedule-Free@0.0025: pip install 'learned-optim[rivals]'" in capsys.readouterr().err
    assert shown(baseline_names=["SGD@0.1"]) == ["Adam", "SGD@0.1"]


def test_quick_shows_two_untuned_rivals() -> None:
    chosen = load_suite("quick").rivals
    assert len(chosen) == 2
    for text in chosen:
        name, _, rate = text.partition("@")
        assert float(rate) == RIVALS[name].untuned[0]


@pytest.mark.parametrize("asked", ["untuned", "tuned", "all"])
def test_rivals_that_are_asked_for_can_all_be_built(asked: Any) -> None:
    for name in RIVALS:
        need(name)
    found = [baseline(name) for name in rival_names(asked)]
    assert len({each.name for each in found}) == len(found)
    tuned = [each.name for each in found if each.is_tuned]
    assert tuned == ([] if asked == "untuned" else [*RIVALS, *DECAYED])
    assert sum(not each.is_tuned for each in found) == (0 if asked == "tuned" else 8)


def test_mistaken_choice_of_rivals_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rivals: unknown name 'some'.*known: untuned, tuned, all"):
        rival_names("some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"AdamW-cosine\+decay is always tuned"):
        baseline("AdamW-cosine+decay@0.1")
    with pytest.raises(ValueError, match=r"unknown name 'Muonn'.*did you mean 'Muon'"):
        baseline("Muonn@0.1")


@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.module != "torch"])
def test_run_of_another_version_of_a_package_is_another_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    need(name)
    identities = [untuned(name).identity]
    assert RIVALS[name].module in identities[0]["package"]
    monkeypatch.setattr(rivals_module, "version", lambda package: "0.0")
    identities.append(untuned(name).identity)
    monkeypatch.setitem(RIVALS, name, dataclasses.replace(RIVALS[name], settings={"other": 1}))
    identities.append(untuned(name).identity)
    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == 3


def test_stored_runs_of_a_rival_are_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = run(suite(), tmp_path, ("Muon@0.01",))["noisy"]
    monkeypatch.setitem(RIVALS, "Muon", dataclasses.replace(RIVALS["Muon"], build=None))  # type: ignore[arg-type]  # never built
    second = run(suite(), tmp_path, ("Muon@0.01",))["noisy"]
    assert [each.final for each in first] == [each.final for each in second]


def test_planned_steps_count_the_grid_of_a_rival() -> None:
    need("Prodigy")
    chosen = suite()
    harness = Harness(chosen, baselines(["Prodigy"]), [], cache=Cache(None))
    assert harness.planned_steps() == 5 * ((len(chosen.rates) + 1) + (len(FACTORS) + 1))
