"""The command line: what it prints, its exit status, and that errors are one line that says what to do."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import ROOT
from learned_optim import available_rules, checkpoint, cli, save_rule
from learned_optim.meta_train.benchmark.evaluation import BASELINES
from learned_optim.meta_train.benchmark.suites import load_suite, shipped_suites
from learned_optim.meta_train.config.load import shipped_configs, shipped_few_shot_configs
from learned_optim.meta_train.data.datasets import DATA_SETS
from learned_optim.meta_train.tasks.mlp import image_rows
from learned_optim.rules import ScaleFreeLSTM


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
        (["benchmark"], ["name a suite (", *shipped_suites(), "--model FILE.py:CLASS"]),
        (["benchmark", "quick", "--model", "a.py:B"], ["name a suite (", "or your own --model FILE.py:CLASS"]),
        (["benchmark", "quik"], ["unknown name 'quik' (did you mean 'quick'?)", *shipped_suites()]),
        (["benchmark", "mine.toml"], ["no suite file mine.toml"]),
        (["benchmark", "quick", "--problems", "quadratik"], ["suite 'quick': problems: unknown name 'quadratik'"]),
        (["benchmark", "quick", "--baselines", "Adamax"], ["unknown name 'Adamax'", *BASELINES]),
        (["benchmark", "quick", "--baselines", "Adam@x"], ["'Adam@x'", "for example Adam@1e-3"]),
        (["benchmark", "quick", "--seeds", "1"], ["at least 2 seeds are needed for a band, got 1"]),
        (["benchmark", "quick", "--steps", "9"], ["--steps goes with --model"]),
        (["benchmark", "quick", "--device", "gpu"], ["--device gpu: "]),
        (["benchmark", "quick", "--rules", "nobody"], ["unknown rule 'nobody'", *available_rules()]),
        (["benchmark", "quick", "--rules", "a/b.safetensors"], ["no rule file at a/b.safetensors"]),
        (["benchmark", "--model", "absent.py:Net"], ["problem 'Net': no file", "absent.py"]),
        (["benchmark", "--model", "Net"], ["unknown name 'Net'"]),
        (["rules", "show", "defualt"], ["unknown rule 'defualt'", *available_rules()]),
        (["rules", "show", "a/b.safetensors"], ["no rule file at a/b.safetensors"]),
        (["rules", "show", "default", "--steps", "9"], ["--steps and --scale go with --plot FILE"]),
        (["rules", "show", "default", "--plot", "rule.jpg"], ["must end in .png, .svg, .pdf", "rule.jpg"]),
        (["rules", "show", "default", "--plot", "rule.png", "--steps", "0"], ["at least 10, got 0"]),
        (["rules", "show", "default", "--plot", "rule.png", "--scale", "-1"], ["positive and finite, got -1"]),
        (["rules", "show", "hf://nobody"], ["expected hf://OWNER/NAME"]),
        (["rules", "export", "default", "rule.pt"], ["must end in .safetensors, got rule.pt"]),
        (["rules", "export", "nobody", "rule.safetensors"], ["unknown rule 'nobody'"]),
        (["data", "fetch", "imagenet"], ["unknown data set 'imagenet'", *DATA_SETS]),
        (["data", "fetch", "mnst"], ["did you mean 'mnist'?"]),
        (["data", "fetch", "digits"], ["needs no download"]),
        (["data", "fetch", "neural_art"], ["cannot be downloaded", "docs/neural-art.md"]),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value, list) else "",
)
def test_error_is_one_line_that_says_what_to_do(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = error_of(capsys, *arguments)
    assert [word for word in words if word not in line] == []
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize("place", [0, 1, 4])
def test_debug_shows_the_traceback_wherever_it_is_written(place: int) -> None:
    arguments = ["benchmark", "quick", "--rules", "nobody"]
    with pytest.raises(ValueError, match="unknown rule"):
        run(*arguments[:place], "--debug", *arguments[place:])


def test_mistake_of_ours_is_one_line_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise KeyError("weights")

    monkeypatch.setattr(checkpoint, "available_rules", broken)
    assert error_of(capsys, "rules") == (
        "learned-optim: error: unexpected KeyError: 'weights'; please report what --debug shows"
    )


def test_missing_data_names_the_places_and_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path / "set"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image_rows.cache_clear()
    for arguments in (
        ["meta-train", "lstm-l2l-mnist", "--output", "run"],
        ["benchmark", "unseen", "--problems", "mnist-relu-100"],
    ):
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
    assert run("data", "list", "--json") == 0
    folders = {name: entry["folder"] for name, entry in json.loads(capsys.readouterr().out).items()}
    assert folders == {**dict.fromkeys(DATA_SETS), "cifar10": places["cifar10"]}
    assert places.keys() == DATA_SETS.keys()
    assert places["cifar10"] == str(tmp_path / "set" / "cifar10")
    assert places["mnist"] == "not here: learned-optim data fetch mnist"
    assert places["digits"] == "nothing to fetch"


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

    monkeypatch.setattr("learned_optim.meta_train.trainer.progress.run_with_progress", interrupted)
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
        'steps = 1\n[[tasks]]\nfamily = "helpers.user_tasks:NeverFiniteFamily"\n[unroll]\ntruncation = 2\n'
        "[validation]\nhorizon = 2\n"
    )
    assert run("meta-train", "mine.toml") == 0
    assert "the latest weights: runs/mine/latest.safetensors" in capsys.readouterr().out
    assert not Path("runs/mine/best.safetensors").exists()
    assert Path("runs/mine/latest.safetensors").exists()


def test_list_of_configurations_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("meta-train", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*shipped_configs(), *shipped_few_shot_configs()]
    assert all(len(line.split()) > 2 for line in lines)  # a description


def test_benchmark_list_names_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("benchmark", "--list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert run("benchmark", "--list") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [name for suite, problems in found.items() for name in (suite, *problems)]
    suites = [load_suite(name) for name in shipped_suites()]
    assert names == [name for suite in suites for name in (suite.name, *(problem.name for problem in suite.problems))]


TINY = """
steps = 4
seeds = 2
tuning_seeds = 2
rates = [0.1, 0.01]
baselines = ["Adam"]
[[problems]]
name = "first"
family = "quadratic"
[[problems]]
name = "second"
family = "quadratic"
noise = 0.1
"""


def test_benchmark_options_reach_the_comparison(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("tiny.toml").write_text(TINY)
    save_rule(ScaleFreeLSTM(2), tmp_path / "mine.safetensors")
    chosen = ["--problems", "second", "--seeds", "3", "--rules", "mine.safetensors", "--baselines", "SGD,Adam@0.1"]
    assert run("benchmark", "tiny.toml", *chosen, "--cache", "stored", "--json") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    (problem,) = document["problems"].values()
    assert [row["optimizer"] for row in problem] == ["Adam", "SGD", "Adam@0.1", "mine"]
    assert (document["suite"], document["seeds"]) == ("tiny", {"second": 3})
    assert "second, 4 steps: tuning SGD over 2 rates" in captured.err
    assert Path("benchmark/tiny/summary.csv").is_file()
    assert list(Path("stored").rglob("*.safetensors"))


def test_interrupted_benchmark_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("learned_optim.meta_train.benchmark.evaluation.train", interrupted)
    Path("tiny.toml").write_text(TINY)
    assert run("benchmark", "tiny.toml", "--cache", "stored") == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == ["finished runs are stored; the same command goes on from there", "learned-optim: interrupted"]


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
    assert (process.returncode, process.stderr) == (0, "")


READ_NO_MORE = """
import sys
from learned_optim.terminal import say, settle_streams

settle_streams()
for number in range(3):
    say(number)
    sys.stdin.readline()  # the reader has read, and goes away after the first line
print("done", file=sys.stderr)
"""


def test_work_goes_on_when_its_reader_goes_away() -> None:
    """As in ``learned-optim meta-train ... | head -1``."""
    process = subprocess.Popen(
        [sys.executable, "-c", READ_NO_MORE],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    process.stdin.write("go on\n" * 3)
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == ("done\n", 0)
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_is_an_error_of_one_line() -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "learned_optim.cli", "runs", "list"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert process.returncode == 1
    assert re.fullmatch(r"learned-optim: error: .*No space left on device\n", process.stderr)


def test_error_shows_control_characters_of_a_file_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("\x1b[2J").mkdir()
    Path("\x1b[2J/checkpoint.safetensors").touch()
    assert r"\x1b[2J/checkpoint.safetensors is damaged" in error_of(capsys, "runs", "list", ".")


@pytest.mark.parametrize("command", ["rules list", "--version", "runs list"])
def test_output_that_was_closed_is_no_failure(command: str, tmp_path: Path) -> None:
    process = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m learned_optim.cli {command} >&-'],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
