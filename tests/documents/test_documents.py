"""The code in these pages of docs/ runs as it stands, and their links lead somewhere."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.paths import ROOT
from learned_optim import cli
from learned_optim.meta_train.config.load import TaskConfig, config_from_tables
from learned_optim.meta_train.few_shot import FewShotModel
from learned_optim.meta_train.few_shot.options import ALGORITHMS, MAMLOptions
from learned_optim.meta_train.few_shot.settings import FEW_SHOT_TASKS, few_shot_config
from learned_optim.meta_train.style_transfer.style import FEATURE_NETWORKS, FeatureNetwork
from learned_optim.meta_train.tasks import FAMILIES
from learned_optim.meta_train.tasks.neural_art import CONTENT, TEST_STYLES

FOLDER = ROOT / "docs"
META_TRAINING, CONFIGURATION, NEURAL_ART, FEW_SHOT = (
    (FOLDER / name).read_text() for name in ("meta-training.md", "configuration.md", "neural-art.md", "few-shot.md")
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_page_on_your_own_task_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = blocks(META_TRAINING, "python")
    (configuration,) = blocks(META_TRAINING, "toml")
    (tmp_path / "waveforms.py").write_text(module)
    (tmp_path / "waveforms.toml").write_text(configuration)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    short = ["--set", "steps=3", "--set", "validation.horizon=5", "--set", "unroll.stagger=false"]
    assert cli.main(["meta-train", "waveforms.toml", *short, "--set", "unroll.instances=2"]) == 0
    (comparison,) = re.findall(r"^learned-optim (benchmark --model .*) --steps 500$", META_TRAINING, flags=re.MULTILINE)
    short = ["--steps", "10", "--seeds", "2", "--baselines", "Adam@0.01", "--cache", "cache", "--out", "results"]
    assert cli.main([*comparison.split(), *short]) == 0
    assert ",best," in (tmp_path / "results" / "summary.csv").read_text()  # a row of the rule's own
    sys.modules.pop("waveforms")


def test_augmented_entry_is_a_valid_configuration() -> None:
    (task,) = config_from_tables({"steps": 1, **_toml(blocks(CONFIGURATION, "toml")[0])}).tasks
    assert task.augment.batch_size == (1, 32)


def _toml(text: str) -> dict[str, object]:
    import tomllib

    return tomllib.loads(text)


def test_table_of_families_is_complete() -> None:
    pattern = r"^\| `([\w-]+)` \|.*\| \[`(\w+)`\]\(\.\./meta_train/tasks/(\w+)\.py\) \|$"
    rows = re.findall(pattern, CONFIGURATION, re.MULTILINE)
    listed = {name: (cls, module) for name, cls, module in rows}
    assert listed == {name: (cls.__name__, cls.__module__.rpartition(".")[2]) for name, cls in FAMILIES.items()}


def test_shown_networks_and_held_out_styles_are_those_of_the_code() -> None:
    assert all(f"`features/{network.file}` | `{name}`" in NEURAL_ART for name, network in FEATURE_NETWORKS.items())
    assert f"as new styles {' and '.join(TEST_STYLES)} |" in NEURAL_ART
    assert all(name in NEURAL_ART for name in CONTENT["validation"])
    with pytest.raises(ValueError, match="not for meta-training"):
        TaskConfig("neural-art", options={"styles": list(TEST_STYLES)}).build()


def test_conversion_of_torchvisions_weights_gives_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names and shapes, as torchvision.models.squeezenet1_1 has them, with random values."""
    widths = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128)}
    widths |= {9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256)}
    shapes = {"features.0": (64, 3, 3, 3), "classifier.1": (1000, 512, 1, 1)}
    for index, (inputs, squeeze, expand) in widths.items():
        shapes[f"features.{index}.squeeze"] = (squeeze, inputs, 1, 1)
        shapes[f"features.{index}.expand1x1"] = (expand, squeeze, 1, 1)
        shapes[f"features.{index}.expand3x3"] = (expand, squeeze, 3, 3)
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    monkeypatch.chdir(tmp_path)
    torch.save(state, "squeezenet1_1-b8a52dc0.pth")
    (code,) = blocks(NEURAL_ART, "python")
    exec(compile(code, "docs/neural-art.md", "exec"), {})
    assert len(np.load("squeezenet1_1.npz").files) == 2 + 8 * 6
    (tmp_path / "neural_art" / "features").mkdir(parents=True)
    Path("squeezenet1_1.npz").rename(tmp_path / "neural_art" / "features" / "squeezenet1_1.npz")
    assert FeatureNetwork("squeezenet", tmp_path).activations(torch.rand(3, 32, 32))["fire5"].shape[0] == 256


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_links_and_anchors_exist(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), target
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{target.name}#{anchor}"


def links(page: Path) -> list[tuple[Path, str]]:
    """Files that a page links to, and the headings there."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", text)
    return [((page.parent / target).resolve() if target else page, anchor) for target, anchor in found]


def anchors(page: Path) -> set[str]:
    """What a code host makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_few_shot_page_names_all_algorithms_and_tasks() -> None:
    first_cells = " ".join(re.findall(r"^\| (.*?) \|", FEW_SHOT, flags=re.MULTILINE))
    shown = set(re.findall(r"`([a-z-]+)`", first_cells))
    assert shown == {*ALGORITHMS, *FEW_SHOT_TASKS}
    (configuration,) = blocks(FEW_SHOT, "toml")
    config = few_shot_config(_toml(configuration))
    assert isinstance(config.algorithm, MAMLOptions)
    assert config.algorithm.train_rule


def test_few_shot_page_adapts_a_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, task in {"maml": {"family": "omniglot", "network": "mlp"}, "sine": {"family": "sinusoid"}}.items():
        model = FewShotModel.of(few_shot_config({"task": task, "steps": 1, "algorithm": {"name": "maml"}}))
        model.save(tmp_path / "runs" / folder / "best.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.rand(5, 1, 28, 28), "labels": torch.arange(5), "more_images": torch.rand(3, 1, 28, 28)}
    for code in blocks(FEW_SHOT, "python"):
        exec(compile(code, "docs/few-shot.md", "exec"), names)
    assert names["logits"].shape == (3, 5)


def test_places_named_by_the_contributing_page_exist() -> None:
    _, _, rest = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where to find it\n")
    section, _, _ = rest.partition("\n## ")
    places = re.findall(r"`([\w./]+/[\w./]*)(?:::(\w+))?`", section)
    assert sum(bool(name) for _, name in places) > 5
    for path, name in places:
        assert (ROOT / path).exists(), path
        assert not name or f"def {name}(" in (ROOT / path).read_text(), f"no {name} in {path}"
