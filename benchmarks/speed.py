"""Speed of the paper's network next to the same network in diffusers, in one run on one machine.

    pip install diffusers && python benchmarks/speed.py             the peer is optional
    python benchmarks/speed.py --device cuda --batch-size 128 --compile

Both train one step (forward, backward, Adam) on the same random batch, taking turns, and the medians
are compared as a ratio; then the achieved rate as a share of the machine's own measured matmul rate.
"""

import argparse
import contextlib
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import ddpm


def multiply_adds(net):
    """Multiply-adds of a forward pass on one 32x32 image, counted by hooks on the layers."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, torch.nn.Conv2d):
            total += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, torch.nn.Linear):
            total += output[0].numel() * module.in_features
        elif isinstance(module, ddpm.Attention):
            _, C, H, W = output.shape
            total += 2 * C * (H * W) ** 2

    hooks = [m.register_forward_hook(count) for m in net.modules()]
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32), torch.ones(1, dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    return total


def peer():
    """The paper's CIFAR-10 network as diffusers configures it, or None where it is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return None
    return UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, dropout=0.1,
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def stepper(net, x, bf16):
    """A function that makes one training step of net on x and waits for it."""
    optimizer = torch.optim.Adam(net.parameters(), 2e-4, fused=True)
    t = torch.randint(1, 1001, (len(x),), device=x.device)

    def step():
        context = torch.autocast(x.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        with context:
            out = net(x, t)
            loss = F.mse_loss(getattr(out, "sample", out).float(), x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def timed(steps, repeats):
    """Seconds a step of each function, the median over `repeats` rounds in which they take turns."""
    times = {name: [] for name in steps}
    for i in range(repeats + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if i >= 2:  # the first two rounds warm up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)

    def product():
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * n**3 / timed({"": product}, 5)[""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=None, help="default: 128 on a GPU, 4 elsewhere")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks")
    flags = parser.parse_args()
    device = torch.device(flags.device)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    B = flags.batch_size or (128 if device.type == "cuda" else 4)
    x = torch.randn(B, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)

    ours = ddpm.UNet()
    operations = 3 * 2 * multiply_adds(ours) * B
    nets = {"ddpm.py": ours, "diffusers": peer()}
    steps = {}
    for name, net in nets.items():
        if net is None:
            print(f"{name}: not installed, left out")
            continue
        net = net.to(device, memory_format=torch.channels_last)
        steps[name] = stepper(torch.compile(net) if flags.compile else net, x, bf16)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}, batch {B}, {'bf16' if bf16 else 'fp32'}"
          f"{', compiled' if flags.compile else ''}")
    seconds = timed(steps, flags.repeats)
    peak = matmul_rate(device, torch.bfloat16 if bf16 else torch.float32)
    for name, s in seconds.items():
        print(f"{name:10} {B / s:10.1f} images/s, {operations / s / peak:6.1%} of the matmul rate")
    if len(seconds) == 2:
        print(f"ddpm.py is {seconds['diffusers'] / seconds['ddpm.py']:.2f} times as fast as diffusers")


if __name__ == "__main__":
    main()
