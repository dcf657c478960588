"""Optimizers that the time of a step is held against: PyTorch's, the usual loop over nn.LSTMCell, and PyLO's."""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learned_optim.rules.lstm_l2l import log_sign

Make = Callable[[list[Tensor]], Optimizer]

ADAM_KERNELS: Mapping[str, Make] = {
    "Adam(fused)": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "Adam(foreach)": lambda parameters: torch.optim.Adam(parameters, foreach=True),
    "Adam(for-loop)": lambda parameters: torch.optim.Adam(parameters, foreach=False),
}
# Classes of github.com/Belilovsky-Lab/pylo; its MuLO is AdafacLO with rates by width.
PYLO = ("AdafacLO", "VeLO", "CELO2", "ELO", "ELO_CELO2")
META_MLP = {"input_size": 39, "hidden_size": 32, "hidden_layers": 1}  # the published weights' sizes; others by default


class LSTMCellLoop(Optimizer):
    """The coordinatewise LSTM as it is usually written: parameter by parameter, coordinates as rows of a batch."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {})
        device = parameters[0].device
        self.first, self.second = nn.LSTMCell(2, 20, device=device), nn.LSTMCell(20, 20, device=device)
        self.output = nn.Linear(20, 1, device=device)

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """One step."""
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                for entry in ("h1", "c1", "h2", "c2"):
                    state[entry] = parameter.new_zeros(parameter.numel(), 20)
            inputs = log_sign(parameter.grad.reshape(-1), 10.0).T
            state["h1"], state["c1"] = self.first(inputs, (state["h1"], state["c1"]))
            state["h2"], state["c2"] = self.second(state["h1"], (state["h2"], state["c2"]))
            parameter.add_(0.1 * self.output(state["h2"]).view(parameter.shape))


def pylo_optimizers(kind: str) -> dict[str, Make]:
    """PyLO's optimizers of a kind, ``"naive"`` or ``"CUDA"``; none where it is not installed.

    They get random weights of the published sizes: PyLO would fetch its own from a hub, and the time is the same.
    """
    if importlib.util.find_spec("pylo") is None:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its CUDA extension is missing
        optim = importlib.import_module("pylo.optim")
    names = [f"{name}_{kind}" for name in PYLO]
    return {f"PyLO {name}": _with_random_weights(getattr(optim, name)) for name in names if hasattr(optim, name)}


def _with_random_weights(kind: Callable[[list[Tensor]], Any]) -> Make:
    def make(parameters: list[Tensor]) -> Optimizer:
        with _hub_out_of_reach():
            optimizer: Any = kind(parameters)
        if "VeLO" in optimizer.__class__.__name__:  # its step reads the loss
            step, loss = optimizer.step, torch.ones((), device=parameters[0].device)
            optimizer.step = lambda: step(loss)
        made: Optimizer = optimizer
        return made

    return make


def _hub_out_of_reach() -> AbstractContextManager[Any]:
    """Networks that would be loaded from the hub are built instead."""

    def build(kind: type[nn.Module], /, *_: object, **__: object) -> nn.Module:
        return kind(**(META_MLP if kind.__name__ == "MetaMLP" else {}))

    hub = importlib.import_module("huggingface_hub")
    return mock.patch.object(hub.PyTorchModelHubMixin, "from_pretrained", classmethod(build))
