"""Edited models, banks and calibrations by the hundred: each is refused in one line, or judges as it did.

    python benchmarks/fuzz_models.py [--edits 300] [--seed 0] [--only NUMBER] [--seconds 60] [--memory 6]

One small model of every method, its bank and its calibration are made of drawn images.  Every edit changes one of their
files: JSON (values removed, replaced, nested, huge, NaN), safetensors (cut short, bits flipped, tensors of other types
and shapes, too many, missing, not finite), or another thing in the file's place (a pipe, a folder, a device, nothing).
Half of the edits are forged: the digests are made to fit.  The model is loaded, given its supports and asked for one
image in a process of its own, with a limit of time and memory.

Counted as failures, exit code 1: tracebacks, hangs, deaths, messages of several lines, scores or p-values that are not
numbers, and, unless it was forged, an edit of weights, bank or calibration that changes a score or a p-value.
"""

import argparse
import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

import torch
from safetensors.torch import load, save

from anatomaly.backbones import build_backbone
from anatomaly.backbones.weights import state_digest
from anatomaly.config import MethodConfig
from anatomaly.data import workers
from anatomaly.data.manifest import load_manifest
from anatomaly.detector.bundle import digest_of
from anatomaly.detector.calibrate import calibrate
from anatomaly.detector.detector import Detector
from anatomaly.detector.facts import ModelFacts
from anatomaly.errors import AnatomalyError
from anatomaly.methods import METHODS, build_method
from anatomaly.synthetic.phantom import write_benchmark
from anatomaly.types import Preprocessing, Scoring

BANK, TASK = "bank.safetensors", "head_ct"
RESULTS = ("refused", "same", "other", "silent", "not finite", "traceback", "lines", "died", "hang")
FAILURES = RESULTS[3:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="Run this edit alone and say what came of it.")
    parser.add_argument("--seconds", type=int, default=60, help="Limit of time of an edit.")
    parser.add_argument("--memory", type=float, default=6.0, help="Limit of memory of an edit beyond its start, GiB.")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked processes have no other threads
    counts, slowest = defaultdict(Counter), (0.0, "")
    with tempfile.TemporaryDirectory() as name:
        world = make_world(Path(name))
        numbers = range(options.edits) if options.only is None else [options.only]
        for number in numbers:
            began = time.perf_counter()
            edit = make_edit(world, options.seed, number)
            result, line = in_a_process(world, edit, options.seconds, options.memory)
            counts[edit["kind"]][result] += 1
            slowest = max(slowest, (time.perf_counter() - began, f"edit {number}: {edit['what']}"))
            if result in FAILURES or options.only is not None:
                print(f"edit {number}: {edit['what']}: {result}: {line}", flush=True)
    print_table(counts, slowest)
    return int(any(count[result] for count in counts.values() for result in FAILURES))


def print_table(counts, slowest):
    print(f"{'edited':<28}{'edits':>7}" + "".join(f"{result:>12}" for result in RESULTS))
    for kind, count in [*sorted(counts.items()), ("total", sum(counts.values(), Counter()))]:
        print(f"{kind:<28}{count.total():>7}" + "".join(f"{count[result]:>12}" for result in RESULTS))
    print(f"slowest: {slowest[0]:.1f} s ({slowest[1]})")
    print("same: judged as before; other: a setting or a forged file changed the score; silent: something else did")


def make_world(folder, names=METHODS.built_in):
    """Models, banks and calibrations by method, the images, and what each model says of the query."""
    manifest = load_manifest(
        write_benchmark(folder / "images", train=6, test_normal=8, test_anomalous=1, size=64, tasks=(TASK,))
    )
    supports = manifest.select(split="train", label=0).samples[:3]
    normals = manifest.select(split="test", label=0).samples
    (query,) = manifest.select(split="test", label=1).samples[:1]
    own = folder / "own.pth"
    torch.save(build_backbone("timm/test_efficientnet", weights="random").body.state_dict(), own)
    teacher = build_backbone("timm/test_efficientnet", weights=str(own))
    world = {"folder": folder, "supports": supports, "query": query, "expected": {}, "parts": {}}
    for name in names:
        method = build_method(name, [teacher] * METHODS[name].teachers)
        detector = Detector(
            method,
            preprocessing=Preprocessing((64, 64)),
            scoring=Scoring(),
            facts=ModelFacts.of(MethodConfig(name), method),
            device="cpu",
        )
        if method.needs_support:
            detector.set_support(supports, task=TASK)
            detector.save_support(folder / name / BANK)
        else:
            detector.set_task(TASK)
        calibrate(detector, normals)
        detector.save(folder / name)
        world["parts"][name] = sorted(file.name for file in (folder / name).iterdir())
        world["expected"][name] = judge(world, folder / name)
    return world


def judge(world, folder):
    """Score and p-value of the query, against the bank and against the supports' own images."""
    detector = Detector.load(folder, device="cpu")
    found = []
    if not detector.method.needs_support:
        ways = [lambda: detector.set_task(TASK)]
    else:
        ways = [
            lambda: detector.load_support(folder / BANK),
            lambda: detector.set_support(world["supports"], task=TASK),
        ]
    for way in ways:
        way()
        (prediction,) = detector.predict([world["query"]])
        if prediction.error is not None:
            raise AnatomalyError(prediction.error)
        found.append((prediction.score, prediction.p_value))
    return found


# --- edits ---


def make_edit(world, seed, number):
    """Copy a model and change one of its files; each edit has a generator of its own, so that it can be made again."""
    rng = random.Random(f"{seed} {number}")
    names = sorted(world["parts"])
    name = names[number % len(names)]
    part = rng.choice(world["parts"][name])
    folder = world["folder"] / "edited"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world["folder"] / name, folder)
    ways = [edit_place, edit_bytes, *([edit_json] * 4 if part.endswith(".json") else [edit_tensors] * 2)]
    if part == BANK:
        ways += [edit_facts] * 3
    way, forged = rng.choice(ways), rng.random() < 0.5
    what = way(folder / part, rng, forged)
    kind = "bank" if part == BANK else part.split(".")[0]
    return {
        "kind": f"{kind} {way.__name__.partition('_')[2]}",
        "what": f"{name}/{part}: {what}{', forged' * forged}",
        "method": name,
        "part": part,
        "folder": folder,
        "may_change": forged or part == "config.json",
    }


def edit_place(file, rng, forged):
    """Something else in the file's place."""
    what = rng.choice(["pipe", "folder", "empty", "missing", "zeros", "device", "socket", "loop"])
    file.unlink()
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    elif what == "empty":
        file.touch()
    elif what == "zeros":
        file.write_bytes(bytes(1000))
    elif what == "device":
        file.symlink_to("/dev/zero")
    elif what == "loop":
        file.symlink_to(file)
    elif what == "socket":
        os.mknod(file, 0o140600)
    return what


def edit_bytes(file, rng, forged):
    """Cut the file short, flip bits, or write over its beginning or its end."""
    content = bytearray(file.read_bytes())
    what = rng.choice(["cut", "flip", "flip header", "length", "longer"])
    if what == "cut":
        content = content[: rng.randrange(len(content))]
    elif what == "length":
        content[:8] = struct.pack("<Q", rng.choice([0, 1, 7, len(content), 2**31, 2**63, 2**64 - 1]))
    elif what == "longer":
        content += rng.randbytes(rng.randrange(1, 99))
    else:
        for _ in range(rng.choice([1, 1, 8])):
            content[rng.randrange(min(len(content), 900) if "header" in what else len(content))] ^= 1 << rng.randrange(
                8
            )
    file.write_bytes(content)
    return what


def hostile(rng):
    """A value that nobody expects."""
    deep = nested(rng.choice([3, 60, 500]))
    texts = ["", "x", "a\nb", "\ud800", "../../etc", "x" * 100_000, "64", "nan", "/dev/zero", "timm/nowhere"]
    texts += ["timm/hf-hub:nobody/nothing", "timm/local-dir:/tmp", "random", "auto", "percentile", "mean", "bf16"]
    numbers = [0, -1, 1, 2, 7, 63, 65, 8192, 10**9, 2**70, 10**400, 0.5, -0.0, 1e-300, 1e300, math.nan, math.inf]
    others = [None, True, False, [], {}, [[]], [1, 2, 3], {"rule": "auto"}, deep]
    return rng.choice([rng.choice(texts), rng.choice(numbers), rng.choice(numbers), rng.choice(others)])


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


def edit_value(facts, rng):
    """Remove, replace or add a value anywhere in the facts."""
    places = []
    pending = [(facts, "")]
    while pending:
        node, where = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(min(len(node), 3))
        for key in keys:
            places.append((node, key, f"{where}.{key}"))
            if isinstance(node[key], (dict, list)):
                pending.append((node[key], f"{where}.{key}"))
    node, key, where = rng.choice(places)
    how = rng.choice(["remove", *["replace"] * 4, *["scale"] * 2, "add"])
    if how == "remove":
        del node[key]
    elif how == "scale" and isinstance(node[key], (int, float)):
        node[key] = node[key] * rng.choice([-1, 1.5, 2, 1000])
    elif how == "add" and isinstance(node, dict):
        node[rng.choice(["more", "a\nb", "pdd", "nearest"])] = hostile(rng)
    else:
        node[key] = hostile(rng)
        return f"{where} = {str(node[key])[:40]!r}"
    return f"{how} {where}"


def edit_json(file, rng, forged):
    """A value changed, or a text that is no such JSON."""
    if rng.random() < 0.15:
        what = rng.choice(["[" * 100_000, "[" * 900 + "]" * 900, "{}", "[]", "null", "NaN", '"x"', "1" * 5000, "\xff"])
        file.write_bytes(what.encode("latin-1"))
        return f"the text {what[:10]}"
    facts = json.loads(file.read_text())
    what = edit_value(facts, rng)
    if forged and file.name == "calibration.json":
        with contextlib.suppress(Exception):
            for entry in facts["calibrations"]:
                entry["digest"] = digest_of({key: value for key, value in entry.items() if key != "digest"})
    file.write_text(json.dumps(facts))
    return what


def split(file):
    """Tensors and metadata of a safetensors file."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return load(content), json.loads(content[8 : 8 + size]).get("__metadata__")


def edit_facts(file, rng, forged):
    """What a bank says of itself; a forged one has no digest, as banks of before."""
    tensors, metadata = split(file)
    facts = json.loads(metadata["bank"])
    if forged:
        facts.pop("digest", None)
    what = edit_value(facts, rng)
    file.write_bytes(save(tensors, {"bank": json.dumps(facts)}))
    return what


def edit_tensors(file, rng, forged):
    """Other numbers, shapes, types or names of tensors."""
    tensors, metadata = split(file)
    whole = {key: tensor for key, tensor in tensors.items() if tensor.numel()} or {"none": torch.zeros(1)}
    key = rng.choice(sorted(whole))
    old = whole[key]
    what = rng.choice(list(TENSORS))
    tensors[key] = TENSORS[what](old.clone())
    if what == "missing":
        tensors.pop(key)
    elif what == "fewer":  # in all of them
        tensors = {name: tensor[:-1].clone() if tensor.ndim else tensor for name, tensor in tensors.items()}
    elif what == "more":
        tensors["more"] = torch.zeros(3)
    if metadata and forged:
        facts = {name: value for name, value in json.loads(metadata["bank"]).items() if name != "digest"}
        if what == "fewer" and rng.random() < 0.5:
            facts |= {name: facts[name][:-1] for name in ("names", "sha256")}
        if what == "none":
            facts |= {"names": [], "sha256": []}
        metadata = {"bank": json.dumps(facts)}
    file.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
    if forged and not metadata:
        forge_weights(file, tensors)
    return f"{what} {key}"


def forge_weights(file, tensors):
    """Let `config.json` name the digest of the edited weights."""
    config = file.with_name("config.json")
    facts = json.loads(config.read_text())
    role = file.name.split(".")[0]
    if role == "weights":
        facts["weights_hash"] = state_digest(tensors)
    else:
        facts[role]["hash"] = state_digest(tensors)
    config.write_text(json.dumps(facts))


def _spoiled(tensor, value):
    tensor.view(-1)[0] = value
    return tensor


TENSORS = {
    "nan": lambda tensor: _spoiled(tensor.float(), math.nan),
    "infinity": lambda tensor: _spoiled(tensor.float(), math.inf),
    "huge": lambda tensor: torch.full_like(tensor.float(), 3e38),
    "one value": lambda tensor: _spoiled(tensor.float(), 7.0),
    "noise": lambda tensor: tensor.float() + 0.1,
    "zeros": torch.zeros_like,
    "int8": lambda tensor: tensor.to(torch.int8),
    "float64": lambda tensor: tensor.to(torch.float64),
    "bfloat16": lambda tensor: tensor.to(torch.bfloat16),
    "bool": lambda tensor: tensor.to(torch.bool),
    "flat": lambda tensor: tensor.reshape(-1),
    "one more axis": lambda tensor: tensor[None],
    "turned": lambda tensor: tensor.movedim(0, -1) if tensor.ndim else tensor,
    "doubled": lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
    "one fewer": lambda tensor: tensor[:-1] if tensor.ndim else tensor,
    "none": lambda tensor: tensor[:0] if tensor.ndim else tensor,
    "fewer": lambda tensor: tensor,
    "missing": lambda tensor: tensor,
    "more": lambda tensor: tensor,
}


# --- what comes of them ---


def in_a_process(world, edit, seconds, memory):
    """The result in a process of its own, and a line about it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.setsid()  # decoders end with it
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        limit = int(memory * 2**30) + used
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        workers._pool = workers._Pool()
        found = outcome(world, edit)
        os.write(write, json.dumps(found).encode()[:60_000])
        os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    began = time.perf_counter()
    signal.alarm(seconds)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    signal.alarm(0)
    if answer:
        return json.loads(answer)
    return ("hang" if time.perf_counter() - began >= seconds else "died"), ""


def outcome(world, edit):
    """One of `RESULTS`, and a line about it."""
    expected = world["expected"][edit["method"]]
    try:
        found = judge(world, edit["folder"])
    except AnatomalyError as err:
        message = str(err)
        return ("lines" if len(message.splitlines()) != 1 or len(message) > 2000 else "refused"), message[:500]
    except BaseException as err:
        return "traceback", "".join(traceback.format_exception(err))[-2000:]
    values = [value for pair in found for value in pair if value is not None]
    if not all(map(math.isfinite, values)):
        return "not finite", str(found)
    scores = [[score for score, _ in each] for each in (found, expected)]
    moved = any(abs(a - b) > 1e-6 for a, b in zip(*scores, strict=True))
    other_p = any(p is not None and p != known for (_, p), (_, known) in zip(found, expected, strict=True))
    if (moved or other_p) and not edit["may_change"]:
        return "silent", f"{found}, expected {expected}"
    if moved and not other_p and any(p is not None for _, p in found) and "forged" not in edit["what"]:
        return "silent", f"{found} with the p-values of {expected}"
    return ("other" if moved or other_p else "same"), str(found)


if __name__ == "__main__":
    sys.exit(main())
