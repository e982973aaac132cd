"""What one wrong support costs, whether the others tell it, and what leaving it out wins back.

    python benchmarks/support_screening.py FOLDER [--images 40] [--draws 5] [--out runs/screening.json]

FOLDER holds data sets with manifests (docs/manifest.md), a task each.  For every task and K, supports are drawn; then
one of them is exchanged for an anomalous image of the task, or for a normal image of another task.  Anomalous images
that serve as supports are not judged.  `screen` (`anatomaly support check`) sees the supports' own scores only.
Prints Markdown.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch

from anatomaly import Detector, load_manifest
from anatomaly.data.loading import load_batches
from anatomaly.detector.screening import screen
from anatomaly.evaluation.metrics import auroc
from anatomaly.evaluation.protocols import draw_supports
from anatomaly.scoring import geometric_mean, level_scores

SHOTS = (4, 8)
KINDS = ("clean", "anomalous", "other task")
WRONG = 10  # anomalous images kept as wrong supports, and normal ones of other tasks


class Encoded:
    """Images of one task, encoded once with the built-in model."""

    def __init__(self, detector, rows):
        self.rows = list(rows)
        self.place = {row: i for i, row in enumerate(self.rows)}
        batches = load_batches(self.rows, detector.preprocessing, batch_size=16)
        parts = [detector.encode([item.prepared.input for item in batch]) for batch in batches]
        self.levels = [torch.cat(level) for level in zip(*parts, strict=True)]

    def of(self, rows):
        """The encoded images of some of the rows."""
        index = [self.place[row] for row in rows]
        return [level[index] for level in self.levels]


def judged(detector, queries, supports):
    bank = {f"level_{i}": level.permute(0, 2, 3, 1).contiguous() for i, level in enumerate(supports)}
    with torch.inference_mode():
        comparisons = detector.method.compare(queries, bank)
        scores = level_scores(comparisons, detector.scoring)
        return geometric_mean(scores, [each.scale for each in comparisons]).numpy()


def own_scores(detector, supports):
    shots = len(supports[0])
    kept = [[i for i in range(shots) if i != k] for k in range(shots)]
    return [
        float(judged(detector, [level[k : k + 1] for level in supports], [level[kept[k]] for level in supports])[0])
        for k in range(shots)
    ]


def read(detector, folder, images):
    """Per task: encoded images, test rows with labels, and rows of wrong supports."""
    manifest, tasks = load_manifest(folder), {}
    for task in manifest.tasks:
        tests = manifest.select(task=task, split="test")
        order = np.random.default_rng(0).permutation
        anomalous = [tests.select(label=1).samples[i] for i in order(len(tests.select(label=1)))]
        normal = [tests.select(label=0).samples[i] for i in order(len(tests.select(label=0)))]
        wrong = anomalous[: min(WRONG, len(anomalous) // 3)]
        rows = [*normal[:images], *anomalous[len(wrong) :][:images]]
        draws = draw_supports(manifest, task=task, shots=max(SHOTS), draws=50)
        supports = sorted({row for draw in draws for row in draw}, key=str)
        tasks[task] = (Encoded(detector, [*rows, *wrong, *supports]), rows, wrong, draws)
        print(f"<!-- {task}: {len(supports)} supports, {len(rows)} tests -->", flush=True)
    return tasks


def measure(detector, tasks, judged_draws):
    results = []
    for task, (encoded, rows, wrong, draws) in tasks.items():
        others = [other for other in tasks if other != task]
        labels = np.array([row.label for row in rows])
        queries = encoded.of(rows)
        for shots, (number, draw) in product(SHOTS, enumerate(draws)):
            clean = encoded.of(draw[:shots])
            other = tasks[others[number % len(others)]]
            wrongs = {
                "clean": [level[-1:] for level in clean],
                "anomalous": encoded.of([wrong[number % len(wrong)]]),
                "other task": other[0].of([other[3][number][0]]),
            }
            for kind in KINDS:
                supports = [torch.cat([level[:-1], last]) for level, last in zip(clean, wrongs[kind], strict=True)]
                found = {"task": task, "shots": shots, "draw": number, "kind": kind}
                found["scores"] = own_scores(detector, supports)
                if number < judged_draws:
                    found["auroc"] = auroc(judged(detector, queries, supports), labels)
                    if kind == "clean":
                        fewer = [level[:-1] for level in clean]
                        found["without"] = auroc(judged(detector, queries, fewer), labels)
                results.append(found)
        print(f"<!-- {task}: done -->", flush=True)
    return results


def tell(results):
    print("\n| K | support exchanged | AUROC | found (flagged first) | any flag | AUROC, flagged ones left out |")
    print("|---|---|---|---|---|---|")
    for shots, kind in product(SHOTS, KINDS):
        mine = [each for each in results if (each["shots"], each["kind"]) == (shots, kind)]
        flags = [[one.odd for one in screen(each["scores"])] for each in mine]
        found = np.mean([flag[-1] for flag in flags])
        alarm = np.mean([any(flag) for flag in flags])
        told = [(each, flag) for each, flag in zip(mine, flags, strict=True) if "auroc" in each]
        before = np.mean([each["auroc"] for each, _ in told])
        clean = {(e["task"], e["draw"]): e for e in results if e["kind"] == "clean" and e["shots"] == shots}
        after = np.mean(
            [clean[each["task"], each["draw"]]["without"] if flag[-1] else each["auroc"] for each, flag in told]
        )
        print(f"| {shots} | {kind} | {before:.3f} | {found:.0%} | {alarm:.0%} | {after:.3f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=40, help="test images per class")
    parser.add_argument("--draws", type=int, default=5, help="draws that are judged on test images; 50 are screened")
    parser.add_argument("--out", type=Path, default=Path("runs/screening.json"))
    options = parser.parse_args()
    if not options.out.is_file():
        detector = Detector.default()
        results = measure(detector, read(detector, options.folder, options.images), options.draws)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results))
    tell(json.loads(options.out.read_text()))


if __name__ == "__main__":
    main()
