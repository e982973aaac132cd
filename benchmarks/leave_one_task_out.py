"""Few-shot on tasks nobody trained on: every task is held out once, the student learns from the others.

    python benchmarks/leave_one_task_out.py MANIFEST_OR_FOLDER --out RUNS [--shots 4] [--draws 5] [--epochs 70] ...

MANIFEST_OR_FOLDER is anything `anatomaly data check` accepts that holds at least two tasks (a folder of data sets, each
with its manifest.csv, is one).  Per task and K it prints image AUROC as mean +- sd over the support draws with the 95 %
bootstrap interval of the mean, for D24FAD and, in the same run on the same teacher, images and draws, two references:
the untrained student, and patch nearest neighbours of the teacher's features.  No target label is read before the
scores are final: the checkpoint is chosen on pasted lesions in held-out normals of the training tasks.
"""

import argparse
import logging
import math
import os
import time
from dataclasses import replace
from pathlib import Path

from anatomaly.config import FitConfig, MethodConfig, TeacherConfig, TrainingConfig
from anatomaly.data.manifest import load_manifest
from anatomaly.evaluation.evaluate import evaluate
from anatomaly.evaluation.protocols import leave_one_task_out
from anatomaly.training.fit import fit
from anatomaly.types import Preprocessing, Scoring

METRICS = ("auroc", "ap", "f1max", "f1max_floor", "pixel_auroc", "aupro", "dice_max")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the bundles; finished folds are not redone")
    parser.add_argument("--shots", type=int, nargs="+", default=[4])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--pooling", nargs="+", choices=["max", "mean", "topk"], default=["max"])
    parser.add_argument("--teacher", default="efficientnet_lite0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[111])
    parser.add_argument("--tasks", nargs="+", help="tasks to hold out; default all")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    manifest = load_manifest(args.manifest)
    base = FitConfig(
        MethodConfig("d24fad"),
        teacher=TeacherConfig(name=args.teacher),
        preprocessing=Preprocessing(size=(args.size, args.size)),
        training=TrainingConfig(epochs=args.epochs, learning_rate=args.lr, shots=args.shots[0]),
    )
    print(f"{args.manifest.name}: {len(manifest)} images, tasks {', '.join(manifest.tasks)}; {os.cpu_count()} cores")
    header = ["task", "method", "pooling", "seed", "K", "AUROC", "95 % interval", *METRICS[1:], "minutes"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for fold in leave_one_task_out(manifest):
        if args.tasks and fold.test_task not in args.tasks:
            continue
        train = manifest.select(task=fold.train_tasks)
        for seed in args.seeds:
            training = replace(base.training, seed=seed)
            runs = {
                "d24fad": replace(base, training=training),
                "untrained student": replace(base, training=replace(training, epochs=0)),
                "patch nearest neighbours": replace(base, method=MethodConfig(name="nearest"), training=training),
            }
            for name, config in runs.items():
                started = time.perf_counter()
                detector = fit(train, args.out / fold.test_task / f"{name.replace(' ', '_')}_{seed}", config)
                for pooling in args.pooling:
                    detector.scoring = Scoring(pooling=pooling)
                    results = evaluate(detector, manifest, task=fold.test_task, shots=args.shots, draws=args.draws)
                    minutes = (time.perf_counter() - started) / 60
                    for result in results:
                        print(row(fold.test_task, name, pooling, seed, result, minutes), flush=True)


def row(task, name, pooling, seed, result, minutes):
    summary = result.summary()
    mean, sd = summary["auroc"]
    cells = [task, name, pooling, seed, result.shots, f"{mean:.3f} ± {sd:.3f}"]
    cells.append(f"{result.interval.low:.3f}-{result.interval.high:.3f}")
    rest = [summary.get(metric, (math.nan,))[0] for metric in METRICS[1:]]
    cells += ["–" if math.isnan(value) else f"{value:.3f}" for value in rest]
    return "| " + " | ".join(map(str, [*cells, f"{minutes:.1f}"])) + " |"


if __name__ == "__main__":
    main()
