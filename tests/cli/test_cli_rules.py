"""The command ``rules``: cards, pictures and copies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.pictures import number_of_colours
from learned_optim import available_rules, cli, load_rule, save_rule
from learned_optim.checkpoint import read_provenance
from learned_optim.rules import ARCHITECTURES, ScaleFreeLSTM


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["rules", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["list"]], ids=["rules", "rules list"])
def test_list_names_what_is_shipped(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    *lines, empty, takes, architectures = shown(capsys, *arguments).splitlines()
    assert [line.split()[0] for line in lines] == available_rules()
    assert takes.startswith("LearnedOptimizer(parameters, rule=...) takes one of these names")
    assert (empty, architectures.partition(":")[2].strip()) == ("", ", ".join(sorted(ARCHITECTURES)))
    assert all("meta-parameters. " in line and not line.endswith("meta-parameters. ") for line in lines)


@pytest.mark.parametrize(
    "provenance",
    [
        {"config": {"tasks": "mnist", "estimator": "pes"}},
        {"config": {"tasks": ["a", 3, {}], "estimator": {}, "seed": [1]}},
        {"config": {"description": {"a": 1}}, "seconds": "long", "meta_steps": None},
        {"config": [1]},
        {"note": {"a": [None, True]}, "architecture": "another", "count": 10**50},
        {"config": {"description": "half a pair \ud800"}},
    ],
    ids=str,
)
def test_show_accepts_any_provenance(
    provenance: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_rule(load_rule("default"), tmp_path / "rule.safetensors", provenance)
    assert "339" in shown(capsys, "show", str(tmp_path / "rule.safetensors"))


def test_provenance_cannot_override_the_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    save_rule(load_rule("default"), "mine.safetensors", {"architecture": "another", "note": "mine"})
    rows = [line.split() for line in shown(capsys, "show", "mine.safetensors").splitlines()]
    assert ["architecture", "schedule-free-lstm"] in rows
    assert ["note", "mine"] in rows


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"], ids=lambda text: text[:9])
@pytest.mark.parametrize("entry", ["settings", "provenance"])
def test_damaged_metadata_is_reported(entry: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_rule(load_rule("default"), "good.safetensors")
    with safe_open("good.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        save_file(tensors, "mine.safetensors", {**file.metadata(), entry: text})
    assert cli.main(["rules", "show", "mine.safetensors"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("learned-optim: error: mine.safetensors: ")
    assert "is damaged (" in line


def test_show_escapes_control_characters_of_the_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = "\x1b[2J\x1b[31mred\r\x07 \u202eleft and ümlaut"
    save_rule(load_rule("default"), tmp_path / "rule.safetensors", {"config": {"description": description}})
    text = shown(capsys, "show", str(tmp_path / "rule.safetensors"))
    assert r"\x1b[2J\x1b[31mred\r\x07 \u202eleft and ümlaut" in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_json_list_holds_the_cards(capsys: pytest.CaptureFixture[str]) -> None:
    cards = json.loads(shown(capsys, "list", "--json"))
    assert [card["rule"] for card in cards] == available_rules()
    assert cards[0] == json.loads(shown(capsys, "show", cards[0]["rule"], "--json"))


def test_card_shows_size_memory_and_origin(capsys: pytest.CaptureFixture[str]) -> None:
    card = json.loads(shown(capsys, "show", "default", "--json"))
    rule = load_rule("default")
    assert card["architecture"] == rule.name
    assert card["meta_parameters"] == sum(parameter.numel() for parameter in rule.parameters())
    assert card["state_bytes_a_parameter"] == 24  # as in docs/using.md
    assert card["origin"]["description"] == read_provenance("default")["config"]["description"]
    assert Path(card["card"]).read_text().startswith("# default")
    lines = shown(capsys, "show", "default").splitlines()
    assert ["state", "bytes", "a", "parameter", "24"] in [line.split() for line in lines]
    assert ["seed", str(read_provenance("default")["config"]["seed"])] in [line.split() for line in lines]
    assert any(line.startswith("settings ") and "hidden_size=" in line for line in lines)


def test_card_of_a_file_without_provenance_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    save_rule(ScaleFreeLSTM(2), "mine.safetensors")
    card = json.loads(shown(capsys, "show", "mine.safetensors", "--json"))
    assert card["settings"]["hidden_size"] == 2
    assert card["origin"] == {"description": "its file does not say how it came about"}
    assert "card" not in card


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_picture_of_every_architecture_is_drawn(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_rule(ARCHITECTURES[architecture](hidden_size=2), "mine.safetensors")
    text = shown(capsys, "show", "mine.safetensors", "--plot", "pictures/rule.png", "--steps", "20", "--scale", "3")
    assert text.splitlines()[-1] == "written: pictures/rule.png"
    assert number_of_colours("pictures/rule.png") > 1000  # the maps are there
    assert [path.name for path in Path("pictures").iterdir()] == ["rule.png"]


def test_export_writes_a_copy_with_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "export", "default", "copies/mine.safetensors") == "written: copies/mine.safetensors\n"
    copy, original = (load_rule(source).state_dict() for source in ("copies/mine.safetensors", "default"))
    assert all(torch.equal(copy[name], original[name]) for name in original)
    assert read_provenance("copies/mine.safetensors") == read_provenance("default")


def test_export_replaces_a_file_only_with_force(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.safetensors").write_text("dear")
    assert cli.main(["rules", "export", "default", "mine.safetensors"]) == 1
    assert capsys.readouterr().err == ("learned-optim: error: mine.safetensors is there already; --force replaces it\n")
    assert Path("mine.safetensors").read_text() == "dear"
    shown(capsys, "export", "default", "mine.safetensors", "--force")
    assert load_rule("mine.safetensors").name == load_rule("default").name
