"""How often normal images of a set are told to come from elsewhere than their supports, and images of other sets.

    python benchmarks/origins.py FOLDER [--shots 8] [--draws 50]

FOLDER holds data sets with manifests (docs/manifest.md), a task each.  Supports are drawn from the normal training
images; told are the normal test images (a false alarm) and one image of each other task (a difference).  No model is
needed.  Prints Markdown.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from anatomaly import load_manifest
from anatomaly.data.origin import difference
from anatomaly.data.readers import read_image
from anatomaly.evaluation.protocols import draw_supports


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--draws", type=int, default=50)
    options = parser.parse_args()
    manifest, known = load_manifest(options.folder), {}

    def origin(row):
        if row not in known:
            known[row] = read_image(row.path, frame=row.frame).origin
        return known[row]

    tests = {task: list(manifest.select(task=task, split="test", label=0)) for task in manifest.tasks}
    print(f"K = {options.shots}, {options.draws} draws\n")
    print("| set | images | told, of its own | told, of other sets | of what |\n|---|---|---|---|---|")
    for task, rows in tests.items():
        draws = draw_supports(manifest, task=task, shots=options.shots, draws=options.draws)
        banks = [[origin(row) for row in draw] for draw in draws]
        own = [difference(origin(row), bank) for bank in banks for row in rows]
        others = [found[0] for other, found in tests.items() if other != task and found]
        foreign = [difference(origin(row), bank) for bank in banks for row in others]
        of_what = Counter(each.partition(",")[0] for each in own if each)
        told = "; ".join(f"{words} ({count / len(own):.1%})" for words, count in of_what.most_common())
        shares = [f"{np.mean([each is not None for each in some]):.1%}" if some else "" for some in (own, foreign)]
        print(f"| {task} | {len(rows)} | {shares[0]} | {shares[1]} | {told} |", flush=True)


if __name__ == "__main__":
    main()
