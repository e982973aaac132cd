"""Archives with `predict --engine ray`: throughput, memory, growth, and what each stage costs.

    python benchmarks/archive.py throughput [--images 2000]     # so many PNG and so many DICOM files, three sides
    python benchmarks/archive.py rows [--rows 100000]           # tiny files: memory over time, start-up
    python benchmarks/archive.py growth [--rows 20000]          # a quarter, a half and all of them: is it a line?
    python benchmarks/archive.py stages [--images 200]          # milliseconds of an image in each stage, one thread

Every run is the command itself, as a process of its own with one thread of torch for each process that judges.
`throughput` compares one process that may use one core, one process that may use all (its decoders then run beside it),
and Ray with two that judge.  Ideal is twice the first.  At most 250 images are drawn, the other files are copies of
their bytes.  `rows` and `growth` take a table whose rows name the same 8 files of 32 pixels over and over, and a small
model (64 pixels), so that what is counted is the way of a row, not the model.
`stages` counts processor time, which others on the machine disturb least.
Memory is resident memory of processes without what they share (RssAnon); the object store is counted by itself.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import machine

from anatomaly.synthetic.phantom import write_benchmark

COMMAND = [sys.executable, "-m", "anatomaly.cli"]
ROLES = {"JudgeBatches": "judge", "ReadChunks": "read", "readers.answer": "decode"}
CHUNK = 32
RAY = ["--engine", "ray", "--actors", "2", "--readers", "1", "--chunk", CHUNK]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "rows", "growth", "stages"])
    parser.add_argument("--images", type=int, help="of each kind; default 2000, for stages 200")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--rows", type=int, help="default 100000, for growth 20000")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.what == "throughput":
            throughput(root, args.images or 2000, args.size)
        elif args.what == "stages":
            stages(root, args.images or 200, args.size)
        elif args.what == "rows":
            rows(root, args.rows or 100_000)
        else:
            growth(root, args.rows or 20_000)


def throughput(root, images, size):
    support, folder = files(root, images, size)
    one, everything = {min(os.sched_getaffinity(0))}, os.sched_getaffinity(0)
    words = ["--support", support, "--task", "head_ct", "--images", folder, "--overlays", "false", "--maps", "false"]
    sides = {
        "one process, one core": (one, []),
        "one process, all cores": (everything, []),
        "ray, 2 that judge": (everything, RAY),
    }
    print(f"{images} PNG and {images} DICOM files of {size} px, 8 supports, built-in model, no maps")
    print("| side | seconds in all | to the first rows | images/s from then on | memory, MiB |\n|---|---|---|---|---|")
    found = {}
    for side, (cores, more) in sides.items():
        run = Run([*words, *more], root / side.replace(" ", "_"), cores)
        found[side] = run
        peaks = ", ".join(f"{role} {peak}" for role, peak in run.peaks().items())
        print(f"| {side} | {run.seconds:.1f} | {run.first:.1f} | {run.rate:.2f} | {peaks} |", flush=True)
    first, _, ray = found.values()
    print(f"Of ideal (twice one process on one core): {first.seconds / ray.seconds / 2:.2f} in all, ", end="")
    print(f"{ray.rate / first.rate / 2:.2f} from the first rows on.")


def rows(root, count):
    run = tiny(root, count)
    print(f"{count} rows: {run.seconds:.1f} s, first rows after {run.first:.1f} s, then {run.rate:.1f} images/s")
    roles = [role for role in ("driver", "judge", "read", "decode", "store") if any(role in s for _, s in run.memory)]
    print(f"| share of the time | {' | '.join(f'{role}, MiB' for role in roles)} |\n|{'---|' * (1 + len(roles))}")
    for tenth in range(1, 11):
        until = [s for at, s in run.memory if (tenth - 1) / 10 <= at / run.seconds <= tenth / 10]
        peaks = [max((sample.get(role, 0) for sample in until), default=0) for role in roles]
        print(f"| {tenth / 10:.1f} | {' | '.join(map(str, peaks))} |")


def growth(root, count):
    sizes = [count // 4, count // 2, count]
    runs = [tiny(root, size) for size in sizes]
    slope, start = np.polyfit(sizes, [run.seconds for run in runs], 1)
    print("| rows | seconds | line | first rows after |\n|---|---|---|---|")
    for size, run in zip(sizes, runs, strict=True):
        print(f"| {size} | {run.seconds:.1f} | {start + slope * size:.1f} | {run.first:.1f} |")
    print(f"{start:.1f} s to start and end, {1000 * slope:.2f} ms a row")


def stages(root, images, size):
    import torch

    from anatomaly.archive.stages import JudgeBatches, Reader, _packed
    from anatomaly.data.readers import _read_here, read_image
    from anatomaly.data.transforms import preprocess
    from anatomaly.detector.detector import Detector

    torch.set_num_threads(1)
    support, folder = files(root, images, size)
    detector = Detector.default(device="cpu").set_support(sorted(support.iterdir()), task="head_ct")
    rule = detector.ready().preprocessing
    print("| stage, ms an image | PNG | DICOM |\n|---|---|---|")
    table = {}
    for kind in ("png", "dcm"):
        paths = sorted(folder.glob(f"*.{kind}"))
        read_image(paths[0])  # starts the decoder
        known = [read_image(path, apply_voi=True) for path in paths[:16]]
        listed = [{"path": str(p), "frame": None, "task": "t", "label": None, "patient_id": None} for p in paths[:64]]
        batches = list(Reader(rule, 16, Path("/")).load([{**row, "whole": False} for row in listed]))
        packed = [_packed(batch, 0, 16 * number, 64) for number, batch in enumerate(batches)]
        judge = JudgeBatches(detector, "cpu", 1, root / "maps")
        blocks, judge.maps = [judge(batch) for batch in packed], None
        maps = [root / file for file in blocks[0]["map"].to_pylist()]
        write = partial(written, blocks, root)
        here = partial(_read_here, frame=None, apply_voi=True)
        table[kind] = {
            "read the file": each(Path.read_bytes, paths),
            "decode": each(here, paths),
            "take over from the decoder": each(partial(read_image, apply_voi=True), paths),
            "prepare": each(partial(preprocess, preprocessing=rule), known),
            "pack for the next process": each(partial(_packed, chunk=0, place=0, total=16), batches) / 16,
            "model, score, map on the source grid": each(judge, packed) / 16,
            "write a map": each(copied, maps),
            "write the row": each(write, range(5)) / 64,
            "kB of a map": maps[0].stat().st_size / 1e6,
            "kB of a file": statistics.mean(path.stat().st_size for path in paths) / 1e6,
            "kB to the model": len(packed[0]["inputs"][0].as_py()) / 16 / 1e6,
        }
    for stage in table["png"]:
        print(f"| {stage} | {table['png'][stage] * 1000:.2f} | {table['dcm'][stage] * 1000:.2f} |")


def copied(file):
    np.save(file.with_suffix(".copy.npy"), np.load(file))


def written(blocks, root, number):
    from anatomaly.archive.table import write_chunks

    return list(write_chunks(blocks, root / f"written{number}"))


def each(call, items):
    """Processor seconds of a call in this process, as the median over the items."""
    times = []
    for item in items:
        started = time.process_time()
        call(item)
        times.append(time.process_time() - started)
    return statistics.median(times)


def files(root, images, size):
    """Folders of 8 supports, and of so many PNG and DICOM files."""
    from anatomaly.data.readers import read_image
    from anatomaly.synthetic.dicom_files import dicom_bytes

    drawn = min(images, 250)
    counts = {"train": 8, "test_normal": drawn - drawn // 2, "test_anomalous": drawn // 2}
    write_benchmark(root / "data", **counts, size=size, tasks=("head_ct",))
    support, folder = root / "support", root / "images"
    for place in (support, folder):
        place.mkdir()
    for number, file in enumerate(sorted((root / "data").rglob("train/*/*.png"))[:8]):
        (support / f"{number}.png").write_bytes(file.read_bytes())
    for number, file in enumerate(sorted((root / "data").rglob("test/*/*.png"))):
        pixels = read_image(file).pixels / 255
        scan = dicom_bytes(pixels, task="head_ct", patient=str(number))
        for copy in range(number, images, drawn):
            (folder / f"{copy:06d}.png").write_bytes(file.read_bytes())
            (folder / f"{copy:06d}.dcm").write_bytes(scan)
    return support, folder


def tiny(root, count):
    """A run over a table of so many rows that name 8 small files."""
    if not (root / "data").exists():
        write_benchmark(root / "data", train=8, test_normal=4, test_anomalous=4, size=32, tasks=("head_ct",))
        words = ["--method.name", "nearest", "--preprocessing.size", "[64,64]"]
        subprocess.run([*COMMAND, "fit", "--data", root / "data", "--out", root / "model", *words], check=True)
    tests = sorted(map(str, (root / "data").rglob("test/*/*.png")))
    pq.write_table(pa.table({"path": [tests[n % 8] for n in range(count)]}), root / f"{count}.parquet")
    support = sorted((root / "data").rglob("train/*/*.png"))[:4]
    words = [
        "--model",
        root / "model",
        "--support",
        *support,
        "--task",
        "head_ct",
        "--images",
        root / f"{count}.parquet",
    ]
    return Run([*words, *RAY, "--batch_size", "64"], root / f"out{count}", os.sched_getaffinity(0))


class Run:
    """A run of `predict`: its seconds, when the first rows were there, rows a second from then on, memory."""

    def __init__(self, words, out, cores):
        self.started, self.marks, self.memory = time.monotonic(), [], []
        self.ended = threading.Event()
        command = [*COMMAND, "predict", *words, "--out", out]
        process = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        watch = threading.Thread(target=self._watch, args=(process.pid, out))
        watch.start()
        message = process.stderr.read().decode()
        code = process.wait()
        self.seconds = time.monotonic() - self.started
        self.ended.set()
        watch.join()
        if code:
            raise SystemExit(message)
        done = [(at, rows) for at, rows in self.marks if rows]
        last = next(mark for mark in done if mark[1] == done[-1][1])
        self.first = done[0][0]
        self.rate = (last[1] - done[0][1]) / max(1e-9, last[0] - done[0][0])

    def _watch(self, pid, out):
        while not self.ended.wait(0.25):
            at = time.monotonic() - self.started
            self.marks.append((at, rows_in(out)))
            if not self.memory or at - self.memory[-1][0] > 1:
                self.memory.append((at, memory_of(pid)))

    def peaks(self):
        """MiB by role, of the largest process of it."""
        found = {}
        for _, sample in self.memory:
            for role, size in sample.items():
                found[role] = max(found.get(role, 0), size)
        return found


def rows_in(out):
    """How many rows there are: those of scores.jsonl, or of all partitions but the last, which may be short."""
    jsonl = out / "scores.jsonl"
    if jsonl.exists():
        return jsonl.read_bytes().count(b"\n")
    return CHUNK * len(list(out.glob("table/*.parquet")))


def memory_of(driver):
    """MiB of the largest process of each role below a process, and of the store."""
    sizes = {}
    for pid, name in [(driver, "driver"), *descendants(driver)]:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            private = int(status["RssAnon"].split()[0]) // 1024
        except (OSError, KeyError):
            continue
        role = "driver" if pid == driver else next((role for word, role in ROLES.items() if word in name), "ray")
        sizes[role] = max(sizes.get(role, 0), private)
    return {**sizes, "store": shared_memory()}


def shared_memory():
    """MiB of the machine's shared memory that are taken: where Ray has its object store."""
    found = os.statvfs("/dev/shm")
    return (found.f_blocks - found.f_bfree) * found.f_frsize >> 20


def descendants(of):
    """(process id, command line) of all processes below one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    waiting = [of]
    while waiting:
        for child in parents.get(waiting.pop(), ()):
            try:
                yield child, Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            waiting.append(child)


if __name__ == "__main__":
    main()
