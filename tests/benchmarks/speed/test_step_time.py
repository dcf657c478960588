"""The script that times a step on the CPU, with tiny sizes, and the floors and bars that it compares with."""

import csv
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed import rivals, step_time
from learned_optim import LearnedOptimizer, load_rule


def test_script_runs_and_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "SHAPES", {"small": [(3, 2), (4,)], "too large": [(300,)]})
    monkeypatch.setattr(step_time, "BLOCK_SIZES", (64, 128))
    threads = torch.get_num_threads()
    assert step_time.main(["--largest", "200", "--rounds", "1", "--output", str(tmp_path)]) == 0
    with (tmp_path / "step_time.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {row["candidate"]: row for row in rows if row["case"] == "small"}
    assert {*rivals.ADAM_KERNELS, *step_time.OURS, step_time.ONE_THREAD, step_time.LOOP} <= set(found)
    moved = [
        found[name]["bytes_moved_per_parameter"]
        for name in ("Adam(fused)", "default", "specialised-mnist", step_time.LOOP)
    ]
    assert moved == ["28", "60", "92", "652"]  # kernels/README.md has the sums
    assert not any(row["case"] == "too large" for row in rows)
    assert torch.get_num_threads() == threads
    details = json.loads((tmp_path / "step_time.json").read_text())
    assert all(value > 0 for value in details["machine_a_second"].values())
    assert set(details["floors_nanoseconds"]) == set(step_time.OURS)


def test_floors_count_the_documented_work() -> None:
    # The default uses no matrix. kernels/README.md counts 236 and 4,980 multiply-adds a coordinate with the LSTMs of
    # the others, and the paper's has 5 x 40 activations.
    machine = step_time.Machine(multiply_adds=1e9, bytes_copied=1e9, activations=1e9)
    default = LearnedOptimizer([torch.zeros(1)]).rule
    assert step_time.floors(default, 60, machine) == pytest.approx({"arithmetic": 0, "memory": 60, "activations": 0})
    assert step_time.floors(load_rule("specialised-mnist"), 92, machine) == pytest.approx(
        {"arithmetic": 236, "memory": 92, "activations": 20}
    )
    assert step_time.floors(load_rule("lstm-l2l-mnist"), 652, machine) == pytest.approx(
        {"arithmetic": 4980, "memory": 652, "activations": 200}
    )


def test_bar_is_judged_against_the_fastest_measured_rival() -> None:
    case = step_time.ONE.format(160_000)
    times = {"default": "30", "lstm-l2l-mnist": "100", step_time.LOOP: "500"}
    rows = [(case, name, "160000", each) for name, each in times.items()]
    assert [title.split(" ")[0] for title in step_time.judge(rows)] == ["lstm-l2l"]
    rows += [(case, "PyLO slow", "160000", "900"), (case, "PyLO fast", "160000", "60")]
    assert list(step_time.judge(rows).values()) == [(0.5, 1 / 3), (0.2, 1 / 4)]


def test_candidates_are_timed_in_turn() -> None:
    calls: list[str] = []
    medians = step_time.paired_medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert "".join(calls) == "ababab"  # one round to warm up
    assert set(medians) == {"a", "b"}


def test_pylo_is_optional_and_built_without_its_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixin:
        @classmethod
        def from_pretrained(cls, key: str) -> "Mixin":
            raise ConnectionError(key)

    class MetaMLP(nn.Linear, Mixin):
        def __init__(self, input_size: int, hidden_size: int, hidden_layers: int) -> None:
            super().__init__(input_size, hidden_size)

    class ELO_naive(torch.optim.SGD):  # noqa: N801
        def __init__(self, parameters: list[Tensor]) -> None:
            super().__init__(parameters)
            self.network = MetaMLP.from_pretrained("somewhere")

    if "pylo" not in sys.modules:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        assert rivals.pylo_optimizers("naive") == {}
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    for name, content in (
        ("huggingface_hub", {"PyTorchModelHubMixin": Mixin}),
        ("pylo", {}),
        ("pylo.optim", {"ELO_naive": ELO_naive}),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    found = rivals.pylo_optimizers("naive")
    assert list(found) == ["PyLO ELO_naive"]
    optimizer = found["PyLO ELO_naive"]([torch.ones(2, requires_grad=True)])
    assert isinstance(optimizer.network, nn.Linear)  # type: ignore[attr-defined]
    with pytest.raises(ConnectionError):
        MetaMLP.from_pretrained("after")
