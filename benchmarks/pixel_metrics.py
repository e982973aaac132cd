"""Pixel metrics of generated maps: counted in one pass, exact with all maps at hand, scikit-learn's AUROC; one run.

    python benchmarks/pixel_metrics.py [--maps 300] [--size 256] [--long 10000] [--banks 50]

Each side runs in a process of its own and generates the same maps, one at a time; the peak is that of the process above
what it held after its imports, the seconds are those of the metrics without the generator.  The counts also run alone
over `--long` maps, and once with `--banks` counts side by side, as `evaluate` has them for as many support draws.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
from sklearn.metrics import roc_auc_score

from anatomaly.evaluation.pixel_metrics import PixelCounts, pixel_metrics, region_shares


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=300)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--long", type=int, default=10_000)
    parser.add_argument("--banks", type=int, default=50)
    parser.add_argument("--side", nargs=3, metavar=("SIDE", "MAPS", "BANKS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, maps, banks = args.side
        print(json.dumps(measure(side, int(maps), args.size, int(banks))))
        return

    print("| side | maps | s | MB above imports | pixel AUROC | AUPRO | Dice max |\n|---|---|---|---|---|---|---|")
    short = {side: row(side, args.maps, args.size) for side in ("counts", "exact", "scikit-learn")}
    row("counts", args.long, args.size)
    row("counts", min(args.maps, 20), args.size, args.banks)
    counts, exact = short["counts"], short["exact"]
    print("\ncounts minus exact, and the bound that the counts give:")
    for name, bound in counts["bounds"].items():
        print(f"  {name}: {counts['metrics'][name] - exact['metrics'][name]:+.1e}, {bound:.1e}")
    sklearn = short["scikit-learn"]["metrics"]["pixel_auroc"]
    print(f"exact minus scikit-learn: {exact['metrics']['pixel_auroc'] - sklearn:+.1e}")


def row(side, maps, size, banks=1):
    """Measure one side in a new process and print its row."""
    words = [sys.executable, __file__, "--size", str(size), "--side", side, str(maps), str(banks)]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    figures = [f"{found['metrics'][name]:.7f}" if name in found["metrics"] else "" for name in ("pixel_auroc", "aupro")]
    dice = f"{found['metrics']['dice_max']:.7f}" if "dice_max" in found["metrics"] else ""
    name = side if banks == 1 else f"{side}, {banks} side by side"
    print(f"| {name} | {maps} | {found['seconds']:.1f} | {found['megabytes']:.0f} | {' | '.join([*figures, dice])} |")
    return found


def measure(side, maps, size, banks):
    """Seconds, peak memory and figures of one side."""
    before = peak()
    seconds, bounds = 0.0, {}
    if side == "counts":
        counts = [PixelCounts() for _ in range(banks)]
        for anomaly_map, mask in scenes(maps, size):
            started = time.perf_counter()
            shares = region_shares(mask)
            for bank, count in enumerate(counts):
                count.add(anomaly_map * (1 + np.float32(bank) / 64), mask, shares=shares)
            seconds += time.perf_counter() - started
        started = time.perf_counter()
        metrics, bounds = counts[0].metrics(), counts[0].bounds()
    else:
        pairs = list(scenes(maps, size))
        started = time.perf_counter()
        if side == "exact":
            metrics = pixel_metrics(*zip(*pairs, strict=True))
        else:
            scores, lesions = (np.concatenate([pair[k].ravel() for pair in pairs]) for k in range(2))
            metrics = {"pixel_auroc": float(roc_auc_score(lesions, scores))}
    seconds += time.perf_counter() - started
    return {"seconds": seconds, "megabytes": peak() - before, "metrics": metrics, "bounds": bounds}


def scenes(maps, size):
    """Positive maps over several factors of ten, every other one with lesions that score somewhat higher."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size]
    for number in range(maps):
        coarse = np.exp(0.9 * generator.standard_normal((-(-size // 8), -(-size // 8)), np.float32) - 2)
        anomaly_map = coarse.repeat(8, axis=0).repeat(8, axis=1)[:size, :size]
        anomaly_map *= 1 + np.float32(0.01) * generator.standard_normal((size, size), np.float32)
        mask = np.zeros((size, size), bool)
        for _ in range(generator.integers(1, 4) if number % 2 else 0):
            centre, radius = generator.uniform(0, size, 2), generator.uniform(1, size / 10)
            mask |= (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2
        anomaly_map[mask] *= np.float32(2)
        yield anomaly_map, mask


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
