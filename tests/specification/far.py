"""A simulated GPU: the device "far", whose tensors are stored and computed on the CPU.

    with far.device() as reads:
        x = torch.randn(2, 3, device="far")          computed by the CPU's kernels
        x + torch.ones(3)                            RuntimeError, because a GPU does not mix with the CPU
        x.double(), torch.zeros(3).double()[:] = x   TypeError, because an Apple GPU has no float64
        torch.ones(3).to("far", non_blocking=True)   nan, because an Apple GPU may read freed memory
        x.sum().item(), x.cpu()                      recorded in `reads`, because the host waits here

It uses PyTorch's interface for devices of other vendors. --float64-device allows float64 on the device.
"""

import contextlib

import pytest
import torch
from checks import close
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)  # copy the first argument, and the second
FLOAT64 = False  # whether the far device has float64; conftest.py sets it from --float64-device
ANSWERS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default,
           aten.nonzero.default, aten.masked_select.default)  # fmt: skip


class Far(torch.Tensor):
    """A tensor on the far device. `near` is its data on the CPU."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, near.stride(), near.storage_offset(),
                                                   dtype=near.dtype, device="far:0")  # fmt: skip

    def __init__(self, near):
        self.near = near

    def __format__(self, spec):
        return format(self.item(), spec) if spec else repr(self)

    def __repr__(self):
        return f"{self.near!r} (far)"

    def __reduce_ex__(self, protocol):  # saved as an ordinary tensor
        return self.near.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise RuntimeError(f"{op}: the far device is only available inside far.device()")


class Simulation(TorchDispatchMode):
    """Run each operation on the CPU. Record synchronisations, and raise or return nan where a GPU would."""

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
                    f"{op}: a CPU tensor {mixed[0]} together with tensors on the far device"
                )
        out = op(*replaced(near, args), **{name: replaced(near, x) for name, x in kwargs.items()})
        if (
            not FLOAT64
            and (far or goes_far)
            and torch.float64 in {x.dtype for x in tensors_in(out)}
        ):
            raise TypeError(
                f"{op}: float64 on the far device, or read from it (--float64-device allows it)"
            )
        arrives = op in COPIES and goes_far and not isinstance(args[COPIES.index(op)], Far)
        if arrives and (kwargs.get("non_blocking") or True in args[2:]):
            out.fill_(float("nan") if out.is_floating_point() else 113)
        if not goes_far:
            return out
        # An in-place operation returns its argument.
        return replaced(lambda x: far[id(x)] if id(x) in far else Far(x), out)


def near(x):
    return x.near if isinstance(x, Far) else x


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors_in(y)


def replaced(function, x):
    """Return x with each tensor replaced by function(tensor)."""
    if isinstance(x, (list, tuple)):
        return type(x)([replaced(function, y) for y in x])
    return function(x) if isinstance(x, torch.Tensor) else x


class Module:
    """The module that torch requires for a device. It is never chosen by itself and has no seeds."""

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


# conftest.py imports this file early: autograd ignores devices that are registered after its first use.
register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
if register:
    register("far", Module)


@contextlib.contextmanager
def device():
    """Make the far device available. Return the list of operations that read from it."""
    if not register:
        pytest.skip(f"torch {torch.__version__} does not support devices written in Python")
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor then copies to the device as x.to does
    try:
        with Simulation() as mode:
            yield mode.reads
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def agrees(results, *given, tol=0.0):
    """Assert that results(*given), a dict of tensors, is the same on the far device without synchronisation.

    The default device makes no difference. tol is in units of the largest value.
    """
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
