"""The committed weights: their bytes are those of their README, and the commands read them."""

import hashlib
import re

from running import ROOT

from support import checkpoint

WEIGHTS = ROOT / "weights" / "cifar10"


def test_the_weights_have_the_checksum_in_their_readme():
    content = (WEIGHTS / "diffusion_pytorch_model.safetensors").read_bytes()
    [promised] = re.findall(r"`([0-9a-f]{64})`", (WEIGHTS / "README.md").read_text())
    assert hashlib.sha256(content).hexdigest() == promised


def test_the_weights_are_a_network_for_the_ten_classes_of_cifar10():
    ckpt, net, d = checkpoint.load_model(str(WEIGHTS))
    assert ckpt["shape"] == (3, 32, 32)
    assert ckpt["process"]["variance"] == "learned"
    assert len(ckpt["classes"]) == net.num_classes == 10
    assert d.T == 1000
