"""A look at a network while it trains: its loss on images held out, and a grid of its samples.

Both take the averaged weights, and little time beside training.
"""

import itertools

import torch

import ddpm
import improved
from support import batches, checkpoint, outputs, pictures, sampling
from support.files import replacing
from support.progress import Progress


@torch.no_grad()
def held_out_loss(cfg, run, d, held_out, device):
    """The simple loss on images that are never trained on, with the same t and noise each time; None if there
    are no such images. It computes on an eighth as many images as an epoch, or on 16."""
    if not len(held_out.images):
        return None
    count, learned, total = (
        min(512, max(16, run.about["images"] // 8)),
        checkpoint.learned(run.about),
        0.0,
    )
    progress, done = Progress("loss on images held out", count, "images"), 0
    for x0, y, t, eps in batches.fixed(held_out, d.T, count, device, int(cfg.micro_batch)):
        with autocast(cfg, device):
            model = lambda xt, t, y=y: run.ema(xt, t, y)  # noqa: E731
            loss = ddpm.loss_simple(improved.eps_only(model) if learned else model, d, x0, t, eps)
        total, done = total + loss * len(x0), done + len(x0)
        progress(done)
    progress.close()
    return (total / count).item()


def draw_grid(cfg, run, d, epoch):
    """Writes a grid of samples beside the checkpoint, in the time of a few training steps."""
    # Noise at every step (eta 1, or a variance that was learned) corrects the errors of a young network,
    # where eta 0 leaves specks. A training step costs three passes over its batch, and a grid four steps.
    classes = run.about["classes"]
    y, rows = sampling.class_labels(classes[:20], n=max(16, min(40, 4 * len(classes))))
    steps = min(d.T, 50, max(8, 12 * cfg.batch_size // len(y)))
    how = dict(steps=steps, clip=run.about["process"]["clip"])
    how.update(dict(variance="learned") if checkpoint.learned(run.about) else dict(eta=1.0))
    parts = [slice(i, i + int(cfg.micro_batch)) for i in range(0, len(y), int(cfg.micro_batch))]
    progress, done, x0 = (
        Progress("drawing a grid", steps * len(parts), "steps"),
        itertools.count(1),
        [],
    )
    for part in parts:
        with autocast(cfg, next(run.ema.parameters()).device):
            x0.append(sampling.sample(run.ema, d, run.about["shape"], range(len(y))[part],
                                      y[part] if classes else None, on_step=lambda *_: progress(next(done)),
                                      **how))  # fmt: skip
    progress.close()
    with replacing(outputs.grid_name(cfg.out, epoch)) as file:
        pictures.grid(pictures.to_uint8(torch.cat(x0)), rows).save(file, "PNG")


def autocast(cfg, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
