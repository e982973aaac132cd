"""Features come from the store as the teacher computes them, each once, whoever else uses or damages the folder."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anatomaly.backbones import feature_cache, feature_files
from anatomaly.backbones.feature_cache import FeatureCache, image_key
from anatomaly.errors import ConfigError
from anatomaly.types import Intensity, Preprocessing, Sample

GIB = 2.0**30
IMAGES = torch.rand(60, 3, 6, 10, generator=torch.Generator().manual_seed(0))
KEYS = [f"image {i}" for i in range(len(IMAGES))]
VALUES = 3 * (3 * 5 + 1 * 2)  # of one entry; the first level has an odd number


@dataclass
class Pyramid:
    """A teacher whose levels are pooled images that float16 cannot hold exactly; notes the sizes of its batches."""

    name: str = "pooling"
    normalise: bool = True
    weights_hash: str = "0123"
    factor: float = 1.0
    repeats: int = 1
    batches: list[int] = field(default_factory=list)

    def __call__(self, images):
        self.batches.append(len(images))
        pooled = [self.factor * torch.nn.functional.avg_pool2d(images, step) for step in (2, 4)]
        return [level.repeat(1, self.repeats, 1, 1) for level in pooled]


class Loader:
    """Hands out images of a list and notes which were asked for."""

    def __init__(self, indices=range(60)):
        self.indices, self.asked = list(indices), []

    def __call__(self, positions):
        self.asked.append(list(positions))
        return IMAGES[[self.indices[i] for i in positions]]


def get(store, indices, *, teacher=None, **choices):
    """Features of these images from one teacher; the images loaded and the levels."""
    loader = Loader(indices)
    features = store.get({"teacher": teacher or Pyramid()}, [KEYS[i] for i in indices], loader, **choices)
    return features["teacher"], [indices[i] for asked in loader.asked for i in asked]


def assert_equal(levels, truth):
    for level, wanted in zip(levels, truth, strict=True):
        assert level.dtype == torch.float32
        assert torch.equal(level, wanted)


def files(folder, pattern="*/*.safetensors"):
    return sorted(folder.glob(pattern))


@pytest.fixture(scope="module")
def size(tmp_path_factory):
    """Bytes of an entry's file."""
    folder = tmp_path_factory.mktemp("one")
    get(FeatureCache(memory_bytes=0, folder=folder, disk_bytes=GIB), [0])
    return files(folder)[0].stat().st_size


def aged(folder, seconds=1000):
    """Make all files of a folder older, those modified first staying the oldest; returns them oldest first."""
    found = sorted(files(folder), key=lambda file: file.stat().st_mtime_ns)
    for file in found:
        moment = file.stat().st_mtime_ns - seconds * 10**9
        os.utime(file, ns=(moment, moment))
    return found


# What comes back


@pytest.mark.parametrize("memory", [0, GIB])
def test_values_are_the_teachers_wherever_an_entry_comes_from(tmp_path, memory):
    exact, rounded = Pyramid()(IMAGES[:5]), [level.half().float() for level in Pyramid()(IMAGES[:5])]
    assert not torch.equal(exact[0], rounded[0])
    plain = FeatureCache(memory_bytes=memory)
    on_disk = FeatureCache(memory_bytes=memory, folder=tmp_path, disk_bytes=GIB)
    for _ in range(2):
        assert_equal(get(plain, range(5))[0], exact)
        assert_equal(get(on_disk, range(5))[0], rounded)
    later = FeatureCache(memory_bytes=memory, folder=tmp_path, disk_bytes=GIB)
    for _ in range(2):
        levels, loaded = get(later, range(5))
        assert_equal(levels, rounded)
        assert loaded == []
    assert_equal(get(FeatureCache(memory_bytes=memory, folder=tmp_path / "no budget"), range(5))[0], rounded)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_teacher_runs_in_the_stores_precision_not_the_callers(lite0, tmp_path, folder, precision):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        truth = lite0(images)
    store = FeatureCache(memory_bytes=GIB, folder=tmp_path if folder else None, disk_bytes=GIB, precision=precision)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "fp32"):
            levels = store.get({"teacher": lite0}, KEYS[:3], lambda _: images)["teacher"]
        assert_equal(levels, [level.half().float() if folder else level.float() for level in truth])
        assert all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)
    assert (store.misses, store.hits) == (3, 3)


def test_only_what_is_missing_is_loaded_and_computed_once():
    store, teacher = FeatureCache(memory_bytes=GIB), Pyramid()
    get(store, [3, 1], teacher=teacher)
    levels, loaded = get(store, [5, 1, 4, 5, 3, 5], teacher=teacher)
    assert loaded == [5, 4]
    assert teacher.batches == [2, 2]
    assert (store.hits, store.misses) == (2, 4)
    assert_equal(levels, Pyramid()(IMAGES[[5, 1, 4, 5, 3, 5]]))
    get(store, [3, 3], teacher=teacher)
    assert (store.hits, store.misses, teacher.batches) == (3, 4, [2, 2])


def test_teachers_share_images_and_methods_share_teachers():
    store, loader = FeatureCache(memory_bytes=GIB), Loader()
    one, two = Pyramid("one"), Pyramid("two", factor=2.0)
    store.get({"teacher": one}, KEYS[:2], loader)
    features = store.get({"first": two, "second": one}, KEYS[:4], loader)
    assert loader.asked == [[0, 1], [0, 1, 2, 3]]
    assert (one.batches, two.batches) == ([2, 2], [4])
    assert_equal(features["first"], Pyramid(factor=2.0)(IMAGES[:4]))
    assert_equal(features["second"], Pyramid()(IMAGES[:4]))


def test_a_teacher_with_two_roles_takes_memory_once():
    store = FeatureCache(memory_bytes=GIB)
    store.get({"first": Pyramid(), "second": Pyramid()}, KEYS[:2], Loader())
    assert store.memory_used == 2 * 4 * VALUES


@pytest.mark.parametrize("levels", [slice(-1, None), slice(0, 1), slice(0, 0)])
def test_levels_that_are_not_needed_are_kept_all_the_same(levels):
    store = FeatureCache(memory_bytes=GIB)
    assert_equal(get(store, [1, 2], levels=levels)[0], Pyramid()(IMAGES[1:3])[levels])
    assert_equal(get(store, [1, 2])[0], Pyramid()(IMAGES[1:3]))
    assert store.misses == 2


def test_what_is_done_to_a_batch_does_not_reach_the_store():
    store = FeatureCache(memory_bytes=GIB)
    for _ in range(2):
        levels, _ = get(store, [0, 1])
        assert_equal(levels, Pyramid()(IMAGES[:2]))
        for level in levels:
            level.zero_()


def test_mistakes_of_the_caller_are_said():
    store, teachers = FeatureCache(memory_bytes=GIB), {"teacher": Pyramid()}
    with pytest.raises(ValueError, match="got no images"):
        store.get(teachers, [], Loader())
    with pytest.raises(ValueError, match="load returned 1 images, expected 2"):
        store.get(teachers, KEYS[:2], lambda _: IMAGES[:1])
    store.get(teachers, KEYS[:1], Loader())
    with pytest.raises(ValueError, match=r"shapes \[\(3, 5, 3\), \(4, 4, 3\)\] in one batch"):
        store.get(teachers, KEYS[:2], lambda _: torch.rand(1, 3, 8, 8))


# Names

SAMPLE = Sample(Path("a.png"), "ct", sha256="ab" * 32)
PREPARED = Preprocessing((6, 10), intensity=Intensity("range", 0.0, 9.0))
OTHER_IMAGES = {
    "file": (replace(SAMPLE, sha256="ac" * 32), PREPARED),
    "frame": (replace(SAMPLE, frame=0), PREPARED),
    "size": (SAMPLE, replace(PREPARED, size=(10, 6))),
    "resize": (SAMPLE, replace(PREPARED, resize="pad")),
    "interpolation": (SAMPLE, replace(PREPARED, interpolation="bilinear")),
    "rule": (SAMPLE, replace(PREPARED, intensity=Intensity("window", 0.0, 9.0))),
    "numbers": (SAMPLE, replace(PREPARED, intensity=Intensity("range", 0.0, 8.0))),
}
OTHER_TEACHERS = {
    "name": replace(Pyramid(), name="other"),
    "normalise": replace(Pyramid(), normalise=False),
    "weights": replace(Pyramid(), weights_hash="0124"),
}


@pytest.mark.parametrize("image", OTHER_IMAGES)
def test_another_image_or_preparation_is_another_key(image):
    assert image_key(*OTHER_IMAGES[image]) != image_key(SAMPLE, PREPARED)


def test_where_an_image_lies_is_not_part_of_its_key():
    moved = replace(SAMPLE, path=Path("b.png"), task="mr", split="train", label=0, patient_id="7")
    assert image_key(moved, replace(PREPARED)) == image_key(SAMPLE, PREPARED)


def test_an_image_without_identity_has_no_key():
    with pytest.raises(ValueError, match=r"a\.png has no sha256"):
        image_key(replace(SAMPLE, sha256=None), PREPARED)
    with pytest.raises(ValueError, match=r"a\.png has a percentile rule"):
        image_key(SAMPLE, replace(PREPARED, intensity=Intensity("percentile", 1.0, 99.0)))


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("other", [*OTHER_TEACHERS, "precision", "format", None])
def test_another_teacher_precision_or_format_is_another_entry(tmp_path, monkeypatch, other, folder):
    store = FeatureCache(memory_bytes=0 if folder else GIB, folder=tmp_path if folder else None, disk_bytes=GIB)
    get(store, [0])
    if other == "format":
        monkeypatch.setattr(feature_cache, "FORMAT", 0)
    if other == "precision":
        store.precision = "bf16"
    get(store, [0], teacher=OTHER_TEACHERS.get(other))
    assert (store.misses, store.hits) == ((1, 1) if other is None else (2, 0))


# Memory


def test_memory_holds_what_fits_and_lets_nothing_go():
    budget = 3 * 4 * VALUES + 5
    store = FeatureCache(memory_bytes=budget)
    assert get(store, range(5))[1] == [0, 1, 2, 3, 4]
    for _ in range(2):
        assert get(store, range(5))[1] == [3, 4]
        assert store.memory_used == 3 * 4 * VALUES
    held = {part.untyped_storage().data_ptr(): part.untyped_storage() for e in store._memory.values() for part in e}
    assert sum(storage.nbytes() for storage in held.values()) == store.memory_used


def test_memory_is_filled_from_disk_too(tmp_path):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), range(4))
    store = FeatureCache(memory_bytes=3 * 2 * VALUES, folder=tmp_path, disk_bytes=GIB)
    get(store, range(4))
    assert (store.memory_hits, store.disk_hits, store.misses) == (0, 4, 0)
    assert store.memory_used == 3 * 2 * VALUES
    get(store, range(4))
    assert (store.memory_hits, store.disk_hits, store.misses) == (3, 5, 0)


def test_filling_goes_in_order_and_ends_where_nothing_more_fits():
    store, teacher, loader = FeatureCache(memory_bytes=5 * 4 * VALUES), Pyramid(), Loader()
    store.fill({"teacher": teacher}, KEYS, loader, batch_size=4)
    assert loader.asked == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert get(store, range(6))[1] == [5]
    FeatureCache(memory_bytes=0).fill({"teacher": teacher}, KEYS, loader)
    assert len(loader.asked) == 2


def test_filling_again_computes_nothing(tmp_path):
    store, teacher, loader = FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), Pyramid(), Loader()
    get(store, [2, 9], teacher=teacher)
    for _ in range(2):
        store.fill({"teacher": teacher}, KEYS[:10], loader, batch_size=4)
    assert loader.asked == [[0, 1, 3], [4, 5, 6, 7], [8]]
    levels, loaded = get(store, range(10))
    assert loaded == []
    assert_equal(levels, [level.half().float() for level in Pyramid()(IMAGES[:10])])


# Disk


def test_an_entry_is_a_file_that_others_can_read(tmp_path):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), [7])
    (file,) = files(tmp_path)
    assert file.parent.name == file.name[:2]
    content = load_file(file)
    for i, level in enumerate(Pyramid()(IMAGES[7:8])):
        assert torch.equal(content[f"level_{i}"], level[0].permute(1, 2, 0).half())


def test_the_disk_gives_up_the_files_used_least_recently_but_none_of_this_run(tmp_path, size):
    first = FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB)
    for i in range(6):
        get(first, [i])
    oldest = aged(tmp_path)
    store = FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=6 * size + 9)
    assert get(store, [0, 4, 10, 11])[1] == [10, 11]
    assert [file.is_file() for file in oldest] == [True, False, False, True, True, True]
    for _ in range(2):
        get(store, [0, 4, 10, 11, 12, 13, 14, 15])
        assert store._disk.used() == sum(file.stat().st_size for file in files(tmp_path)) == 6 * size
    assert [file.is_file() for file in oldest] == [True, False, False, False, True, False]
    assert get(store, [0, 4, 10, 11, 12, 13, 14, 15])[1] == [14, 15]


def test_a_file_another_process_uses_meanwhile_is_not_evicted(tmp_path, size):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), range(3))
    oldest = aged(tmp_path)
    store = FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=3 * size)
    assert store._disk.used() == 3 * size
    get(FeatureCache(memory_bytes=0, folder=tmp_path), [0])
    get(store, [5])
    assert [file.is_file() for file in oldest] == [True, False, True]


def test_an_entry_larger_than_the_budget_evicts_nothing(tmp_path, size):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), range(3))
    aged(tmp_path)
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=size - 1), [5])
    assert len(files(tmp_path)) == 3


def test_eviction_bears_that_files_vanish(tmp_path, size):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), range(4))
    oldest = aged(tmp_path)
    store = FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=4 * size)
    assert store._disk.used() == 4 * size
    oldest[0].unlink()
    get(store, [5, 6])
    assert [file.is_file() for file in oldest] == [False, False, True, True]
    assert store._disk.used() == 4 * size


def test_processes_that_write_side_by_side_see_each_others_bytes(tmp_path, size):
    pair = [FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=32 * size) for _ in range(2)]
    for i in range(60):
        get(pair[i % 2], [i])
    assert 32 <= len(files(tmp_path)) <= 32 + 2 * 32 / 16


def test_files_that_are_not_the_stores_are_neither_counted_nor_deleted(tmp_path, size):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), range(3))
    digest = "0" * 64
    for name in ("notes.txt", f"{digest}.safetensors", "00/model.safetensors", "00/.x.part", f"00/{digest}.txt",
                 f"xy/{digest}.safetensors", f"00/.{digest}.part"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
        os.utime(tmp_path / name, (1, 1))
    own = aged(tmp_path)
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    store = FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=3 * size)
    assert store._disk.used() == 3 * size
    get(store, range(3, 9))
    left = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert before - left == {file for file in own if file.stem != digest and file.name != "model.safetensors"}


def test_what_a_killed_process_left_is_swept_when_it_is_old(tmp_path):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), [0])
    (entry,) = files(tmp_path)
    old, young = (entry.with_name(f".{entry.stem}.{c * 16}.part") for c in "ab")
    for part, seconds in ((old, 3700), (young, 60)):
        part.write_bytes(b"half")
        os.utime(part, (time.time() - seconds,) * 2)
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), [1])
    assert (old.exists(), young.exists(), len(files(tmp_path))) == (False, True, 2)


@pytest.mark.parametrize("content", [b"", b"\0" * 700, b"x" * 700, None])
def test_a_damaged_file_is_replaced(tmp_path, caplog, content):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), [0])
    (file,) = files(tmp_path)
    good = file.read_bytes()
    file.write_bytes(good[:-1] if content is None else content)
    store = FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB)
    levels, loaded = get(store, [0])
    assert loaded == [0]
    assert_equal(levels, [level.half().float() for level in Pyramid()(IMAGES[:1])])
    assert [record.getMessage().startswith(f"{file}: damaged (") for record in caplog.records] == [True]
    assert file.read_bytes() == good


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_an_entry_that_is_no_file_is_replaced_and_never_opened(tmp_path, what):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), [0])
    (file,) = files(tmp_path)
    good = file.read_bytes()
    file.unlink()
    os.mkfifo(file) if what == "pipe" else file.symlink_to("/dev/zero")
    assert get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), [0])[1] == [0]
    assert not file.is_symlink()
    assert file.read_bytes() == good


@pytest.mark.parametrize("change", ["one level less", "other shape", "not finite", "float32"])
def test_a_whole_entry_that_is_not_the_teachers_is_replaced(tmp_path, change, caplog):
    size = tuple(IMAGES.shape[2:])
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB, size=size), [0])
    (file,) = files(tmp_path)
    good = file.read_bytes()
    levels = feature_files.unpacked(good)
    if change == "one level less":
        levels = levels[:-1]
    elif change == "other shape":
        levels[0] = levels[0][1:].contiguous()
    elif change == "not finite":
        levels[0][0, 0, 0] = float("nan")
    else:
        levels = [level.float() for level in levels]
    content = {f"level_{i}": level for i, level in enumerate(levels)}
    bits = [level.view(torch.float16) for level in levels]
    file.write_bytes(feature_files.pack({**content, "checksum": torch.tensor(feature_files._checksum(bits))}))
    store = FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB, size=size)
    found, loaded = get(store, [0])
    assert loaded == [0]
    assert_equal(found, [level.half().float() for level in Pyramid()(IMAGES[:1])])
    assert "features are computed anew" in caplog.text
    assert file.read_bytes() == good
    assert get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB, size=size), [0])[1] == []


def test_a_damaged_file_that_cannot_be_replaced_is_removed(tmp_path):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), [0])
    (file,) = files(tmp_path)
    file.write_bytes(b"damaged")
    get(FeatureCache(memory_bytes=0, folder=tmp_path), [0])
    assert not file.exists()


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), [0])
    (file,) = files(tmp_path)
    good = file.read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            damaged = bytearray(good)
            damaged[place] ^= 1 << bit
            with pytest.raises(Exception):  # noqa: B017
                feature_files.unpacked(bytes(damaged))


@pytest.mark.parametrize("value", [65600.0, -65600.0, float("inf"), float("nan")])
def test_values_float16_does_not_hold_are_refused_where_there_is_a_folder(tmp_path, value):
    teacher = Pyramid(factor=value)
    images = torch.ones(1, 3, 6, 10)
    store = FeatureCache(memory_bytes=GIB, folder=tmp_path, disk_bytes=GIB)
    with pytest.raises(ConfigError, match=r"^pooling: level 1 has values in .* Switch the disk cache off\.$"):
        store.get({"teacher": teacher}, KEYS[:1], lambda _: images)
    assert (store.memory_used, files(tmp_path)) == (0, [])
    plain = FeatureCache(memory_bytes=GIB).get({"teacher": teacher}, KEYS[:1], lambda _: images)["teacher"]
    assert torch.equal(plain[0], teacher(images)[0]) or value != value


def test_the_largest_float16_is_stored(tmp_path):
    store = FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB)
    for _ in range(2):
        levels = store.get({"teacher": Pyramid(factor=-65504.0)}, KEYS[:1], lambda _: torch.ones(1, 3, 6, 10))
        assert levels["teacher"][0].unique().tolist() == [-65504.0]
    assert store.misses == 1


def raising(code):
    def write(*_, **__):
        raise OSError(code, os.strerror(code))

    return write


@pytest.mark.parametrize("problem", ["full", "read-only", "not a folder"])
def test_a_disk_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, caplog, problem):
    folder = tmp_path / "features"
    get(FeatureCache(memory_bytes=0, folder=folder, disk_bytes=GIB), [0])
    if problem == "not a folder":
        folder = tmp_path / "file"
        folder.write_bytes(b"")
    else:
        monkeypatch.setattr(Path, "write_bytes", raising(errno.ENOSPC if problem == "full" else errno.EROFS))
        monkeypatch.setattr(os, "utime", raising(errno.EROFS))
    store = FeatureCache(memory_bytes=4 * 2 * VALUES, folder=folder, disk_bytes=GIB)
    for _ in range(2):
        levels, loaded = get(store, range(6))
        assert_equal(levels, [level.half().float() for level in Pyramid()(IMAGES[:6])])
    assert loaded == [4, 5]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{folder}: features are no longer stored on disk: ")
    assert store.disk_hits == (0 if problem == "not a folder" else 1)
    assert list(tmp_path.rglob("*.part")) == []


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", raising(errno.EIO))
    get(FeatureCache(memory_bytes=0, folder=tmp_path, disk_bytes=GIB), [0])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# Several processes

WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_feature_cache import *
print("ready", flush=True)
sys.stdin.readline()
for run in range(int(sys.argv[3])):
    store = FeatureCache(memory_bytes=0, folder=Path(sys.argv[2]), disk_bytes=GIB)
    store.fill({"teacher": large(run)}, KEYS[:8], Loader(), batch_size=4)
"""


def large(run):
    """A teacher whose entries take 1 MB and a while to write; every run is another one and writes files of its own."""
    return Pyramid(weights_hash=str(run), repeats=10_000)


@pytest.fixture
def start():
    """start(folder, runs): a worker that waits for a line; it does not outlive the test."""
    workers = []

    def begin(folder, runs):
        arguments = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(folder), str(runs)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        workers.append(subprocess.Popen(arguments, **pipes, text=True))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.kill()
        worker.communicate()


def test_processes_share_a_folder_and_may_be_killed(tmp_path, start):
    finished, killed = workers = start(tmp_path, 5), start(tmp_path, 10**6)
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    whole = set()
    while len(whole) < 6 * 8:  # files are looked at as soon as they have their name
        assert killed.poll() is None
        for file in set(files(tmp_path)) - whole:
            feature_files.unpacked(file.read_bytes())
            whole.add(file)
    killed.send_signal(signal.SIGKILL)
    for worker, code in ((killed, -signal.SIGKILL), (finished, 0)):
        assert worker.communicate(timeout=60) == ("", "")
        assert worker.returncode == code
    for file in files(tmp_path):
        feature_files.unpacked(file.read_bytes())
    store = FeatureCache(memory_bytes=0, folder=tmp_path)
    for run in range(5):
        levels, loaded = get(store, range(8), teacher=large(run))
        assert loaded == []
        assert_equal(levels, [level.half().float() for level in large(run)(IMAGES[:8])])
