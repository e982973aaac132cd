"""Images per second of the built-in model in torch, ONNX Runtime and, where it is installed, OpenVINO, in one run.

    python benchmarks/export_speed.py [--shots 8] [--batch 8] [--repeats 5] [--threads 1]

The input is prepared phantom images, so neither reading nor resizing counts.  The runtimes take turns on the same
batch; figures are medians, and the difference is the largest of a score, as a share of torch's.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from machine import machine

from anatomaly.data.readers import read_image
from anatomaly.data.transforms import preprocess
from anatomaly.detector.detector import Detector
from anatomaly.detector.export import export_model
from anatomaly.synthetic.phantom import draw, png_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.png" for i in range(args.shots + args.batch)]
        for i, file in enumerate(files):
            file.write_bytes(png_bytes(draw("head_ct", seed=i, anomalous=i % 2 == 1 and i >= args.shots).pixels))
        detector = Detector.default(device="cpu").set_support(files[: args.shots])
        images = [preprocess(read_image(file), detector.ready().preprocessing).input for file in files[args.shots :]]
        model = Path(folder) / "model.onnx"
        export_model(detector, model, images)
        runtimes = made(detector, model, args.threads)
    batch, seconds, scores = np.stack(images), {name: [] for name in runtimes}, {}
    for repeat in range(args.repeats + 1):  # the first is the warm-up
        for name, run in runtimes.items():
            started = time.perf_counter()
            scores[name] = run(batch)
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    print(f"{machine()}, {args.threads} threads; batches of {args.batch}, K = {args.shots}")
    print("| runtime | images/s | largest difference of a score |\n|---|---|---|")
    for name, times in seconds.items():
        apart = np.abs(scores[name] / scores["torch"] - 1).max()
        print(f"| {name} | {args.batch / statistics.median(times):.1f} | {apart:.1e} |")


def made(detector, model, threads):
    """By name, what takes a batch to its scores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    runtimes = {
        "torch": lambda batch: detector.compare(detector.encode(batch), detector.ready()).scores.numpy(),
        f"onnxruntime {onnxruntime.__version__}": lambda batch: session.run(["score"], {"images": batch})[0],
    }
    try:
        import openvino
    except ImportError:
        return runtimes
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(model), "CPU", hints)
    version = openvino.__version__.partition("-")[0]
    return {**runtimes, f"openvino {version}": lambda batch: compiled({"images": batch})["score"]}


if __name__ == "__main__":
    main()
