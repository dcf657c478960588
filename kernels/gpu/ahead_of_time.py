"""Compilation of kernels for NVIDIA GPUs that need not be there, to read their registers and instructions."""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from learned_optim.kernels.gpu import training
from learned_optim.kernels.gpu.launch import OPTIONS, WARPS, constants
from learned_optim.kernels.gpu.modules import module_of, step_module
from learned_optim.kernels.slots import Columns, StepSettings
from learned_optim.kernels.sources.registry import registered
from learned_optim.kernels.sources.triton import arguments_of


class Resources(NamedTuple):
    """The registers, memory and instructions of a kernel's machine code."""

    registers: int
    """Registers of a thread."""
    shared: int
    """Bytes of shared memory of a program."""
    spill_stores: int
    """Instructions that store to local memory; more than none means that the registers did not suffice."""
    spill_loads: int
    fma: int
    """Float32 multiply-adds in the code; a loop's body counts once, here and below."""
    special: int
    """Exponentials, reciprocal roots, logarithms, reciprocals."""
    loads: int
    """Loads from global memory: data, weights and addresses."""
    instructions: int


def compile_for(
    key: str,
    parameter_dtype: torch.dtype,
    state_dtypes: Sequence[torch.dtype],
    *,
    compute_capability: int,
    scaled: bool,
    block: int | None = None,
) -> Resources:
    """Compile the kernel of a program as a step of an optimizer with weight decay launches it.

    Args:
        key: the key of the rule's program.
        parameter_dtype: dtype of parameters and gradients.
        state_dtypes: dtypes of the entries of the state.
        compute_capability: 80 for an A100, 90 for an H100 or H200.
        scaled: whether updates have a factor for each tensor.
        block: coordinates of a program; None takes what a launch takes.
    """
    like, scale = [torch.empty(0, dtype=parameter_dtype)], [torch.empty(0) if scaled else None]
    entries = {str(place): [torch.empty(0, dtype=dtype)] for place, dtype in enumerate(state_dtypes)}
    tensors = Columns(like, like, entries, [torch.empty(0)], scale, [True])
    settings = StepSettings(lr=1.0, weight_decay=0.01, maximize=False, skip_nonfinite=True)
    constexprs: dict[str, Any] = {
        "grad_scale": None,
        "found_inf": None,
        **constants(key, tensors, settings, shared=True),
        "LR_ON_DEVICE": False,
        "PROGRESS_ON_DEVICE": False,
        "BLOCK": block or registered(key).block,
    }
    pointers = {"table": "i64", "tensor_of_program": "i32", "weights": "fp32", "step": "fp32"}
    kernel = step_module(key, interpreted=False).step
    scalars = dict.fromkeys(("lr", "weight_decay", "progress", "averaging"), "fp32")
    return _compiled(kernel, pointers, scalars, constexprs, WARPS, compute_capability)


def compile_training(step: training.TrainingStep, *, compute_capability: int) -> dict[str, Resources]:
    """Compile the kernels of a differentiable step.

    Args:
        step: the step of any rule.
        compute_capability: 80 for an A100, 90 for an H100 or H200.

    Returns:
        The resources of each kernel, by direction and, where products of torch cut it in pieces, number.
    """
    found = {}
    for direction, half in (("forward", step.forward), ("backward", step.backward)):
        for number, segment in enumerate(half.segments):
            if not segment.stores:
                continue
            kernel = getattr(module_of(half.text, interpreted=False), f"segment{number}")
            names = [f"{name}_state" for name in arguments_of(segment)]
            pointers = dict.fromkeys([*names, "weights"], "fp32")
            scalars = {"size": "i32", "weights_stride": "i32"}
            label = direction if len(half.segments) == 1 else f"{direction} {number}"
            found[label] = _compiled(
                kernel, pointers, scalars, {"BLOCK": training.TRAINING_BLOCK}, WARPS, compute_capability
            )
    return found


def _compiled(
    kernel: Any,
    pointers: Mapping[str, str],
    scalars: Mapping[str, str],
    constants: Mapping[str, Any],
    warps: int,
    compute_capability: int,
) -> Resources:
    """Compile a kernel for arguments of these types; pointers are aligned to 16 bytes, as those of tensors are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: "*" + kind for name, kind in pointers.items()} | dict(scalars)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    target = GPUTarget("cuda", compute_capability, 32)
    return _resources(triton.compile(source, target=target, options={"num_warps": warps, **OPTIONS}))


def _resources(compiled: Any) -> Resources:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    # One instruction a line: /*0040*/ @!P0 FFMA R1, R2, R3, R4 ;
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", code)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage

    def count(*names: str) -> int:
        return sum(operation.split(".")[0] in names for operation in operations)

    return Resources(
        registers=int(registers[1]),
        shared=int(compiled.metadata.shared),
        spill_stores=count("STL"),
        spill_loads=count("LDL"),
        fma=count("FFMA"),
        special=count("MUFU"),
        loads=count("LDG"),
        instructions=len(operations) - count("NOP"),
    )


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
