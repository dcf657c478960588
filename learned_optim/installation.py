"""Whether the installation works: versions, devices, and a step of every shipped rule beside its definition.

Each function returns findings by name. A finding that begins with ``WRONG`` is an error, one that begins with ``not``
is something that is only missing.
"""

import importlib.metadata
import platform
from typing import TYPE_CHECKING

from learned_optim import __version__

if TYPE_CHECKING:
    import torch  # imported where it is used: without a torch that works, versions() still says so

PACKAGES = {
    "torch": "",
    "numpy": "",
    "safetensors": "",
    "triton": "gpu",
    "pydantic": "train",
    "tqdm": "train",
    "tensorboard": "train",
    "matplotlib": "demo",
    "scikit-learn": "demo",
    "pillow": "art",
    "huggingface_hub": "hub",
}
"""Packages, and the extra that brings those which are not always needed."""
OLDEST_TORCH = 2, 11
TOLERANCE = 1e-5
"""The largest error of a step over the largest update: some hundred roundings of float32, of 6e-8 each. Found: 3e-7."""


def versions() -> dict[str, str]:
    """The version of each package that is used, and the extra that installs a missing one."""
    found = {"python": platform.python_version(), "learned-optim": __version__}
    for package, extra in PACKAGES.items():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = f"not installed: pip install 'learned-optim[{extra}]'" if extra else "WRONG: not installed"
    version = found["torch"].split(".")
    if version[0].isdecimal() and (int(version[0]), int(version[1])) < OLDEST_TORCH:
        found["torch"] = f"WRONG: {found['torch']} is too old: pip install 'torch>={'.'.join(map(str, OLDEST_TORCH))}'"
    return found


def devices() -> dict[str, str]:
    """The CPU and the GPUs that torch can use."""
    import torch

    found = {"cpu": f"{torch.get_num_threads()} threads, {platform.machine()}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if len(found) == 1:
        built = torch.version.cuda or torch.version.hip
        found["gpu"] = "not found" if built else "not usable: this torch is built for CPUs alone"
    return found


def steps() -> dict[str, str]:
    """A verdict for each shipped rule: on the CPU without a fused kernel, and with that of each kind of device."""
    import torch

    from learned_optim.checkpoint import available_rules, load_rule
    from learned_optim.step.programs import unsupported_reason

    found = {}
    devices = [torch.device("cpu"), *[torch.device("cuda")] * torch.cuda.is_available()]
    for name in available_rules():
        found[f"{name}, cpu"] = _verdict(name, torch.device("cpu"), fused=False)
        for device in devices:
            reason = unsupported_reason(load_rule(name), device, torch.float32)
            verdict = f"not possible: {reason}" if reason else _verdict(name, device, fused=True)
            found[f"{name}, {device.type} fused"] = verdict
    if not torch.cuda.is_available():
        found["fused kernels of GPUs"] = "not tried: they need a GPU"
    return found


def _verdict(name: str, device: "torch.device", *, fused: bool) -> str:
    try:
        error = step_error(name, device, fused=fused)
    except Exception as failure:  # whatever a driver, a compiler or a broken installation raises is the answer
        return f"WRONG: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    return f"right (relative error {error:.1e})" if error <= TOLERANCE else f"WRONG: relative error {error:.1e}"


def step_error(name: str, device: "torch.device", *, fused: bool) -> float:
    """Largest difference of the optimizer's third step from the rule's own in float64, over the largest update.

    Each step starts from a parameter of zero, because the rounding of a larger one would hide the error.
    """
    import torch

    from learned_optim.checkpoint import load_rule
    from learned_optim.optimizer import LearnedOptimizer

    rule = load_rule(name).double()
    grads = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = rule.init_state((1000,), dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.zeros(1000, device=device))
    optimizer = LearnedOptimizer([parameter], name, fused=fused, state_dtype=torch.float32)
    expected = torch.zeros(1000, dtype=torch.float64)
    for step, grad in enumerate(grads, 1):
        with torch.no_grad():
            expected, state = rule(grad, state, torch.tensor(float(step), dtype=torch.float64))
            parameter.zero_()
        parameter.grad = grad.float().to(device)
        optimizer.step()
    difference = parameter.detach().cpu().double() - expected
    return float(difference.abs().max() / expected.abs().max())
