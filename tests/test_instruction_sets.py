"""The promise of `scoring.predict_tensor` on every set of instructions this CPU has: a batch changes no number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

#: From the oldest, by PyTorch's name: what oneDNN and MKL may use of it, and the flag a CPU that has it shows.
SETS = {
    "default": ("SSE41", "SSE4_2", "sse4_1"),
    "avx2": ("AVX2", "AVX2", "avx2"),
    "avx512": ("AVX512_CORE", "AVX512", "avx512f"),
}

#: Run in a process of its own, since the variables are read once.  The keys of the supports are made such that the
#: query hangs in the balance between them: so much as the seventh digit of a feature or of a logit moves the weights.
CHECK = """
import sys
import torch
from anatomaly.backbones import build_backbone
from anatomaly.methods import METHODS, build_method
from anatomaly.scoring import embed_tensor, encode_tensor, predict_tensor
from anatomaly.types import Scoring

torch.set_num_threads(int(sys.argv[2]))
assert torch.backends.cpu.get_cpu_capability() == sys.argv[1], torch.backends.cpu.get_cpu_capability()
images = torch.rand(19, 3, 64, 64, generator=torch.Generator().manual_seed(0))
images *= torch.linspace(0.3, 1, 19).view(-1, 1, 1, 1)
query, others, supports = images[:1], images[1:16], images[16:]
lite0 = build_backbone("efficientnet_lite0")
for name in METHODS:
    method = build_method(name, [lite0] * METHODS[name].teachers, seed=3).eval()
    bank, _ = embed_tensor(method, supports)
    if name == "d24fad":
        for level, encoded in enumerate(encode_tensor(method, query)):
            logits = method.l2w.logits(encoded, bank[f"key_{level}"], dtype=torch.float64)[0]
            bank[f"key_{level}"] = bank[f"key_{level}"].double() * (logits[0] / logits).view(-1, 1, 1, 1)
    alone = predict_tensor(method, query, bank, scoring=Scoring())
    if name == "d24fad":
        torch.testing.assert_close(alone.weights, torch.full((1, 3, 3), 1 / 3), rtol=0, atol=1e-2)
    for size, place in ((3, 2), (8, 0), (8, 7), (16, 9)):
        batch = torch.cat([others[:place], query, others[place : size - 1]])
        judged = predict_tensor(method, batch, bank, scoring=Scoring())
        for field in ("maps", "scores") if alone.weights is None else ("maps", "scores", "weights"):
            off = float((getattr(judged, field)[place] - getattr(alone, field)[0]).abs().max())
            assert off <= 1e-5, f"{name}: {field} of image {place + 1} of {size} are off by {off:.1e}"
"""


def run(capability, threads):
    """Run the check as on a CPU that has this set and no later one, or skip."""
    onednn, mkl, flag = SETS[capability]
    info = Path("/proc/cpuinfo")
    if not info.is_file() or flag not in info.read_text().split():
        pytest.skip(f"this CPU has no {flag}, or does not say so")
    chosen = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
    waits = {"OMP_WAIT_POLICY": "PASSIVE"}  # a thread that waits leaves its core to other tests
    command = [sys.executable, "-c", CHECK, capability.upper(), str(threads)]
    done = subprocess.run(command, env={**os.environ, **chosen, **waits}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("capability", SETS)
def test_a_batch_changes_no_number(capability):
    run(capability, threads=1)


def test_a_batch_changes_no_number_in_two_threads():
    run(torch.backends.cpu.get_cpu_capability().lower(), threads=2)
