"""What one wrong support costs, whether the others tell it, and what leaving it out wins back.

    python benchmarks/support_screening.py FOLDER [--images 40] [--draws 5] [--out FILE]
           [--whole_patients] [--ignore_patients] [--clean_only]

FOLDER holds data sets with manifests (docs/manifest.md), a task each.  For every task and K, supports are drawn; then
one of them is exchanged for an anomalous image of the task, or for a normal image of another task.  Anomalous images
that serve as supports are not judged.  `screen` (`anatomaly support check`) sees the supports' own scores only, each by
images of other patients where the manifest names patients.  Prints Markdown.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch

from anatomaly import Detector, load_manifest
from anatomaly.data.loading import load_batches
from anatomaly.data.patients import patient_groups
from anatomaly.detector.screening import screen
from anatomaly.evaluation.metrics import auroc
from anatomaly.evaluation.protocols import draw_supports
from anatomaly.scoring import geometric_mean, leave_one_out, level_scores

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


def bank_of(supports):
    """What the built-in method's `embed_support` makes of encoded images."""
    return {f"level_{i}": level.permute(0, 2, 3, 1).contiguous() for i, level in enumerate(supports)}


def judged(detector, queries, supports):
    with torch.inference_mode():
        comparisons = detector.method.compare(queries, bank_of(supports))
        scores = level_scores(comparisons, detector.scoring)
        return geometric_mean(scores, [each.scale for each in comparisons]).numpy()


def own_scores(detector, supports, patients):
    how = {"size": detector.preprocessing.size, "scoring": detector.scoring, "patients": patients}
    return leave_one_out(detector.method, supports, bank_of(supports), **how).scores.tolist()


def with_all_of_patients(manifest, task, count):
    """Draws of normal training images as a folder lists them: all images of one patient after the other."""
    by_patient = {}
    for row in manifest.select(task=task, split="train"):
        by_patient.setdefault(row.patient_id or row.path, []).append(row)
    groups = list(by_patient.values())
    orders = [np.random.default_rng(draw).permutation(len(groups)) for draw in range(count)]
    return [[row for k in order for row in groups[k]][: max(SHOTS)] for order in orders]


def read(detector, folder, images, *, whole_patients):
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
        if whole_patients:
            draws = with_all_of_patients(manifest, task, 50)
        supports = sorted({row for draw in draws for row in draw}, key=str)
        tasks[task] = (Encoded(detector, [*rows, *wrong, *supports]), rows, wrong, draws)
        print(f"<!-- {task}: {len(supports)} supports, {len(rows)} tests -->", flush=True)
    return tasks


def measure(detector, tasks, judged_draws, *, kinds, ignore_patients):
    results = []
    for task, (encoded, rows, wrong, draws) in tasks.items():
        others = [other for other in tasks if other != task]
        labels = np.array([row.label for row in rows])
        queries = encoded.of(rows)
        for shots, (number, draw) in product(SHOTS, enumerate(draws)):
            clean = encoded.of(draw[:shots])
            other = tasks[others[number % len(others)]]
            wrongs = {
                "clean": (encoded, draw[shots - 1]),
                "anomalous": (encoded, wrong[number % len(wrong)]),
                "other task": (other[0], other[3][number][0]),
            }
            for kind in kinds:
                source, last = wrongs[kind]
                supports = [torch.cat([a[:-1], b]) for a, b in zip(clean, source.of([last]), strict=True)]
                patients = patient_groups([*draw[: shots - 1], last])
                if ignore_patients:
                    patients = range(shots)
                found = {"task": task, "shots": shots, "draw": number, "kind": kind}
                found |= {"scores": own_scores(detector, supports, patients), "patients": list(patients)}
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
        if not mine:
            continue
        flags = [[one.odd for one in screen(each["scores"], each["patients"])] for each in mine]
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
    parser.add_argument("--whole_patients", action="store_true", help="draw patients with all their images")
    parser.add_argument("--clean_only", action="store_true", help="exchange nothing: false alarms alone")
    parser.add_argument("--ignore_patients", action="store_true", help="judge every image by all others")
    parser.add_argument("--out", type=Path, default=Path("runs/screening.json"))
    options = parser.parse_args()
    if not options.out.is_file():
        detector = Detector.default()
        tasks = read(detector, options.folder, options.images, whole_patients=options.whole_patients)
        how = {"kinds": KINDS[: 1 if options.clean_only else None], "ignore_patients": options.ignore_patients}
        results = measure(detector, tasks, options.draws, **how)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results))
    tell(json.loads(options.out.read_text()))


if __name__ == "__main__":
    main()
