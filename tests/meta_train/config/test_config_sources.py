"""Sources of a configuration: TOML files, overrides, families and rules of a user, weights to start from."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import user_tasks
from helpers.small_configs import SMALLEST, refusal, write
from learned_optim import save_rule
from learned_optim.meta_train.common.strict import ConfigError
from learned_optim.meta_train.config.load import config_from_tables, load_config, shipped_configs
from learned_optim.rules import ARCHITECTURES, LSTML2L, ScaleFreeLSTM


class TestUserFamily:
    def test_user_family_is_imported_by_module_and_class(self, tmp_path: Path) -> None:
        text = 'steps = 1\n[[tasks]]\nfamily = "helpers.user_tasks:DropoutFamily"\nprobability = 0.25'
        config = load_config(write(tmp_path, text))
        assert config.tasks[0].build() == user_tasks.DropoutFamily(probability=0.25)
        assert config_from_tables(json.loads(config.to_json())) == config

    @pytest.mark.parametrize(
        ("family", "message"),
        [
            ("helpers.user_tasks:Absent", "cannot import 'helpers.user_tasks:Absent'"),
            ("no_such_module:Family", "cannot import 'no_such_module:Family'"),
            ("helpers.user_tasks:NotAFamily", "is not a sub-class of TaskFamily"),
            ("helpers.user_tasks:ROWS", "is not a sub-class of TaskFamily"),
            ("helpers.user_tasks:", "cannot import"),
            (":DropoutFamily", "cannot import"),
        ],
    )
    def test_unusable_user_family_is_refused(self, family: str, message: str, tmp_path: Path) -> None:
        assert message in refusal(f'steps = 1\n[[tasks]]\nfamily = "{family}"', tmp_path)

    def test_user_family_options_are_checked(self, tmp_path: Path) -> None:
        text = 'steps = 1\n[[tasks]]\nfamily = "helpers.user_tasks:DropoutFamily"\n'
        assert "unknown key 'probabilty' (did you mean 'probability'?)" in refusal(text + "probabilty = 1", tmp_path)
        assert "probability: Input should be a valid number" in refusal(text + "probability = 'high'", tmp_path)


class TestOverride:
    @pytest.mark.parametrize(
        ("override", "path", "value"),
        [
            ("steps=5", ("steps",), 5),
            ("meta_optimizer.lr=1e-2", ("meta_optimizer", "lr"), 0.01),
            ("unroll.horizon=[5, 9]", ("unroll", "horizon"), (5, 9)),
            ("estimator.meta_loss=log", ("estimator", "meta_loss"), "log"),
            ("description=two words = 2", ("description",), "two words = 2"),
            ('description="5"', ("description",), "5"),
            ("estimator.second_derivatives=true", ("estimator", "second_derivatives"), True),
            ("rule.settings.hidden_size=9", ("rule", "settings"), {"hidden_size": 9}),
            ("tasks[0].weight=4", ("tasks", 0, "weight"), 4.0),
            ("tasks[1].dimensions=[3, 4]", ("tasks", 1, "options"), {"dimensions": [3, 4]}),
            ("tasks.1.weight=3", ("tasks", 1, "weight"), 3.0),
        ],
    )
    def test_override_changes_one_value(
        self, override: str, path: Sequence[str | int], value: object, tmp_path: Path
    ) -> None:
        text = SMALLEST + '[[tasks]]\nfamily = "quadratic"\n'
        found: Any = load_config(write(tmp_path, text), [override])
        for part in path:
            found = found[part] if isinstance(part, int) else getattr(found, part)
        assert found == value

    def test_last_override_wins(self, tmp_path: Path) -> None:
        assert load_config(write(tmp_path, SMALLEST), ["steps=5", "steps=6"]).steps == 6

    def test_override_leaves_the_file_unchanged(self, tmp_path: Path) -> None:
        path = write(tmp_path, SMALLEST)
        load_config(path, ["steps=5"])
        assert path.read_text() == SMALLEST

    @pytest.mark.parametrize("override", ["steps", "=3", "", ".=3", "[]=3"])
    def test_override_without_assignment_is_refused(self, override: str, tmp_path: Path) -> None:
        assert "expected key=value" in refusal(SMALLEST, tmp_path, [override])

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("steps.x=3", "'steps' is not a table"),
            ("tasks[1].weight=3", "no entry '1'; there are 1, counted from 0"),
            ("tasks[first].weight=3", "no entry 'first'"),
            ("tasks[0]=3", "name a key of an entry"),
            ("stepz=3", "unknown key 'stepz' (did you mean 'steps'?)"),
            ("unroll.pol=3", "unknown key 'unroll.pol' (did you mean 'pool'?)"),
        ],
    )
    def test_override_of_an_unknown_key_is_refused(self, override: str, message: str, tmp_path: Path) -> None:
        assert message in refusal(SMALLEST, tmp_path, [override])


class TestFile:
    def test_missing_file_error_lists_the_shipped(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no configuration file .*absent\.toml; shipped ones: ") as caught:
            load_config(tmp_path / "absent.toml")
        assert all(name in str(caught.value) for name in shipped_configs())

    @pytest.mark.parametrize("content", [b"steps = ", b"\xff\xfe", b"[[tasks]\n"])
    def test_invalid_toml_is_refused(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"mine\.toml: not valid TOML"):
            load_config(tmp_path / "mine.toml")

    def test_file_is_read_as_utf8(self, tmp_path: Path) -> None:
        assert load_config(write(tmp_path, 'description = "größer"\n' + SMALLEST)).description == "größer"


class TestStartFrom:
    def test_start_from_loads_the_weights(self, tmp_path: Path) -> None:
        rule = LSTML2L(3)
        rule.reset_parameters(seed=5)
        save_rule(rule, tmp_path / "start.safetensors")
        tables = tomllib.loads(SMALLEST) | {
            "rule": {
                "architecture": "lstm-l2l",
                "settings": {"hidden_size": 3},
                "start_from": str(tmp_path / "start.safetensors"),
            }
        }
        config = config_from_tables(tables)
        for seed in (0, 1):
            built = config.rule.build(seed)
            assert all(torch.equal(tensor, rule.state_dict()[name]) for name, tensor in built.state_dict().items())
            assert all(parameter.requires_grad for parameter in built.parameters())

    def test_weights_without_start_from_follow_from_the_seed(self, tmp_path: Path) -> None:
        config = load_config(write(tmp_path, SMALLEST))
        first, again, other = (config.rule.build(seed).state_dict()["cell.weight"] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_missing_or_mismatched_start_from_is_refused(self, tmp_path: Path) -> None:
        save_rule(LSTML2L(3), tmp_path / "start.safetensors")
        overrides = [f"rule.start_from={tmp_path / 'start.safetensors'}"]
        assert "rule.start_from: " in refusal(SMALLEST, tmp_path, overrides)
        assert "rule.start_from: no rule file" in refusal(SMALLEST, tmp_path, ["rule.start_from=a/b.safetensors"])
        assert "rule.start_from: unknown rule 'nobody'" in refusal(SMALLEST, tmp_path, ["rule.start_from=nobody"])


def test_architecture_registered_by_a_user_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/own-rule.md: the file of one's own tasks may import one's own rule."""
    monkeypatch.setitem(ARCHITECTURES, "mine", ScaleFreeLSTM)  # so that it is taken out after the test
    del ARCHITECTURES["mine"]
    (tmp_path / "mine.py").write_text(
        "from learned_optim.meta_train.tasks import QuadraticFamily\n"
        "from learned_optim.rules import ARCHITECTURES, ScaleFreeLSTM\n"
        "ARCHITECTURES['mine'] = type('Mine', (ScaleFreeLSTM,), {'name': 'mine'})\n"
        "class MyFamily(QuadraticFamily):\n    pass\n"
    )
    config = config_from_tables(
        {"steps": 1, "rule": {"architecture": "mine"}, "tasks": [{"family": f"{tmp_path / 'mine.py'}:MyFamily"}]}
    )
    assert config.rule.build(0).name == "mine"
