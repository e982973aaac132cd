"""Whole exams judged slice by slice: which axis, how slices are pooled, and whether slices are matched by position.

    python benchmarks/volumes.py FOLDER [--slices 8] [--intensity range:0..255] [--out runs/volumes.json]

FOLDER holds volumes (NIfTI files or DICOM series) in normal/ and abnormal/.  Every exam is judged by the built-in model
with the slices of all normal exams but one: a normal exam without itself, the j-th abnormal one without normal exam j
(counted round and round), so that all have as many supports.  The scores of all slices are kept in --out, from which a
second call makes the table.  Prints Markdown.
"""

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from anatomaly import Detector, load_manifest
from anatomaly.data.cuts import volumes_of
from anatomaly.data.loading import load_batches
from anatomaly.data.volume_grid import AXES
from anatomaly.data.windows import parse_intensity
from anatomaly.detector.places import NEAR, compare_placed, nearby
from anatomaly.evaluation.metrics import auroc, bootstrap

MATCHES = {"none": None, "position": NEAR}
POOLINGS = {"max": 1, "mean of the 3 highest": 3}


def encoded_volumes(detector, volumes, intensity):
    """Per volume: its rows, and what `method.encode` says of them."""
    preprocessing = replace(detector.preprocessing, intensity=intensity)
    for volume in volumes:
        batches = load_batches(volume.samples, preprocessing, batch_size=16)
        parts = [detector.encode([item.prepared.input for item in batch]) for batch in batches]
        yield volume.samples, [torch.cat(level) for level in zip(*parts, strict=True)]


def judged(detector, query, supports, near):
    """Scores of a volume's slices against those of other volumes."""
    levels = [torch.cat(level) for level in zip(*(encoded for _, encoded in supports), strict=True)]
    bank = {f"level_{i}": level.permute(0, 2, 3, 1).contiguous() for i, level in enumerate(levels)}
    places = [(row.cut.axis, row.cut.position) for rows, _ in supports for row in rows]
    rows, encoded = query
    chosen = [nearby(places, (row.cut.axis, row.cut.position), near) for row in rows]
    how = {"size": detector.preprocessing.size, "scoring": detector.scoring}
    return compare_placed(detector.method, encoded, bank, supports=chosen, **how).scores.tolist()


def measure(folder, slices, intensity):
    detector = Detector.default()
    results = []
    for axis in AXES:
        exams = {}
        for label, name in enumerate(("normal", "abnormal")):
            rows = load_manifest(folder / name).samples
            exams[label] = list(encoded_volumes(detector, volumes_of(rows, (axis,), slices=slices), intensity))
            print(f"<!-- {axis}: {len(exams[label])} {name} exams encoded -->", flush=True)
        for label, match in product(exams, MATCHES):
            for number, query in enumerate(exams[label]):
                left_out = number % len(exams[0])
                supports = [exam for k, exam in enumerate(exams[0]) if k != left_out]
                scores = judged(detector, query, supports, MATCHES[match])
                found = {"exam": str(query[0][0].path), "label": label, "axis": axis, "match": match, "scores": scores}
                results.append(found)
            print(f"<!-- {axis}, label {label}, {match}: done -->", flush=True)
    return {"slices": slices, "results": results}


def tell(told):
    results = told["results"]
    labels = {each["exam"]: each["label"] for each in results}
    counts = [sum(label == k for label in labels.values()) for k in (0, 1)]
    print(f"\n{counts[0]} normal and {counts[1]} abnormal exams, {told['slices']} slices of each along each axis.\n")
    print("| axis | slices pooled by | support_match none | support_match position |\n|---|---|---|---|")
    for axis, (pooling, top) in product((*AXES, "all"), POOLINGS.items()):
        cells = []
        for match in MATCHES:
            pooled = {exam: [] for exam in labels}
            for each in results:
                if each["match"] == match and axis in (each["axis"], "all"):
                    pooled[each["exam"]].append(np.mean(sorted(each["scores"])[-top:]))
            scores = [float(np.mean(pooled[exam])) for exam in labels]
            value = bootstrap(auroc, scores, list(labels.values()), samples=5000)
            cells.append(f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})")
        print(f"| {axis} | {pooling} | {' | '.join(cells)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slices", type=int, default=8, help="of each exam along each axis, evenly spread")
    parser.add_argument("--intensity", type=parse_intensity, default=parse_intensity("range:0..255"))
    parser.add_argument("--out", type=Path, default=Path("runs/volumes.json"))
    options = parser.parse_args()
    if not options.out.is_file():
        told = measure(options.folder, options.slices, options.intensity)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(told))
    tell(json.loads(options.out.read_text()))


if __name__ == "__main__":
    main()
