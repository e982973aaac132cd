"""Random kills of `predict --engine ray`, each followed by a restart: is the table that of an undisturbed run?

    python benchmarks/archive_kills.py [--kills 20] [--images 300] [--seed 0]

Each trial starts the command on a fresh folder, waits for a random moment between the first rows and the end, sends
SIGKILL to a random worker (one that judges or reads), to the driver, or to both at once, in turns, and runs the same
command again until the run is finished.  A killed worker must not end the run.  Then the table must hold every image
once, with the scores, errors and digests of the undisturbed run, and files of before the kill must be the same bytes.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.dataset as ds
from machine import machine

from anatomaly.synthetic.phantom import write_benchmark
from archive import COMMAND, descendants

WORKERS = ("JudgeBatches", "ReadChunks")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        words = prepared(root, args.images)
        started = time.monotonic()
        run([*words, "--out", root / "whole"])
        expected = rows_of(root / "whole")
        print(
            f"{args.images} images, undisturbed: {time.monotonic() - started:.0f} s, {len(expected)} rows", flush=True
        )
        tally = {}
        for trial in range(args.kills):
            victim = ("worker", "driver", "both")[trial % 3]
            killed_at, done, survived = disturbed(words, root / "out", victim, chance)
            found = rows_of(root / "out")
            same = found == expected and all((root / "out/table" / n).read_bytes() == b for n, b in done.items())
            tally.setdefault(victim, []).append(same)
            print(
                f"{trial + 1}: {victim} killed after {killed_at:.1f} s with {len(done)} files of the table; "
                f"{'went on by itself' if survived else 'was started again'}; {'the same' if same else 'DIFFERENT'}",
                flush=True,
            )
            shutil.rmtree(root / "out")
    for victim, results in tally.items():
        print(f"{victim}: {sum(results)} of {len(results)} tables are the same")
    return 0 if all(all(results) for results in tally.values()) else 1


def prepared(root, images):
    """A folder of images, among them two that cannot be read, and the words of the command."""
    counts = {"train": 4, "test_normal": images - images // 2, "test_anomalous": images // 2}
    write_benchmark(root / "data", **counts, size=64, tasks=("head_ct",))
    folder = root / "images"
    folder.mkdir()
    for file in (root / "data").rglob("test/*/*.png"):
        shutil.copy(file, folder / f"{file.parent.name}_{file.name}")
    some = sorted(folder.iterdir())
    for file in (some[len(some) // 3], some[-1]):
        file.write_bytes(file.read_bytes()[:99])
    support = sorted((root / "data").rglob("train/*/*.png"))[:4]
    words = ["--support", *support, "--images", folder, "--task", "head_ct", "--engine", "ray", "--actors", "2"]
    return [*COMMAND, "predict", *words, "--readers", "1", "--chunk", "8", "--batch_size", "4", "--device", "cpu"]


def disturbed(words, out, victim, chance):
    """Kill, and start again until it is done; seconds until the kill, the files then there, whether it went on."""
    started, chunks = time.monotonic(), list(out.glob("table/*.parquet"))
    with subprocess.Popen(
        list(map(str, [*words, "--out", out])), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and not chunks:
            time.sleep(0.01)
            chunks = list(out.glob("table/*.parquet"))
        time.sleep(chance.uniform(0, 3))
        workers = [pid for pid, name in descendants(process.pid) if any(word in name for word in WORKERS)]
        done = {path.name: path.read_bytes() for path in out.glob("table/*.parquet")}
        at = time.monotonic() - started
        victims = [chance.choice(workers)] if victim != "driver" and workers else []
        victims += [process.pid] if victim != "worker" else []
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        process.stderr.read()
    survived = process.returncode == 0
    if victim == "worker" and not survived:
        raise SystemExit("a killed worker ended the run")
    if not json.loads((out / "run.json").read_text())["finished"]:
        run([*words, "--out", out])
    return at, done, survived


def run(words):
    """Run a command to its end."""
    found = subprocess.run(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if found.returncode:
        raise SystemExit(found.stderr.decode())


def rows_of(out):
    """The rows, sorted, without the time that each took; a float of a score in full."""
    table = ds.dataset(out / "table", format="parquet").to_table().drop_columns(["seconds"])
    return table.sort_by([("item", "ascending"), ("frame", "ascending")]).to_pylist()


if __name__ == "__main__":
    sys.exit(main())
