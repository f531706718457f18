"""Trains a DDPM on built-in digits, on CIFAR-10, or on a folder of images.

python train.py --epochs 5                           digits: nothing to download, no GPU needed
python train.py --data cifar10 --epochs 100          on a GPU, the paper's network and settings
python train.py --data path/to/images                your photos; with --labels, subfolders are classes
python train.py --resume ckpt.pt                     goes on where it stopped, bit for bit
python train.py --init ckpt.pt --data path/to/images   a new run from trained weights: fine-tuning
torchrun --standalone --nproc-per-node 4 -- train.py --data cifar10    four GPUs, the same batches
"""

# The file reads from top to bottom: settings; the run, from the data to the network; and its loop, which
# is Algorithm 1. What it shares with the other commands is in support/, a file for each duty.

import support.start  # noqa: F401, and first: see there

# isort: split
import copy
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch

import ddpm
import improved
from support import (
    batches,
    budget,
    checkpoint,
    command,
    data,
    outputs,
    recipes,
    snapshots,
    workers,
)  # fmt: skip
from support.command import flag
from support.data.folder import parse_size
from support.monitor import Monitor
from support.progress import note, say

# --- Settings ------------------------------------------------------------------------------------


def own(name, text, **limits):
    """A flag whose default suits the data and the machine (support/recipes.py)."""
    defaults = {
        "CIFAR-10 on a GPU": recipes.PAPER,
        "photos on a CPU": recipes.SMALL,
        "glyphs": recipes.GLYPHS,
    }
    told = "; ".join(f"{where} {recipe[name]}" for where, recipe in defaults.items())
    return flag(None, f"{text} (default: {told})", **limits)


@dataclass(frozen=True)
class Config:
    # What is learned from. Glyphs and CIFAR-10 have their own size and channels.
    data: str = flag(
        "glyphs",
        "images to train on: glyphs, which are built-in digits; cifar10, found in "
        "--data-dir or downloaded to it; or a folder, read recursively",
        group="data",
        metavar="DATA",
    )
    data_dir: str = flag(
        "data", "folder of CIFAR-10 and of the caches of image folders", metavar="DIR"
    )
    size: str | None = flag(
        None,
        "size to which a folder's images are cropped, such as 64 or 48x64 (default: 32)",
        metavar="HxW",
    )
    channels: int | None = flag(
        None, "channels of a folder's images: 3 for colour, 1 for grey (default: 3)", choices=(1, 3)
    )
    skip_broken: bool = flag(False, "leave out the files of a folder that are no images")
    labels: bool | None = flag(
        None,
        "learn classes: CIFAR-10's ten, or the subfolders of --data; a tenth of "
        "the labels is dropped, as sample.py --guidance needs (glyphs: always)",
    )
    limit: int | None = flag(
        None, "number of images to train on, a seeded choice (default: all)", low=1
    )

    # What learns it, and the process that it learns to reverse. A resumed run keeps all of these.
    init: str | None = flag(
        None,
        "checkpoint whose averaged weights a new run starts from, on other images, "
        "at another size or with other classes; its network, T and schedule are kept, "
        "and --lr is a tenth by default",
        group="network",
        metavar="PATH",
    )
    width: int | None = own("width", "channels at full resolution", low=4, high=8192)
    dropout: float | None = own("dropout", "dropout rate in the residual blocks", low=0, high=0.999)
    schedule: str | None = own("schedule", "noise schedule", choices=tuple(checkpoint.SCHEDULES))
    timesteps: int = flag(1000, "T, the number of diffusion steps", low=1, high=10**6)
    variance: str = flag(
        "fixed",
        "variances of the reverse steps: fixed, or learned by the network (improved.py)",
        choices=("fixed", "learned"),
    )

    # How it learns. The paper's text has no warm-up and no gradient clipping; its authors' code has both.
    epochs: int | None = flag(
        None,
        "passes over the data, in all (default: 100, or more if the images are "
        "few; photos on a CPU: what 50 minutes allow)",
        low=1,
        group="training",
    )
    batch_size: int | None = own("batch_size", "images a step, over all processes", low=1)
    micro_batch: str = flag(
        "auto",
        "images of a batch that are computed at a time; auto is what is fast and "
        "fits into half of the free memory",
        metavar="N",
    )
    lr: float | None = own("lr", "learning rate of Adam", low=0)
    warmup: int | None = own("warmup", "steps in which the learning rate rises from 0", low=0)
    decay: str | None = own("decay", "fall of the learning rate to 0", choices=("none", "cosine"))
    ema: float | None = own(
        "ema",
        "decay of the moving average of the weights; after n updates it is at "
        "most (1 + n) / (10 + n)",
        low=0,
        high=1,
    )
    flip: str | None = own("flip", "mirror images at random", choices=("yes", "no"))
    seed: int = flag(0, "seed of weights, noise and the order of images", low=0, high=2**31)

    # What is kept and shown.
    out: str = flag(
        "ckpt.pt",
        "checkpoint to write, of --init X.pt X-tuned.pt; grids go beside it",
        group="output",
        metavar="PATH",
    )
    resume: str | None = flag(
        None,
        "checkpoint of a run to go on with, by its own settings; it is also --out",
        metavar="PATH",
    )
    sample_every: int | None = flag(
        None, "epochs between grids of samples, 0 for none (default: a tenth of --epochs)", low=0
    )
    log: str | None = flag(
        None, "file to which each report is added as a line of JSON", metavar="PATH"
    )

    # Where it runs.
    device: str = flag(
        "auto", "device to compute on: auto, cpu, cuda, cuda:1, mps, ...", group="machine"
    )
    precision: str = flag(
        "auto",
        "precision of the network; auto is what a trial step shows to be faster",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = flag(False, "compile the network: slow to start, faster on a GPU")
    deterministic: bool = flag(
        False, "take only GPU kernels whose sums never vary: resuming is exact then"
    )


# --- The run -------------------------------------------------------------------------------------


def main(cfg, given):
    if cfg.resume and "out" not in given:
        cfg = replace(cfg, out=cfg.resume)
    with outputs.claimed(cfg.out):
        train(cfg, given)


def train(cfg, given):
    # Settings: the command line's, completed by what suits data and device, or those of the run to resume.
    saved, start = (checkpoint.load(path) if path else None for path in (cfg.resume, cfg.init))
    with checkpoint.refusing(cfg.resume or cfg.init):
        cfg, device = recipes.settled(cfg, given, saved, start)
    if (
        saved and data.is_folder(cfg.data) and workers.is_first()
    ):  # a path out of a file is shown first
        say(f"{cfg.resume}: goes on with the images of {cfg.data}")
    workers.share(cfg.batch_size)
    size = parse_size(cfg.size) if cfg.size else None
    if size:  # what the network cannot divide is refused now, not after an hour of reading images
        recipes.network(cfg, (cfg.channels, *size), 0, start)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    outputs.refuse(cfg)

    # Data: uint8 images, mapped into memory. The first process decodes them; the others read its files.
    workers.meet(device)
    with workers.first_goes_ahead():
        train_set, held_out = data.load_both(cfg, size)

    # Network, moving average and optimiser: new ones, or those of the run to resume.
    with checkpoint.refusing(cfg.resume or cfg.init):
        run = begin(cfg, saved, start, train_set, held_out, device)
        d = ddpm.Diffusion(run.about["process"]["beta"])
    if saved:  # one that is done is refused before the trial
        recipes.steps(cfg, run)

    # A trial step: the precision, the images at a time, and how long all of it will take.
    cost = budget.trial(
        run.net,
        run.about,
        cfg.batch_size // workers.place()[1],
        device,
        cfg.precision,
        cfg.micro_batch,
    )
    cfg = recipes.measured(cfg, run.about, cost, device.type)
    steps = recipes.steps(cfg, run)
    outputs.make_way(cfg)

    # The loop, to the last step or to a signal.
    monitor = Monitor(cfg, run.about["images"], run.step, steps, device)
    monitor.describe(run, d, cost, recipes.reason(cfg, run.about, device.type))
    for warning in () if saved else recipes.warnings(cfg, run.about, steps, d):
        note(f"warning: {warning}")
    learn(cfg, run, d, train_set, held_out, monitor, device)
    if workers.is_first():
        say(
            f"{cfg.out}: {steps} steps done; now: python sample.py --ckpt {command.typed(cfg.out)} "
            f"--out grid.png"
        )
    workers.end()


@dataclass
class Run:
    """What training changes, and what says which run it is. A checkpoint keeps both."""

    net: ddpm.UNet
    ema: ddpm.UNet  # the moving average of its weights: samples are drawn from it
    optimizer: torch.optim.Adam
    step: int
    about: (
        dict  # network (arguments of UNet), process, shape, classes, numbers of images, fingerprint
    )


def begin(cfg, saved, start, train_set, held_out, device):
    """The run before its first step, with the weights of `start` if there are any, or as it was saved.
    Refuses to go on with other images."""
    about = dict(
        shape=tuple(train_set.images.shape[1:]),
        classes=train_set.classes,
        images=len(train_set.images),
        held_out=len(held_out.images),
        fingerprint=data.fingerprint(train_set),
    )
    if saved:
        checkpoint.refuse_other_images(cfg.data, about, saved)
        about.update(network=saved["network"], process=saved["process"])
    else:
        about["network"] = recipes.network(cfg, about["shape"], len(about["classes"]), start)
        about["process"] = (
            start["process"]
            if start
            else checkpoint.process(cfg.schedule, cfg.timesteps, cfg.variance)
        )

    # The weights are drawn on the CPU, so that a seed gives the same ones on every device.
    torch.manual_seed(batches.mixed(cfg.seed, 0))
    net = ddpm.UNet(**about["network"]).to(device, memory_format=torch.channels_last)
    if start:
        net.load_state_dict(checkpoint.starting_weights(start, about["classes"]))
        say_fresh(cfg, start, about["classes"])
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(
        net.parameters(), cfg.lr, fused=device.type in ("cuda", "cpu", "mps")
    )
    run = Run(net, ema, optimizer, 0, about)
    if saved:
        net.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        checkpoint.check_optimizer(saved["optimizer"], optimizer)
        optimizer.load_state_dict(saved["optimizer"])
        run.step = saved["step"]
    return run


def say_fresh(cfg, start, classes):
    """Prints what a new run does not take over from the weights that it starts from."""
    new = [name for name in classes if name not in start["classes"]]
    few = ", ".join(new[:5]) + (", ..." if new[5:] else "")
    if workers.is_first():
        title = checkpoint.title(start, "ema")
        say(
            f"starts from {cfg.init}, {title}; afresh: optimiser, average and steps"
            + (f"; and the classes {few}, which begin as no label" if new else "")
        )


# --- The loop ------------------------------------------------------------------------------------


def learn(cfg, run, d, train_set, held_out, monitor, device):
    """Algorithm 1, step by step to the last. Now and then: report? save? stop? draw?"""
    model = workers.together(torch.compile(run.net) if cfg.compile else run.net)
    # Images that fit into a quarter of the GPU's free memory are kept there: no batch is copied.
    if (
        device.type == "cuda"
        and train_set.images.nbytes < 0.25 * torch.cuda.mem_get_info(device)[0]
    ):
        train_set = train_set._replace(images=train_set.images.to(device))
    objective = improved.loss_hybrid if cfg.variance == "learned" else ddpm.loss_simple
    every = cfg.epochs // 10 or 1 if cfg.sample_every is None else cfg.sample_every
    saved_at = time.monotonic()
    monitor.listen()
    model.train()
    while run.step < monitor.steps:
        # A batch is a function of seed and step alone: a resumed run draws what an uninterrupted one does.
        batch = batches.draw(
            run.step, train_set, d, device, cfg.batch_size, cfg.seed, cfg.flip == "yes"
        )
        lr = rate(cfg, run.step, monitor.steps)
        run.step += 1
        decay = min(
            cfg.ema, (1 + run.step) / (10 + run.step)
        )  # a young average forgets its first weights
        loss, norm = update(
            model,
            d,
            batch,
            run.optimizer,
            lr,
            run.ema,
            decay,
            cfg.precision == "bf16",
            objective,
            int(cfg.micro_batch),
        )
        monitor.add(run.step, loss, norm)

        # Nothing above waits for the device, which may be several steps behind. What follows does wait.
        if not monitor.due(run.step):
            continue
        monitor.report(run.step, lr, lambda: snapshots.held_out_loss(cfg, run, d, held_out, device))
        last, drawing = run.step == monitor.steps, every and monitor.ends(run.step, every)
        with monitor.aside():
            if (
                monitor.stopping or drawing or last or time.monotonic() - saved_at > 600
            ):  # SIGKILL loses this
                save(cfg, run, monitor)
                saved_at = time.monotonic()
            if monitor.stopping and not last:
                stop(cfg, run, monitor)
            if drawing and workers.is_first():
                snapshots.draw_grid(cfg, run, d, monitor.epoch(run.step))


def rate(cfg, step, steps):
    """The learning rate of a step: it rises over the warm-up, and may then fall to 0 along a cosine."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    return (
        cfg.lr
        * warm
        * (0.5 + 0.5 * math.cos(math.pi * step / steps) if cfg.decay == "cosine" else 1)
    )


def update(
    model, d, batch, optimizer, lr, ema, decay, bf16=False, objective=ddpm.loss_simple, micro=None
):
    """One step of Algorithm 1. Returns the loss and the norm of its gradient, still on the device.

    micro: images that are computed at a time, all by default. The sum of their gradients is the batch's.
    """
    params, B, total = optimizer.param_groups[0]["params"], len(batch[0]), 0.0
    micro = micro or B
    for first in range(0, B, micro):
        # Lines 2 to 4: the image, the step and the noise; batches.draw has drawn them.
        x0, y, t, eps = (None if part is None else part[first : first + micro] for part in batch)
        # Line 5: the gradient of the loss. Only the network computes in bf16; noise and loss stay float32.
        with workers.unsummed(model, unless=first + micro >= B):
            with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
                loss = objective(lambda xt, t, y=y: model(xt, t, y), d, x0, t, eps) * (len(x0) / B)
            loss.backward()
        total = total + loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(
        params, 1.0
    )  # the authors' code clips, the paper does not say so
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():  # the average, which samples are drawn from (App. B)
        torch._foreach_lerp_(list(ema.parameters()), params, 1 - decay)
    return total, norm


def save(cfg, run, monitor):
    """Writes the checkpoint, unless a weight is not finite: then the last good one stays."""
    sums = (float(sum(p.detach().sum() for p in net.parameters())) for net in (run.net, run.ema))
    monitor.refuse_infinite(run.step, 0, 0, *sums)
    if workers.is_first():
        # A run may be resumed from another folder: the path of its own is kept whole.
        place = os.path.abspath(cfg.data) if data.is_folder(cfg.data) else cfg.data
        checkpoint.save(
            cfg.out,
            dict(
                config=dict(asdict(cfg), data=place),
                **run.about,
                step=run.step,
                model=run.net.state_dict(),
                ema=run.ema.state_dict(),
                optimizer=run.optimizer.state_dict(),
            ),
        )


def stop(cfg, run, monitor):
    """Ends the run after a signal, with the exit status of that signal."""
    if workers.is_first():
        monitor.progress.close()
        say(
            f"stopped at step {run.step} of {monitor.steps}; go on with --resume {command.typed(cfg.out)}"
        )
    workers.wait()  # torchrun ends all processes once one has ended: the first must have saved
    sys.exit(128 + monitor.stops[0])


if __name__ == "__main__":
    command.run(main, Config, __doc__)
