"""Images per second of D24FAD or PDD against the release's procedure, in one run.

    python benchmarks/inference.py [--method d24fad] [--shots 8] [--batch 16] [--size 128] [--repeats 5]
    python benchmarks/inference.py --method pdd [--batch 4] [--size 256] [--repeats 5]

Both sides use a WideResNet-50-2 teacher and its student with random weights, and the same images.
"release" follows the released evaluation: fp32, default memory layout, and for every batch of queries each of the K
supports is copied to the batch size and encoded again.  "ours" encodes the supports once into a bank.
PDD: both sides use WideResNet-50-2 and VMamba-Tiny with random weights and one shared student; "release" works image by
image in fp32 and default memory layout and scans with the plain loop.
Sides take turns; the figures are medians, the ratios are medians of ratios of neighbouring runs.
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
from anatomaly.scoring import anomaly_map, blur, compare_tensor, encode_tensor, image_score, predict_tensor
from anatomaly.types import Comparison, Scoring


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["d24fad", "pdd"], default="d24fad")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    pdd = args.method == "pdd"
    args.batch, args.size = args.batch or (4 if pdd else 16), args.size or (256 if pdd else 128)
    sides = pdd_sides(args) if pdd else d24fad_sides(args)
    sides = {name: run for name, run in sides.items() if has_bf16() or "bf16" not in name}  # or it takes for ever
    scores = {name: run() for name, run in sides.items()}  # also the warm-up
    times = {name: [] for name in sides}
    for repeat in range(args.repeats):
        for name, run in sides.items():
            if pdd and name == "release" and repeat:
                times[name].append(times[name][0])  # half a minute each: once is enough
                continue
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)

    shots = "" if pdd else f", K = {args.shots}"
    print(f"{args.method}, {machine()}{shots}, batch {args.batch}, {args.size} px")
    print("| side | images/s | ratio | largest score difference |\n|---|---|---|---|")
    for name in sides:
        speed = args.batch / statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(times["release"], times[name], strict=True))
        difference = ((scores[name] - scores["release"]).abs() / scores["release"].abs()).max().item()
        print(f"| {name} | {speed:.2f} | {ratio:.1f} | {difference:.1e} |")
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def d24fad_sides(args):
    method = build_method("d24fad", build_backbone("wide_resnet50_2", weights="random", normalise=False)).eval()
    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(args.batch, 3, args.size, args.size, generator=generator)
    supports = torch.rand(args.shots, 3, args.size, args.size, generator=generator)
    plain = build_method("d24fad", build_backbone("wide_resnet50_2", weights="random", normalise=False)).eval()
    plain.load_state_dict(method.state_dict())
    plain.to(memory_format=torch.contiguous_format)
    plain.teachers["teacher"].to(memory_format=torch.contiguous_format)
    scoring = Scoring()

    with torch.inference_mode():
        bank = method.embed_support(method.extract(supports))
        with torch.autocast("cpu", torch.bfloat16):
            bank_bf16 = method.embed_support(method.extract(supports))
    return {
        "release": lambda: release(plain, queries, supports),
        "ours fp32": lambda: predict_tensor(method, queries, bank, scoring=scoring).scores,
        "ours bf16": lambda: (
            compare_tensor(
                method,
                encode_tensor(method, queries, precision="bf16"),
                bank_bf16,
                size=(args.size, args.size),
                scoring=scoring,
            ).scores
        ),
    }


def pdd_sides(args):
    names, settings = ("wide_resnet50_2", "vmamba_tiny_merged"), {"shared_students": True}
    method, plain = (
        build_method("pdd", [build_backbone(name, weights="random") for name in names], PDDSettings(**settings)).eval()
        for _ in range(2)
    )
    for module in (plain, *plain.teachers.values()):
        module.to(memory_format=torch.contiguous_format)
    plain.teachers["global"].body.use_scan("ref")
    images = torch.rand(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    scoring = Scoring()

    def release_pdd():
        scores = []
        for image in images:
            encoded = plain.encode(plain.extract(image[None]))
            scored = compare_tensor(plain, encoded, {}, size=(args.size, args.size), scoring=scoring)
            scores.append(scored.scores)
        return torch.cat(scores)

    return {
        "release": torch.inference_mode()(release_pdd),
        "ours fp32": lambda: predict_tensor(method, images, {}, scoring=scoring).scores,
        "ours bf16": lambda: predict_tensor(method, images, {}, scoring=scoring, precision="bf16").scores,
    }


@torch.inference_mode()
def release(method, queries, supports):
    """The released procedure: every support copied to the batch size and encoded for every batch."""
    size = (queries.shape[2], queries.shape[3])
    encoded = method.student(method.teachers["teacher"].body(queries)[-1])
    shots = [method.student(method.teachers["teacher"].body(s.expand(len(queries), -1, -1, -1))[-1]) for s in supports]
    comparisons = []
    for level, query in enumerate(encoded):
        values = torch.stack([shot[level] for shot in shots], dim=1)  # (B, K, C, h, w)
        keys = torch.stack([method.l2w.project(level, shot[level]) for shot in shots], dim=1)
        weights = method.l2w.logits(query, keys).softmax(dim=1)
        comparisons.append(Comparison(query, torch.einsum("bk,bkchw->bchw", weights, values)))
    return image_score(blur(anomaly_map(comparisons, size), 4.0), Scoring())


if __name__ == "__main__":
    main()
