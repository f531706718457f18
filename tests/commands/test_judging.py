"""The specification, of another file: how it is loaded, named, and refused where it cannot be judged."""

import subprocess
import sys

import judged
import pytest
from running import ROOT

SOURCE = (ROOT / "ddpm.py").read_text()
IMPROVED = (ROOT / "improved.py").read_text()


def test_other_files_are_judged_from_any_folder_by_the_names_of_their_equations(tmp_path):
    """sigma^2 z where sigma z is meant fails a test of Algorithm 2, with the variance in words, and a
    mean that is not detached one of iDDPM eq. 16; at the end stands which files were judged, and which
    of their names were not."""
    wrong = SOURCE.replace("at(sigma2.sqrt(), t, xt) * noise_like", "at(sigma2, t, xt) * noise_like")
    (tmp_path / "mine.py").write_text(wrong + "\n\ndef v_from_eps():\n    pass\n")
    (tmp_path / "more.py").write_text(IMPROVED.replace("eps_theta.detach()", "eps_theta"))
    command = [sys.executable, "-m", "pytest", ROOT / "tests" / "specification", "--ddpm", "mine.py",
               "--improved", "more.py", "-qk", "takes_each_step or learns_from"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=100)
    assert done.returncode == 1 and "FAILED" in done.stdout, done.stdout + done.stderr
    assert "test_algorithm2_takes_each_step_from_p" in done.stdout
    assert "AssertionError: variance of x_1: estimated" in done.stdout
    assert "test_iddpm_eq16_eps_learns_from_L_simple_alone[0.001]" in done.stdout
    assert f"judged: {tmp_path / 'mine.py'}\njudged: {tmp_path / 'more.py'}" in done.stdout
    assert "beyond the specification, not judged: v_from_eps" in done.stdout


def test_a_file_may_import_what_it_does_not_define(tmp_path, monkeypatch):
    """Names that come from elsewhere count as there; sys.modules is put back."""
    (tmp_path / "mine.py").write_text("from whole import *\n")
    (tmp_path / "whole.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "ddpm", sys.modules["ddpm"])
    module, beyond = judged.load(tmp_path / "mine.py")
    assert module.UNet.__module__ == "whole" and beyond == []


@pytest.mark.parametrize("source, words", [
    ("import sys; sys.exit('no')", "cannot be imported: SystemExit"),
    (SOURCE.replace("def normal_kl", "def kl"), "missing: normal_kl"),
    (SOURCE.replace("class UNet", "class Net"), "missing: UNet"),
    (SOURCE.replace("def p_mean", "def mean"), "missing: Diffusion.p_mean"),
    ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
    ("def linear_schedule(:", "cannot be imported: SyntaxError"),
], ids=["an exit", "no function", "no class", "no method", "a failing import", "no Python"])  # fmt: skip
def test_a_file_that_cannot_be_judged_is_refused_in_one_line(tmp_path, source, words):
    """One message, not a cascade of failures."""
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(pytest.UsageError) as refusal:
        judged.load(tmp_path / "mine.py")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
