"""A forward of VMamba-Tiny with every backend in one run: time, peak memory, and what stands between it and its floor.

    python benchmarks/vmamba.py [--size 256] [--batches 1 8] [--repeats 5] [--model vmamba_tiny] [--onnx]

"ref" is the same network with the plain loop a CPU user gets from the release; it runs once and at batch 1 only, the
others `--repeats` times, taking turns; figures are medians.  Weights are random, which changes no time.
--onnx also exports the teacher and times it in onnxruntime (`anatomaly[export]`).
The floor of the part outside the scan is its multiply-adds at the speed of a large float32 matrix product here.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from machine import machine
from selective_scan import peak_mib, reset_peak

from anatomaly.backbones.vmamba import network as vmamba
from anatomaly.backbones.vmamba.network import VARIANTS, VMamba
from anatomaly.detector.device import has_bf16

SIDES = (("ref", False), ("chunked", False), ("numba", False), *[("numba", True)] * has_bf16())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="vmamba_tiny", choices=VARIANTS)
    parser.add_argument("--onnx", action="store_true")
    args = parser.parse_args()
    if args.onnx:
        onnx(args)

    torch.manual_seed(0)
    model = VMamba(args.model, merged=True).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    images = torch.randn(max(args.batches), 3, args.size, args.size)
    run(model, images[:1, :, :32, :32], "numba", bf16=False)  # compiles
    before = reset_peak()
    # Memory first, and in this order: what one backend has freed, the next one is given without a trace.
    order = [(batch, *side) for side in (*SIDES[2:], SIDES[1]) for batch in args.batches] + [(1, *SIDES[0])]
    peaks = {
        (batch, name, bf16): run(model, images[:batch], name, bf16=bf16)[2] - before for batch, name, bf16 in order
    }
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    print(f"{machine()}, {args.model}, {args.size} px, weights {weights:.0f} MiB")
    print("| backend | batch | s / image | faster than ref | of it scan | peak MiB above start | features differ |")
    print("|---|---|---|---|---|---|---|")
    plain = truth = None
    for batch in args.batches:
        sides = [side for side in SIDES if side[0] != "ref" or batch == 1]
        figures = {side: [] for side in sides}
        levels = {}
        for repeat in range(args.repeats):
            for side in sides:
                if repeat == 0 or side[0] != "ref":
                    *figure, levels[side] = run(model, images[:batch], side[0], bf16=side[1])
                    figures[side].append(figure)
        if plain is None and ("ref", False) in figures:
            plain, truth = figures["ref", False][0][0], levels["ref", False]
        for side in sides:
            seconds, scan, _ = (statistics.median(column) for column in zip(*figures[side], strict=True))
            differ = "" if truth is None or batch > 1 else f"{difference(levels[side], truth):.1e}"
            ratio = "" if plain is None else f"{plain / (seconds / batch):.1f}"
            name = side[0] + (" bf16" if side[1] else "")
            cells = (
                name,
                batch,
                f"{seconds / batch:.3f}",
                ratio,
                f"{scan / batch:.3f}",
                f"{peaks[(batch, *side)]:.0f}",
            )
            print("| " + " | ".join(map(str, (*cells, differ))) + " |")

    operations = multiply_adds(model, images[:1])
    speed = matrix_speed()
    print(
        f"\noutside the scan: {2 * operations / 1e9:.1f} GFLOP an image; a float32 matrix product here runs at "
        f"{speed / 1e9:.0f} GFLOP/s, so its floor is {2 * operations / speed:.3f} s."
    )


def onnx(args):
    """Export the teacher, then take turns between onnxruntime and the eager forward at batch 1."""
    import onnxruntime

    from anatomaly.backbones import build_backbone
    from anatomaly.backbones.export import export_teacher

    teacher = build_backbone(args.model, weights="random")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.onnx"
        started = time.perf_counter()
        exported = export_teacher(teacher, file, size=(args.size, args.size))
        seconds, mib = time.perf_counter() - started, file.stat().st_size / 2**20
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    images = torch.rand(1, 3, args.size, args.size)
    sides = {"onnxruntime": lambda: session.run(None, {"images": images.numpy()}), "eager": lambda: teacher(images)}
    times = {name: [] for name in sides}
    for _ in range(args.repeats + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - started)
    facts = f"{mib:.0f} MiB, {exported.nodes} nodes, parity {exported.parity:.0e}"
    print(f"ONNX: {seconds:.0f} s to export, {facts}; forward:")
    print(", ".join(f"{name} {statistics.median(values[1:]):.3f} s" for name, values in times.items()) + "\n")


@torch.inference_mode()
def run(model, images, backend, *, bf16):
    """(seconds, seconds in the scan, the process's peak MiB, levels) of one forward."""
    model.use_scan(backend)
    spent = 0.0
    scan = vmamba.cross_selective_scan

    def timed(*args, **options):
        nonlocal spent
        started = time.perf_counter()
        result = scan(*args, **options)
        spent += time.perf_counter() - started
        return result

    vmamba.cross_selective_scan = timed
    try:
        reset_peak()
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            levels = model(images.contiguous(memory_format=torch.channels_last))
        seconds = time.perf_counter() - started
    finally:
        vmamba.cross_selective_scan = scan
    return seconds, spent, peak_mib(), levels


def difference(levels, truth):
    """Largest relative difference of a level."""
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(levels, truth, strict=True))


def multiply_adds(model, images):
    """Multiply-adds of all linear maps and convolutions of one forward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.use_scan("numba")(images)
    return counter.get_total_flops() / 2


def matrix_speed():
    a, b = torch.randn(2, 2048, 2048)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


if __name__ == "__main__":
    main()
