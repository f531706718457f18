"""Train a DDPM on built-in digits, on CIFAR-10, or on a folder of images.

python train.py --epochs 5                           digits: nothing to download, no GPU needed
python train.py --data cifar10 --epochs 100          on a GPU, the paper's network and settings
python train.py --data path/to/images                your photos; with --labels, subfolders are classes
python train.py --resume ckpt.pt                     continue a stopped run
python train.py --init ckpt.pt --data path/to/images   a new run from trained weights: fine-tuning
torchrun --standalone --nproc-per-node 4 -- train.py --data cifar10    four GPUs, the same batches
"""

# Read this file from the top: settings; a run, from its data to its network; and train(), which is
# Algorithm 1 of the paper. support/ has a module for each other duty.

import copy
import math
import os
import pathlib
import signal
import sys
import time
from dataclasses import asdict, dataclass

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # python -P leaves it out

import torch

import ddpm
import improved
from support import batches, budget, checkpoint, command, data, devices, files, recipes, workers
from support import monitor as monitoring
from support.command import flag
from support.progress import note, say

# --- Settings ------------------------------------------------------------------------------------


def own(name, help, **limits):
    """Declare a flag whose default suits the data and the machine (support/recipes.py)."""
    where = f"CIFAR-10 on a GPU {recipes.PAPER[name]}; photos on a CPU {recipes.SMALL[name]}"
    return flag(None, f"{help} (default: {where}; digits {recipes.GLYPHS[name]})", **limits)


# Each field is a flag: its type, default, help text and limits. None stands for a default that
# follows from the data, from the machine, or from the run to resume.
@dataclass(frozen=True)
class Config:
    # The images. Digits and CIFAR-10 have a size and channels of their own.
    data: str = flag("glyphs", "glyphs (digits), cifar10, or a folder of images", group="data")
    data_dir: str = flag("data", "folder for CIFAR-10 and the caches of image folders")
    size: tuple | None = flag(None, "a folder's images become HxW (default: 32)", type=recipes.size)
    channels: int | None = flag(
        None, "read a folder in colour (3, default) or grey (1)", choices=(1, 3)
    )
    skip_broken: bool = flag(False, "skip the files of a folder that are not images")
    labels: bool | None = flag(None, "learn classes: CIFAR-10's, or a folder's subfolders")
    limit: int | None = flag(None, "train on N images, chosen with a fixed seed", low=1)

    # The network, and the process that it learns to reverse. A resumed run keeps all of these.
    init: str | None = flag(None, "start from the average weights of a checkpoint", group="network")
    width: int | None = own("width", "channels at full resolution", low=4, high=8192)
    dropout: float | None = own("dropout", "dropout rate in residual blocks", low=0, high=0.999)
    schedule: str | None = own("schedule", "noise schedule", choices=tuple(checkpoint.SCHEDULES))
    timesteps: int = flag(1000, "T, the number of diffusion timesteps", low=1, high=10**6)
    variance: str = flag("fixed", "variances of the reverse steps", choices=("fixed", "learned"))

    # The training. The paper's text has no warm-up and no clipping; its authors' code has both.
    epochs: int | None = flag(
        None, "total (default: 100 or more; photos on a CPU: 50 minutes)", low=1, group="training"
    )
    minutes: int | None = flag(None, "choose --epochs so that the run takes N minutes", low=1)
    batch_size: int | None = own("batch_size", "images per step, over all processes", low=1)
    micro_batch: int | None = flag(None, "images at a time, or auto", type=recipes.micro_batch)
    lr: float | None = own("lr", "learning rate of Adam", low=0)
    warmup: int | None = own("warmup", "steps in which the learning rate rises from 0", low=0)
    decay: str | None = own("decay", "how the learning rate falls to 0", choices=("none", "cosine"))
    ema: float | None = own("ema", "decay of the moving average of the weights", low=0, high=1)
    flip: bool | None = flag(None, "mirror images: yes or no (digits: no)", type=recipes.yes_or_no)
    seed: int = flag(0, "seed of weights, noise and the order of images", low=0, high=2**31)

    # The files. Sample grids are saved next to the checkpoint.
    out: str = flag("ckpt.pt", "checkpoint to write (with --init X.pt: X-tuned.pt)", group="output")
    resume: str | None = flag(None, "continue the run of this checkpoint, in the same file")
    sample_every: int | None = flag(None, "epochs between grids, 0: none (default: a tenth)", low=0)
    log: str | None = flag(None, "file to which each report is appended as a line of JSON")

    # The machine.
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps, ...", group="machine")
    precision: str = flag("auto", "auto is the faster one", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "compile the network: slow to start, faster on a GPU")
    deterministic: bool = flag(False, "only deterministic GPU kernels: resuming is bit-exact")


# --- The run -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What training changes. A checkpoint contains it."""

    net: ddpm.UNet
    ema: ddpm.UNet  # the moving average of its weights: samples are drawn from it
    optimizer: torch.optim.Adam
    step: int
    about: dict  # network and process, shape and classes, numbers of images, fingerprint
    out: str  # where it is saved
    version: tuple | None = None  # of that file, as this run last wrote it
    saved_at: float = 0.0  # time.monotonic() of the last save


def main(cfg, given):
    # The settings: the command line's, completed by a recipe, or those of the run to resume.
    saved = checkpoint.load(cfg.resume) if cfg.resume else None
    start = checkpoint.load(cfg.init) if cfg.init else None
    if saved:
        cfg = recipes.resumed(cfg, given, saved)
    device = devices.pick_device(workers.own_device(cfg.device))
    if not saved:
        cfg = recipes.complete(cfg, given, device, start)
    # Wrong settings and outputs are reported here, before images are read.
    recipes.check(cfg, given, start, device)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)

    # The data: uint8 images, mapped into memory. The first process decodes them for the others.
    workers.meet(device)
    with workers.first_goes_ahead():
        split = data.split_of(saved) if saved else data.SPLIT
        source = (cfg.data, cfg.data_dir, cfg.size, cfg.channels, cfg.skip_broken)
        train_set, held_out = data.load(*source, cfg.labels, cfg.limit, split)

    # Network, average and optimiser, and trial steps: precision, micro-batch, and the total time.
    run = begin(cfg, saved, start, train_set, held_out, device)
    d = ddpm.Diffusion(run.about["process"]["beta"])
    share = cfg.batch_size // workers.place()[1]
    # On a CPU, torch 2.13 loses gradients of a compiled network in bf16.
    precision = "fp32" if cfg.compile and device.type == "cpu" else cfg.precision
    cost = budget.trial(run.net, run.about, share, device, precision, cfg.micro_batch)
    cfg = recipes.measured(cfg, run.about["images"], run.step, cost, device)
    monitor = monitoring.Monitor(cfg, run, device)
    why = "those of the run" if saved else recipes.recipe_for(cfg, device)[1]
    monitor.describe(d, cost, why)
    if not saved:
        recipes.warn(cfg, run.about["images"], d, cost.seconds)

    # Nothing is overwritten: the existing checkpoint of another run is renamed to ckpt.1.pt.
    if workers.is_first() and not (saved and files.same(cfg.out, cfg.resume)):
        files.make_way(cfg.out)
    run.version = files.version(cfg.out)
    run.saved_at = time.monotonic()

    train(cfg, run, d, train_set, held_out, device, monitor)
    ckpt = command.typed(run.out)
    say(f"{run.out}: step {run.step} is done; now: python sample.py --ckpt {ckpt} --out grid.png")
    workers.end()


def begin(cfg, saved, start, train_set, held_out, device):
    """Return a new run, perhaps with the weights of the checkpoint `start`, or the run that was saved."""
    about = recipes.about(cfg, saved, start, train_set, held_out)
    # The weights are initialised on the CPU, so that a seed gives the same ones on every device.
    torch.manual_seed(batches.mixed(cfg.seed, 0))
    net = ddpm.UNet(**about["network"]).to(device, memory_format=torch.channels_last)
    if start:
        net.load_state_dict(checkpoint.starting_weights(start, about["classes"]))
    # The average starts as a copy. It stays in eval mode, so that held-out losses have no dropout.
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    fused = device.type in ("cuda", "cpu", "mps")
    optimizer = torch.optim.Adam(net.parameters(), cfg.lr, fused=fused)
    run = Run(net, ema, optimizer, step=0, about=about, out=cfg.out)
    if saved:
        run.step = saved["step"]
        net.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        checkpoint.load_optimizer(cfg.resume, saved["optimizer"], optimizer)
    return run


# --- Algorithm 1 ---------------------------------------------------------------------------------


def train(cfg, run, d, train_set, held_out, device, monitor):
    """Run Algorithm 1 of the paper, from run.step to the last step or to a signal.

    1  repeat
    2      x0 ~ q(x0)
    3      t ~ Uniform({1, .., T})
    4      eps ~ N(0, I)
    5      take a gradient descent step on
           grad_theta || eps - eps_theta(sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, t) ||^2
    6  until converged

    ddpm.loss_simple is what the gradient is taken of. The authors' code adds three things to the
    paper's text: a warm-up of the learning rate, gradient clipping, and the average weights.
    """
    model = workers.together(torch.compile(run.net) if cfg.compile else run.net)
    loss_function = improved.loss_hybrid if cfg.variance == "learned" else ddpm.loss_simple
    params = list(run.net.parameters())
    ema_params = list(run.ema.parameters())
    train_set = batches.on_device(train_set, device)
    model.train()
    while run.step < monitor.steps:
        # Lines 2 to 4: images x0 with labels y, timesteps t and noise eps. They depend on the seed
        # and the step only, so that a resumed run continues as if it had never stopped. y is None
        # without classes. A tenth of the labels is replaced by "no label", for guidance.
        x0, y, t, eps = batches.sample_batch(
            run.step, train_set, d.T, cfg.batch_size, cfg.seed, cfg.flip, device
        )

        # Line 5: the gradient of || eps - eps_theta(x_t, t) ||^2, summed over micro-batches that
        # fit into memory. Only the network computes in bf16; noise and loss stay float32.
        loss = 0.0
        for first in range(0, len(x0), cfg.micro_batch):
            part = slice(first, first + cfg.micro_batch)
            y_part = None if y is None else y[part]
            with workers.skip_all_reduce(model, when=part.stop < len(x0)):
                with devices.autocast(device, cfg.precision):
                    eps_theta = lambda xt, t, y=y_part: model(xt, t, y)  # noqa: E731
                    part_loss = loss_function(eps_theta, d, x0[part], t[part], eps[part])
                    part_loss = part_loss * (len(x0[part]) / len(x0))  # a part counts by its size
                part_loss.backward()
            loss = loss + part_loss.detach()

        # The step of Adam. A gradient whose norm over all weights is above 1 is scaled down to 1.
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        lr = learning_rate(cfg, run.step, monitor.steps)
        run.optimizer.param_groups[0]["lr"] = lr
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1

        # The moving average of the weights (App. B), with which images are sampled. Its decay is
        # small at first, so that it forgets the random weights of the start.
        decay = min(cfg.ema, (1 + run.step) / (10 + run.step))
        with torch.no_grad():
            torch._foreach_lerp_(ema_params, params, 1 - decay)

        # Nothing above waits for a GPU, which may be several steps behind. A report waits for it.
        monitor.losses.append(loss)
        if monitor.due():
            monitor.report(lr, lambda: monitoring.held_out_loss(cfg, run, d, held_out, device))
            save_and_stop(cfg, run, d, device, monitor)
            monitor.restart_clocks()


def learning_rate(cfg, step, steps):
    """Return the learning rate of a step: it rises over the warm-up, and may then fall along a cosine."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return cfg.lr * warm * (cosine if cfg.decay == "cosine" else 1)


# --- Saving and stopping -------------------------------------------------------------------------


def save_and_stop(cfg, run, d, device, monitor):
    """After a report: save, write a sample grid, and stop, where each is due.

    A checkpoint precedes each grid, so that a grid's weights can be found again. A signal stops the
    run here, between two steps, where a checkpoint contains all that the next step depends on.
    """
    every = max(1, cfg.epochs // 10) if cfg.sample_every is None else cfg.sample_every
    last = run.step == monitor.steps
    with_grid = every and monitor.ends(every)
    long_ago = time.monotonic() - run.saved_at > 600  # SIGKILL loses ten minutes at most
    if monitor.stopping or with_grid or last or long_ago:
        save(cfg, run)
    if with_grid and workers.is_first():
        monitoring.write_grid(cfg, run, d, int(monitor.epochs(run.step)), device)
    if monitor.stopping and not last:
        monitor.progress.close()
        ckpt = command.typed(run.out)
        say(f"stopped at step {run.step} of {monitor.steps}; continue with --resume {ckpt}")
        workers.wait()  # torchrun ends all processes once one has ended, and the first saves
        sys.exit(128 + (monitor.signals or [signal.SIGTERM])[0])


def save(cfg, run):
    """Write the checkpoint, unless a weight is not finite: then the last good checkpoint stays."""
    # One sum is read from the device, instead of every weight.
    total = sum(p.detach().sum() for p in run.net.parameters())
    monitoring.check_finite(cfg, run.step, total, "sum of the weights")
    run.saved_at = time.monotonic()
    if not workers.is_first():
        return
    # If another program has written to the same path meanwhile, both files are kept.
    if files.version(run.out) not in (None, run.version):
        taken = run.out
        run.out = files.free_name(run.out)
        note(f"note: another program wrote {taken}; this run is saved to {run.out}")
    config = asdict(cfg)
    if data.is_folder(cfg.data):  # the run may be resumed in another working directory
        config["data"] = os.path.abspath(cfg.data)
    parts = dict(model=run.net, ema=run.ema, optimizer=run.optimizer)
    # With step, seed and images, these states determine every later step bit for bit on a CPU.
    states = {name: part.state_dict() for name, part in parts.items()}
    checkpoint.save(run.out, dict(config=config, **run.about, step=run.step, **states))
    run.version = files.version(run.out)


if __name__ == "__main__":
    command.run(main, Config, __doc__)
