"""The command ``learned-optim doctor``: what is installed, what was found, and whether a step is right here."""

import argparse
import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

from learned_optim import __version__
from learned_optim.cli_common import CommandError, Commands, add_command, coloured, print_json

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
"""Of a step's error beside the largest update: some hundred roundings of float32, of 6e-8 each. Found: 3e-7."""
GREEN, RED, YELLOW, PLAIN = 32, 31, 33, 0


def add_doctor(commands: Commands) -> None:
    """Add the sub-command with its options."""
    doctor = add_command(
        commands,
        "doctor",
        "check the installation: versions, GPU, data, and a step of every rule",
        description="Say what is installed, which devices and data sets there are, and hold a step of every shipped "
        "rule to its definition, on the CPU and on a GPU if there is one, by the fused kernels too. Exit status 1 if "
        "something is wrong; what is only missing is no error.",
        examples=["doctor", "doctor --json"],
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    sections: dict[str, Callable[[], dict[str, str]]] = {
        "versions": _versions,
        "devices": _devices,
        "data": _data,
        "a step of each rule": _steps,
    }
    found = {}
    for title, section in sections.items():
        found[title] = section()
        if not options.json:
            print(title)
            for name, finding in found[title].items():
                print(f"  {name:32}{coloured(finding, _colour(finding))}", flush=True)
    problems = [
        f"{name}: {finding}" for part in found.values() for name, finding in part.items() if _colour(finding) == RED
    ]
    if options.json:
        print_json({**found, "problems": problems})
    elif not problems:
        print(coloured("nothing is wrong", GREEN))
    if problems:
        raise CommandError("; ".join(problems))


def _colour(finding: str) -> int:
    if finding.startswith("WRONG"):
        return RED
    return YELLOW if finding.startswith("not ") else GREEN if finding.startswith("right") else PLAIN


def _versions() -> dict[str, str]:
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


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": f"{torch.get_num_threads()} threads, {platform.machine()}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if len(found) == 1:
        built = torch.version.cuda or torch.version.hip
        found["gpu"] = "not found" if built else "not usable: this torch is built for CPUs alone"
    return found


def _data() -> dict[str, str]:
    from learned_optim.cli_data import described
    from learned_optim.meta_train.data.datasets import DATA_SETS

    entries = {name: described(name) for name in DATA_SETS}
    return {name: entry["folder"] or entry["remedy"] for name, entry in entries.items()}


def _steps() -> dict[str, str]:
    """A verdict for each shipped rule: on the CPU without a fused kernel, and by that of each kind of device."""
    import torch

    from learned_optim.checkpoint import available_rules
    from learned_optim.fused import why_not

    found = {}
    devices = [torch.device("cpu"), *[torch.device("cuda")] * torch.cuda.is_available()]
    for name in available_rules():
        found[f"{name}, cpu"] = _verdict(name, torch.device("cpu"), fused=False)
        for device in devices:
            reason = why_not(_rule(name), device, torch.float32)
            verdict = f"not possible: {reason}" if reason else _verdict(name, device, fused=True)
            found[f"{name}, {device.type} fused"] = verdict
    if not torch.cuda.is_available():
        found["fused kernels of GPUs"] = "not tried: they need a GPU"
    return found


def _rule(name: str) -> Any:
    from learned_optim.checkpoint import load_rule

    return load_rule(name)


def _verdict(name: str, device: Any, *, fused: bool) -> str:
    try:
        error = step_error(name, device, fused=fused)
    except Exception as failure:  # whatever a driver, a compiler or a broken installation raises is the answer
        return f"WRONG: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    return f"right (relative error {error:.1e})" if error <= TOLERANCE else f"WRONG: relative error {error:.1e}"


def step_error(name: str, device: Any, *, fused: bool) -> float:
    """Largest error of the optimizer's third step, relative to the largest update: beside the rule itself in float64.

    Each step starts from a parameter of zero, whose rounding would hide the error.
    """
    import torch

    from learned_optim import LearnedOptimizer

    rule = _rule(name).double()
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
