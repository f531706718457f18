"""A device that stands for the GPUs that a machine does not have: its tensors lie on the CPU.

    with far.device() as reads:
        x = torch.randn(2, 3, device="far")          the CPU computes it, with its own kernels
        x + torch.ones(3)                            RuntimeError: no GPU mixes with the CPU
        x.double(), torch.zeros(3).double()[:] = x   TypeError: an Apple GPU has no float64
        torch.ones(3).to("far", non_blocking=True)   nan: an Apple GPU may find that memory freed
        x.sum().item(), x.cpu()                      each is noted in `reads`: here the host waits

Such a tensor is one of the kind that PyTorch has for devices of others, and holds one of the CPU.
"""

import contextlib

import pytest
import torch
from judge import close
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)  # of the first argument, and of the second
ANSWERS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default,
           aten.nonzero.default, aten.masked_select.default)  # fmt: skip


class Far(torch.Tensor):
    """What the program holds; `near` is the tensor on the CPU."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, near.stride(), near.storage_offset(),
                                                   dtype=near.dtype, device="far:0")  # fmt: skip

    def __init__(self, near):
        self.near = near

    def __repr__(self):
        return f"{self.near!r} far away"

    def __reduce_ex__(self, protocol):  # saved, it is a tensor like any
        return self.near.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise RuntimeError(f"{op}: its device is gone")


class Simulation(TorchDispatchMode):
    """Does every operation on the CPU, and notes, refuses and spoils what a GPU would."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = list(tensors_in([args, *kwargs.values()]))
        far = {id(x.near): x for x in tensors if isinstance(x, Far)}
        goes_far = bool(far)
        if kwargs.get("device") is not None:
            goes_far = kwargs["device"].type == "far"
            kwargs["device"] = "cpu" if goes_far else kwargs["device"]
        elif op is aten.copy_.default:
            goes_far = isinstance(args[0], Far)
        masked = op is aten.index.Tensor and torch.bool in {x.dtype for x in tensors[1:]}
        if far and (op in ANSWERS or masked or not goes_far):
            self.reads.append(str(op))
        if far and op not in COPIES:  # numbers, which have no dimensions, may come from the CPU
            mixed = [tuple(x.shape) for x in tensors if x.ndim and not isinstance(x, Far)]
            if mixed:
                raise RuntimeError(
                    f"{op}: a tensor {mixed[0]} of the CPU among those of the far device"
                )
        out = op(*replaced(near, args), **{name: replaced(near, x) for name, x in kwargs.items()})
        if (far or goes_far) and torch.float64 in {x.dtype for x in tensors_in(out)}:
            raise TypeError(f"{op}: float64 on the far device, or read from it")
        arrives = op in COPIES and goes_far and not isinstance(args[COPIES.index(op)], Far)
        if arrives and (kwargs.get("non_blocking") or True in args[2:]):
            out.fill_(float("nan") if out.is_floating_point() else 113)
        if not goes_far:
            return out
        return replaced(
            lambda x: far[id(x)] if id(x) in far else Far(x), out
        )  # the same, if in place


def near(x):
    return x.near if isinstance(x, Far) else x


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors_in(y)


def replaced(function, x):
    """x, in which each tensor has become function(tensor)."""
    if isinstance(x, (list, tuple)):
        return type(x)([replaced(function, y) for y in x])
    return function(x) if isinstance(x, torch.Tensor) else x


class Module:
    """What torch asks of a device's module: it is none to be chosen by itself, nor has it seeds."""

    @staticmethod
    def is_available():
        return False

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16]

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass


# conftest.py imports this file: a device that autograd was once used without, it never gets to know.
register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
if register:
    register("far", Module)


@contextlib.contextmanager
def device():
    """The far device is there, and what is read back from it is listed."""
    if not register:
        pytest.skip(f"torch {torch.__version__} takes no device that is written in Python")
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # so that torch.tensor sends what it makes as x.to does
    try:
        with Simulation() as mode:
            yield mode.reads
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def agrees(results, *given, tol=0.0):
    """Assert that results(*given), named tensors, are the same far away, whatever the default device, and
    that none is read back; tol is in units of the largest number in them."""
    __tracebackhide__ = True
    wanted = results(*given)
    scale = max(x.abs().max() for x in wanted.values())
    with device() as reads:
        given = [x.to("far") for x in given]
        for default in ("cpu", "far"):
            with torch.device(default):
                got = results(*given)
            assert not reads, (
                f"the host waits for the device {len(reads)} times, first for {reads[0]}"
            )
            for name, x in got.items():
                assert x.device.type == "far", f"{name} is on the {x.device}"
                close(f"{name}, default device {default}", x.cpu(), wanted[name], tol, scale)
            reads.clear()
