"""Problems that were run by themselves take their place in committed results."""

import json
from pathlib import Path

import pytest

from benchmarks.results import merge, read_suite, read_summary, write_suite
from benchmarks.suites import l2l_2016
from learned_optim.meta_train.benchmark.cache import Cache
from learned_optim.meta_train.benchmark.contenders import baselines
from learned_optim.meta_train.benchmark.harness import Harness
from learned_optim.meta_train.benchmark.progress import Bar
from learned_optim.meta_train.benchmark.report import save_results
from learned_optim.meta_train.benchmark.suites import suite_from_tables

pytestmark = pytest.mark.slow
NAMES = ("quadratic", "mnist", "cifar-10")  # of the experiments of 2016, in their order; what is run is a small problem
PROBLEMS = [{"name": name, "family": "quadratic", "steps": 20} for name in NAMES]
SUITE = suite_from_tables(
    {"name": "small", "seeds": 2, "tuning_seeds": 2, "rates": [0.1, 0.01], "problems": PROBLEMS}, "small"
)
ORDER = [problem.name for problem in SUITE.problems]


def write(folder: Path, names: list[str], suite: str = "small", seeds: int = 2) -> Path:
    """Results of Adam on some of the problems."""
    part = SUITE.only(names).with_seeds(seeds)
    harness = Harness(part, baselines(["Adam"]), [], cache=Cache(None))
    with Bar(harness.planned_steps()) as bar:
        results = {group[0].problem.name: group for group in harness.results(bar)}
    details = {"suite": suite, "problems": names, "seeds": dict.fromkeys(names, seeds), "rates": [0.1, 0.01]}
    save_results(results, folder, details)
    return folder


def test_merged_parts_equal_one_run(tmp_path: Path) -> None:
    part, target, whole = write(tmp_path / "part", ["mnist"]), tmp_path / "target", tmp_path / "whole"
    write(target, ["quadratic", "cifar-10"])
    write(whole, ORDER)
    merge(part, target, ORDER)
    write_suite(whole, read_suite(whole))
    for name in ("summary", "curves"):
        assert (target / f"{name}.csv").read_text() == (whole / f"{name}.csv").read_text()
    assert sorted(path.name for path in target.iterdir()) == ["curves.csv", "provenance.json", "summary.csv"]
    provenance = json.loads((target / "provenance.json").read_text())
    assert provenance["problems"] == ORDER
    assert list(provenance["merged"]) == ["mnist"]
    assert {"date", "commit", "processor"} <= set(provenance["merged"]["mnist"])


def test_merge_replaces_rows_of_problems_in_both(tmp_path: Path) -> None:
    part, target = write(tmp_path / "part", ["mnist"], seeds=3), write(tmp_path / "target", ORDER)
    merge(part, target, ORDER)
    seeds = {row["problem"]: row["seeds"] for row in read_summary(target)}
    assert seeds == {"quadratic": "2", "mnist": "3", "cifar-10": "2"}


def test_parts_are_merged_into_committed_rows_one_after_the_other(tmp_path: Path) -> None:
    target = write(tmp_path / "target", ["cifar-10"])
    for name in ("quadratic", "mnist"):  # the first merge writes tuning and comparison into one table
        merge(write(tmp_path / name, [name]), target, ORDER)
    merged = read_suite(target)
    assert [row["problem"] for row in merged.summary] == ORDER
    assert list(dict.fromkeys(row["problem"] for row in merged.tuning)) == ORDER


def test_first_results_of_a_suite_make_its_folder(tmp_path: Path) -> None:
    part, target = write(tmp_path / "part", ["mnist"]), tmp_path / "target"
    merge(part, target, ORDER)
    assert read_summary(target) == read_suite(part).summary
    assert (target / "provenance.json").read_text() == (part / "provenance.json").read_text()


def test_results_that_lack_a_column_are_refused(tmp_path: Path) -> None:
    part, target = write(tmp_path / "part", ["mnist"]), write(tmp_path / "target", ["quadratic"])
    table = part / "summary.csv"
    table.write_text(table.read_text().replace("speedup", "speed"))
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ValueError, match="columns speedup are not among those of the new rows"):
        merge(part, target, ORDER)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_merge_refuses_results_of_another_suite(tmp_path: Path) -> None:
    part, target = write(tmp_path / "part", ["mnist"], suite="other"), write(tmp_path / "target", ["quadratic"])
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ValueError, match="is of suite 'other'"):
        merge(part, target, ORDER)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_rerun_of_one_2016_experiment_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write(tmp_path / "target", ["quadratic", "mnist"], suite="l2l-2016")

    def benchmark(arguments: list[str]) -> int:
        assert arguments[arguments.index("--problems") + 1] == "mnist"
        write(Path(arguments[arguments.index("--out") + 1]), ["mnist"], suite="l2l-2016", seeds=3)
        return 0

    monkeypatch.setattr(l2l_2016, "RESULTS", target)
    monkeypatch.setattr("learned_optim.cli.main", benchmark)
    assert l2l_2016.main(["run", "--problems", "mnist"]) == 0
    assert {row["problem"]: row["seeds"] for row in read_summary(target)} == {"quadratic": "2", "mnist": "3"}
    assert (target / "figure.png").is_file()
