"""Few-shot tasks: what episodes hold, where images come from, and what is refused."""

import dataclasses
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.small_few_shot import write_omniglot
from learned_optim.meta_train.data.datasets import DataNotFoundError
from learned_optim.meta_train.few_shot import mini_imagenet
from learned_optim.meta_train.few_shot import omniglot as omniglot_module
from learned_optim.meta_train.few_shot.images import ImageClasses
from learned_optim.meta_train.few_shot.learner import Learner
from learned_optim.meta_train.few_shot.mini_imagenet import MiniImageNet
from learned_optim.meta_train.few_shot.omniglot import Omniglot
from learned_optim.meta_train.few_shot.sinusoid import Sinusoid
from learned_optim.meta_train.tasks import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestSinusoid:
    def test_points_lie_on_one_wave_of_the_papers_ranges(self) -> None:
        drawn = Sinusoid(shots=30, queries=50).episodes(200, generator())
        x, y = (torch.cat(pair, 1)[..., 0].double() for pair in zip(drawn.support, drawn.query, strict=True))
        assert (x.abs() <= 5).all()
        assert x.abs().max() > 4.9
        # y = p sin x + q cos x: two unknowns for each task, 80 points
        basis = torch.stack([x.sin(), x.cos()], -1)
        solution = torch.linalg.lstsq(basis, y[..., None]).solution[..., 0]
        torch.testing.assert_close((basis @ solution[..., None])[..., 0], y, rtol=1e-4, atol=1e-5)
        amplitude = solution.norm(dim=1)
        phase = torch.atan2(-solution[:, 1], solution[:, 0])
        assert 0.1 <= amplitude.min() < 0.4
        assert 4.7 < amplitude.max() <= 5
        assert -1e-4 <= phase.min() < 0.2
        assert math.pi - 0.2 < phase.max() <= math.pi + 1e-4

    def test_sizes_are_checked(self) -> None:
        with pytest.raises(ValueError, match="shots, queries and hidden"):
            Sinusoid(shots=0)
        with pytest.raises(ValueError, match="one layer or more"):
            Sinusoid(hidden=())

    def test_evaluation_sets_its_own_number_of_queries(self) -> None:
        drawn = Sinusoid(shots=3, queries=4).episodes(2, generator(), "test", 7)
        assert drawn.support[0].shape == (2, 3, 1)
        assert drawn.query[1].shape == (2, 7, 1)


class TestImageClasses:
    """Five classes of unequal size; an image has the number of its class and its own as pixels, and one corner lit."""

    counts = (4, 6, 3, 9, 5)

    @pytest.fixture
    def classes(self) -> ImageClasses:
        images = torch.zeros(sum(self.counts), 2, 3, 3, dtype=torch.uint8)
        owner = torch.repeat_interleave(torch.arange(5), torch.tensor(self.counts))
        images[:, 0] = owner[:, None, None] + 1
        images[:, 1] = torch.arange(len(owner), dtype=torch.uint8)[:, None, None] + 1
        images[:, :, 0, 0] += 100
        sizes = torch.tensor(self.counts)
        return ImageClasses(images, sizes.cumsum(0) - sizes, sizes)

    @pytest.mark.parametrize("rotations", [1, 4])
    def test_drawn_images_match_their_classes_and_rotations_without_repeats(
        self, rotations: int, classes: ImageClasses
    ) -> None:
        images, chosen = classes.draw(4, 3, rotations, 50, generator())
        assert images.shape == (50, 4, 3, 2, 3, 3)
        pixels = (images * 255).round().long()
        assert torch.equal(pixels[..., 0, 1, 1], (chosen % 5 + 1)[..., None].expand(-1, -1, 3))
        for task in range(50):
            assert len(chosen[task].unique()) == 4
            for way in range(4):
                assert len(pixels[task, way, :, 1, 1, 1].unique()) == 3
        corners = torch.stack([pixels[..., 0, y, x] for y, x in ((0, 0), (2, 0), (2, 2), (0, 2))], -1)
        lit = (corners > 100).long().argmax(-1)  # counted as rot90 turns
        assert torch.equal(lit, (chosen // 5)[..., None].expand(-1, -1, 3))
        assert len(chosen.unique()) == 5 * rotations

    def test_class_with_just_enough_images_gives_all_of_them(self, classes: ImageClasses) -> None:
        images, chosen = classes.draw(5, 3, 1, 20, generator())
        smallest = (images * 255).round().long()[..., 1, 1, 1][chosen == 2]
        assert {tuple(sorted(row.tolist())) for row in smallest} == {(11, 12, 13)}


@pytest.fixture
def small_omniglot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_omniglot(tmp_path)
    monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path))
    omniglot_module.omniglot.cache_clear()
    yield tmp_path
    omniglot_module.omniglot.cache_clear()


class TestOmniglot:
    def test_splits_share_no_character(self, small_omniglot: Path) -> None:
        task = Omniglot(ways=2)
        splits = {split: task.classes(split) for split in SPLITS}
        assert [len(classes.first) for classes in splits.values()] == [28, 2, 10]
        means = [classes.images.double().view(len(classes.first), -1).mean(1) for classes in splits.values()]
        assert len(torch.cat(means).unique()) == 40

    def test_ink_is_bright_and_paper_dark(self, small_omniglot: Path) -> None:
        images = Omniglot(ways=2).classes("test").images
        assert images.shape == (200, 1, 28, 28)
        share = images.double().mean() / 255
        assert 0.2 < share < 0.4  # three tenths of the pattern is ink

    def test_episodes_have_documented_shapes_and_turn_training_characters_only(self, small_omniglot: Path) -> None:
        task = Omniglot(ways=5, shots=2, queries=3)
        drawn = task.episodes(4, generator())
        assert drawn.support[0].shape == (4, 10, 1, 28, 28)
        assert drawn.query[0].shape == (4, 15, 1, 28, 28)
        assert drawn.support[1].tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 4
        assert drawn.classes is not None
        assert int(drawn.classes.max()) >= 28  # a turned character
        test = task.episodes(50, generator(), "test", 1)
        assert test.classes is not None
        assert int(test.classes.max()) < 10  # none is turned
        # A query is nearest to the support of its own class: the noise is small.
        support, query = (part[0].flatten(2) for part in (test.support, test.query))
        nearest = test.support[1].gather(1, torch.cdist(query, support).argmin(2))
        assert float((nearest == test.query[1]).double().mean()) > 0.95

    def test_same_seed_gives_the_same_episodes(self, small_omniglot: Path) -> None:
        first, second, other = (Omniglot().episodes(2, generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(first.support[0], second.support[0])
        assert not torch.equal(first.support[0], other.support[0])

    @pytest.mark.parametrize(("network", "size"), [("mlp", 246_597 + 2 * 512), ("conv", 111_936 + 325)])
    def test_networks_are_those_of_the_paper(self, network: str, size: int) -> None:
        """Without reading any image: 784-256-128-64-64-5 and batch norm; four convolutions of 64 filters."""
        task = Omniglot(network=network)  # type: ignore[arg-type]
        learner = Learner(task, 0)
        assert learner.coordinates == size
        assert learner.predict(learner.fresh_parameters, torch.rand(2, 3, 1, 28, 28)).shape == (2, 3, 5)

    def test_missing_archives_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(DataNotFoundError, match=r"images_background\.zip and images_evaluation\.zip"):
            Omniglot().classes("train")

    def test_damaged_archives_are_named(self, small_omniglot: Path) -> None:
        path = small_omniglot / "omniglot" / "images_evaluation.zip"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ValueError, match=r"images_evaluation\.zip is no zip archive, or damaged"):
            Omniglot().classes("train")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images_evaluation/A/character01/1_01.png", b"")
        with pytest.raises(ValueError, match="every character must have 20 drawings"):
            Omniglot().classes("train")

    def test_too_many_drawings_are_refused(self) -> None:
        with pytest.raises(ValueError, match="a class has 20 images; shots and queries ask for 21"):
            Omniglot(shots=15, queries=6)


def write_pictures(folder: Path, classes: dict[str, int], pictures: int) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in classes.items():
        for number in range(count):
            place = folder / split / f"n{number:02}"
            place.mkdir(parents=True)
            for picture in range(pictures):
                colours = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(colours).save(place / f"{picture}.{'jpg' if picture % 2 else 'png'}")


class TestMiniImageNet:
    @pytest.fixture
    def task(self, tmp_path: Path) -> Iterator[MiniImageNet]:
        write_pictures(tmp_path, {"train": 4, "val": 3, "test": 3}, 4)
        yield MiniImageNet(str(tmp_path), ways=3, shots=1, queries=2, size=32, filters=4, evaluation_queries=3)
        mini_imagenet.read_pictures.cache_clear()

    def test_episodes_of_a_users_own_folder(self, task: MiniImageNet) -> None:
        assert task.training_classes == 4
        for split in SPLITS:
            drawn = task.episodes(2, generator(), split)
            assert drawn.support[0].shape == (2, 3, 3, 32, 32)
            assert drawn.query[0].shape == (2, 6, 3, 32, 32)
        learner = Learner(task, 0)
        assert learner.predict(learner.fresh_parameters, drawn.query[0]).shape == (2, 6, 3)

    def test_network_is_the_papers(self) -> None:
        """Four convolutions of 32 filters: 896 + 3 * 9,248 weights, 256 of batch norm; the last layer 800 * 5 + 5."""
        assert Learner(MiniImageNet(), 0).coordinates == 896 + 3 * 9_248 + 256 + 4_005

    def test_too_few_classes_or_pictures_are_refused(self, task: MiniImageNet) -> None:
        with pytest.raises(ValueError, match=r"4 ways of 4 pictures need more than the 3 test classes with 4 pictures"):
            dataclasses.replace(task, ways=4).episodes(1, generator(), "test")
        with pytest.raises(ValueError, match=r"3 ways of 6 pictures need more than the 4 train classes"):
            dataclasses.replace(task, queries=5).episodes(1, generator())

    def test_missing_folder_says_what_it_must_hold(self, tmp_path: Path) -> None:
        with pytest.raises(DataNotFoundError, match=r"task\.folder names a folder that holds train, val, test"):
            MiniImageNet(str(tmp_path / "nowhere")).classes("validation")

    def test_unreadable_picture_is_named(self, task: MiniImageNet) -> None:
        assert task.folder is not None
        (Path(task.folder) / "train" / "n00" / "5.png").write_text("no picture")
        with pytest.raises(ValueError, match=r"5\.png cannot be read"):
            task.classes("train")
