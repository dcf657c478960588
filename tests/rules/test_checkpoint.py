"""Rule files: saving and loading are bit-exact, writing is atomic, and every other file is refused."""

import json
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import learned_optim
from helpers.rules import RULES, VARIANTS, Build, each, randomised
from learned_optim import LearnedOptimizer, available_rules, load_rule, save_rule
from learned_optim.checkpoint import read_provenance
from learned_optim.rules import LSTML2L, ScaleFreeLSTM

PROVENANCE = {"seed": 3, "tasks": ["mnist", "quadratic"], "loss": 0.1, "nested": {"resumed": None}}


@pytest.fixture
def rule_file(tmp_path: Path) -> Path:
    path = tmp_path / "rule.safetensors"
    save_rule(randomised(ScaleFreeLSTM()).float(), path, PROVENANCE)
    return path


def rewrite(path: Path, metadata: dict[str, str | None], tensors: dict[str, Tensor] | None = None) -> None:
    """Replace entries of a rule file's metadata (None: leave out) and its tensors."""
    header = read_header(path)["__metadata__"] | metadata
    contents = load(path.read_bytes()) if tensors is None else tensors
    path.write_bytes(save(contents, {key: value for key, value in header.items() if value is not None}))


def read_header(path: Path) -> dict[str, dict[str, str]]:
    content = path.read_bytes()
    header: dict[str, dict[str, str]] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


@each(RULES | VARIANTS)
def test_saved_rule_loads_bit_exact(build: Build, tmp_path: Path) -> None:
    rule = randomised(build()).float()
    save_rule(rule, tmp_path / "rule.safetensors", PROVENANCE)
    loaded = load_rule(tmp_path / "rule.safetensors")
    assert type(loaded) is type(rule)
    assert loaded.settings == rule.settings
    assert loaded.state_dict().keys() == rule.state_dict().keys()
    for name, value in rule.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert read_provenance(str(tmp_path / "rule.safetensors")) == PROVENANCE


def test_saving_leaves_the_rule_unchanged(tmp_path: Path) -> None:
    rule = ScaleFreeLSTM()
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    save_rule(rule, tmp_path / "rule.safetensors")
    assert all(parameter.requires_grad for parameter in rule.parameters())
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
    assert read_provenance(tmp_path / "rule.safetensors") == {}


def test_loaded_rule_is_frozen_float32_on_the_cpu(tmp_path: Path) -> None:
    save_rule(randomised(ScaleFreeLSTM()), tmp_path / "rule.safetensors")  # float64
    for parameter in load_rule(tmp_path / "rule.safetensors").parameters():
        assert not parameter.requires_grad
        assert parameter.dtype == torch.float32
        assert parameter.device.type == "cpu"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "default",
    [
        pytest.param(lambda: torch.device("meta"), id="default-device"),
        pytest.param(lambda: default_dtype(torch.float64), id="default-dtype"),
    ],
)
def test_loaded_rule_is_independent_of_torchs_defaults(
    rule_file: Path, default: Callable[[], AbstractContextManager[object]]
) -> None:
    expected = load_rule(rule_file).state_dict()
    with default():
        loaded = load_rule(rule_file).state_dict()
    for name, value in expected.items():
        assert loaded[name].device.type == "cpu"
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value)


def test_file_holds_only_json_and_numbers(rule_file: Path) -> None:
    content = rule_file.read_bytes()
    header = read_header(rule_file)  # plain JSON
    assert all(isinstance(value, str) for value in header.pop("__metadata__").values())
    size = sum(4 * value.numel() for value in load(content).values())  # float32
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + size  # and nothing besides the numbers
    assert header.keys() == load(content).keys()


# Writing.


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk-full", "interrupt"])
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("exists", [True, False], ids=["over-a-file", "new-file"])
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, function: str, exists: bool
) -> None:
    path = tmp_path / "rule.safetensors"
    if exists:
        save_rule(ScaleFreeLSTM(), path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        save_rule(randomised(ScaleFreeLSTM()), path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_invalid_provenance_keeps_the_old_file(rule_file: Path) -> None:
    before = rule_file.read_bytes()
    with pytest.raises(TypeError, match="JSON"):
        save_rule(ScaleFreeLSTM(), rule_file, {"rule": object()})
    assert rule_file.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)], ids=["umask-022", "umask-027"])
def test_file_mode_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_rule(ScaleFreeLSTM(), tmp_path / "rule.safetensors")
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "rule.safetensors").stat().st_mode) == mode


def test_missing_folders_are_created(tmp_path: Path) -> None:
    save_rule(ScaleFreeLSTM(), tmp_path / "a" / "b" / "rule.safetensors")
    assert [entry.name for entry in (tmp_path / "a" / "b").iterdir()] == ["rule.safetensors"]


# Shipped rules.


def test_available_rules_lists_every_shipped_rule() -> None:
    weights = Path(learned_optim.__file__).parent / "weights"
    assert available_rules() == sorted(path.stem for path in weights.iterdir() if path.suffix == ".safetensors")
    assert "default" in available_rules()


@pytest.mark.parametrize("name", available_rules())
def test_shipped_rule_steps(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([parameter], name)
    parameter.grad = torch.tensor([1.0, -1e-3, 1e3])
    optimizer.step()
    assert parameter.isfinite().all()
    assert (parameter != 1).any()
    assert read_provenance(name), "shipped weights say how they came about"


def test_shipped_rule_takes_precedence_over_a_file_of_its_name(
    rule_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule_file.rename(rule_file.with_name("default"))
    monkeypatch.chdir(rule_file.parent)
    shipped, mine = load_rule("default"), load_rule(Path("default"))
    assert any(not torch.equal(one, other) for one, other in zip(shipped.parameters(), mine.parameters(), strict=True))


# Files and names that are no rule.


def test_misspelt_name_error_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"'lstm-l2l' is an architecture, not a rule .*: lstm-l2l-cifar, .*LSTML2L\(\)"
    ):
        load_rule("lstm-l2l")
    with pytest.raises(ValueError, match=r"unknown rule 'defualt'; known names: .*default"):
        load_rule("defualt")


@pytest.mark.parametrize("source", ["missing.safetensors", "folder/default", Path("default")], ids=repr)
def test_missing_path_raises_file_not_found(
    source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no rule file at"):
        load_rule(source)


@pytest.mark.parametrize("kept", [0, 4, 200, -1], ids=["empty", "in-length", "in-header", "one-byte-short"])
def test_truncated_file_is_refused(rule_file: Path, kept: int) -> None:
    rule_file.write_bytes(rule_file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"rule\.safetensors is not a whole \.safetensors file"):
        load_rule(rule_file)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["no-metadata", "pytorch"])
def test_foreign_safetensors_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(save({"weight": torch.ones(2)}, metadata))
    with pytest.raises(ValueError, match=r"model\.safetensors holds no learned-optim rule"):
        load_rule(tmp_path / "model.safetensors")


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt is not a whole \.safetensors file"):
        load_rule(tmp_path / "model.pt")


@pytest.mark.parametrize("version", ["2", "one", None], ids=["newer", "no-number", "none"])
def test_file_of_another_format_version_is_refused(rule_file: Path, version: str | None) -> None:
    rewrite(rule_file, {"version": version})
    with pytest.raises(ValueError, match=f"format version {version}"):
        load_rule(rule_file)


def test_unknown_architecture_error_lists_the_known(rule_file: Path) -> None:
    rewrite(rule_file, {"architecture": "transformer"})
    with pytest.raises(ValueError, match=r"unknown architecture 'transformer'; known: .*scale-free-lstm"):
        load_rule(rule_file)


@pytest.mark.parametrize(
    "settings",
    [None, "{", "[6]", '{"hidden_size": 7}', '{"hidden_size": 0}', '{"hidden_size": "6"}', '{"units": 6}'],
    ids=["none", "no-json", "no-keywords", "other-size", "impossible", "wrong-type", "unknown-keyword"],
)
def test_settings_that_do_not_fit_the_weights_are_refused(rule_file: Path, settings: str | None) -> None:
    rewrite(rule_file, {"settings": settings})
    with pytest.raises(ValueError, match="weights do not fit the architecture 'scale-free-lstm'"):
        load_rule(rule_file)


def cut_short(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"output_weight": tensors["output_weight"][:, :-1].contiguous()}


def without_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name != "output_bias"}


def with_another(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"another": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(cut_short, "output_weight", id="wrong-shape"),
        pytest.param(without_bias, "output_bias", id="missing"),
        pytest.param(with_another, "another", id="too-many"),
    ],
)
def test_weights_that_do_not_fit_the_architecture_are_refused(
    rule_file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], named: str
) -> None:
    rewrite(rule_file, {}, change(load(rule_file.read_bytes())))
    with pytest.raises(ValueError, match=rf"weights do not fit the architecture[\s\S]*{named}"):
        load_rule(rule_file)


# Files that are made to do harm.


def with_header(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Change the header, and nothing else."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail on allocations of more than 256 MB."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of the process, by /proc")


@linux
@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1], ids=lambda length: f"2^{length.bit_length()}")
def test_huge_header_length_is_refused_without_allocating(rule_file: Path, length: int) -> None:
    rule_file.write_bytes(length.to_bytes(8, "little") + rule_file.read_bytes()[8:])
    with little_memory(), pytest.raises(ValueError, match=r"is not a whole \.safetensors file"):
        load_rule(rule_file)


@linux
@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        pytest.param([2**31, 2**33], [0, 24], id="product-overflows"),
        pytest.param([2**40], [0, 2**42], id="beyond-the-end"),
        pytest.param([6], [2**63, 24], id="backwards"),
        pytest.param([-6], [0, 24], id="negative"),
        pytest.param([6.5], [0, 24], id="no-whole-number"),
    ],
)
def test_impossible_shapes_are_refused_without_allocating(
    rule_file: Path, shape: list[float], offsets: list[int]
) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        header["output_bias"] |= {"shape": shape, "data_offsets": offsets}

    with_header(rule_file, change)
    with little_memory(), pytest.raises(ValueError, match=r"is not a whole \.safetensors file"):
        load_rule(rule_file)


@linux
@pytest.mark.parametrize(
    "settings",
    [
        '{"hidden_size": 1000000000}',
        '{"hidden_size": 4096}',
        '{"hidden_size": 1e400}',
        '{"hidden_size": %s}' % ("9" * 4000),
        "[" * 100_000,
    ],
    ids=["billion-units", "largest", "infinite", "many-digits", "deep"],
)
def test_huge_settings_are_refused_without_allocating(rule_file: Path, settings: str) -> None:
    rewrite(rule_file, {"settings": settings})
    with little_memory(), pytest.raises(ValueError, match="weights do not fit the architecture"):
        load_rule(rule_file)


@linux
def test_huge_number_of_layers_is_refused_without_allocating(tmp_path: Path) -> None:
    save_rule(LSTML2L(hidden_size=2), tmp_path / "rule.safetensors")
    for layers in (4096, 10**9):
        rewrite(tmp_path / "rule.safetensors", {"settings": json.dumps({"hidden_size": 2, "layers": layers})})
        with little_memory(), pytest.raises(ValueError, match="weights do not fit the architecture"):
            load_rule(tmp_path / "rule.safetensors")


def test_oversized_file_is_refused(rule_file: Path) -> None:
    with open(rule_file, "ab") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"it has 1,099,511,627,776 bytes, rules at most"):
        load_rule(rule_file)


def test_trailing_bytes_are_refused(rule_file: Path) -> None:
    rule_file.write_bytes(rule_file.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"is not a whole \.safetensors file"):
        load_rule(rule_file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda bias: bias.fill_(float("nan")), "weights that are NaN or infinite", id="nan"),
        pytest.param(lambda bias: bias.to(torch.int32), "weights must be of dtype BF16, F16, F32, F64", id="integer"),
    ],
)
def test_non_finite_or_integer_weights_are_refused(
    rule_file: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    tensors = load(rule_file.read_bytes())
    rewrite(rule_file, {}, tensors | {"output_bias": change(tensors["output_bias"])})
    with pytest.raises(ValueError, match=message):
        load_rule(rule_file)


def test_saving_into_the_name_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        save_rule(load_rule("default"), tmp_path)
    assert not list(tmp_path.iterdir())
