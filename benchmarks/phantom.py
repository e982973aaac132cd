"""Speed of the phantom benchmark, and how far trivial image statistics get on it.

Run `python benchmarks/phantom.py`.  Prints one table row per task: images per second (one process, drawing only; the
fastest block of 50 images, so that other work on the machine counts little), then the image AUROC of mean gray,
standard deviation of gray and PNG size, each as max(a, 1 - a), on 200 normal and 200 anomalous images of different
patients.
"""

import argparse
import time

import numpy as np
from sklearn.metrics import roc_auc_score

from anatomaly.synthetic.phantom import TASKS, draw, png_bytes

BLOCK = 50  # images timed together


def trivial_statistics(pixels):
    """Mean and standard deviation of gray, and bytes of the PNG."""
    gray = pixels.mean(axis=0)
    return gray.mean(), gray.std(), len(png_bytes(pixels))


def measure(task, *, count, size, first_seed):
    """Return images per second and the three two-sided AUROCs."""
    draw(task, seed=first_seed, anomalous=True, size=size)  # imports and cached noise bases are not drawing time
    images, speed = [], 0.0
    for block in range(0, 2 * count, BLOCK):
        start = time.perf_counter()
        numbers = range(block, min(block + BLOCK, 2 * count))
        images += [draw(task, seed=first_seed + i, anomalous=i % 2 == 1, size=size) for i in numbers]
        speed = max(speed, len(numbers) / (time.perf_counter() - start))
    labels = [image.pathology is not None for image in images]
    statistics = np.array([trivial_statistics(image.pixels) for image in images])
    areas = [roc_auc_score(labels, column) for column in statistics.T]
    return speed, [max(area, 1 - area) for area in areas]


def main():
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="images per class and task")
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first patient")
    options = parser.parse_args()
    print("| task | images/s | mean gray | std of gray | PNG bytes |\n|---|---:|---:|---:|---:|")
    for task in TASKS:
        speed, areas = measure(task, count=options.count, size=options.size, first_seed=options.seed)
        print(f"| {task} | {speed:.0f} | " + " | ".join(f"{area:.2f}" for area in areas) + " |", flush=True)


if __name__ == "__main__":
    main()
