"""Check that the tools that compute FID read sample.py's files correctly.

    pip install pytorch-fid clean-fid            in a separate environment, with requirements.txt
    python tests/peers/read_samples.py --evaluator guided-diffusion/evaluations/evaluator.py

Runs each tool's own reading function on images of a small network, grey and in colour, without the
Inception networks, which these tools download. The evaluator is a file of openai/guided-diffusion. It is
optional and does not need TensorFlow here. Exits with 1 if a pixel differs.
"""

import argparse
import importlib.util
import pathlib
import subprocess
import sys
import tempfile
import types

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import ddpm  # noqa: E402
from support import checkpoint  # noqa: E402

N = 12


def samples(folder, channels):
    """Sample N images of a random network; return the folder, the .npz file and its pixels."""
    network = dict(in_channels=channels, out_channels=channels, ch=8, mult=(1, 2), blocks=1, attention=(),
                   dropout=0.0, groups=4, num_classes=None)  # fmt: skip
    weights = ddpm.UNet(**network).state_dict()
    checkpoint.save(folder / "ckpt.pt", dict(
        network=network, shape=(channels, 32, 32), classes=[], model=weights, ema=weights, step=0,
        process=checkpoint.process("linear", 5, "fixed")))  # fmt: skip
    for out in ("samples/", "samples.npz"):
        command = [ROOT / "sample.py", "--ckpt", folder / "ckpt.pt", "--n", str(N)]
        command += ["--out", f"{folder}/{out}"]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return folder / "samples", folder / "samples.npz", np.load(folder / "samples.npz")["arr_0"]


def pytorch_fid(folder):
    """Return the images that its data set reads from a folder: uint8 (N, H, W, 3)."""
    from pytorch_fid.fid_score import IMAGE_EXTENSIONS, TF, ImagePathDataset

    files = sorted(file for ext in IMAGE_EXTENSIONS for file in folder.glob(f"*.{ext}"))
    images = torch.stack(list(ImagePathDataset(files, TF.ToTensor())))
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def clean_fid(folder):
    """Return the images that reach its network, without the resizing."""
    from cleanfid import fid

    rows = fid.get_folder_features(str(folder), lambda x: x.flatten(1), num_workers=0, batch_size=5,
                                   device=torch.device("cpu"), verbose=False,
                                   custom_fn_resize=lambda image: image.astype(np.float32))  # fmt: skip
    return rows.reshape(N, 3, 32, 32).transpose(0, 2, 3, 1)


def adm(npz, evaluator):
    """Return the images that reach the network of guided-diffusion's evaluator."""
    tensorflow = types.ModuleType("tensorflow")
    tensorflow.compat = tensorflow.v1 = tensorflow
    names = ("tensorflow", "tensorflow.compat", "tensorflow.compat.v1")
    sys.modules.update(dict.fromkeys(names, tensorflow), requests=types.ModuleType("requests"))
    spec = importlib.util.spec_from_file_location("evaluator", evaluator)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.open_npz_array(str(npz), "arr_0") as reader:
        return np.concatenate(list(reader.read_batches(5)))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--evaluator", help="path of guided-diffusion's evaluations/evaluator.py")
    given, failed = parser.parse_args(), False
    for channels in (1, 3):
        with tempfile.TemporaryDirectory() as name:
            folder, npz, pixels = samples(pathlib.Path(name), channels)
            read = {"pytorch-fid": pytorch_fid(folder), "clean-fid": clean_fid(folder)}
            if given.evaluator:
                read["ADM evaluator"] = adm(npz, given.evaluator)
            for tool, images in read.items():
                same = images.shape == pixels.shape and np.array_equal(images, pixels)
                failed |= not same
                print(
                    f"{'ok' if same else 'DIFFERENT':>9}  {tool}, {channels} channel(s): {images.shape}"
                )
    sys.exit(failed)


if __name__ == "__main__":
    main()
