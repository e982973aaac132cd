"""Patch attention's fixed settings chosen anew for every task by the other tasks: what the gain is worth elsewhere.

    python benchmarks/nested_choice.py FOLDER runs/patch_attention [--seed 0] [--draws 3] [--teacher efficientnet_lite0]

FOLDER is the data of `anatomaly benchmark -c benchmarks/patch_attention.yaml`, the second its --out, whose models are
read.  Every setting is judged by its image AUROC minus that of patch nearest neighbours with the same supports; a
task's own figures are those of the setting with the best mean over the other tasks.  Maps are made at 32 x 32.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch

from anatomaly.data.loading import load_batches
from anatomaly.data.manifest import load_manifest
from anatomaly.detector.detector import Detector
from anatomaly.evaluation.metrics import auroc
from anatomaly.evaluation.protocols import draw_supports, samples_to_test
from anatomaly.methods import build_method
from anatomaly.scoring import anomaly_map, blur, compare_tensor, image_score, surroundings
from anatomaly.types import Scoring

SHOTS, GRID = (2, 4, 8), (32, 32)
#: Share of the learned surroundings, weights of the deepest level and of the teacher's own (shipped: 1, 1, 1), pooling.
SETTINGS = list(product((0.0, 0.5, 1.0), (0.5, 1.0, 2.0), (0.0, 1.0, 2.0), ("max", 0.01, 0.05)))
SHIPPED = (1.0, 1.0, 1.0, 0.05)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--teacher", default="efficientnet_lite0")
    args = parser.parse_args()
    manifest = load_manifest(args.data)
    gains = {}
    for task in manifest.tasks:
        model = args.runs / "models" / "attention" / args.teacher / task / f"seed_{args.seed}"
        gains[task] = gains_of(Detector.load(model, device="cpu"), manifest, task, args.draws, args.seed)
    print(
        f"{len(SETTINGS)} settings; AUROC minus nearest neighbours', K = {SHOTS}, seed {args.seed}, {args.draws} draws"
    )
    print("| task | shipped | best for the others | its setting |\n|---|---|---|---|")
    chosen = {}
    for task, own in gains.items():
        others = np.mean([gain.mean(axis=1) for other, gain in gains.items() if other != task], axis=0)
        best = int(others.argmax())
        chosen[task] = own[best]
        print(f"| {task} | {text(own[SETTINGS.index(SHIPPED)])} | {text(own[best])} | {SETTINGS[best]} |")
    shipped = np.mean([own[SETTINGS.index(SHIPPED)] for own in gains.values()], axis=0)
    print(f"| mean | {text(shipped)} | {text(np.mean(list(chosen.values()), axis=0))} | |")


def text(gain):
    return " / ".join(f"{value:+.3f}" for value in gain)


@torch.inference_mode()
def gains_of(detector, manifest, task, draws, seed):
    """(settings, K) image AUROC minus that of nearest neighbours, mean over draws."""
    rows = samples_to_test(manifest, task)
    labels = np.array([row.label for row in rows])
    batches = [tensor(batch) for batch in load_batches(rows, detector.preprocessing, batch_size=32)]
    method, nearest = detector.method, build_method("nearest", detector.method.teachers["teacher"])
    features = [method.extract(images) for images in batches]
    encoded, reference = ([each.encode(of) for of in features] for each in (method, nearest))
    gains = np.zeros((draws, len(SETTINGS), len(SHOTS)))
    for draw, supports in enumerate(draw_supports(manifest, task=task, shots=max(SHOTS), draws=draws, seed=seed)):
        (images,) = (tensor(batch) for batch in load_batches(supports, detector.preprocessing, batch_size=max(SHOTS)))
        whole = method.embed_support(method.extract_support(images))
        plain = nearest.embed_support(nearest.extract(images))
        for column, shots in enumerate(SHOTS):
            bank, other = ({name: t[:shots] for name, t in each.items()} for each in (whole, plain))
            scores = [
                compare_tensor(nearest, of, other, size=detector.preprocessing.size, scoring=Scoring()).scores
                for of in reference
            ]
            floor = auroc(torch.cat(scores).numpy(), labels)
            scores = torch.cat([all_scores(method.compare(each, bank), len(method.readings)) for each in encoded])
            gains[draw, :, column] = [auroc(of.numpy(), labels) - floor for of in scores.T]
    return gains.mean(axis=0)


def tensor(batch):
    return torch.from_numpy(np.stack([image.prepared.input for image in batch]))


def all_scores(comparisons, levels):
    """(B, settings) image scores."""
    plain = [blur(anomaly_map([c._replace(surround=0.0)], GRID), 1.0) for c in comparisons]
    around = [c.surround * surroundings(level) for c, level in zip(comparisons, plain, strict=True)]
    scores = []
    for share, deepest, teacher, pooled in SETTINGS:
        weights = [*[1.0] * (levels - 1), deepest, *[teacher] * (len(plain) - levels)]
        parts = zip(weights, plain, around, strict=True)
        maps = sum(weight * (level - share * wide) for weight, level, wide in parts)
        pooling = Scoring(pooling="max") if pooled == "max" else Scoring(pooling="topk", top_fraction=pooled)
        scores.append(image_score(maps, pooling))
    return torch.stack(scores, dim=1)


if __name__ == "__main__":
    main()
