"""How far training in two processes, or in two steps a batch, is from training in one, beside what rounding alone does.

    python benchmarks/several_processes.py [--train 16] [--size 64] [--epochs 3] [--rate 1e-4]

Each method trains on the built-in images of two tasks.  "gradient": of one epoch at a rate near 0, the relative length
of the difference between what Adam remembers of the gradients, and "first loss", of that epoch.  "loss": the largest
relative difference of an epoch's loss at the rate given.  "start moved": one process, whose first weights were moved by
1e-7 of themselves.  "two steps": `--training.accumulate 2`, whose batch norms see half a batch.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from machine import machine

from anatomaly.config import FitConfig, MethodConfig, TrainingConfig
from anatomaly.data.manifest import load_manifest
from anatomaly.methods.settings import D24FADSettings
from anatomaly.synthetic.phantom import write_benchmark
from anatomaly.training import fit as training
from anatomaly.types import Preprocessing

METHODS = {
    "d24fad": MethodConfig("d24fad"),
    "d24fad, elements": MethodConfig("d24fad", D24FADSettings(softmax_scale="elements")),
    "pdd": MethodConfig("pdd"),
}
WAYS = {"two processes": {"devices": 2}, "two steps": {"accumulate": 2}, "start moved": {}}
build_method = training.build_method


def moved(*arguments, **choices):
    """The method with its first weights moved by 1e-7 of themselves."""
    method, generator = build_method(*arguments, **choices), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in method.parameters():
            weight.mul_(1 + 1e-7 * torch.randn(weight.shape, generator=generator))
    return method


def run(manifest, out, config):
    """Losses of the epochs, and all of Adam's means of the gradients."""
    training.fit(manifest, out, config)
    lines = [json.loads(line) for line in (out / "training/progress.jsonl").read_text().splitlines()]
    state = torch.load(out / "training/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    return torch.tensor([line["total"] for line in lines]), torch.cat([e["exp_avg"].flatten() for e in state.values()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-4)
    args = parser.parse_args()
    print(f"{machine()}; {args.train} images of each of two tasks, {args.size} px, {args.epochs} epochs at {args.rate}")
    print("| method | beside one process | gradient | first loss | loss |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root, tasks = Path(folder), ("brain_mr", "fundus")
        write_benchmark(root / "data", train=args.train, test_normal=0, test_anomalous=0, size=args.size, tasks=tasks)
        manifest = load_manifest(root / "data")
        for name, method in METHODS.items():
            settings = TrainingConfig(shots=2, batch_size=8, validate_every=args.epochs, device="cpu")
            config = FitConfig(method, preprocessing=Preprocessing(size=(args.size, args.size)), training=settings)
            found = {}
            for way, choices in {"one": {}, **WAYS}.items():
                training.build_method = moved if way == "start moved" else build_method
                for epochs, rate in ((1, 1e-12), (args.epochs, args.rate)):
                    chosen = replace(settings, epochs=epochs, learning_rate=rate, **choices)
                    out = root / f"{name} {way} {epochs}"
                    found[way, rate] = run(manifest, out, replace(config, training=chosen))
            for way in WAYS:
                pairs = [[found[each, rate] for each in ("one", way)] for rate in (1e-12, args.rate)]
                ((first, gradient), (other_first, other)), ((loss, _), (other_loss, _)) = pairs
                figures = (
                    (other - gradient).norm() / gradient.norm(),
                    *map(difference, (first, loss), (other_first, other_loss)),
                )
                print(f"| {name} | {way} | {' | '.join(f'{float(each):.0e}' for each in figures)} |", flush=True)


def difference(one, other):
    """The largest, relative."""
    return ((other - one) / one).abs().max()


if __name__ == "__main__":
    main()
