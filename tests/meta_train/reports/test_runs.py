"""Runs on disk: how they are read, listed, shown, drawn and compared."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.pictures import number_of_colours
from helpers.small_runs import STEPS, configuration, run
from learned_optim import __version__, cli
from learned_optim.meta_train.reports.run_plots import (
    MetricPanel,
    draw_curve,
    known,
    plot_comparison_of_runs,
    set_scale,
    short_names,
)
from learned_optim.meta_train.reports.runs import different_settings, find_runs, read_run
from learned_optim.meta_train.reports.settings import settings_of
from learned_optim.meta_train.trainer.kind import RULE
from learned_optim.meta_train.trainer.log import read_metrics
from learned_optim.meta_train.trainer.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
PES = {"name": "pes", "pairs": 2, "replay_coordinates": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, ``a``, and one that was left early, ``b``."""
    folder = tmp_path_factory.mktemp("runs")
    run(Trainer(configuration(), folder / "a"))
    trainer = Trainer(configuration(estimator=PES, seed=3, description="another"), folder / "b")
    for progress in trainer.run():
        if progress.meta_step == 6:
            break
    return folder


class TestReading:
    def test_summary_is_that_of_the_checkpoint(self, folder: Path) -> None:
        finished, left_early = (read_run(folder / name).summary() for name in "ab")
        assert (finished["meta_steps"], finished["of"], finished["state"]) == (STEPS, STEPS, "finished")
        assert (left_early["meta_steps"], left_early["of"], left_early["state"]) == (6, STEPS, "unfinished")
        assert left_early["estimator"] == "pes"
        assert finished["families"] == {"quadratic": 1, "helpers.user_tasks:DropoutFamily": 1}
        assert finished["best_validation"] == Trainer.resume(folder / "a").best_validation

    def test_run_with_an_ended_curriculum_is_finished(self, tmp_path: Path) -> None:
        run_ = read_run_of(tmp_path, curriculum={"horizons": [2, 4]}, unroll={"horizon": [100, 100]})
        assert not run_.finished
        run_.progress["curriculum"]["finished"] = True
        assert run_.finished

    def test_metrics_end_with_the_checkpoint(self, folder: Path) -> None:
        metrics = read_run(folder / "b").metrics()
        assert metrics["meta_step"] == list(range(1, 7))
        assert [step for step, value in zip(*known(metrics, "validation"), strict=True) if value > 0] == [4]
        assert len(metrics["estimator/variance"]) == 6

    def test_changed_settings_are_those_that_differ_from_the_defaults(self, tmp_path: Path) -> None:
        changed = read_run_of(tmp_path).changed_settings()
        assert changed["unroll.truncation"] == 2
        assert changed["steps"] == STEPS
        assert "unroll.stagger" not in changed
        assert changed["tasks[0].options.dimensions"] == [2, 4]

    def test_differences_name_the_settings_of_each_run(self, folder: Path) -> None:
        runs = find_runs([folder])
        assert different_settings(runs) == {
            "estimator.name": ["truncated-bptt", "pes"],
            "estimator.pairs": [None, 2],  # a setting that only one of the estimators has
            "estimator.replay_coordinates": [3, None],
            "estimator.sigma": [None, 0.01],
            "seed": [0, 3],
        }
        del runs[0].config["unroll"]["stagger"]  # as in a run of a version that did not know it
        assert "unroll.stagger" not in different_settings(runs)

    def test_find_runs_lists_each_run_once(self, folder: Path) -> None:
        assert [run_.folder.name for run_ in find_runs([folder, folder / "a"])] == ["a", "b"]

    @pytest.mark.parametrize(
        ("folders", "names"),
        [
            (["runs/a", "runs/b"], ["a", "b"]),
            (["runs/a/x", "runs/b/x"], ["a/x", "b/x"]),
            (["runs/a"], ["a"]),
            (["runs/a", "runs/a/b"], ["a", "a/b"]),
        ],
    )
    def test_short_names_leave_out_the_common_folder(self, folders: list[str], names: list[str]) -> None:
        assert short_names([Path(name) for name in folders]) == names


def read_run_of(folder: Path, **changes: Any) -> Any:
    trainer = Trainer(configuration(**changes), folder)
    next(trainer.run())
    return read_run(folder)


def test_list_shows_the_runs_beside_a_damaged_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "b", tmp_path / "whole")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "checkpoint.safetensors").write_bytes(b"junk")
    assert cli.main(["runs", "list", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert str(tmp_path / "whole") in output.out
    assert f"{tmp_path / 'broken' / 'checkpoint.safetensors'} is damaged" in output.err


@pytest.mark.parametrize("file", ["metrics.csv", "run.json"])
@pytest.mark.parametrize(
    "content", [b"", b"a,b\n\xff\xfe\n", b"[1]", b'{"sessions": [3]}', b"meta_step,x\n1,two\n"], ids=repr
)
def test_damaged_file_is_named_in_one_line(
    file: str, content: bytes, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(folder / "b", damaged)
    (damaged / file).write_bytes(content)
    for arguments in (["runs", "show"], ["runs", "plot"], ["meta-train", "--resume"]):
        assert cli.main([*arguments, str(damaged)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"learned-optim: error: {damaged / file} is damaged (")


@pytest.mark.parametrize(
    ("table", "value"),
    [
        ("progress", {}),
        ("progress", []),
        ("progress", {"meta_step": "x", "skipped": 0, "seconds": 1.0, "best_validation": None}),
        ("progress", {"meta_step": 1, "skipped": 0, "seconds": 1e999, "best_validation": None}),
        ("config", {}),
        ("config", {"steps": 1, "tasks": [{}], "rule": {"architecture": "mlp"}, "estimator": {"name": "es"}}),
        ("config", {"steps": 1, "tasks": [], "rule": None, "estimator": {"name": "es"}, "validation": 3}),
        ("config", {"steps": 1, "algorithm": "maml", "task": {"family": "sinusoid"}}),
    ],
    ids=str,
)
def test_malformed_checkpoint_is_named_in_one_line(
    table: str, value: object, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with safe_open(folder / "b" / "checkpoint.safetensors", framework="pt") as file:
        metadata = {**file.metadata(), table: json.dumps(value)}
    save_file({}, tmp_path / "checkpoint.safetensors", metadata)
    for arguments in (["runs", "list"], ["runs", "show"], ["runs", "plot"], ["meta-train", "--resume"]):
        assert cli.main([*arguments, str(tmp_path)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"learned-optim: error: {tmp_path / 'checkpoint.safetensors'}")


def test_checkpoint_without_its_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    with safe_open(folder / "b" / "checkpoint.safetensors", framework="pt") as file:
        save_file({}, tmp_path / "checkpoint.safetensors", file.metadata())
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged, or of another version"):
        Trainer.resume(tmp_path)


def test_cut_off_row_is_ignored(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    whole = (folder / "b" / "metrics.csv").read_bytes()
    names, rows = read_metrics(folder / "b" / "metrics.csv")
    for tail in (b"7,", b"7" + b"," * (len(names) - 1) + b"1e-", bytes(100), b"\xff\xfe"):
        path.write_bytes(whole + tail)
        assert read_metrics(path) == (names, rows)


def test_settings_are_compared_with_the_defaults_of_their_class() -> None:
    config = {
        "steps": 5,
        "rule": {"architecture": "lstm-l2l", "settings": {"hidden_size": 20, "layers": 2}},
        "tasks": [{"family": "quadratic", "weight": 2.0, "options": {"noise": 0.0}}, {"family": "mine:Mine"}],
        "unroll": {"truncation_growth": {"to": 50, "over": 10, "jitter": 0.2}, "pool": 1},
        "validation": {"suites": [{"name": "mixture"}, {"name": "other", "families": [{"family": "mlp"}], "tasks": 3}]},
        "unknown": {"to": "us"},
    }
    changed = {setting.name: setting.value for setting in settings_of(config, RULE) if setting.value != setting.default}
    assert changed == {
        "steps": 5,
        "rule.architecture": "lstm-l2l",
        "tasks[0].family": "quadratic",
        "tasks[0].weight": 2.0,
        "tasks[1].family": "mine:Mine",
        "unroll.truncation_growth.to": 50,
        "unroll.truncation_growth.over": 10,
        "validation.suites[1].name": "other",
        "validation.suites[1].families[0].family": "mlp",
        "validation.suites[1].tasks": 3,
        "unknown.to": "us",
    }


def test_options_that_an_earlier_version_recorded_for_every_estimator_are_no_settings(
    folder: Path, tmp_path: Path
) -> None:
    with safe_open(folder / "b" / "checkpoint.safetensors", framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"])
    config["estimator"] |= {"covariance": True, "caution": 8.0, "second_derivatives": False}
    save_file({}, tmp_path / "checkpoint.safetensors", {**metadata, "config": json.dumps(config)})
    assert read_run(tmp_path).settings() == read_run(folder / "b").settings()


def test_special_characters_in_run_names_are_drawn(folder: Path, tmp_path: Path) -> None:
    for name in ("_hidden", "a$b_{", "\x1b[2J"):  # left out of legends, no formula, a control character
        shutil.copytree(folder / "b", tmp_path / name)
    plot_comparison_of_runs(find_runs([tmp_path]), tmp_path / "figure.png")  # no warning, no error
    assert (tmp_path / "figure.png").is_file()


def test_byte_order_mark_is_skipped(folder: Path, tmp_path: Path) -> None:
    marked = tmp_path / "run"
    shutil.copytree(folder / "b", marked)
    for file in ("metrics.csv", "run.json"):
        (marked / file).write_bytes(b"\xef\xbb\xbf" + (marked / file).read_bytes())
    assert read_run(marked).metrics() == read_run(folder / "b").metrics()


def test_changed_settings_leave_out_defaults(folder: Path) -> None:
    run = read_run(folder / "a")
    changed = run.changed_settings()
    assert {name for name in changed if name.startswith("tasks")} == {
        "tasks[0].family",
        "tasks[1].family",
        *(f"tasks[0].options.{option}" for option in ("dimensions", "condition", "initial_deviation")),
    }
    assert not [name for name in changed if name.startswith("validation.suites")]
    assert changed["unroll.rescale"] == 0.5


def axes_of(panels: list[MetricPanel]) -> list[str]:
    """The scales of the vertical axes that are drawn."""
    scales = []
    for panel in panels:
        axes = Figure().subplots()
        for name, metrics in panel.runs.items():
            draw_curve(axes, metrics, panel.metric, name)
        set_scale(axes, [known(metrics, panel.metric)[1] for metrics in panel.runs.values()])
        scales.append(axes.get_yscale())
        assert len(axes.lines) == len(panel.runs)
    return scales


def test_curves_with_negative_values_use_a_linear_or_symlog_axis() -> None:
    steps = [1.0, 2.0, 3.0]
    positive = {"meta_step": steps, "meta_loss": [1.0, 0.1, 0.01]}
    negative = {"meta_step": steps, "meta_loss": [-1.0, -1.5, -2.0]}
    together = MetricPanel("meta_loss", "", {"positive": positive, "negative": negative})
    assert axes_of([MetricPanel("meta_loss", "", {"positive": positive}), together]) == ["log", "linear"]
    wild = {"meta_step": steps, "meta_loss": [1e6, 2.0, 1.0]}
    assert axes_of([MetricPanel("meta_loss", "", {"wild": wild, "negative": negative})]) == ["symlog"]


def test_validations_of_different_lengths_have_separate_axes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Trainer(configuration(validation={"every": 4, "horizon": 6}), tmp_path / "longer"))
    drawn: list[MetricPanel] = []
    monkeypatch.setattr("learned_optim.meta_train.reports.run_plots._draw", lambda panels, path: drawn.extend(panels))
    plot_comparison_of_runs(find_runs([folder, tmp_path / "longer"]), tmp_path / "figure.png")
    assert [len(panel.runs) for panel in drawn if panel.metric == "validation"] == [2, 1]
    assert [len(panel.runs) for panel in drawn if panel.metric == "meta_loss"] == [3]


class TestCommand:
    def test_list_has_a_line_for_each_run(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["runs", "list", str(folder)]) == 0
        header, *lines = capsys.readouterr().out.splitlines()
        assert header.split() == ["run", "families", "estimator", "meta-steps", "best", "over", "time", "state"]
        assert [line.split()[0] for line in lines] == [str(folder / "a"), str(folder / "b")]
        assert f" {STEPS}/{STEPS} " in lines[0]
        assert lines[1].endswith("unfinished")
        assert cli.main(["runs", "list", str(folder), "--json"]) == 0
        assert [entry["estimator"] for entry in json.loads(capsys.readouterr().out)] == ["truncated-bptt", "pes"]

    def test_show_prints_settings_outcome_and_provenance(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["runs", "show", str(folder / "b")]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        for expected in (["estimator.pairs", "2"], ["seed", "3"], ["meta_steps", "6"], ["torch", torch.__version__]):
            assert expected in rows
        assert cli.main(["runs", "show", str(folder / "b"), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["settings"]["estimator.pairs"] == 2
        assert shown["sessions"][0]["learned_optim"] == __version__
        assert shown["latest"]["meta_step"] == 6

    def test_list_before_the_first_run_succeeds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for _ in range(2):  # without a folder, and with an empty one
            assert cli.main(["runs", "list"]) == 0
            assert capsys.readouterr().out.startswith("no runs yet in runs; ")
            assert cli.main(["runs", "list", "--json"]) == 0
            assert json.loads(capsys.readouterr().out) == []
            (tmp_path / "runs").mkdir(exist_ok=True)

    def test_list_shows_the_length_and_families_of_scores(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(Trainer(configuration(validation={"every": 4, "horizon": 6}), tmp_path / "longer"))
        assert cli.main(["runs", "list", str(folder / "a"), str(tmp_path / "longer")]) == 0
        _, one, other = capsys.readouterr().out.splitlines()
        assert " 4 steps of quadratic, helpers.user_tasks:DropoutFamily " in one
        assert " 6 steps of quadratic, helpers.user_tasks:DropoutFamily " in other

    @pytest.mark.slow
    def test_plots_are_pictures(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one, both = tmp_path / "one.png", tmp_path / "both.png"
        assert cli.main(["runs", "plot", str(folder / "b"), "--output", str(one)]) == 0
        assert cli.main(["runs", "compare", str(folder), "--output", str(both)]) == 0
        for path in (one, both):
            assert number_of_colours(path) > 50  # something is drawn
            assert f"written: {path}" in capsys.readouterr().out or path == both
        assert one.stat().st_size != both.stat().st_size
        assert cli.main(["runs", "plot", str(folder / "b"), "--png"]) == 0
        assert (folder / "b" / "metrics.png").read_bytes() == one.read_bytes()

    def test_compare_prints_what_differs(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["runs", "compare", str(folder / "a"), str(folder / "b"), "--output", str(tmp_path / "figure.png")]
        assert cli.main(arguments) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert rows[0] == ["a", "b"]
        assert ["estimator.name", "truncated-bptt", "pes"] in rows
        assert ["meta_steps", str(STEPS), "6"] in rows
        assert cli.main([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["seed"] == [0, 3]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["list", "absent"], "no folder absent"),
            (["list", "."], "no runs in ."),
            (["show", "absent"], "no run in absent: it has no checkpoint.safetensors"),
            (["plot", "absent"], "no folder absent"),
            (["plot", "{folder}", "--output", "figure.png"], "--output takes a single run, got 2"),
            (["plot", "{folder}/a", "--output", "figure.jpg"], "--output must end in .html or .png, got figure.jpg"),
            (["plot", "{folder}/a", "--png", "--output", "a.html"], "--png writes a .png, --output is a.html"),
            (["compare", "{folder}/a"], "name two runs or more"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_error_is_one_line(
        self,
        arguments: list[str],
        words: str,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.main(["runs", *(argument.format(folder=folder) for argument in arguments)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("learned-optim: error: ")
        assert words in line
        assert list(tmp_path.iterdir()) == []
