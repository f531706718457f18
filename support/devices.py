"""The device on which a command computes, and its precision there."""

import torch

from support.errors import UsageError, out_of_memory


def pick_device(name):
    """The torch device called `name`; "auto" is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if name.split(":")[0] == "meta":  # its tensors hold no numbers
            raise RuntimeError
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if out_of_memory(error):
            raise
        raise UsageError(f"--device {name}: not on this machine; try cpu") from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL looks for it there
    return device


def use_precision(precision, device):
    """Sets the precision of all that follows, and returns whether networks compute in bfloat16.

    float32 means float32: without bfloat16, matrix products and convolutions do not use TF32 either.
    """
    bf16 = in_bf16(precision, device)
    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    torch.backends.cudnn.allow_tf32 = bf16
    return bf16


def in_bf16(precision, device):
    """Whether `precision` ("fp32", "bf16" or "auto") means bfloat16; "auto" takes it where it is fast."""
    if precision == "auto" and device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto" and device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return precision == "bf16"


def refuse_lossy_compiler(device, bf16):
    """Raises UsageError where a compiled network loses gradients (torch 2.13.0; benchmarks/curves.py)."""
    if bf16 and device.type == "cpu":
        raise UsageError("--compile: on a CPU, torch loses gradients of a compiled network in bf16; leave it "
                         "out, or give --precision fp32")


def title(device):
    """What a person calls the device: a GPU's own name, or its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
