"""Images per second and memory of the default beside plain nearest neighbours, from files to a report, in one run.

    python benchmarks/default_cost.py [--images 200] [--shots 8] [--repeats 3] [--presets matching nearest]

Each side is `anatomaly predict` as a process of its own on the same built-in PNG files, maps, overlays and report
included.  It is run with all images and with a quarter of them, in turns; the slope is the time of an image and the
rest that of starting.  Figures are medians, the ratio is that of neighbouring runs; memory is the largest of any
process of a run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

from anatomaly.synthetic.phantom import write_benchmark


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--presets", nargs="+", default=["matching", "nearest"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_benchmark(
            root / "data", train=args.shots + 4, test_normal=args.images, test_anomalous=1, size=256, tasks=("head_ct",)
        )
        for preset in args.presets:
            call("fit", "--preset", preset, "--data", root / "data", "--out", root / preset)
        normal = sorted((root / "data").rglob("train/*/*.png"))[: args.shots]
        tests = sorted((root / "data").rglob("test/*/*.png"))[: args.images]
        support = copies(normal, root / "support")
        few, many = copies(tests[: args.images // 4], root / "few"), copies(tests, root / "many")
        seconds = {preset: [] for preset in args.presets}
        memory = dict.fromkeys(args.presets, 0)
        for repeat in range(args.repeats + 1):  # the first is the warm-up
            for preset in args.presets:
                times = []
                for images in (few, many):
                    out = root / f"{preset}_{images.name}_{repeat}"
                    took, peak = call(
                        "predict", "--model", root / preset, "--support", support, "--images", images, "--out", out
                    )
                    times.append(took)
                    memory[preset] = max(memory[preset], peak)
                if repeat:
                    seconds[preset].append((times[1] - times[0]) / (len(tests) - len(tests) // 4))
    first = args.presets[0]
    print(f"{machine()}; {args.images} images of 256 px, K = {args.shots}")
    print(f"| preset | images/s | time of an image, {args.presets[-1]} = 1 | peak memory, GiB |\n|---|---|---|---|")
    for preset in args.presets:
        ratio = statistics.median(a / b for a, b in zip(seconds[preset], seconds[args.presets[-1]], strict=True))
        rate = 1 / statistics.median(seconds[preset])
        print(f"| {preset} | {rate:.1f} | {ratio:.2f} | {memory[preset] / 2**20:.2f} |")
    print(f"One {first} image: {1000 * statistics.median(seconds[first]):.0f} ms")


def call(*words):
    """Run the command line; seconds and the peak memory of its process in KiB."""
    command = [str(Path(sys.executable).with_name("anatomaly")), *map(str, words)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(message.decode())
    return time.perf_counter() - started, usage.ru_maxrss


def copies(files, folder):
    """A folder with links to the files."""
    folder.mkdir()
    for number, file in enumerate(files):
        (folder / f"{number:04}.png").symlink_to(file)
    return folder


if __name__ == "__main__":
    main()
