"""Neural style transfer: features, losses, pictures in and out, and the command."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from learned_optim import cli
from learned_optim.meta_train.style_transfer import style as neural_art
from learned_optim.meta_train.style_transfer.command import descend, make_optimizer
from learned_optim.meta_train.style_transfer.style import (
    FEATURE_NETWORKS,
    ArtLoss,
    FeatureNetwork,
    Targets,
    load_picture,
    save_picture,
)

pytestmark = pytest.mark.usefixtures("neural_art")


def random_picture(seed: int = 0, height: int = 36, width: int = 44) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


class TestFeatures:
    def test_preprocessing_matches_each_network(self) -> None:
        picture = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1).expand(3, 32, 32)
        red, green, blue = 0.2, 0.5, 0.9
        expected = {
            "vgg19": [255 * blue - 103.939, 255 * green - 116.779, 255 * red - 123.68],
            "vgg19-distilled": [red, green, blue],
            "squeezenet": [(red - 0.485) / 0.229, (green - 0.456) / 0.224, (blue - 0.406) / 0.225],
        }
        for name, values in expected.items():
            network = FeatureNetwork(name)
            first = network.architecture.layers[0]
            middle = network.activations(picture)[first][:, 8, 8]  # away from the padding
            weight, bias = network._weights[f"{first}.weight"], network._weights[f"{first}.bias"]
            by_hand = weight.sum((2, 3)) @ torch.tensor(values) + bias
            torch.testing.assert_close(middle, by_hand if first == "conv0" else by_hand.relu(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            ("vgg19", {"conv1_1": (36, 44), "conv2_1": (18, 22), "conv3_4": (9, 11)}),
            ("vgg19-distilled", {"conv0": (36, 44), "conv3_2": (9, 11), "conv4_1": (4, 5)}),
            ("squeezenet", {"conv1": (17, 21), "fire2": (8, 10), "fire5": (4, 5)}),  # no padding; pools round up
        ],
    )
    def test_feature_maps_have_the_sizes_of_the_network(self, name: str, sizes: dict[str, tuple[int, int]]) -> None:
        found = FeatureNetwork(name).activations(random_picture())
        assert {layer: tuple(found[layer].shape[1:]) for layer in sizes} == sizes

    @pytest.mark.parametrize("name", FEATURE_NETWORKS)
    def test_network_stops_at_the_last_layer_of_the_loss(self, name: str) -> None:
        network = FeatureNetwork(name)
        wanted = {network.architecture.content, *network.architecture.style}
        found = list(network.activations(random_picture()))
        assert found[-1] in wanted
        assert wanted <= set(found)

    def test_unknown_network_error_lists_the_known(self) -> None:
        with pytest.raises(ValueError, match="unknown feature network 'alexnet'; known: vgg19, vgg19-distilled"):
            FeatureNetwork("alexnet")

    @pytest.mark.parametrize("content", [b"not an archive", b""], ids=["text", "empty"])
    def test_damaged_file_is_named(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "neural_art" / "features" / FEATURE_NETWORKS["vgg19"].file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} is damaged or no archive of features"):
            FeatureNetwork("vgg19", tmp_path)


class TestLoss:
    def test_gram_matrix_is_the_mean_product_of_channels(self) -> None:
        features = random_picture(height=5, width=4)
        expected = np.einsum("chw,dhw->cd", features.double().numpy(), features.double().numpy()) / 20
        torch.testing.assert_close(neural_art.gram(features), torch.from_numpy(expected).float())

    def test_total_variation_is_that_of_neighbours(self) -> None:
        picture = torch.tensor([[0.0, 1.0], [3.0, 3.0], [3.0, 3.0]]).expand(3, 3, 2)
        down, across = np.mean([9, 4, 0, 0]), np.mean([1, 0, 0])
        assert float(neural_art.total_variation(picture)) == pytest.approx(down + across)

    @pytest.mark.parametrize("name", FEATURE_NETWORKS)
    def test_losses_vanish_at_their_targets_and_are_one_for_zero_features(self, name: str) -> None:
        network = FeatureNetwork(name)
        content, style = random_picture(1), random_picture(2, 40, 60)
        targets = network.targets(content, style)
        only_content, only_style = ArtLoss(1.0, 0.0, 0.0), ArtLoss(0.0, 1.0, 0.0)
        assert float(network.loss(content, targets, only_content)) == 0
        assert float(network.loss(style, targets._replace(content=torch.ones(1)), only_style)) < 1e-10
        assert float(network.loss(content, targets, only_style)) > 1e-4
        nothing = Targets(torch.zeros_like(targets.content), targets.grams)
        assert float(neural_art.relative_error(nothing.content, targets.content)) == 1

    def test_loss_weights_multiply_their_parts(self) -> None:
        network = FeatureNetwork("vgg19-distilled")
        targets = network.targets(random_picture(1), random_picture(2))
        picture = random_picture(3)
        parts = [float(network.loss(picture, targets, ArtLoss(*row))) for row in np.eye(3)]
        assert min(parts) > 0
        whole = float(network.loss(picture, targets, ArtLoss(2.0, 3.0, 5.0)))
        assert whole == pytest.approx(float(np.dot([2, 3, 5], parts)), rel=1e-5)
        assert parts[2] == pytest.approx(float(neural_art.total_variation(picture)))

    def test_coordinates_and_pixels_are_inverse(self) -> None:
        torch.testing.assert_close(neural_art.to_picture(neural_art.to_coordinates(random_picture())), random_picture())
        assert float(neural_art.to_picture(torch.tensor(1.0))) == 0.75


class TestPictures:
    def test_saved_picture_loads_again(self, tmp_path: Path) -> None:
        picture = random_picture(height=33, width=47)
        save_picture(picture, tmp_path / "new" / "picture.png")
        torch.testing.assert_close(
            load_picture(tmp_path / "new" / "picture.png"), picture, rtol=0, atol=0.5 / 255 + 1e-6
        )
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["picture.png"]

    def test_values_out_of_range_are_clipped(self, tmp_path: Path) -> None:
        picture = torch.full((3, 32, 32), -3.0)
        picture[:, 16:] = 7.0
        save_picture(picture, tmp_path / "picture.png")
        assert load_picture(tmp_path / "picture.png").unique().tolist() == [0.0, 1.0]

    @pytest.mark.parametrize(("size", "shape"), [(None, (3, 36, 44)), (32, (3, 32, 39)), (90, (3, 90, 110))])
    def test_shorter_side_has_the_size(self, size: int | None, shape: tuple[int, ...], tmp_path: Path) -> None:
        save_picture(random_picture(), tmp_path / "picture.jpg")
        assert load_picture(tmp_path / "picture.jpg", size).shape == shape

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "I;16"])
    def test_other_kinds_of_pictures_become_rgb(self, mode: str, tmp_path: Path) -> None:
        path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
        image = Image.new("L", (40, 32), 255)
        (Image.new(mode, (40, 32), 65535) if mode == "I;16" else image.convert(mode)).save(path)
        picture = load_picture(path)
        assert picture.shape == (3, 32, 40)
        assert float(picture.min()) == 1.0

    def test_exif_orientation_is_applied(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        Image.new("RGB", (60, 40)).save(tmp_path / "picture.jpg", exif=exif)
        assert load_picture(tmp_path / "picture.jpg").shape == (3, 60, 40)

    @pytest.mark.parametrize(
        ("write", "size", "message"),
        [
            (lambda path: None, None, r"no picture at .*picture\.png"),
            (lambda path: path.write_bytes(b"text"), None, r"picture\.png is not a picture that Pillow can read"),
            (lambda path: path.write_bytes(png()[:200]), None, "is not a picture that Pillow can read"),
            (lambda path: path.write_bytes(png()), 31, "size must be at least 32 pixels, got 31"),
            (lambda path: Image.new("RGB", (40, 31)).save(path), None, "has 40x31 pixels; at least 32"),
        ],
        ids=["missing", "text", "cut off", "size", "small"],
    )
    def test_unreadable_picture_is_named(
        self, write: Callable[[Path], object], size: int | None, message: str, tmp_path: Path
    ) -> None:
        write(tmp_path / "picture.png")
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_picture(tmp_path / "picture.png", size)

    def test_unknown_format_is_refused(self, tmp_path: Path) -> None:
        for name in ("picture", "picture.txt"):
            with pytest.raises(
                ValueError, match=f"cannot write a picture called .*{name}; use a name that ends in .png"
            ):
                save_picture(random_picture(), tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_missing_pillow_is_named_with_its_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(ImportError, match=r"pip install 'learned-optim\[art\]'"):
            load_picture(tmp_path / "picture.png")


def png() -> bytes:
    from io import BytesIO

    stream = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


class TestCommand:
    @pytest.fixture(autouse=True)
    def _pictures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        save_picture(random_picture(1), "content.png")
        save_picture(random_picture(2, 60, 50), "style.png")

    def paint(self, *options: str, capsys: pytest.CaptureFixture[str]) -> float:
        paths = ["--content", "content.png", "--style", "style.png", "--out", "art.png", "--size", "32"]
        assert cli.main(["neural-art", *paths, *options]) == 0
        (loss,) = re.findall(r"^written: art.png \(loss ([\d.e+-]+)\)$", capsys.readouterr().out)
        return float(loss)

    @pytest.mark.parametrize("optimizer", ["default", "lstm-l2l-mnist", "adam", "lbfgs"])
    def test_every_optimizer_lowers_the_loss_and_writes_a_picture(
        self, optimizer: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first = self.paint("--steps", "1", "--optimizer", "adam", "--lr", "1e-9", capsys=capsys)
        assert self.paint("--steps", "20", "--optimizer", optimizer, capsys=capsys) < 0.9 * first
        assert load_picture("art.png").shape == (3, 32, 39)

    def test_lbfgs_uses_its_line_search(self) -> None:
        """Rosenbrock's valley, to its floor: steps of length 1 alone get stuck half-way."""
        point = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        optimizer = make_optimizer("lbfgs", point, None)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (1 - point[0]) ** 2 + 100 * (point[1] - point[0] ** 2) ** 2
            loss.backward()
            return loss.detach()

        descend(optimizer, closure, 60)
        assert closure() < 1e-6

    def test_seed_determines_the_painting(self, capsys: pytest.CaptureFixture[str]) -> None:
        pictures = []
        for seed in ("0", "0", "1"):
            self.paint("--steps", "2", "--initial", "noise", "--seed", seed, "--network", "squeezenet", capsys=capsys)
            pictures.append(load_picture("art.png"))
        assert torch.equal(pictures[0], pictures[1])
        assert not torch.equal(pictures[0], pictures[2])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--content", "none.jpg"], "no picture at none.jpg"),
            (["--style", "text.png"], "text.png is not a picture that Pillow can read"),
            (["--out", "art.doc"], "cannot write a picture called art.doc"),
            (["--size", "10"], "size must be at least 32 pixels, got 10"),
            (["--steps", "0"], "--steps must be at least 1, got 0"),
            (["--lr", "0"], "--lr must be positive, got 0"),
            (["--style-weight", "-1"], "--style-weight must not be negative"),
            (["--optimizer", "nobody"], "unknown rule 'nobody'"),
            (["--network", "alexnet"], "unknown feature network 'alexnet'"),
            (["--device", "abacus"], "--device abacus"),
            (["--optimizer", "adam", "--lr", "1e30"], "the loss is nan after 3 steps; lower --lr"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_error_is_one_line_and_writes_nothing(
        self, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("text.png").write_text("text")
        usual = ["--content", "content.png", "--style", "style.png", "--out", "art.png", "--size", "32", "--steps", "3"]
        assert cli.main(["neural-art", *usual, *options]) == 1
        error = capsys.readouterr().err
        assert error.startswith("learned-optim: error: ")
        assert error.count("\n") == 1
        assert message in error
        assert not list(Path().glob("art*"))

    def test_missing_features_are_named_with_what_to_do(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("LEARNED_OPTIM_DATA", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        arguments = ["--content", "content.png", "--style", "style.png", "--out", "art.png"]
        assert cli.main(["neural-art", *arguments]) == 1
        error = capsys.readouterr().err
        assert f"{tmp_path}/neural_art/features/vgg19_conv1_1" in error
        assert "docs/neural-art.md says where its files come from" in error
