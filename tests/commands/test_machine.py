"""Devices, precision, files and terminals, as the commands meet them."""

import errno
import json
import os
import pty
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time

import far
import numpy as np
import pytest
import torch
from judge import close
from running import ROOT, TINY, run, start

import evaluate
import sample
import train
from support import checkpoint, devices, files, monitor, pictures
from support.errors import Failure


def test_the_commands_say_the_same_on_another_device_and_seldom_wait_for_it(call):
    """Training, stopped and resumed, sampling and evaluation, on the device of far.py: the CPU's losses,
    pictures and bits/dim, but for the order of sums. A GPU would be waited for at reports and at pictures
    and in the trial only: fewer times than there are steps, which are 32."""
    tiny = [*TINY, "--batch-size", 4, "--timesteps", 6, "--flip", "yes", "--dropout", 0.1]
    drawing = "--ckpt ckpt.pt --out a.npz --n 4 --guidance 1 --precision fp32 --steps".split()

    def results(device):
        losses = []
        for flags in (tiny, ["--resume", "ckpt.pt"]):
            status, out, err = call(
                train, *flags, "--epochs", 1 if flags is tiny else 2, "--device", device
            )
            assert status == 0, err
            losses += map(float, re.search(r"loss (.*), held out (.*),", out).groups())
        waits = [len(reads)]
        for steps in (6, 3):
            assert call(sample, *drawing, steps, "--device", device)[0] == 0
            waits.append(len(reads))
        _, out, err = call(evaluate, "--ckpt", "ckpt.pt", "--n", 2, "--device", device)
        bits = float(out.splitlines()[-1].split()[-3]) if out else err
        return losses, np.load("a.npz")["arr_0"].astype(float), bits, waits

    with far.device() as reads:
        near, away = results("cpu"), results("far")
    close("loss", away[0], near[0], 1e-3, 1.0)
    close("bits/dim", away[2], near[2], 1e-2, 1.0)
    close("pixel", away[1], near[1], 2, 1.0)
    training, *drawings = np.diff([0, *away[3]])
    assert near[3] == [0, 0, 0] and training < 32 and drawings == [2, 2], reads


@pytest.mark.parametrize(
    "precision, matmul, tf32", [("fp32", "highest", False), ("bf16", "high", True)]
)
def test_float32_is_not_tf32_unless_bfloat16_is_asked_for(precision, matmul, tf32):
    """Neither in products of matrices nor in convolutions, where CUDA's default is TF32."""
    try:
        devices.use_precision(bf16=precision == "bf16")
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        devices.use_precision(bf16=False)


def test_an_operation_that_a_device_lacks_is_one_line(call, monkeypatch, ckpt):
    """As log_ndtr, of the decoder, on Apple's GPUs."""

    def missing(x):
        raise NotImplementedError(
            "The operator 'aten::special_log_ndtr' is not there for MPS. More words."
        )

    monkeypatch.setattr(torch.special, "log_ndtr", missing)
    status, _, err = call(evaluate, "--ckpt", ckpt, "--n", 1, "--device", "cpu")
    assert status == 1 and err == (
        "evaluate.py: error: The operator 'aten::special_log_ndtr' is not there "
        "for MPS; try --device cpu, or PYTORCH_ENABLE_MPS_FALLBACK=1\n"
    )


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")],
    ids=["allocator", "start"],
)
def test_a_device_that_is_full_is_not_one_that_is_missing(call, monkeypatch, ckpt, error):
    """As when another process has all of its memory."""

    def empty(*size, device=None):
        raise error

    monkeypatch.setattr(torch, "empty", empty)
    status, _, err = call(sample, "--ckpt", ckpt, "--out", "a.png", "--device", "cuda")
    assert (status, err.count("\n")) == (
        1,
        1,
    ) and "out of memory; try a smaller --batch-size" in err


def test_an_output_that_takes_no_more_is_one_line(ckpt):
    """Also where Python buffers what is printed, and would find out at its very end."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, ROOT / "evaluate.py", "--ckpt", ckpt, "--n", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100
        )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "evaluate.py: error: " in done.stderr and "No space left" in done.stderr


def test_what_a_killed_writer_left_is_cleared_after_an_hour(tmp_path):
    """Another writer's partial file is left alone while it is young."""
    old, young = (tmp_path / f".a.pt.{pid}.partial" for pid in (1, 2))
    old.touch(), young.touch()
    os.utime(old, (0, 0))
    checkpoint.save(tmp_path / "a.pt", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [young.name, "a.pt"]


def test_progress_rewrites_one_line_on_a_terminal(ckpt, tmp_path):
    leader, follower = pty.openpty()
    command = [
        sys.executable,
        ROOT / "sample.py",
        "--ckpt",
        ckpt,
        "--out",
        tmp_path / "a.png",
        "--n",
        "4",
    ]
    subprocess.run(command, stderr=follower, stdout=subprocess.DEVNULL, check=True)
    shown = os.read(leader, 10_000).decode()
    assert "\rsampling: " in shown and "left" in shown and "\n" not in shown


# --- Streams, variables and signals --------------------------------------------------------------

SHORT = [*TINY, "--limit", "16", "--epochs", "1"]


@pytest.mark.parametrize("how", ["2>&-", ">&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full", "| true"])
def test_a_stream_that_is_closed_full_or_unread_does_not_cost_the_run(tmp_path, how):
    """The work is done and saved, and the status is 0."""
    command = f"{shlex.join([sys.executable, str(ROOT / 'train.py'), *SHORT])} {how}"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=tmp_path, timeout=100,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert checkpoint.load(tmp_path / "ckpt.pt")["step"] == 1


TORCHRUN = dict(
    WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29517"
)


@pytest.mark.parametrize("variables, words", [
    ({"WORLD_SIZE": "", "RANK": ""}, ""),
    ({"WORLD_SIZE": "1"}, ""),
    ({"RANK": "3", "LOCAL_RANK": "x"}, ""),
    ({"WORLD_SIZE": "4"}, "has WORLD_SIZE=4, but not what torchrun sets"),
    ({"WORLD_SIZE": "2", "RANK": "1"}, "start with torchrun, or unset WORLD_SIZE"),
    (TORCHRUN | {"WORLD_SIZE": "two"}, "has WORLD_SIZE=two"),
    (TORCHRUN | {"WORLD_SIZE": "0"}, "has RANK=0, WORLD_SIZE=0"),
    (TORCHRUN | {"RANK": "2"}, "has RANK=2, WORLD_SIZE=2"),
    (TORCHRUN | {"LOCAL_RANK": "1"}, "which no torchrun sets"),
    (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999, which no torchrun sets"),
], ids=str)  # fmt: skip
def test_variables_that_a_cluster_left_are_no_torchrun(call, monkeypatch, variables, words):
    """Empty ones count as none; half of them are one line."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, _, err = call(train, *SHORT)
    assert (status, words in err, "error" in err) == (2 if words else 0, True, bool(words)), err


@pytest.mark.parametrize("numpy, words", [
    ("raise ModuleNotFoundError(\"No module named 'numpy'\")", "No module named 'numpy'; the first command"),
    ("raise ValueError('a variable\\nmore')", "numpy cannot be loaded: a variable more\n"),
    ("raise ValueError", "numpy cannot be loaded: ValueError\n"),
    ("import os; os.kill(os.getpid(), 2)", ""),
], ids=["missing", "refused by a variable", "without words", "Ctrl-C"])  # fmt: skip
def test_what_happens_while_torch_is_loaded_is_one_line_at_most(
    tmp_path, monkeypatch, numpy, words
):
    """Tried with a numpy that does it."""
    (tmp_path / "numpy.py").write_text(numpy)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, out, err = run("sample.py", "--help", cwd=tmp_path)
    assert (status, out) == (1 if words else -signal.SIGINT, ""), err
    assert (
        err.startswith(f"sample.py: error: {words}") and err.count("\n") == 1 if words else not err
    ), err


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    """Where a command starts; a library of torch's would end the process."""
    there = shlex.join([sys.executable, str(ROOT / "sample.py"), "--help"])
    done = subprocess.run(["bash", "-c", f"mkdir gone && cd gone && rmdir ../gone && exec {there}"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1, "sample.py: error: the folder in which it was started is gone\n"), done  # fmt: skip


def test_a_process_that_waits_for_the_others_can_be_ended(tmp_path, monkeypatch):
    """The second of two never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (TORCHRUN | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    process = start("train.py", *SHORT, cwd=tmp_path)
    for _ in range(600):  # it listens once it waits
        with socket.socket() as caller:
            if not caller.connect_ex(("127.0.0.1", port)):
                break
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM and not os.path.exists(tmp_path / "ckpt.pt")
    process.communicate()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_in_a_write_leaves_no_partial_file(call, ckpt, monkeypatch, tmp_path, name):
    """Whatever signal ends it, and though it comes twice; the exit status is 128 and the signal's number."""
    number = getattr(signal, name)
    previous = signal.signal(number, signal.SIG_DFL)  # the tests themselves may be under nohup

    def killed(*args):
        try:
            os.kill(os.getpid(), number)
            time.sleep(9)
        finally:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(pictures, "grid", killed)
    try:
        status, _, err = call(sample, "--ckpt", ckpt, "--out", "a.png", "--n", 1, "--steps", 1)
        assert (status, err) == (128 + number, "sample.py: error: interrupted\n")
        assert not list(tmp_path.iterdir())
    finally:
        signal.signal(number, previous)


# --- Files ---------------------------------------------------------------------------------------


def test_a_file_that_is_replaced_keeps_its_permissions_and_its_links(tmp_path):
    """A private checkpoint stays private; what a link points to is replaced, and the link stays."""
    target = tmp_path / "a.pt"
    target.touch(mode=0o600)
    (tmp_path / "link.pt").symlink_to("a.pt")
    with files.replacing(tmp_path / "link.pt") as file:
        file.write(b"new")
    assert target.read_bytes() == b"new" and stat.S_IMODE(target.stat().st_mode) == 0o600
    assert (tmp_path / "link.pt").is_symlink()


@pytest.mark.parametrize("writer", [files.replacing, files.replacing_folder])
def test_a_disk_that_is_full_is_one_line_that_names_the_file_as_it_was_typed(
    tmp_path, monkeypatch, writer
):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(Failure, match=r"^new: No space left on device; nothing changed$"),
        writer("new"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_a_cache_is_replaced_and_not_followed(tmp_path):
    """Somebody else may have put it there."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "cache").symlink_to("mine")
    with files.replacing(tmp_path / "cache", through_links=False) as file:
        file.write(b"new")
    assert (tmp_path / "mine").read_text() == "precious" and (
        tmp_path / "cache"
    ).read_bytes() == b"new"


def test_what_another_user_left_in_a_shared_folder_is_refused_before_the_work(
    tmp_path, monkeypatch
):
    """As in /tmp, where everybody may write, and nobody may replace what is another's."""
    tmp_path.chmod(0o1777)
    (tmp_path / "a.png").touch()
    files.writable(str(tmp_path / "a.png"))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    files.writable(str(tmp_path / "b.png"))
    with pytest.raises(Failure, match="belongs to another user"):
        files.writable(str(tmp_path / "a.png"))


@pytest.mark.parametrize("letters, fits", [(246, True), (247, False), (260, False)])
def test_a_name_that_is_too_long_is_refused_before_the_work(call, tmp_path, letters, fits):
    """A disk takes 255 letters. Those of the grids are tried too: ckpt.0001.png for ckpt.pt."""
    status, out, err = call(train, *SHORT, "--out", "x" * letters + ".pt")
    assert status == (0 if fits else 1), err
    if not fits:
        assert out == "" and err.count("\n") == 1 and "File name too long" in err
    assert bool(list(tmp_path.iterdir())) == fits


def test_a_log_that_cannot_be_written_any_more_does_not_cost_the_run(call, monkeypatch):
    """A full disk under the log is noted once; the run goes on to its end."""

    def full(line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor.json, "dumps", full)
    status, _, err = call(train, *TINY, "--epochs", 2, "--log", "log.jsonl")
    assert status == 0 and err.count("--log log.jsonl: No space left") == 1, err


@pytest.mark.parametrize("content", ['{"name": "a package"}\n', "{", "[1]\n", "3\n", "text\n"])
def test_a_file_that_is_no_log_is_not_appended_to(call, tmp_path, content):
    (tmp_path / "package.json").write_text(content)
    status, _, err = call(train, *SHORT, "--log", "package.json")
    assert status == 1 and "is not a log of train.py" in err
    assert (tmp_path / "package.json").read_text() == content


def test_a_pipe_is_no_log(call, tmp_path):
    """Opened for writing, it would wait for a reader for good."""
    os.mkfifo(tmp_path / "pipe")
    status, _, err = call(train, *SHORT, "--log", "pipe")
    assert status == 1 and "pipe: is not an ordinary file" in err


def test_a_log_whose_last_line_is_torn_goes_on_with_a_whole_one(call, tmp_path):
    """A run that was killed in a write leaves half a line, which no reader takes."""
    (tmp_path / "log").write_text('{"step": 1, "epoch": 1, "loss": 1}\n{"step": 2, "ep')
    assert call(train, *SHORT, "--log", "log")[0] == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "log").read_text().splitlines()] == [
        1,
        1,
    ]


def test_a_log_inside_the_images_is_refused(call, tmp_path):
    """The next reading of the folder would take it for an image."""
    (tmp_path / "album").mkdir()
    status, _, err = call(train, "--data", "album", "--log", "album/log", "--size", 8)
    assert status == 2 and "--log album/log: is inside --data" in err


@pytest.mark.parametrize("text", ['{"a":' * 20_000, "[" * 200_000], ids=["objects", "lists"])
def test_a_log_that_is_too_deep_is_no_log(call, tmp_path, text):
    (tmp_path / "log").write_text(text)
    status, _, err = call(train, *SHORT, "--log", "log")
    assert status == 1 and "is not a log of train.py" in err
