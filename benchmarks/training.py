"""Time of one training step of D24FAD or PDD against the release's procedure, in one run.

    python benchmarks/training.py [--method d24fad] [--shots 2] [--batch 16] [--size 128] [--repeats 3]
    python benchmarks/training.py --method pdd [--batch 10] [--size 256] [--repeats 3]

All sides train the same student from random weights on the same images.  "release" follows the released loop: fp32,
default memory layout, teachers run at every step; D24FAD's collects gradients nobody uses, PDD's VMamba scans with the
plain loop (image by image, which is faster and takes less memory than the release's whole batch; timed once).
"ours" freezes the teacher; "cached" takes its features from memory, as `fit` does from the first epoch on.
Sides take turns; the figures are medians, the ratios are medians of ratios of neighbouring runs.  PDD's sides share one
student, as in its release.
"""

import argparse
import resource
import statistics
import time

import torch
from machine import machine

from anatomaly.backbones import build_backbone
from anatomaly.detector.device import has_bf16
from anatomaly.methods import build_method
from anatomaly.methods.settings import PDDSettings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["d24fad", "pdd"], default="d24fad")
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    pdd = args.method == "pdd"
    args.batch, args.size = args.batch or (10 if pdd else 16), args.size or (256 if pdd else 128)

    generator = torch.Generator().manual_seed(0)
    query = torch.rand(args.batch, 3, args.size, args.size, generator=generator)
    support = torch.rand(args.batch, args.shots, 3, args.size, args.size, generator=generator)
    if pdd:
        make, support = PDDSide, None
    else:
        make = Side
    sides = {
        "release": make(query, support, released=True),
        **({"release, our scan": PDDSide(query, None, released=True, fast=True)} if pdd else {}),
        "ours fp32": make(query, support),
        "ours fp32, cached": make(query, support, cached=True),
    }
    if has_bf16():  # or it takes for ever
        sides["ours bf16"] = make(query, support, bf16=True)
        sides["ours bf16, cached"] = make(query, support, bf16=True, cached=True)
    times = {name: [] for name in sides}
    losses = {}
    for name, side in sides.items():  # also the warm-up
        started = time.perf_counter()
        losses[name] = side.step()
        if pdd and name == "release":
            times[name] = [time.perf_counter() - started] * args.repeats
    for _ in range(args.repeats):
        for name, side in sides.items():
            if not (pdd and name == "release"):
                started = time.perf_counter()
                side.step()
                times[name].append(time.perf_counter() - started)

    shots = "" if pdd else f", K = {args.shots}"
    print(f"{args.method}, {machine()}{shots}, batch {args.batch}, {args.size} px")
    bases = [name for name in sides if name.startswith("release")]
    print(f"| side | seconds a step | {' | '.join(f'times faster than {base}' for base in bases)} | first loss |")
    print("|---|---|---|" + "---|" * len(bases))
    for name in sides:
        ratios = [statistics.median(a / b for a, b in zip(times[base], times[name], strict=True)) for base in bases]
        cells = (name, f"{statistics.median(times[name]):.2f}", *(f"{r:.1f}" for r in ratios), f"{losses[name]:.4f}")
        print(f"| {' | '.join(cells)} |")
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
        run = self.method.teachers["teacher"].body if self.released else self.method.teachers["teacher"]
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


class PDDSide(Side):
    """One way of doing a training step of PDD on the paper's pair of teachers."""

    def __init__(self, images, support, *, released=False, fast=False, cached=False, bf16=False):
        self.images, self.released, self.fast, self.bf16 = images, released, fast, bf16
        teachers = [build_backbone(name, weights="random") for name in ("wide_resnet50_2", "vmamba_tiny_merged")]
        settings = {"shared_students": True, "cosine_sign": "release"}  # the same loss on all sides
        self.method = build_method("pdd", teachers, PDDSettings(**settings)).train()
        if released:
            for module in (self.method, *teachers):
                module.to(memory_format=torch.contiguous_format)
            teachers[1].body.use_scan("auto" if fast else "ref")
        self.optimizer = torch.optim.Adam(self.method.parameters(), lr=2e-3, betas=(0.5, 0.999))
        self.features = None
        if cached:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                self.features = self._features()

    def _features(self):
        """Features of both teachers and no support."""
        if self.released and not self.fast:
            parts = [self.method.extract(image[None]) for image in self.images]
            return {
                name: [torch.cat(levels) for levels in zip(*(part[name] for part in parts), strict=True)]
                for name in parts[0]
            }, {}
        return self.method.extract(self.images), {}


if __name__ == "__main__":
    main()
