"""What the shipped weights were meta-trained and selected on, by the configuration that each file carries."""

import json

import pytest

from learned_optim.checkpoint import WEIGHTS_FOLDER, available_rules, read_provenance
from learned_optim.meta_train.config.load import Config, config_from_tables, load_config, shipped_configs
from learned_optim.meta_train.tasks.neural_art import CONTENT, TEST_STYLES


def of_weights(name: str) -> Config:
    return config_from_tables(read_provenance(name)["config"], name, resuming=True)


def refuse_what_is_for_evaluation(config: Config) -> None:
    for family in config.families:
        assert not family.build().evaluation_only, family
    text = config.to_json()  # in case that a family does not say so
    assert not any(name in text for name in ("fashion", *TEST_STYLES))


@pytest.mark.parametrize("name", available_rules())
class TestWeights:
    def test_shipped_weights_used_no_evaluation_data(self, name: str) -> None:
        refuse_what_is_for_evaluation(of_weights(name))

    def test_physics_is_unseen_by_all_but_the_rule_for_it(self, name: str) -> None:
        assert ("physics" in of_weights(name).to_json()) == (name == "specialised-physics")

    def test_shipped_weights_match_a_shipped_configuration(self, name: str) -> None:
        carried = of_weights(name)
        shipped = [load_config(config, resuming=True) for config in shipped_configs() if config.startswith(name)]
        assert (carried.tasks, carried.rule.architecture) in [
            (config.tasks, config.rule.architecture) for config in shipped
        ]

    def test_shipped_weights_have_a_card_with_configuration_cost_and_choice(self, name: str) -> None:
        card = (WEIGHTS_FOLDER / f"{name}.md").read_text(encoding="utf-8")
        assert card.startswith(f"# {name}\n")
        assert f"meta_train/configs/{name}.toml" in card
        assert all(f"| {entry} |" in card for entry in ("cost", "chosen", "tasks"))


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_use_no_evaluation_data(name: str) -> None:
    refuse_what_is_for_evaluation(load_config(name, resuming=True))


def test_check_finds_evaluation_data() -> None:
    config = json.loads(load_config("demo").to_json())
    config["tasks"][0] |= {"family": "mlp", "options": {"dataset": "fashion-mnist"}}
    with pytest.raises(ValueError, match="fashion-mnist"):
        refuse_what_is_for_evaluation(config_from_tables(config))


def test_splits_share_no_photograph() -> None:
    photographs = [name for names in CONTENT.values() for name in names]
    assert len(set(photographs)) == len(photographs)
