"""Rules on the Hugging Face hub, with a folder in place of the hub."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learned_optim import LearnedOptimizer, cli, load_rule, save_rule
from learned_optim.checkpoint import read_provenance
from learned_optim.hub import Address, parse
from learned_optim.rules import ScaleFreeLSTM


class Hub:
    """The functions of huggingface_hub that are used, under their names, on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.revisions: list[str | None] = []

    def module(self) -> Any:
        return SimpleNamespace(hf_hub_download=self.hf_hub_download, HfApi=lambda: self)

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        self.revisions.append(revision)
        path = self.folder / repo_id / filename
        if not path.is_file():
            raise LookupError(f"404 Client Error.\n\nEntry Not Found: {filename}")
        return str(path)

    def create_repo(self, repo_id: str, *, exist_ok: bool = False) -> None:
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def file_exists(self, repo_id: str, filename: str, *, revision: str | None = None) -> bool:
        return (self.folder / repo_id / filename).is_file()

    def upload_file(
        self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, revision: str | None, commit_message: str
    ) -> None:
        self.revisions.append(revision)
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in.module())
    return stand_in


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://me/rule", Address("me/rule", None, "rule.safetensors")),
        ("hf://me/my.rule_1@v1.0", Address("me/my.rule_1", "v1.0", "rule.safetensors")),
        ("hf://me/rule/runs/a.safetensors", Address("me/rule", None, "runs/a.safetensors")),
        ("hf://me/rule@abc/a.safetensors", Address("me/rule", "abc", "a.safetensors")),
    ],
)
def test_address_is_parsed(text: str, address: Address) -> None:
    assert parse(text) == address


@pytest.mark.parametrize("text", ["hf://me", "hf:///rule", "hf://me/rule/", "hf://me/rule@", "hf://me/a b"])
def test_invalid_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected hf://OWNER/NAME\[@REVISION\]\[/FILE.safetensors\]"):
        load_rule(text)


def test_rule_round_trips_through_the_hub(hub: Hub) -> None:
    rule = ScaleFreeLSTM(3)
    rule.reset_parameters(seed=5)
    save_rule(rule, "hf://me/rule", {"seed": 5})
    back = load_rule("hf://me/rule")
    assert all(torch.equal(tensor, rule.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert read_provenance("hf://me/rule") == {"seed": 5}
    assert LearnedOptimizer([torch.nn.Parameter(torch.zeros(1))], "hf://me/rule").rule.settings["hidden_size"] == 3


def test_revision_and_file_reach_the_hub(hub: Hub) -> None:
    save_rule(ScaleFreeLSTM(2), "hf://me/rule@v1/other.safetensors")
    assert load_rule("hf://me/rule@v1/other.safetensors").settings["hidden_size"] == 2
    assert set(hub.revisions) == {"v1"}
    with pytest.raises(OSError, match=r"^cannot load hf://me/rule: 404 Client Error\.$"):
        load_rule("hf://me/rule")


def test_new_repository_gets_a_card_and_an_old_one_keeps_its_own(hub: Hub) -> None:
    save_rule(ScaleFreeLSTM(2), "hf://me/rule")
    card = hub.folder / "me" / "rule" / "README.md"
    assert 'rule="hf://me/rule"' in card.read_text()
    card.write_text("mine")
    save_rule(ScaleFreeLSTM(2), "hf://me/rule")
    assert card.read_text() == "mine"


def test_command_line_exports_to_and_shows_from_the_hub(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rules", "export", "default", "hf://me/rule"]) == 0
    assert capsys.readouterr().out == "written: hf://me/rule\n"
    assert cli.main(["rules", "show", "hf://me/rule"]) == 0
    assert "schedule-free-lstm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["show", "hf://me/rule"], ["export", "default", "hf://me/rule"]], ids=["load", "save"]
)
def test_missing_library_error_names_the_extra(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["rules", *arguments]) == 1
    assert capsys.readouterr().err == (
        "learned-optim: error: hf://me/rule needs huggingface_hub: pip install 'learned-optim[hub]'\n"
    )


def test_real_library_has_the_signatures_of_the_stand_in() -> None:
    real = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    import inspect

    assert {"revision"} <= inspect.signature(real.hf_hub_download).parameters.keys()
    for name in ("create_repo", "file_exists", "upload_file"):
        stand_in = inspect.signature(getattr(Hub, name)).parameters.keys()
        assert stand_in <= inspect.signature(getattr(real.HfApi, name)).parameters.keys()


def test_name_in_place_of_a_rule_is_not_saved(tmp_path: Path) -> None:
    for place in (str(tmp_path / "rule.safetensors"), "hf://somebody/rule"):
        with pytest.raises(TypeError, match="rule must be an UpdateRule, got 'default'; load_rule gives one"):
            save_rule("default", place)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
