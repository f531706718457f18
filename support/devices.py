"""The device on which a command computes, and the precision of its networks."""

import torch

from support.errors import UsageError


def pick_device(name):
    """Return the torch device `name`; "auto" is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        torch.zeros(1, device=name).item()  # "meta" has no values
    except (RuntimeError, AssertionError, ImportError) as error:  # as torch's backends raise
        reason = str(error).splitlines()[0][:100]
        raise UsageError(f"--device {name}: {reason}; try cpu") from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL expects it
    return device


def has_bf16(device):
    """Return whether the hardware computes in bfloat16. Elsewhere it is emulated, or fails."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = [name for name, present in torch.cpu.get_capabilities().items() if present]
    return device.type == "cpu" and any(name.endswith("bf16") for name in names)


def samples_in_bf16(precision, device, trained=None):
    """Return whether a network samples in bfloat16.

    "auto" is the precision that was faster in training, `trained`, where the hardware has it, so
    that the samples do not depend on a measurement.
    """
    if precision != "auto" or trained == "fp32":
        return precision == "bf16"
    fast = device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16")
    return bool(trained == "bf16" or fast) and has_bf16(device)


def use_precision(bf16):
    """Set the precision of everything that follows.

    float32 means float32: unless networks compute in bfloat16, CUDA does not use TF32 either.
    """
    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    torch.backends.cudnn.allow_tf32 = bf16


def autocast(device, precision):
    """Return a context in which networks compute in `precision`; noise and loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
