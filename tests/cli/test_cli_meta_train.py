"""The command ``meta-train``: runs, resuming, and what it says at the end."""

import sys
from pathlib import Path

import pytest

from helpers.commands import error_of, run
from learned_optim.meta_train.config.load import shipped_configs
from learned_optim.meta_train.few_shot.settings import shipped_few_shot_configs


def test_interruption_before_the_first_save_says_only_interrupted(
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
    assert output[1].startswith("meta-step 0: validation ")
    assert all(name in output[1] for name in (" start", " default", " outputs of zero", " tuned Adam"))
    assert output[2].startswith("meta-step 2: validation ")
    assert output[-1].endswith("weights: runs/mine/best.safetensors")
    assert (tmp_path / "runs" / "mine" / "best.safetensors").is_file()
    for again in (["mine.toml", *small, "--resume"], ["mine.toml", *small, "--resume", "runs/mine"]):
        assert run("meta-train", *again) == 0
        assert capsys.readouterr().out.startswith("continuing runs/mine at meta-step 2 of 2\n")
    assert sys.path.count(str(tmp_path)) <= 1  # once, not for each command


def test_end_of_the_curriculum_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        'steps = 50\n[[tasks]]\nfamily = "quadratic"\n[unroll]\ntruncation = 2\n[validation]\nhorizon = 2\n'
        "[meta_optimizer]\nlr = 1e-30\n[curriculum]\nhorizons = [2, 3]\nevery = 1\nevaluations = 2\n"
    )
    Path("mine.toml").write_text(text)  # the weights stand still: the first stage never improves
    assert run("meta-train", "mine.toml") == 0
    assert "the curriculum ended at meta-step 2: horizon 2 brings no more" in capsys.readouterr().out


def test_resume_under_another_configuration_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_run_without_a_validation_score_names_the_latest_weights(
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
