"""The command line: what it prints, its exit status, and that errors are one line that says what to do."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import error_of, run
from helpers.paths import ROOT
from learned_optim import available_rules, checkpoint
from learned_optim.meta_train.benchmark.evaluation import BASELINES
from learned_optim.meta_train.benchmark.suites import shipped_suites
from learned_optim.meta_train.config.load import shipped_configs
from learned_optim.meta_train.data.datasets import DATA_SETS


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
def test_debug_raises_at_any_position(place: int) -> None:
    arguments = ["benchmark", "quick", "--rules", "nobody"]
    with pytest.raises(ValueError, match="unknown rule"):
        run(*arguments[:place], "--debug", *arguments[place:])


def test_unexpected_exception_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise KeyError("weights")

    monkeypatch.setattr(checkpoint, "available_rules", broken)
    assert error_of(capsys, "rules") == (
        "learned-optim: error: unexpected KeyError: 'weights'; please report what --debug shows"
    )


def test_interruption_is_status_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[str]:
        signal.raise_signal(signal.SIGTERM)
        return []

    monkeypatch.setattr(checkpoint, "available_rules", interrupted)
    assert run("rules") == 130
    assert capsys.readouterr().err == "learned-optim: interrupted\n"


@pytest.mark.slow
def test_closed_pipe_ends_quietly() -> None:
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


def test_work_continues_after_a_closed_pipe() -> None:
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
def test_full_disk_is_one_line() -> None:
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


def test_error_escapes_control_characters_of_a_file_name(capsys: pytest.CaptureFixture[str]) -> None:
    Path("\x1b[2J").mkdir()
    Path("\x1b[2J/checkpoint.safetensors").touch()
    assert r"\x1b[2J/checkpoint.safetensors is damaged" in error_of(capsys, "runs", "list", ".")


@pytest.mark.parametrize("command", ["rules list", "--version", "runs list"])
def test_closed_standard_output_is_success(command: str, tmp_path: Path) -> None:
    process = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m learned_optim.cli {command} >&-'],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
