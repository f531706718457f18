"""Measure the quality of CIFAR-10 samples with a small classifier.

    python benchmarks/cifar10_quality.py --train                  once; 13 minutes of CPU time with AMX
    python benchmarks/cifar10_quality.py samples.npz [more.npz]   made by sample.py --n 500 --out samples.npz

As requested: the share of images that the classifier assigns to the requested class. Distance: the Fréchet
distance between 64 features, the last hidden layer, of the row's images and of 500 test images. It is NOT FID
and cannot be compared with published FIDs. A few hundred images bias it upwards, so every row has 500, 50 of
each class. The classifier was trained on the training images. The other test images are new to it, as samples are.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from support.data import cifar10


def conv(n_in, n_out, kernel=3, stride=1):
    layer = nn.Conv2d(n_in, n_out, kernel, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(n_out), nn.ReLU())


def classifier():
    """Return an untrained network of 1.35 million weights: images in [0, 255] -> class scores (B, 10)."""
    return nn.Sequential(
        *(nn.BatchNorm2d(3), conv(3, 64, kernel=4, stride=2), conv(64, 64), conv(64, 64)),  # 16x16
        *(conv(64, 128, stride=2), conv(128, 128), conv(128, 128)),  # 8x8
        *(conv(128, 256, stride=2), conv(256, 256), nn.AdaptiveAvgPool2d(1), nn.Flatten()),  # 4x4
        *(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    ).to(memory_format=torch.channels_last)


def augmented(images):
    """Shift each image by up to 4 pixels, and mirror half of them."""
    padded = nn.functional.pad(images.float(), (4, 4, 4, 4), mode="reflect")
    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (B, 3, 9, 9, 32, 32), not a copy
    row, column = torch.randint(9, (2, len(images)))
    images = windows[torch.arange(len(images)), :, row, column]
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)


def train(net, images, labels, epochs=10, batch=256):
    """Train with SGD and one cycle of the learning rate, in bf16 on CPUs that are faster in it."""
    steps = len(images) // batch
    optimiser = torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.25, epochs * steps, pct_start=0.25)
    bf16 = torch.cpu.get_capabilities().get("amx_bf16", False)
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(images))[: steps * batch].split(batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                scores = net(augmented(images[rows])).float()
            loss = nn.functional.cross_entropy(scores, labels[rows].long(), label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
        print(f"epoch {epoch} of {epochs}: loss {loss.item():.2f}", flush=True)


@torch.no_grad()
def predict(net, images, labels):
    """Return the features (B, 64) and the share of images whose most probable class is their label."""
    features = torch.cat([net.eval()[:-1](x.float()) for x in torch.from_numpy(images).split(500)])
    return features.double(), (net[-1](features).argmax(1).numpy() == labels).mean()


def frechet_distance(a, b):
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^1/2), where A and B are the covariances of a and b (N, 64)."""
    x = (a - a.mean(0)) / (len(a) - 1) ** 0.5  # A is x^T x
    y = (b - b.mean(0)) / (len(b) - 1) ** 0.5
    # The eigenvalues of A B are the squared singular values of x y^T, whose sum is the nuclear norm.
    cross = torch.linalg.matrix_norm(x @ y.T, "nuc")
    return ((a.mean(0) - b.mean(0)).norm() ** 2 + x.norm() ** 2 + y.norm() ** 2 - 2 * cross).item()


def balanced(images, labels, skip=0, each=50):
    """Return `each` images of each class, after the first `skip` of that class, and their labels."""
    rows = np.concatenate([np.flatnonzero(labels == k)[skip : skip + each] for k in range(10)])
    return images[rows], labels[rows]


def main():
    parser = argparse.ArgumentParser(description="Measure the quality of CIFAR-10 samples.")
    parser.add_argument("paths", nargs="*", metavar="samples.npz")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="folder of CIFAR-10")
    parser.add_argument("--train", action="store_true", help="train the classifier first")
    given = parser.parse_args()
    training = cifar10.load(given.data_dir, train=True)
    test = cifar10.load(given.data_dir, train=False)
    rows = {"real training images": balanced(*training)}
    rows["other test images"] = balanced(*test, skip=50)
    for path in given.paths:
        file = np.load(path)
        rows[path] = balanced(file["arr_0"].transpose(0, 3, 1, 2), file["arr_1"])
        if len(rows[path][1]) < 500 or [*file.get("classes", cifar10.CLASSES)] != cifar10.CLASSES:
            sys.exit(f"{path}: needs 50 samples of each CIFAR-10 class; use sample.py --n 500")
    torch.manual_seed(0)
    net = classifier()
    saved = pathlib.Path(given.data_dir) / "cifar10-classifier.pt"
    if given.train:
        train(net, *map(torch.from_numpy, training))
        torch.save(net.state_dict(), saved)
    net.load_state_dict(torch.load(saved, weights_only=True))
    print(f"{predict(net, *test)[1]:.1%} of the 10,000 test images are classified correctly")
    reference, _ = predict(net, *balanced(*test))
    print("as requested  distance")
    for name, row in rows.items():
        features, share = predict(net, *row)
        print(f"{share:12.1%}  {frechet_distance(features, reference):8.3f}  {name}")
    print("\n" + __doc__.split("\n\n")[-1].rstrip())


if __name__ == "__main__":
    main()
