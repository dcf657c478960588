"""The comparison behind every published figure: fair tuning, reuse of stored runs, tables and files."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from helpers.benchmarks import NOISY, RESULTS, STEPS, result, run, suite, timed
from learned_optim import save_rule
from learned_optim.meta_train.benchmark import evaluation
from learned_optim.meta_train.benchmark import harness as harness_module
from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import baseline, baselines
from learned_optim.meta_train.benchmark.evaluation import Problem, final_loss
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.report import as_json, problem_table, save_results, scores, summary_table
from learned_optim.meta_train.reports.comparison import compare
from learned_optim.rules import ScaleFreeLSTM


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of seeds of each training that is really done."""
    done: list[int] = []
    train = evaluation.train

    def counted(task: Any, *arguments: Any, **options: Any) -> np.ndarray:
        done.append(task.instances)
        return train(task, *arguments, **options)

    monkeypatch.setattr(evaluation, "train", counted)
    return done


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tuning_shares_only_the_architecture_with_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[Problem] = []

    class Recorded(Problem):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            problems.append(self)

    monkeypatch.setattr(harness_module, "Problem", Recorded)
    run(suite(), names=())
    assert len(problems) == 2  # the first for all rates
    assert len({problem.task.coordinates for problem in problems}) == 1
    for draws in (
        [problem.task.initial_parameters for problem in problems],
        [problem.task.buffers["module.matrix"].flatten(1) for problem in problems],
        [tree_leaves(problem.task.batch(problem.generator()))[0].flatten(1) for problem in problems],
    ):
        tuning, comparison = ({tuple(row.tolist()) for row in draw} for draw in draws)
        assert len(tuning) == len(comparison) == 3
        assert tuning & comparison == set()


def test_results_are_those_of_the_problem_itself(tmp_path: Path) -> None:
    chosen = suite()
    adam, sgd = run(chosen, tmp_path)["noisy"]
    family = chosen.problems[0].build()
    for found in (adam, sgd):
        contender = baseline(found.optimizer)
        for seed, losses in ((1, None), (2, found.losses)):
            runs = Problem(family, 3, STEPS, seed)
            for rate, score in found.tuning.items():
                own = runs.run(contender.maker(rate, STEPS))
                if losses is None:
                    assert float(final_loss(own).mean()) == score
                elif rate == found.rate:
                    assert np.array_equal(own, losses)
        assert found.rate == min(found.tuning, key=lambda rate: found.tuning[rate])


@pytest.mark.parametrize(("rates", "tried"), [([0.1, 0.03, 0.01], 3), ([0.01, 0.003], 4)], ids=str)
def test_grid_is_extended_while_its_end_is_best(rates: list[float], tried: int) -> None:
    (adam,) = run(suite({**NOISY, "steps": 30}, rates=rates), names=())["noisy"]
    assert len(adam.tuning) >= tried
    assert adam.edge is None
    assert min(adam.tuning) < (adam.rate or 0.0) < max(adam.tuning)


class TestStoredRuns:
    def test_repeated_suite_uses_the_stored_runs(self, tmp_path: Path, trained: list[int]) -> None:
        first = run(suite(), tmp_path)
        count = len(trained)
        assert count >= 2 * (3 + 1)
        second = run(suite(), tmp_path)
        assert len(trained) == count
        for one, other in zip(first["noisy"], second["noisy"], strict=True):
            assert np.array_equal(one.losses, other.losses)
            assert one.tuning == other.tuning

    def test_new_rule_adds_only_its_own_runs(self, tmp_path: Path, trained: list[int]) -> None:
        run(suite(), tmp_path)
        path = tmp_path / "mine.safetensors"
        save_rule(ScaleFreeLSTM(2), path)
        trained.clear()
        run(suite(), tmp_path, rules=[path])
        assert trained == [3]
        run(suite(), tmp_path, rules=[path])
        assert trained == [3]
        save_rule(ScaleFreeLSTM(2, rate=0.1), path)  # the same name, another rule
        run(suite(), tmp_path, rules=[path])
        assert trained == [3, 3]

    @pytest.mark.parametrize(
        "change", [{"steps": 6}, {"noise": 0.2}, {"split": "train", "seeds": 4}, {"draw": 1}], ids=str
    )
    def test_changed_problem_is_run_again(self, change: dict[str, Any], tmp_path: Path, trained: list[int]) -> None:
        run(suite(), tmp_path, names=())
        trained.clear()
        run(suite({**NOISY, **change}), tmp_path, names=())
        assert trained != []

    def test_new_rates_or_title_reuse_the_stored_runs(self, tmp_path: Path, trained: list[int]) -> None:
        run(suite({**NOISY, "steps": 30}), tmp_path, names=())
        trained.clear()
        found = run(suite({**NOISY, "steps": 30, "name": "n", "title": "other"}, rates=[0.1, 0.05]), tmp_path, names=())
        assert len(trained) <= 2  # the new rate, and the comparison if it is the best
        assert 0.05 in found["n"][0].tuning

    def test_more_seeds_add_blocks(self, tmp_path: Path, trained: list[int]) -> None:
        blocks = {**NOISY, "instances": 2, "seeds": 4}
        few = run(suite(blocks), tmp_path, names=())["noisy"][0]
        trained.clear()
        many = run(suite({**blocks, "seeds": 7}), tmp_path, names=())["noisy"][0]
        assert trained == [2, 1]
        assert many.losses.shape == (STEPS + 1, 7)
        assert np.array_equal(many.losses[:, :4], few.losses)
        assert len(set(many.losses[0].tolist())) == 7

    def test_interrupted_suite_resumes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = run(suite(), names=("SGD", "NAG"))
        done: list[int] = []
        train = evaluation.train

        def interrupted(task: Any, *arguments: Any, **options: Any) -> np.ndarray:
            done.append(task.instances)
            if len(done) == stop:
                raise KeyboardInterrupt
            return train(task, *arguments, **options)

        monkeypatch.setattr(evaluation, "train", interrupted)
        stop = 6
        with pytest.raises(KeyboardInterrupt):
            run(suite(), tmp_path, names=("SGD", "NAG"))
        assert len(list(tmp_path.rglob("*.safetensors"))) == 5
        stop = 0
        resumed = run(suite(), tmp_path, names=("SGD", "NAG"))
        assert len(done) == 6 + len(list(tmp_path.rglob("*.safetensors"))) - 5
        for one, other in zip(whole["noisy"], resumed["noisy"], strict=True):
            assert np.array_equal(one.losses, other.losses)


def test_progress_bar_ends_at_its_total(tmp_path: Path) -> None:
    """Otherwise the remaining time would be wrong."""
    chosen = suite({**NOISY, "steps": 60}, rates=[1e9, 0.1])
    for _ in range(2):
        harness = Harness(chosen, baselines(["SGD"]), [], cache=Cache(tmp_path))
        with Bar(harness.planned_steps(), live=True) as bar:
            list(harness.results(bar))
            assert bar.bar.n == bar.bar.total == bar.done
    assert bar.done == 0


def test_rate_at_an_edge_is_flagged_in_the_table_and_the_csv(tmp_path: Path) -> None:
    text = problem_table(RESULTS["p"])
    notes = [line for line in text.splitlines() if line.startswith("*")]
    assert [note.split(":")[0] for note in notes] == ["* SGD", "* NAG"]
    assert "upper edge" in notes[0]
    assert "lower edge" in notes[1]
    assert all("may be understated" in note for note in notes)
    assert "30* " in text
    assert "0.01 " in text

    save_results(RESULTS, tmp_path, {})
    edges = {row["optimizer"]: row["edge"] for row in rows(tmp_path / "summary.csv") if row["problem"] == "p"}
    assert edges == {"Adam": "", "SGD": "upper", "NAG": "lower", "mine": ""}


def test_summary_lists_rules_first_with_speed_wins_and_divergences() -> None:
    lines = scores(RESULTS)
    assert [line.optimizer for line in lines] == ["mine", "Adam", "NAG", "SGD"]
    assert (lines[0].better, lines[0].problems, lines[0].runs) == (1, 2, 8)
    assert (lines[2].problems, lines[2].runs) == (1, 4)
    text = summary_table(lines)
    assert "1 of 2 problems" in text
    assert "0 of 8 runs" in text
    assert "in seconds" not in text
    in_seconds = scores(timed(RESULTS, 1.0, of_rules=2.0), in_seconds=True)
    found = {line.optimizer: line.speedup for line in in_seconds}
    assert found["mine"] == pytest.approx(lines[0].speedup / 2)
    assert found["SGD"] == pytest.approx(lines[3].speedup)
    both = next(line for line in summary_table(lines, in_seconds).splitlines() if line.startswith("mine"))
    assert f" {lines[0].speedup:.2f} " in both
    assert f" {found['mine']:.2f} " in both


def test_files_hold_every_number_that_is_shown(tmp_path: Path) -> None:
    names = save_results(timed(RESULTS, 0.5), tmp_path, {"command": "test"})
    assert names == ["summary", "curves", "runs", "tuning", "timing"]
    summary = rows(tmp_path / "summary.csv")
    assert [(row["problem"], row["optimizer"]) for row in summary] == [
        (name, r.optimizer) for name, group in RESULTS.items() for r in group
    ]
    for row, found in zip(summary, [r for group in RESULTS.values() for r in group], strict=True):
        assert float(row["final_loss"]) == pytest.approx(found.final[0], rel=1e-5)
        assert float(row["band_low"]) <= float(row["final_loss"]) <= float(row["band_high"])
        assert (row["rate"] == "") == found.is_rule
        assert (row["seeds"], row["steps"], row["diverged"], row["seconds_per_step"]) == ("4", "20", "0", "0.5")
        assert float(row["seconds_to_adam"]) > 0
    assert [float(row["optimizer_seconds_per_step"]) for row in rows(tmp_path / "timing.csv")] == [0.125] * 6
    ratios = {row["optimizer"]: float(row["ratio_to_best_baseline"]) for row in summary if row["problem"] == "p"}
    assert ratios["Adam"] == ratios["NAG"] == 1.0
    assert ratios["mine"] < 1.0 < ratios["SGD"]

    runs = [row for row in rows(tmp_path / "runs.csv") if (row["problem"], row["optimizer"]) == ("p", "mine")]
    assert [row["seed"] for row in runs] == ["0", "1", "2", "3"]
    assert [float(row["final_loss"]) for row in runs] == pytest.approx(list(RESULTS["p"][3].finals), rel=1e-5)
    curve = [row for row in rows(tmp_path / "curves.csv") if (row["problem"], row["optimizer"]) == ("p", "SGD")]
    assert [float(row["mean_loss"]) for row in curve] == pytest.approx(list(RESULTS["p"][1].losses.mean(1)), rel=1e-5)
    assert [float(row["seconds"]) for row in curve] == [0.5 * step for step in range(21)]
    assert [row["rate"] for row in rows(tmp_path / "tuning.csv")] == ["0.01", "30", "1e-05", "0.01"]
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["command"] == "test"
    assert provenance["torch"] == torch.__version__
    assert {"date", "commit", "processor", "cores", "threads", "learned_optim"} <= provenance.keys()
    assert provenance["load_of_others_while_timing"] == {"p": 0.0, "q": 0.0}


def test_files_of_an_earlier_command_do_not_stay(tmp_path: Path) -> None:
    save_results(timed(RESULTS, 0.5), tmp_path, {})
    assert (tmp_path / "timing.csv").is_file()
    assert save_results(RESULTS, tmp_path, {}) == ["summary", "curves", "runs", "tuning"]
    assert not (tmp_path / "timing.csv").exists()
    assert {row["seconds_per_step"] for row in rows(tmp_path / "summary.csv")} == {""}


def test_json_is_valid_with_runs_that_diverged() -> None:
    broken = result("broken")
    broken.losses[10:, 0] = np.inf
    document = json.loads(as_json({"p": [result("Adam", rate=0.01), broken]}, {"suite": "x"}))
    assert document["suite"] == "x"
    assert document["problems"]["p"][1] == {
        "optimizer": "broken",
        "rate": None,
        "edge": None,
        "final_loss": None,
        "band": [pytest.approx(1.0, abs=0.2), None],
        "speedup": 0.25,
        "diverged": 1,
    }
    assert [line["diverged"] for line in document["scores"]] == [1, 0]
    assert document["scores_in_seconds"] is None


def test_whole_comparison_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.safetensors"
    save_rule(ScaleFreeLSTM(2, rate=0.1), path)  # untrained: Adam at a good rate
    results = compare(
        suite({**NOISY, "steps": 40}),
        [path],
        ["SGD", "Adam@1e-3"],
        out=tmp_path / "out",
        cache=Cache(tmp_path / "cache"),
        settings={"command": "test"},
    )
    assert [found.optimizer for found in results["noisy"]] == ["Adam", "SGD", "Adam@0.001", "mine"]
    starts = {tuple(found.losses[0]) for found in results["noisy"]}
    assert len(starts) == 1  # the same problems for all
    finals = {found.optimizer: found.final[0] for found in results["noisy"]}
    assert finals["Adam"] < 0.5 * np.mean(starts.pop())
    assert finals["Adam"] < finals["Adam@0.001"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *(f"{name}.csv" for name in ("summary", "curves", "runs", "tuning")),
        *(f"{name}.png" for name in ("comparison", "speedup", "profile")),
        "provenance.json",
    }
    captured = capsys.readouterr()
    assert "noisy, 40 steps, 3 seeds" in captured.out
    assert "speed-up over tuned Adam in steps" in captured.out
    assert "noisy, 40 steps: tuning Adam over 3 rates" in captured.err
