"""The promise of `spine.predict_tensor` on every set of instructions this CPU has: a batch changes no number."""

import os
import subprocess
import sys

import pytest
import torch

#: From the oldest: what PyTorch and oneDNN may use, the flag in /proc/cpuinfo, and what MKL computes with.  The last is
#: "COMPATIBLE" once: what MKL does on a CPU it does not know.
SETS = {
    "default": ("SSE41", "sse4_1", "COMPATIBLE"),
    "avx2": ("AVX2", "avx2", "AVX2"),
    "avx512": ("AVX512_CORE", "avx512f", "AVX512"),
}

#: Run in a process of its own, since the variables are read once.  Two of the three supports are close to each other,
#: and phi is made stronger until their weights react to the sixth digit of a feature.
CHECK = """
import sys

import torch

from anatomaly.backbones import build_backbone
from anatomaly.methods import METHODS, build_method
from anatomaly.spine import embed_tensor, predict_tensor
from anatomaly.types import Scoring

torch.set_num_threads(int(sys.argv[2]))
assert torch.backends.cpu.get_cpu_capability() == sys.argv[1], torch.backends.cpu.get_cpu_capability()
generator = torch.Generator().manual_seed(0)
images = torch.rand(19, 3, 64, 64, generator=generator) * torch.linspace(0.3, 1, 19)[:, None, None, None]
queries, supports = images[:16], images[16:]
supports[1] = supports[0] + 0.02 * torch.rand(3, 64, 64, generator=generator)
lite0 = build_backbone("efficientnet_lite0")
for name in METHODS:
    method = build_method(name, [lite0, lite0] if name == "pdd" else [lite0], seed=3).eval()
    if name == "d24fad":
        for projection in method.l2w.projections:
            projection.weight.data *= 5

    def judge(batch):
        parts = [predict_tensor(method, part, bank, scoring=Scoring()) for part in queries.split(batch)]
        return [torch.cat(each) for each in zip(*parts) if each[0] is not None]

    bank, _ = embed_tensor(method, supports)
    alone = judge(1)
    if name == "d24fad":
        torch.testing.assert_close(alone[2].sum(dim=2), torch.ones(16, 3))
        undecided = (alone[2] > 0.05).sum(dim=2) > 1
        assert undecided.float().mean() > 0.1, "some weights must hang in the balance"
    for batch in (3, 8, 16):
        for field, got, expected in zip(("maps", "scores", "weights"), judge(batch), alone):
            worst = float((got - expected).abs().max())
            assert worst <= 1e-5, f"{name}: {field} of batches of {batch} are off by {worst:.1e}"
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("capability", SETS)
def test_a_batch_changes_no_number(capability, threads):
    isa, flag, mkl = SETS[capability]
    if flag not in os.popen("cat /proc/cpuinfo").read():
        pytest.skip(f"this CPU has no {flag}")
    chosen = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": isa, "MKL_CBWR": mkl}
    command = [sys.executable, "-c", CHECK, capability.upper(), str(threads)]
    done = subprocess.run(command, env={**os.environ, **chosen}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
