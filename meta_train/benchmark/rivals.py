"""Optimizers that people would pick instead of a rule without a learning rate, set as their authors say.

A setting without a source of its own is the default of the package. None gets a schedule unless its name says so.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learned_optim.meta_train.benchmark.stepping import Model

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Rival:
    """An optimizer, and how it is used where nothing is tuned."""

    build: Callable[[Model, float, int, Settings], Optimizer]
    """From a model, its rate, the steps of the whole training, and the settings."""
    module: str
    """What is imported; PyTorch, or a package of the extra ``rivals``, whose distribution has the same name."""
    untuned: tuple[float, ...]
    """Rates that are recommended or customary where nothing is tuned."""
    settings: Settings = field(default_factory=dict)
    """Plain values, by which stored runs are told apart."""
    grid: tuple[float, ...] | None = None
    """Rates to tune over; None: those of the suite."""

    @property
    def identity(self) -> dict[str, Any]:
        """What determines a training beside its rate: the settings, and the version of a package.

        PyTorch's own version belongs to every stored run.
        """
        package = {} if self.module == "torch" else {"package": f"{self.module} {version(self.module)}"}
        return {**package, "settings": dict(self.settings)}


def _schedule_free(model: Model, rate: float, steps: int, settings: Settings) -> Optimizer:
    """Schedule-Free AdamW, in the mode in which it takes steps."""
    build = importlib.import_module("schedulefree").AdamWScheduleFree
    optimizer: Any = build(model.tensors.values(), lr=rate, warmup_steps=math.ceil(settings["warmup"] * steps))
    optimizer.train()
    made: Optimizer = optimizer
    return made


def _prodigy(model: Model, rate: float, steps: int, settings: Settings) -> Optimizer:
    """Prodigy at learning rate 1; the rate is its factor on the step size that it estimates."""
    made: Optimizer = importlib.import_module("prodigyopt").Prodigy(model.tensors.values(), d_coef=rate, **settings)
    return made


def _d_adaptation(model: Model, rate: float, steps: int, settings: Settings) -> Optimizer:
    """Adam with D-Adaptation; the rate is a factor on the step size that it estimates."""
    made: Optimizer = importlib.import_module("dadaptation").DAdaptAdam(model.tensors.values(), lr=rate, **settings)
    return made


def _muon(model: Model, rate: float, steps: int, settings: Settings) -> Optimizer:
    """Muon for hidden matrices, AdamW for the rest."""
    hidden = hidden_matrices(model.module, model.tensors)
    return MuonWithAdamW(
        [model.tensors[name] for name in hidden],
        [tensor for name, tensor in model.tensors.items() if name not in hidden],
        rate,
        **settings,
    )


def _soap(model: Model, rate: float, steps: int, settings: Settings) -> Optimizer:
    """Adam in the eigenbasis of Shampoo's preconditioner."""
    made: Optimizer = importlib.import_module("pytorch_optimizer").SOAP(model.tensors.values(), lr=rate, **settings)
    return made


def _ademamix(model: Model, rate: float, steps: int, settings: Settings) -> Optimizer:
    """Adam with a slow average of gradients beside the fast one, both warmed up over the whole training."""
    build = importlib.import_module("pytorch_optimizer").AdEMAMix
    made: Optimizer = build(model.tensors.values(), lr=rate, t_alpha_beta3=steps, **settings)
    return made


FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""To tune over, of a step size that is estimated: what Prodigy's README names, from 0.1 to 10."""

RIVALS: dict[str, Rival] = {
    # github.com/facebookresearch/schedule_free. Rate 0.0025: the package's default and the authors' entry to AlgoPerf's
    # self-tuning track; its README: rates "1x-10x larger than with schedule-based approaches", 0.01 is ten times Adam's
    # default, and "using learning rate warmup is recommended": 2% of the steps, the warmup_factor of that entry.
    "Schedule-Free": Rival(_schedule_free, "schedulefree", (0.0025, 0.01), {"warmup": 0.02}),
    # github.com/konstmish/prodigy, README: "we recommend using lr=1. (default) for all networks", "either using no
    # scheduler or using cosine annealing", and to change d_coef rather than the rate. Weight decay: 0, its default.
    "Prodigy": Rival(_prodigy, "prodigyopt", (1.0,), {"lr": 1.0}, FACTORS),
    # github.com/facebookresearch/dadaptation, README: "set the LR parameter to 1.0".
    "D-Adaptation": Rival(_d_adaptation, "dadaptation", (1.0,), {}, FACTORS),
    # kellerjordan.github.io/posts/muon: vectors, the input and the output layer by AdamW. torch.optim.Muon, with the
    # adjustment by which a rate of AdamW serves for both (Liu et al. 2025, arXiv 2502.16982): three and ten times its
    # default. Momentum 0.95, Nesterov, weight decay 0.1, and AdamW's 0.01: PyTorch's defaults.
    "Muon": Rival(_muon, "torch", (0.003, 0.01), {"adjust_lr_fn": "match_rms_adamw"}),
    # github.com/nikhilvyas/SOAP, README: exactly these.
    "SOAP": Rival(
        _soap,
        "pytorch_optimizer",
        (0.003,),
        {"betas": [0.95, 0.95], "weight_decay": 0.01, "precondition_frequency": 10},
    ),
    # github.com/apple/ml-ademamix, README: these, with a warm-up of alpha and beta3 over all steps.
    "AdEMAMix": Rival(
        _ademamix,
        "pytorch_optimizer",
        (0.001,),
        {"betas": [0.9, 0.999, 0.9999], "alpha": 8.0, "weight_decay": 0.1, "weight_decouple": True},
    ),
}
"""By name."""


def missing(names: Iterable[str]) -> list[str]:
    """Packages that rivals of these names need and that are not installed."""
    modules = dict.fromkeys(RIVALS[name].module for name in names)
    return [module for module in modules if not is_installed(module)]


def is_installed(module: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def need_packages(names: Sequence[str]) -> None:
    """Raise ``ValueError``, which says what to install, if a package of these rivals is missing."""
    if absent := missing(names):
        needing = [name for name in dict.fromkeys(names) if RIVALS[name].module in absent]
        raise ValueError(f"{', '.join(needing)}: no {', '.join(absent)} here: pip install 'learned-optim[rivals]'")


def hidden_matrices(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of the parameters that Muon is meant for: matrices and filters but those at the input and the output.

    Jordan et al. 2024 (kellerjordan.github.io/posts/muon): "scalar and vector parameters of the network, as well as the
    input and output layers, should be optimized by a standard method such as AdamW"; of a convolutional network all
    filters but the first (README of github.com/KellerJordan/Muon). The first and the last matrix in the order of the
    module count as input and output. Where there are embeddings, these are the input. What a module with parts holds
    itself, such as positions or a class token, is added to inputs, and counts with them; gains of norms are vectors.

    A perceptron with one hidden layer has none.

    Args:
        module: tells the kinds of layers.
        names: of the parameters that are trained.
    """
    kept = set(names)
    found, embedded = [], False
    for name, tensor in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        embedded |= isinstance(owner, nn.Embedding | nn.EmbeddingBag)
        outside = isinstance(owner, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm | nn.RMSNorm)
        if tensor.dim() > 1 and not outside and not any(owner.children()):
            found.append(name)
    inner = found[:-1] if embedded else found[1:-1]
    return [name for name in inner if name in kept]


class MuonWithAdamW(Optimizer):
    """``torch.optim.Muon`` for some tensors and ``torch.optim.AdamW`` for others, at one rate.

    Muon gets filters as matrices, ``(out, in * height * width)``, as the README of github.com/KellerJordan/Muon does.

    Args:
        hidden: tensors of two and more dimensions, in one piece of memory.
        others: the rest.
        lr: rate of both.
        adjust_lr_fn: how Muon's rate depends on a matrix's shape; see :class:`torch.optim.Muon`.
    """

    def __init__(self, hidden: Sequence[Tensor], others: Sequence[Tensor], lr: float, adjust_lr_fn: str) -> None:
        super().__init__([*hidden, *others], {"lr": lr})
        self.hidden = list(hidden)
        self.matrices = [tensor.detach().view(len(tensor), -1) for tensor in hidden]
        self.parts: list[Optimizer] = []
        if hidden:
            self.parts.append(torch.optim.Muon(self.matrices, lr=lr, adjust_lr_fn=adjust_lr_fn))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for matrix, tensor in zip(self.matrices, self.hidden, strict=True):
            matrix.grad = None if tensor.grad is None else tensor.grad.view_as(matrix)
        for part in self.parts:
            part.step()
