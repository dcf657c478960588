"""The command line: what it prints, its exit status, and that errors are one line that says what to do."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image as matplotlib_image

from learned_optim import __version__, available_rules, checkpoint, cli, save_rule
from learned_optim.meta_train.benchmark import COMPARISONS
from learned_optim.meta_train.config import shipped_configs
from learned_optim.meta_train.data import DATA_SETS
from learned_optim.meta_train.evaluation import BASELINES
from learned_optim.meta_train.tasks.mlp import image_rows
from learned_optim.rules import LSTML2L, ScaleFreeLSTM

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "": ["demo", "meta-train", "runs", "benchmark", "rules", "data", "examples:"],
    "demo": ["--output"],
    "meta-train": ["--set", "--output", "--resume", "--device", "--threads"],
    "benchmark": ["--list", "--rule", "--baseline", "--seeds", "--output"],
    "rules": [],
    "runs": ["list", "show", "plot", "compare"],
    "runs list": ["--json"],
    "runs show": ["--json"],
    "runs plot": ["--output"],
    "runs compare": ["--output", "--json"],
    "data": ["list", "fetch"],
    "data list": [],
    "data fetch": ["--output"],
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, so that nothing is written into the checkout; SIGTERM handled as before afterwards."""
    monkeypatch.chdir(tmp_path)
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


def run(*arguments: str) -> int:
    return cli.main(arguments)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a failing command prints to standard error."""
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("learned-optim: error: ")
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*command.split(), "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: learned-optim {command}".rstrip())
    assert all(word in text for word in COMMANDS[command])


def test_help_examples_can_be_parsed() -> None:
    examples = [line.split()[1:] for line in cli.EXAMPLES.splitlines() if line.startswith("  learned-optim ")]
    assert len(examples) >= 3
    for arguments in examples:
        assert cli._parser().parse_args(arguments).run


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"learned-optim {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["data"],
        ["data", "fetch"],
        ["rules", "--verbose"],
        ["benchmark", "--seeds", "many"],
        ["meta-train", "demo", "--threads", "x"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage: learned-optim" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["meta-train"], ["name a configuration", "--resume RUN"]),
        (["meta-train", "nothing"], ["no configuration file nothing", "shipped ones: ", *shipped_configs()]),
        (["meta-train", "demo", "--set", "stepz=3"], ["demo: unknown key 'stepz'", "did you mean 'steps'?"]),
        (["meta-train", "demo", "--set", "steps"], ["--set 'steps': expected key=value"]),
        (["meta-train", "demo", "--set", "unroll.horizon=[5,2]"], ["demo: unroll: horizon", "low <= high"]),
        (["meta-train", "demo", "--device", "cuda:99"], ["--device cuda:99: "]),
        (["meta-train", "demo", "--device", "gpu"], ["--device gpu: "]),
        (["meta-train", "demo", "--threads", "0"], ["positive"]),
        (["meta-train", "--resume"], ["which run? --resume RUN"]),
        (["meta-train", "--resume", "absent"], ["nothing to resume: no absent/checkpoint.safetensors"]),
        (["meta-train", "demo", "--resume"], ["nothing to resume: no runs/demo/checkpoint.safetensors"]),
        (["meta-train", "--resume", "absent", "--set", "steps=9"], ["--set cannot change a run that has begun"]),
        (["meta-train", "--resume", "absent", "--output", "other"], ["leave out --output"]),
        (["benchmark", "quadratik"], ["unknown problem 'quadratik'", *COMPARISONS]),
        (["benchmark", "quadratic", "--baseline", "Adamax"], ["unknown baseline 'Adamax'", *BASELINES]),
        (["benchmark", "quadratic", "--seeds", "1"], ["--seeds must be at least 2"]),
        (["benchmark", "quadratic", "--rule", "nobody"], ["unknown rule 'nobody'", *available_rules()]),
        (["benchmark", "quadratic", "--rule", "a/b.safetensors"], ["no rule file at a/b.safetensors"]),
        (["data", "fetch", "imagenet"], ["unknown data set 'imagenet'", *DATA_SETS]),
        (["data", "fetch", "digits"], ["needs no download"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value, list) else "",
)
def test_error_is_one_line_that_says_what_to_do(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = error_of(capsys, *arguments)
    assert [word for word in words if word not in line] == []
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="unknown rule"):
        run("--debug", "benchmark", "quadratic", "--rule", "nobody")


def test_missing_data_names_the_places_and_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path / "set"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image_rows.cache_clear()
    for arguments in (["meta-train", "lstm-l2l-mnist", "--output", "run"], ["benchmark", "mnist", "--rule", "default"]):
        line = error_of(capsys, *arguments)
        assert "data set 'mnist' not found" in line
        assert f"{tmp_path}/set/mnist (no such folder)" in line
        assert f"{tmp_path}/cache/learned_optim/data/mnist (no such folder)" in line
        assert "run 'learned-optim data fetch mnist'" in line
    assert not list(tmp_path.rglob("*.safetensors"))

    assert run("data", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not here: learned-optim data fetch mnist" in [line.strip() for line in lines]


def test_data_list_shows_every_data_set_and_its_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "set" / "cifar10").mkdir(parents=True)
    (tmp_path / "set" / "cifar10" / "cifar10_subset.npz").touch()
    monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path / "set"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run("data", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    places = {above.split()[0]: below.strip() for above, below in zip(lines[::2], lines[1::2], strict=True)}
    assert places.keys() == DATA_SETS.keys()
    assert places["cifar10"] == str(tmp_path / "set" / "cifar10")
    assert places["mnist"] == "not here: learned-optim data fetch mnist"
    assert places["digits"] == "nothing to fetch"


def test_rules_lists_what_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rules") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == available_rules()
    assert all("meta-parameters. " in line and not line.endswith("meta-parameters. ") for line in lines)


def test_interruption_is_status_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[str]:
        signal.raise_signal(signal.SIGTERM)
        return []

    monkeypatch.setattr(checkpoint, "available_rules", interrupted)
    assert run("rules") == 130
    assert capsys.readouterr().err == "learned-optim: interrupted\n"


def test_interruption_before_anything_is_saved_does_not_say_saved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(trainer: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("learned_optim.meta_train.progress.run_with_progress", interrupted)
    assert run("meta-train", "demo") == 130
    assert capsys.readouterr().err == "learned-optim: interrupted\n"


def test_meta_train_runs_and_reports_where_the_weights_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("mine.toml").write_text('steps = 2\n[[tasks]]\nfamily = "quadratic"\n[validation]\nhorizon = 2\n')
    small = ["--set", "unroll.truncation=2", "--set", "rule.settings.hidden_size=2"]
    assert run("meta-train", "mine.toml", *small) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("meta-step 2: validation ")
    assert output[-1].endswith("weights: runs/mine/best.safetensors")
    assert (tmp_path / "runs" / "mine" / "best.safetensors").is_file()
    for again in (["mine.toml", *small, "--resume"], ["mine.toml", *small, "--resume", "runs/mine"]):
        assert run("meta-train", *again) == 0
        assert capsys.readouterr().out.startswith("continuing runs/mine at meta-step 2 of 2\n")
    assert sys.path.count(str(tmp_path)) <= 1  # once, not for each command


def test_end_of_the_curriculum_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        'steps = 50\n[[tasks]]\nfamily = "quadratic"\n[unroll]\ntruncation = 2\n[validation]\nhorizon = 2\n'
        "[meta_optimizer]\nlr = 1e-30\n[curriculum]\nhorizons = [2, 3]\nevery = 1\nevaluations = 2\n"
    )
    Path("mine.toml").write_text(text)  # the weights stand still: the first stage never improves
    assert run("meta-train", "mine.toml") == 0
    assert "the curriculum ended at meta-step 2: horizon 2 brings no more" in capsys.readouterr().out


def test_run_is_not_continued_under_another_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    text = 'steps = 1\n[[tasks]]\nfamily = "quadratic"\n[unroll]\ntruncation = 2\n[validation]\nhorizon = 2\n'
    Path("mine.toml").write_text(text)
    assert run("meta-train", "mine.toml") == 0
    saved = Path("runs/mine/checkpoint.safetensors").read_bytes()
    capsys.readouterr()
    text = text.replace("steps = 1", 'steps = 9\ndescription = "longer"')
    Path("mine.toml").write_text(text.replace('"quadratic"', '"quadratic"\ndimensions = [3, 3]'))
    for arguments in (["mine.toml", "--resume"], ["mine.toml", "--resume", "runs/mine"]):
        line = error_of(capsys, "meta-train", *arguments)
        assert "mine.toml is not the configuration of the run in runs/mine: " in line
        assert "steps: 1, not 9" in line
        assert "tasks[0].options.dimensions: null, not [3, 3]" in line
        assert "description" not in line
        assert "continue that as it began with --resume runs/mine" in line
    assert Path("runs/mine/checkpoint.safetensors").read_bytes() == saved
    assert run("meta-train", "--resume", "runs/mine") == 0


def test_run_without_a_validation_score_does_not_name_weights_that_are_not_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine.toml").write_text(
        'steps = 1\n[[tasks]]\nfamily = "user_tasks:NeverFiniteFamily"\n[unroll]\ntruncation = 2\n'
        "[validation]\nhorizon = 2\n"
    )
    assert run("meta-train", "mine.toml") == 0
    assert "the latest weights: runs/mine/latest.safetensors" in capsys.readouterr().out
    assert not Path("runs/mine/best.safetensors").exists()
    assert Path("runs/mine/latest.safetensors").exists()


def test_benchmark_list_names_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("benchmark", "--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(COMPARISONS)


@pytest.mark.slow
def test_benchmark_writes_whole_and_plausible_results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_rule(ScaleFreeLSTM(2, rate=0.1), tmp_path / "mine.safetensors")  # untrained: Adam at a good rate
    save_rule(LSTML2L(2), tmp_path / "other.safetensors")
    rules = ["--rule", str(tmp_path / "mine.safetensors"), "--rule", str(tmp_path / "other.safetensors")]
    assert run("benchmark", "quadratic", "--seeds", "2", *rules, "--output", "out") == 0
    names = [*BASELINES, "mine", "other"]
    folder, steps = tmp_path / "out", COMPARISONS["quadratic"].steps

    with (folder / "summary.csv").open(newline="") as file:
        summary = list(csv.DictReader(file))
    assert [row["optimizer"] for row in summary] == names
    finals = {row["optimizer"]: float(row["final_loss"]) for row in summary}
    best = min(finals[name] for name in BASELINES)
    for row in summary:
        assert (row["rate"] == "") == (row["optimizer"] not in BASELINES)
        assert float(row["band_low"]) <= finals[row["optimizer"]] <= float(row["band_high"])
        assert float(row["ratio_to_best_baseline"]) == pytest.approx(finals[row["optimizer"]] / best, rel=1e-4)

    with (folder / "curves.csv").open(newline="") as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == len(names) * (steps + 1)
    starts = {float(row["mean_loss"]) for row in curves if row["step"] == "0"}
    assert len(starts) == 1  # the same problems for all
    for name in names:
        losses = [float(row["mean_loss"]) for row in curves if row["optimizer"] == name]
        assert np.mean(losses[-10:]) == pytest.approx(finals[name], rel=1e-4)
    assert finals["Adam"] < 0.5 * starts.pop()

    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["problems"] == ["quadratic"]
    assert provenance["seeds"] == 2
    assert provenance["torch"] == torch.__version__
    assert {"date", "commit", "processor", "cores", "threads", "learned_optim"} <= provenance.keys()

    pixels = matplotlib_image.imread(folder / "comparison.png")  # fails on a damaged file
    assert min(pixels.shape[:2]) >= 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50  # something is drawn, in colours

    captured = capsys.readouterr()
    assert all(name in captured.out for name in names)
    assert "written: out/summary.csv" in captured.out
    assert "tuning Adam over 11 rates" in captured.err
    assert {path.name for path in folder.iterdir()} == {
        "summary.csv",
        "curves.csv",
        "provenance.json",
        "comparison.png",
    }


@pytest.mark.slow
def test_reader_that_goes_away_causes_no_traceback() -> None:
    """As in ``learned-optim data list | true``."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "learned_optim.cli", "rules"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},  # the pipe is written to at the end
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (1, "")
