"""Images per second of patch attention against D24FAD and patch nearest neighbours, in one run.

    python benchmarks/attention.py [--teachers efficientnet_lite0 wide_resnet50_2 vmamba_tiny] [--shots 8] [--batch 8]
                                   [--size 128] [--repeats 5]

All sides have the same teacher (random weights but for efficientnet_lite0), the same images and an encoded bank; the
time is that of `scoring.predict_tensor`, pixels to scores.  Sides take turns; the figures are medians, the ratios are
medians of ratios of neighbouring runs.  "training step" is one loss and its gradients on cached teacher features.
"""

import argparse
import statistics
import time

import torch
from machine import machine

from anatomaly.backbones import build_backbone
from anatomaly.methods import build_method
from anatomaly.scoring import predict_tensor
from anatomaly.types import Scoring

SIDES = ("d24fad", "attention", "nearest")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", default=["efficientnet_lite0", "wide_resnet50_2", "vmamba_tiny"])
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(args.batch, 3, args.size, args.size, generator=generator)
    supports = torch.rand(args.shots, 3, args.size, args.size, generator=generator)
    print(f"{machine()}, K = {args.shots}, batch {args.batch}, {args.size} px")
    print("| teacher | side | images/s | speed, D24FAD = 1 | training step, s |\n|---|---|---|---|---|")
    for name in args.teachers:
        weights = "auto" if name == "efficientnet_lite0" else "random"
        teacher = build_backbone(name, weights=weights, normalise=weights == "auto")
        methods = {side: build_method(side, teacher).eval() for side in SIDES}
        with torch.inference_mode():
            banks = {side: m.embed_support(m.extract_support(supports)) for side, m in methods.items()}
        times = {side: [] for side in SIDES}
        for repeat in range(args.repeats + 1):  # the first is the warm-up
            for side, method in methods.items():
                started = time.perf_counter()
                predict_tensor(method, queries, banks[side], scoring=Scoring())
                if repeat:
                    times[side].append(time.perf_counter() - started)
        for side in SIDES:
            speed = args.batch / statistics.median(times[side])
            ratio = statistics.median(a / b for a, b in zip(times["d24fad"], times[side], strict=True))
            step = f"{training_step(methods[side], queries[:4]):.2f}" if side != "nearest" else ""
            print(f"| {name} | {side} | {speed:.1f} | {ratio:.2f} | {step} |", flush=True)


def training_step(method, images):
    """Seconds of the loss and its gradients for 4 queries with 4 supports each."""
    with torch.no_grad():
        levels = [level.clone() for level in method.teachers["teacher"](images)]
    supports = {"teacher": [level[:, None].repeat(1, 4, *[1] * (level.ndim - 1)) for level in levels]}
    query = {"teacher": levels, "pasted": [level.flip(0) for level in levels]}
    query["mask"] = [torch.rand(len(images), *images.shape[2:]) > 0.9]
    method.train()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        method.training_loss(query, supports)["total"].backward()
        seconds.append(time.perf_counter() - started)
    method.eval()
    return min(seconds)


if __name__ == "__main__":
    main()
