"""Wrong calls and failures: one line, an exit status, and nothing changed."""

import os
import shlex

import pytest
import torch
from running import stripes

import evaluate
import figures
import sample
import train
from support import checkpoint


@pytest.mark.parametrize("module", [train, sample, evaluate])
def test_help_explains_every_flag(call, module):
    status, out, _ = call(module, "--help")
    assert status == 0 and "python " in out
    for name, f in module.Config.__dataclass_fields__.items():
        assert "--" + name.replace("_", "-") in out and f.metadata["text"].split()[0] in out


@pytest.mark.parametrize("module, flags, words", [
    (train, "--epoch 3", "unknown argument --epoch; did you mean --epochs?"),
    (train, "surplus", "unknown argument surplus"),
    (train, "--epochs", "--epochs: expected one argument"),
    (train, "--epochs three", "--epochs: invalid whole number value: 'three'"),
    (train, "--epochs 0", "--epochs: 0 is impossible; it must be at least 1"),
    (train, "--epochs 2.5", "invalid whole number"),
    (train, "--lr nan", "--lr: nan is impossible"),
    (train, "--ema 1.5", "--ema: 1.5 is impossible; it must be from 0 to 1"),
    (train, "--dropout 1", "--dropout: 1 is impossible"),
    (train, "--schedule quadratic", "invalid choice: 'quadratic'"),
    (train, "--device tpu", "--device tpu: not on this machine"),
    (train, "--device hpu", "--device hpu: not on this machine"),
    (train, "--device cuda:99", "--device cuda:99: not on this machine"),
    (train, "--compile --precision bf16 --device cpu", "loses gradients of a compiled network in bf16"),
    (train, "--size 32", "--size: only a folder of images takes it"),
    (figures, "--only embedding --log a.jsonl", "--log: the figure loss alone takes it"),
    (train, "--skip-broken", "--skip-broken: only a folder of images takes it"),
    (sample, "--ckpt {ckpt} --out a.png --grid quadratic", "--grid quadratic: chooses some of the 20 steps"),
    (train, "--data . --size 30x32", "multiples of 8; try 24x32 or 32x32"),
    (train, "--data . --size big", "--size big: must be one number or HEIGHTxWIDTH"),
    (train, "--data . --size 0", "--size 0: must be"),
    (train, "--resume ''", "--resume: must not be empty"),
    (train, "--lr inf", "--lr: inf is impossible"),
    (train, "--epochs 99999999999", "--epochs: 99999999999 is impossible"),
    (train, "--out a.pt --log a.pt", "--log a.pt: is the checkpoint"),
    (train, "--width 10", "--width 10: must be a multiple of 4"),
    (train, "--data . --out ckpt.pt", "--out ckpt.pt: is inside --data"),
    (sample, "--out a.png", "arguments are required: --ckpt"),
    (sample, "--ckpt {ckpt} --out a.jpg", "must end in .png, .gif, .webp, .npz, or in / for a folder"),
    (sample, "--ckpt {ckpt} --out a.png --steps 21", "the checkpoint has T = 20 steps"),
    (sample, "--ckpt {ckpt} --out a.png --eta 0 --variance beta", "--eta: belongs to DDIM, and --variance"),
    (sample, "--ckpt {ckpt} --out a.png --variance learned", "this network has learned none"),
    (sample, "--ckpt {ckpt} --out a.png --guidance -2", "--guidance: -2 is impossible"),
    (sample, "--ckpt {ckpt} --out a.png --label 7,Q", "--label Q: not a class of this checkpoint"),
    (train, "--variance guessed", "invalid choice: 'guessed'"),
    (sample, "--ckpt {ckpt} --out a.gif --n 99999 --steps 1", "too many for one .gif picture"),
    (sample, "--ckpt {ckpt} --out a.png --n 99999 --steps 1", "too many for one picture"),
    (sample, "--ckpt {ckpt} --out a.png --n 2000000000", "it must be from 1 to 1000000"),
    (sample, "--ckpt {ckpt} --out a.png --eta 2", "--eta: 2 is impossible"),
    (sample, "--ckpt {ckpt} --out a.png --label Q", "--label Q: not a class of this checkpoint; its classes"),
    (evaluate, "--ckpt {ckpt} --skip-broken", "only a folder of images takes it, and not glyphs"),
    (evaluate, "--ckpt {ckpt} --n 0", "--n: 0 is impossible"),
])  # fmt: skip
def test_a_wrong_call_is_one_line_and_status_2(call, ckpt, tmp_path, module, flags, words):
    stripes(40, 40).save(tmp_path / "image.png")
    status, out, err = call(module, *shlex.split(flags.format(ckpt=ckpt)))
    assert status == 2 and out == "" and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("module, flags, words", [
    (train, "--data nowhere", "error: --data nowhere: neither glyphs nor cifar10"),
    (train, "--data empty", "there are no images in it"),
    (train, "--out nowhere/ckpt.pt", "there is no folder nowhere"),
    (train, "--out empty", "is a folder"),
    (train, "--out new/", "is a folder"),
    (train, "--out /dev/null", "is not an ordinary file"),
    (train, "--data full/a.png", "it is a file"),
    (train, "--log text.pt", "--log text.pt: exists, and is not a log"),
    (sample, "--ckpt edited.pt --out a.png", "contents do not fit together"),
    (train, "--resume edited.pt", "contents do not fit together"),
    (train, "--resume settings.pt", "contents do not fit together"),
    (sample, "--ckpt variance.pt --out a.png", "contents do not fit together"),
    (sample, "--ckpt classes.pt --out a.png --label 1", "contents do not fit together"),
    (sample, "--ckpt empty --out a.png", "is a folder"),
    (evaluate, "--ckpt nan.pt --n 1", "not finite"),
    (train, "--resume nowhere.pt", "no such file"),
    (train, "--resume half.pt", "not a checkpoint of train.py, or not all of one"),
    (sample, "--ckpt flipped.pt --out a.png", "damaged: its checksum"),
    (sample, "--ckpt nowhere.pt --out a.png", "no such file"),
    (sample, "--ckpt half.pt --out a.png", "not a checkpoint of train.py, or not all"),
    (sample, "--ckpt text.pt --out a.png", "not a checkpoint of train.py, or not all"),
    (sample, "--ckpt pickle.pt --out a.png", "not a checkpoint of train.py, or not all"),
    (sample, "--ckpt tensor.pt --out a.png", "not a checkpoint of train.py, or not all"),
    (sample, "--ckpt newer.pt --out a.png", "its format, 3, is newer"),
    (sample, "--ckpt nan.pt --out a.png --n 1", "not finite"),
    (sample, "--ckpt {ckpt} --out nowhere/a.png", "there is no folder nowhere"),
    (sample, "--ckpt {ckpt} --out full/", "the folder is not empty"),
    (sample, "--ckpt {ckpt} --out .", "the folder is not empty"),
    (sample, "--ckpt {ckpt} --out text.pt/", "--out text.pt/: is there, and no folder"),
    (sample, "--ckpt {ckpt} --out pipe/", "--out pipe/: is there, and no folder"),
    (sample, "--ckpt {ckpt} --out away.png", "away.png: there is no folder"),
    (train, "--data loop.pt --out a.pt", "there is no such folder"),
    (train, "--resume loop.pt", "loop.pt: Too many levels of symbolic links"),
    (sample, "--ckpt pipe --out a.png", "pipe: is no ordinary file"),
    (figures, "--only embedding --out text.pt", "--out text.pt: is there, and no folder"),
    (figures, "--only loss --log pipe --out a", "--log pipe: is not an ordinary file"),
    (figures, "--only loss --log /dev/zero --out a", "--log /dev/zero: is not an ordinary file"),
    (evaluate, "--ckpt {ckpt} --data nowhere", "error: --data nowhere: neither glyphs nor cifar10"),
    (evaluate, "--ckpt {ckpt} --data full", "a.png: is in no subfolder"),
])  # fmt: skip
def test_a_failure_is_one_line_and_status_1(call, ckpt, strange, monkeypatch, module, flags, words):
    monkeypatch.chdir(strange)
    before = sorted(strange.rglob("*"))
    status, out, err = call(module, *flags.format(ckpt=ckpt).split())
    assert status == 1 and out == "" and err.count("\n") == 1 and words in err, err
    assert sorted(strange.rglob("*")) == before, "a file appeared or was lost"


@pytest.fixture(scope="module")
def strange(trained, tmp_path_factory):
    """A folder of files and folders that cannot be what they are taken for."""
    folder, whole = tmp_path_factory.mktemp("strange"), (trained[0] / "ckpt.pt").read_bytes()
    for name in ("empty", "full"):
        (folder / name).mkdir()
    (folder / "full" / "a.png").touch()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("hello")
    (folder / "pickle.pt").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    torch.save(torch.zeros(3), folder / "tensor.pt")
    (folder / "loop.pt").symlink_to("loop.pt")
    (folder / "away.png").symlink_to("nowhere/a.png")
    os.mkfifo(folder / "pipe")
    saved = checkpoint.load(trained[0] / "ckpt.pt")
    bad = {k: v * float("nan") for k, v in saved["ema"].items()}
    for name, change in {
        "edited.pt": {"network": {**saved["network"], "ch": 16}}, "newer.pt": {"ddpm_format": 3},
        "nan.pt": {"ema": bad}, "settings.pt": {"config": {**saved["config"], "lr": "fast"}},
        "variance.pt": {"config": {**saved["config"], "variance": "learned"}},
        "classes.pt": {"classes": list(range(10))},
    }.items():  # fmt: skip
        checkpoint.save(folder / name, {**saved, **change})
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (folder / "flipped.pt").write_bytes(flipped)
    return folder
