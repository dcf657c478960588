"""The command ``data``, and what other commands say of data that are not there."""

import json
from pathlib import Path

import pytest

from helpers.commands import error_of, run
from learned_optim.meta_train.data.datasets import DATA_SETS
from learned_optim.meta_train.tasks.mlp import image_rows


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
