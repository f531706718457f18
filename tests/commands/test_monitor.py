"""support/monitor.py: reports, the log, stop signals, and looks at the network."""

import json
import pathlib
import signal

import pytest
import torch
from running import TINY

import ddpm
import train
from support import checkpoint, monitor, sampling
from support.errors import Failure

CPU = torch.device("cpu")
SHORT = [*TINY, "--epochs", 1, "--log", "log.jsonl"]


@pytest.fixture
def watch():
    """Return the monitor of two steps; signal handlers are restored afterwards."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    run = train.Run(None, None, None, step=1, about=dict(images=8), out="a.pt")
    yield monitor.Monitor(train.Config(epochs=1, batch_size=4), run, CPU)
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def entries(path="log.jsonl"):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


# --- The log -------------------------------------------------------------------------------------


def test_the_log_is_json_lines_of_numbers_that_end_with_the_last_epoch(call):
    """Steps of 16 in 50 images do not end with an epoch; the log ends with epoch 2, not 2.24."""
    flags = [flag for flag in TINY if flag not in ("--limit", "64")]
    assert call(train, *flags, "--limit", 50, "--epochs", 2, "--log", "log.jsonl")[0] == 0
    lines = entries()
    assert lines[-1]["step"] == 7 and lines[-1]["epoch"] == 2
    for line in lines:
        assert {"step", "epoch", "loss", "lr", "images_per_s", "memory_gb", "seconds"} <= set(line)
        assert all(isinstance(number, (int, float)) for number in line.values())
        assert ("held_out" in line) == (line["step"] in (4, 7))


@pytest.mark.parametrize("rest", ['{"step": 2, "loss": 0.5, "epoch": 1}', '{"step": 2, "ep'])
def test_a_log_is_never_truncated(call, tmp_path, rest):
    """Neither a last line without a newline nor half a line of a killed run is removed."""
    old = '{"step": 1, "epoch": 1, "loss": 1}\n' + rest
    (tmp_path / "log.jsonl").write_text(old)
    assert call(train, *SHORT)[0] == 0
    text = (tmp_path / "log.jsonl").read_text()
    assert text.startswith(old + "\n") and json.loads(text.splitlines()[-1])["step"] == 4


@pytest.mark.parametrize("content", ['{"name": "a package"}\n', "{", "[1]\n", "text\n"])
def test_a_file_that_is_not_a_log_is_not_appended_to(tmp_path, content):
    (tmp_path / "package.json").write_text(content)
    with pytest.raises(Failure, match=r"--log .* is not a log of train\.py"):
        monitor.open_log(str(tmp_path / "package.json"))
    assert (tmp_path / "package.json").read_text() == content


# --- Time and signals ----------------------------------------------------------------------------


def test_ctrl_c_is_answered_at_once_and_the_second_one_ends_the_run(watch, capfd):
    """Before the step is over, which may take a minute."""
    assert not watch.due()
    signal.raise_signal(signal.SIGINT)
    assert "stopping after this step; Ctrl-C again to stop now" in capfd.readouterr().err
    assert watch.due() and watch.signals == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_sigterm_does_not_end_the_run_a_second_time(watch, capfd):
    """A scheduler may send it twice; the checkpoint is written all the same."""
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert watch.due() and capfd.readouterr().err.count("stopping after this step") == 1


def test_a_number_that_is_not_finite_is_found_although_nothing_reads_it_at_once(watch):
    watch.losses += [torch.tensor(1.0), torch.tensor(float("inf")), torch.tensor(1.0)]
    with pytest.raises(Failure, match="step 1: the loss is inf"):
        watch.report(0.1, lambda: None)


# --- Looks at the network ------------------------------------------------------------------------


@pytest.mark.parametrize("batch, classes", [(32, 10), (32, 0), (128, 10), (64, 100)])
def test_a_grid_takes_the_time_of_a_few_steps(monkeypatch, tmp_path, batch, classes):
    """A step computes three passes over its batch, and a grid at most twelve."""
    seen = []

    def sample(net, d, shape, seeds, labels, steps, **how):
        seen.append(len(seeds) * steps)
        return torch.zeros(len(seeds), *shape)

    monkeypatch.setattr(sampling, "sample", sample)
    about = dict(
        classes=[str(k) for k in range(classes)],
        shape=(3, 8, 8),
        network=dict(out_channels=3),
        process=checkpoint.process("cosine", 1000, "fixed"),
    )
    cfg = train.Config(batch_size=batch, micro_batch=16, precision="fp32")
    run = train.Run(None, None, None, 0, about, str(tmp_path / "a.pt"))
    monitor.write_grid(cfg, run, ddpm.Diffusion(ddpm.cosine_schedule()), 1, CPU)
    assert sum(seen) <= 12 * batch and (tmp_path / "a.0001.png").is_file()
