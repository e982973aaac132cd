"""The scans of one image through VMamba-Tiny with every backend in one run: time, peak memory and the kernel's floor.

    python benchmarks/selective_scan.py [--size 256] [--batch 1] [--repeats 5] [--model vmamba_tiny]

Every stage's four-direction scan is timed with every backend on the same random input and counted as often as the model
has blocks.  "ref" is the plain loop a CPU user gets from the release: exp(delta A) of all positions in memory, then one
step of Python a position.  It runs once, the others `--repeats` times, taking turns; figures are medians.
The floor is the bare recurrence on one tile that stays in the first-level cache: no gathering, no softplus, no memory.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from machine import machine

from anatomaly.backbones.vmamba import _scan_numba
from anatomaly.backbones.vmamba.cross_scan import cross_selective_scan
from anatomaly.backbones.vmamba.network import VARIANTS, WIDTHS

BACKENDS = ("ref", "chunked", "numba")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="vmamba_tiny", choices=VARIANTS)
    args = parser.parse_args()
    facts = VARIANTS[args.model]

    started = time.perf_counter()
    cross_selective_scan(*stage(1, 2, 4, facts), backend="numba")
    first = time.perf_counter() - started
    print(f"{machine()}, {args.model}, {args.size} px, batch {args.batch}")
    print(f"first call of the compiled kernel: {first:.2f} s (compiles, or loads from numba's cache)\n")

    # Memory first, and in this order: what one backend has freed, the next one is given without a trace.
    largest = stage(args.batch, args.size // 4, WIDTHS[0], facts)
    before = reset_peak()
    peaks = {name: measure(largest, name)[1] - before for name in ("numba", "chunked", "ref")}
    totals, updates, moved, worst = dict.fromkeys(BACKENDS, 0.0), 0, 0, 0.0
    print("| stage | " + " | ".join(f"{name} ms" for name in BACKENDS) + " |\n|---|" + "---|" * len(BACKENDS))
    for width, blocks, side in zip(WIDTHS, facts.depths, (args.size // s for s in (4, 8, 16, 32)), strict=True):
        tensors = stage(args.batch, side, width, facts)
        times = {name: [] for name in BACKENDS}
        results = {}
        for repeat in range(args.repeats):
            for name in BACKENDS if repeat == 0 else BACKENDS[1:]:
                seconds, _, results[name] = measure(tensors, name)
                times[name].append(seconds)
        medians = {name: statistics.median(times[name]) for name in BACKENDS}
        worst = max(worst, float((results["numba"] - results["ref"]).norm() / results["ref"].norm()))
        cells = " | ".join(f"{1000 * medians[name]:.1f}" for name in BACKENDS)
        print(f"| {side} x {side}, {facts.expansion * width} channels, {blocks} blocks | {cells} |")
        for name in BACKENDS:
            totals[name] += blocks * medians[name]
        updates += blocks * args.batch * 4 * side * side * facts.expansion * width * facts.states
        inputs = (
            4 * (2 * tensors[0].numel() + tensors[1].numel()) + 2 * tensors[0].numel()
        )  # per walk: read, add, B and C
        moved += blocks * 4 * inputs

    print("\n| all scans of one batch | " + " | ".join(BACKENDS) + " |\n|---|" + "---|" * len(BACKENDS))
    print("| seconds | " + " | ".join(f"{totals[name]:.3f}" for name in BACKENDS) + " |")
    print("| times faster than ref | " + " | ".join(f"{totals['ref'] / totals[name]:.0f}" for name in BACKENDS) + " |")
    print("| peak memory above the inputs, MiB | " + " | ".join(f"{peaks[name]:.0f}" for name in BACKENDS) + " |")
    print(f"\nlargest relative difference numba - ref: {worst:.1e}")

    floor = updates * bare_update(facts.states) / torch.get_num_threads()
    print(
        f"{updates / 1e6:.0f} M state updates, one exponential and two multiply-adds each; "
        f"{moved / 2**20:.0f} MiB read and written.\n"
        f"floor of the recurrence: {floor:.3f} s in {torch.get_num_threads()} threads; "
        f"the kernel takes {totals['numba'] / floor:.1f} times that."
    )


def stage(batch, side, width, facts):
    """Random arguments of `cross_selective_scan` with step sizes and decays like a trained model's."""
    draw = torch.Generator().manual_seed(width)
    inner, rank, states = facts.expansion * width, -(-width // 16), facts.states
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    return (
        normal(batch, side, side, inner),
        normal(batch, side, side, 4, rank + 2 * states),
        normal(4, inner, rank) / rank**0.5,
        normal(4, inner) * 1.5 - 3,
        -torch.arange(1.0, states + 1).repeat(4, inner, 1),
        torch.ones(4, inner),
    )


@torch.inference_mode()
def measure(tensors, backend):
    """(seconds, the process's peak MiB, result) of one call."""
    reset_peak()
    started = time.perf_counter()
    result = cross_selective_scan(*tensors, backend=backend)
    return time.perf_counter() - started, peak_mib(), result


def reset_peak():
    """Start the process's peak memory anew (Linux) and return the present use in MiB."""
    with open("/proc/self/clear_refs", "w") as stream:  # noqa: PTH123
        stream.write("5")
    return peak_mib()


def peak_mib():
    with open("/proc/self/status") as stream:  # noqa: PTH123
        return next(int(line.split()[1]) for line in stream if line.startswith("VmHWM")) / 1024


def bare_update(states):
    """Seconds of one thread per state update when everything stays in the first-level cache."""
    lanes, tile = _scan_numba.LANES, _scan_numba.TILE
    draw = np.random.default_rng(0)
    state, decay = np.zeros((states, lanes), np.float32), -np.ones((states, lanes), np.float32)
    skip, y = np.ones(lanes, np.float32), np.empty((tile, lanes), np.float32)
    b, c = draw.random((2, tile, states), np.float32)
    best = np.inf
    delta, u = np.ones((tile, lanes), np.float32), draw.random((tile, lanes), np.float32)  # 1: u stays as it is
    for _ in range(50):
        started = time.perf_counter()
        for _ in range(100):
            _scan_numba._advance(state, decay, skip, delta, u, b, c, y, tile, False)
        best = min(best, time.perf_counter() - started)
    return best / (100 * tile * lanes * states)


if __name__ == "__main__":
    main()
