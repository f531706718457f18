"""The device on which a command computes, and its precision there."""

import torch

from support.errors import UsageError, out_of_memory


def pick_device(name):
    """The torch device called `name`; "auto" is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        if name.split(":")[0] == "meta":  # its tensors hold no numbers
            raise RuntimeError
        torch.empty(1, device=name)
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # as torch's parts for a device may raise
        if out_of_memory(error):
            raise
        raise UsageError(f"--device {name}: not on this machine; try cpu") from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL looks for it there
    return device


def has_bf16(device):
    """Whether the hardware computes in bfloat16; elsewhere it is emulated, or refused."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(
        on for name, on in torch.cpu.get_capabilities().items() if name.endswith("bf16")
    )


def samples_in_bf16(precision, device, trained=None):
    """Whether a network samples in bfloat16: as `precision` says. "auto" takes the precision that was faster
    in its training, `trained`, where the hardware has it: what is drawn does not depend on a clock."""
    if precision != "auto" or trained == "fp32":
        return precision == "bf16"
    fast = (
        trained == "bf16" or device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16")
    )
    return bool(fast) and has_bf16(device)


def use_precision(bf16):
    """Sets the precision of all that follows. float32 means float32: where networks do not compute in
    bfloat16, matrix products and convolutions do not use TF32 either."""
    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    torch.backends.cudnn.allow_tf32 = bf16


def to_compile(precision, device):
    """The precision of a network that will be compiled, where "auto" stands for the one that can be. Raises
    UsageError for one that loses gradients (torch 2.13.0; benchmarks/curves.py)."""
    if device.type != "cpu":
        return precision
    if precision == "bf16":
        raise UsageError(
            "--compile: on a CPU, torch loses gradients of a compiled network in bf16; leave it "
            "out, or give --precision fp32"
        )
    return "fp32"


def title(device):
    """What a person calls the device: a GPU's own name, or its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
