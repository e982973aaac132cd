"""What p-values are worth: how often normals are called, over many calibrations; the figures of docs/calibration.md.

    python benchmarks/calibration.py [--repeats 300] [--seed 0] [--parts 1 2 3 4 5]

1. Synthetic scores: the rate of one calibration against its Beta distribution.
2. Synthetic patients with correlated slices: slices counted as if they were patients, and patients.
3. The phantom (head CT, 64 px), patch nearest neighbours on EfficientNet-Lite0: calibration on held-out normals and on
   the supports alone, several n; every repeat deals a pool of 240 patients anew into supports, calibration and queries.
4. The same pool size as 60 patients of 4 slices.
5. A student of D24FAD, shortly trained on other phantom tasks, calibrated on its supports alone.

All queries are normal, so whatever is called is a false positive.  The figures are the mean over the repeats with its
standard error; nothing is tuned.  Takes several minutes at one thread; `--parts` chooses.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from anatomaly.backbones import build_backbone
from anatomaly.config import FitConfig, MethodConfig, TrainingConfig
from anatomaly.data.manifest import load_manifest
from anatomaly.detector.conformal import false_positive_range, needed_normals, p_values
from anatomaly.methods import build_method
from anatomaly.scoring import blur, compare_tensor, encode_tensor, image_score
from anatomaly.synthetic.phantom import draw, write_benchmark
from anatomaly.training.fit import fit
from anatomaly.types import Preprocessing, Scoring

RATES = (0.2, 0.1, 0.05, 0.01)
SIZES = (8, 19, 50, 99)
SIZE, SCORING = (64, 64), Scoring()
POOL = 240
SHOTS = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=int, nargs="+", choices=range(1, 6), default=range(1, 6))
    args = parser.parse_args()
    started = time.perf_counter()
    for part in args.parts:  # each has its own numbers, whatever runs before it
        (synthetic, synthetic_patients, single_images, patients, d24fad)[part - 1](
            np.random.default_rng([args.seed, part]), args.repeats
        )
    print(f"\n{time.perf_counter() - started:.0f} s")


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def head(title, *columns):
    print(f"\n{title}\n")
    row(*columns)
    row(*["---"] * len(columns))


def rate(values):
    """Mean and standard error in percent."""
    values = np.asarray(values, dtype=float)
    return f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1) / np.sqrt(len(values)):.2f} %"


def called(queries, normals):
    """Share of the queries with a p-value up to each rate; None where n cannot assert it."""
    found = p_values(queries, normals)
    return [(found <= alpha).mean() if len(normals) >= needed_normals(alpha) else None for alpha in RATES]


def columns_of(results):
    """One cell per rate from a list of `called`."""
    return ["cannot" if column[0] is None else rate(column) for column in zip(*results, strict=True)]


def synthetic(rng, repeats, calibrations=4000, queries=2000):
    head("1. Synthetic scores, 4000 calibrations", "n", "alpha", "mean rate", "5 to 95 % measured", "Beta says")
    for n in SIZES:
        for alpha in RATES:
            if n < needed_normals(alpha):
                continue
            rates = [
                (p_values(rng.normal(size=queries), rng.normal(size=n)) <= alpha).mean() for _ in range(calibrations)
            ]
            low, high = np.quantile(rates, [0.05, 0.95])
            expected = false_positive_range(n, alpha)
            row(n, alpha, rate(rates), f"{low:.1%} to {high:.1%}", f"{expected[0]:.1%} to {expected[1]:.1%}")


def synthetic_patients(rng, repeats, calibrations=4000, n=20, slices=5):
    title = f"2. Synthetic patients of {slices} slices (correlation 0.8), calibrated on {n} patients"
    head(title, "alpha", "counted", "slices called", "patients with a called slice")
    per_slice, per_patient = {}, {}
    for _ in range(calibrations):
        scores = rng.normal(size=(n + 20, 1)) * 0.8**0.5 + rng.normal(size=(n + 20, slices)) * 0.2**0.5
        for counted, normals in (("as slices", scores[:n].ravel()), ("as patients", scores[:n].max(axis=1))):
            found = p_values(scores[n:], normals)
            for alpha in (0.1, 0.05, 0.01):
                per_slice.setdefault((alpha, counted), []).append((found <= alpha).mean())
                per_patient.setdefault((alpha, counted), []).append((found.min(axis=1) <= alpha).mean())
    for key in per_slice:
        cannot = key[1] == "as patients" and n < needed_normals(key[0])
        row(*key, *(["cannot"] * 2 if cannot else [rate(per_slice[key]), rate(per_patient[key])]))


def single_images(rng, repeats):
    method = build_method("nearest", [build_backbone("efficientnet_lite0")])
    pairs = similarities(method, phantom([(patient, 0) for patient in range(POOL)]))
    held_out(pairs, rng, repeats)
    leave_one_out(pairs, rng, repeats)


def phantom(drawings):
    """(N, 3, 64, 64) normal head CTs of (patient, slice) pairs."""
    images = [draw("head_ct", seed=10_000 + patient, slice_index=k, size=SIZE[0]).pixels for patient, k in drawings]
    return torch.from_numpy(np.stack(images)).expand(-1, 3, -1, -1).contiguous()


def similarities(method, images):
    """Per level (N, N, h, w): cosine of each patch of image i with the nearest patch of image j.

    The score against any bank follows from the maximum over its images, so that thousands of banks can be tried.
    """
    encoded = encode_tensor(method, images)
    found = []
    for level in encoded:
        patches = F.normalize(level.float(), dim=1).flatten(2)  # (N, C, h*w)
        pairs = [(one.T @ patches).amax(dim=2) for one in patches]  # each (N, h*w)
        found.append(torch.stack(pairs).unflatten(2, level.shape[2:]))
    queries, bank = [level[:4] for level in encoded], method.embed_support({"teacher": method_levels(method, images)})
    expected = compare_tensor(method, queries, bank, size=SIZE, scoring=SCORING).scores
    torch.testing.assert_close(scores_of(found, [0, 1, 2, 3], range(4, 12)), expected.double(), rtol=0, atol=1e-5)
    return found


def method_levels(method, images):
    with torch.inference_mode():
        return method.extract(images[4:12])["teacher"]


def scores_of(pairs, queries, bank):
    """(Q,) scores of images of the pool against a bank of it; a member of the bank is scored against the others."""
    maps = torch.zeros(len(queries), *SIZE)
    queries, bank = torch.as_tensor(np.array(queries)), torch.as_tensor(np.array(bank))
    own = (queries[:, None] == bank)[..., None, None]
    for level in pairs:
        distance = 1 - level[queries][:, bank].masked_fill(own, -1).amax(dim=1)
        maps += F.interpolate(distance[:, None], SIZE, mode="bilinear", align_corners=True)[:, 0]
    return image_score(blur(maps, SCORING.blur), SCORING).double()


def held_out(pairs, rng, repeats):
    title = f"3a. Phantom, nearest neighbours, {SHOTS} supports, calibrated on n held-out normals, {repeats} repeats"
    head(title, "n", *(f"{alpha:.0%}" for alpha in RATES))
    results = {n: [] for n in SIZES}
    for _ in range(repeats):
        dealt = rng.permutation(POOL)
        scores = scores_of(pairs, dealt[SHOTS:], dealt[:SHOTS]).numpy()
        for n in SIZES:
            results[n].append(called(scores[n:], scores[:n]))
    for n in SIZES:
        row(n, *columns_of(results[n]))


def leave_one_out(pairs, rng, repeats, queries=60):
    title = f"3b. Phantom, nearest neighbours, calibrated on its K supports alone, {repeats} repeats"
    head(title, "K", *(f"{alpha:.0%}" for alpha in RATES))
    for shots in SIZES:
        results = []
        for _ in range(repeats):
            dealt = rng.permutation(POOL)[: shots + queries]
            bank = dealt[:shots]
            scores = scores_of(pairs, dealt, bank).numpy()
            results.append(called(scores[shots:], scores[:shots]))
        row(shots, *columns_of(results))


def patients(rng, repeats, n=20, slices=4):
    method = build_method("nearest", [build_backbone("efficientnet_lite0")])
    pairs = similarities(method, phantom([(p, k) for p in range(POOL // slices) for k in range(slices)]))
    title = f"4. Phantom patients of {slices} slices, calibrated on {n} patients, {SHOTS} supports, {repeats} repeats"
    head(title, "alpha", "counted", "slices called", "patients with a called slice")
    per_slice, per_patient = {}, {}
    for _ in range(repeats):
        dealt = rng.permutation(POOL // slices)
        rows = (dealt[:, None] * slices + np.arange(slices)).ravel()
        bank = dealt[:SHOTS] * slices
        scores = scores_of(pairs, rows[SHOTS * slices :], bank).numpy().reshape(-1, slices)
        for counted, normals in (("as slices", scores[:n].ravel()), ("as patients", scores[:n].max(axis=1))):
            found = p_values(scores[n:], normals)
            for alpha in (0.1, 0.05, 1.001 / (n * slices + 1)):
                if len(normals) >= needed_normals(alpha):
                    per_slice.setdefault((f"{alpha:.4f}", counted), []).append((found <= alpha).mean())
                    per_patient.setdefault((f"{alpha:.4f}", counted), []).append((found.min(axis=1) <= alpha).mean())
    for key in per_slice:
        row(*key, rate(per_slice[key]), rate(per_patient[key]))


def d24fad(rng, repeats, queries=60):
    with tempfile.TemporaryDirectory() as folder:
        tasks = ("brain_mr", "chest_xray")
        counts = {"train": 24, "test_normal": 0, "test_anomalous": 0}
        manifest = load_manifest(write_benchmark(Path(folder) / "data", size=SIZE[0], tasks=tasks, **counts))
        training = TrainingConfig(epochs=10, learning_rate=1e-3, shots=4, batch_size=8, device="cpu")
        config = FitConfig(MethodConfig("d24fad"), preprocessing=Preprocessing(size=SIZE), training=training)
        method = fit(manifest, Path(folder) / "model", config).method
    images = phantom([(patient, 0) for patient in range(POOL)])
    encoded = encode_tensor(method, images)
    with torch.inference_mode():
        support = method.embed_support(method.extract(images))
    title = f"5. Phantom, D24FAD after 10 epochs on {', '.join(tasks)}, calibrated on its K supports alone"
    head(f"{title}, {repeats} repeats", "K", *(f"{alpha:.0%}" for alpha in RATES))

    def score(these, bank):
        rest = {name: tensor[bank] for name, tensor in support.items()}
        return compare_tensor(method, [level[these] for level in encoded], rest, size=SIZE, scoring=SCORING).scores

    for shots in (4, 8, 19):
        results = []
        for _ in range(repeats):
            dealt = torch.from_numpy(rng.permutation(POOL)[: shots + queries])
            bank = dealt[:shots]
            normals = [score(one[None], bank[bank != one]).item() for one in bank]
            results.append(called(score(dealt[shots:], bank).numpy(), normals))
        row(shots, *columns_of(results))


if __name__ == "__main__":
    main()
