"""The cases of ``gpu_check``: parameters of well-known models, optimizers, and the bytes that a step must move."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.speed.rivals import LSTMCellLoop, pylo_optimizers
from learned_optim import LearnedOptimizer
from learned_optim.rules import ScaleFreeLSTM

Shape = tuple[int, ...]

OPTIMIZERS: Mapping[str, Callable[[list[Tensor]], Optimizer]] = {
    "Adam(fused)": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "Adam(foreach)": lambda parameters: torch.optim.Adam(parameters, foreach=True),
    "default, fused": lambda parameters: LearnedOptimizer(parameters, fused=True),
    "default, plain": lambda parameters: LearnedOptimizer(parameters, fused=False),
    "specialised-mnist, fused": lambda parameters: LearnedOptimizer(parameters, "specialised-mnist", fused=True),
    "scale-free-lstm, fused": lambda parameters: LearnedOptimizer(parameters, ScaleFreeLSTM(), fused=True),
    "lstm-l2l, fused": lambda parameters: LearnedOptimizer(parameters, "lstm-l2l-mnist", fused=True),
    "lstm-l2l, plain": lambda parameters: LearnedOptimizer(parameters, "lstm-l2l-mnist", fused=False),
    "loop of nn.LSTMCell(20) x 2": LSTMCellLoop,
    **pylo_optimizers("CUDA"),
}


def resnet50() -> list[Shape]:
    """Shapes of the parameters of torchvision's ResNet-50: 25,557,032 in 161 tensors."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((planes, inputs, 1, 1), (planes, planes, 3, 3), (4 * planes, planes, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * planes, inputs, 1, 1), (4 * planes,), (4 * planes,)]
            inputs = 4 * planes
    return [*shapes, (1000, inputs), (1000,)]


def vit_b_16() -> list[Shape]:
    """Shapes of the parameters of torchvision's ViT-B/16: 86,567,656 in 152 tensors."""
    layer: list[Shape] = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    layer += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    stem: list[Shape] = [(1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768)]
    return [*stem, *layer * 12, (768,), (768,), (1000, 768), (1000,)]


def gpt2() -> list[Shape]:
    """Shapes of the parameters of GPT-2 small, head tied: 124,439,808 in 148 tensors."""
    layer: list[Shape] = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
    layer += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]


CASES: Mapping[str, list[Shape]] = {
    **{f"one tensor of {10**power:,}": [(10 ** (power - 2), 100)] for power in range(4, 9)},
    "1,000 tensors of 100": [(100,)] * 1000,
    "ResNet-50": resnet50(),
    "ViT-B/16": vit_b_16(),
    "GPT-2 124M": gpt2(),
}


def bytes_that_must_move(optimizer: Optimizer) -> int:
    """Gradients read, parameters and states read and written, once each."""
    total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            total += 2 * parameter.nbytes + parameter.grad.nbytes
            state = optimizer.state[parameter]
            total += sum(
                2 * value.nbytes
                for key, value in state.items()
                if key not in ("step", "scale") and isinstance(value, Tensor)
            )
    return total
