"""Time of one D24FAD training step against the release's procedure, in one run.

    python benchmarks/training.py [--shots 2] [--batch 16] [--size 128] [--repeats 3]

Both sides train the WideResNet-50-2 student from random weights on the same episodes.  "release" follows the released
loop: fp32, default memory layout, teacher run at every step with all its tensors collecting gradients nobody uses.
"ours" freezes the teacher; "cached" takes its features from memory, as `fit` does from the first epoch on.
Sides take turns; the figures are medians, the ratios are medians of ratios of neighbouring runs.
"""

import argparse
import os
import resource
import statistics
import time

import torch

from anatomaly.backbones import build_backbone
from anatomaly.methods import build_method


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    query = torch.rand(args.batch, 3, args.size, args.size, generator=generator)
    support = torch.rand(args.batch, args.shots, 3, args.size, args.size, generator=generator)
    sides = {
        "release": Side(query, support, released=True),
        "ours fp32": Side(query, support),
        "ours fp32, cached": Side(query, support, cached=True),
        "ours bf16": Side(query, support, bf16=True),
        "ours bf16, cached": Side(query, support, bf16=True, cached=True),
    }
    losses = {name: side.step() for name, side in sides.items()}  # also the warm-up
    times = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            side.step()
            times[name].append(time.perf_counter() - started)

    print(f"{os.cpu_count()} cores, torch {torch.__version__}, K = {args.shots}, batch {args.batch}, {args.size} px")
    print("| side | seconds a step | ratio | loss of the first step |\n|---|---|---|---|")
    for name in sides:
        ratio = statistics.median(a / b for a, b in zip(times["release"], times[name], strict=True))
        print(f"| {name} | {statistics.median(times[name]):.2f} | {ratio:.1f} | {losses[name]:.4f} |")
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


class Side:
    """One way of doing a training step."""

    def __init__(self, query, support, *, released=False, cached=False, bf16=False):
        self.query, self.support, self.released, self.bf16 = query, support, released, bf16
        teacher = build_backbone("wide_resnet50_2", weights="random", normalise=False)
        self.method = build_method("d24fad", teacher).train()
        if released:
            self.method.to(memory_format=torch.contiguous_format)
            teacher.to(memory_format=torch.contiguous_format).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.method.parameters(), lr=1e-4, betas=(0.5, 0.999))
        self.features = None
        if cached:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                self.features = self._features()

    def _features(self):
        """Teacher features of queries and of supports (B, K, ...)."""
        run = self.method.teacher.body if self.released else self.method.teacher
        shots = [run(self.support[:, k])[-1] for k in range(self.support.shape[1])]
        return {"teacher": list(run(self.query))[-4:]}, {"teacher": [torch.stack(shots, dim=1)]}

    def step(self):
        """One optimiser step; returns the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            query, support = self.features or self._features()
            loss = self.method.training_loss(query, support)["total"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


if __name__ == "__main__":
    main()
