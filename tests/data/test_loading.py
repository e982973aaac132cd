"""Images arrive in order, a little ahead of who uses them, and a broken file breaks nothing else."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from anatomaly.data import loading
from anatomaly.data.loading import load_batches
from anatomaly.data.transforms import load
from anatomaly.types import Intensity, Preprocessing, Sample

SMALL = Preprocessing(size=(8, 8))


@pytest.fixture
def samples(tmp_path):
    """11 grey images, the n-th of brightness 10 n."""
    paths = [tmp_path / f"{n:02}.png" for n in range(11)]
    for n, path in enumerate(paths):
        Image.fromarray(np.full((16, 12), 10 * n, np.uint8)).save(path)
    return [Sample(path, "task") for path in paths]


@pytest.mark.parametrize(("batch_size", "lengths"), [(1, [1] * 11), (4, [4, 4, 3]), (11, [11]), (50, [11])])
def test_rows_keep_their_order(samples, batch_size, lengths):
    batches = list(load_batches(samples, SMALL, batch_size=batch_size))
    assert [len(batch) for batch in batches] == lengths
    items = [item for batch in batches for item in batch]
    assert [item.sample for item in items] == samples
    brightness = [float(item.prepared.input.mean()) * 255 for item in items]
    assert brightness == pytest.approx([10 * n for n in range(11)], abs=0.01)
    assert all(item.error is None for item in items)
    for item, sample in zip(items, samples, strict=True):  # read ahead or alone: the same, bit for bit
        alone = load(sample, SMALL)
        assert np.array_equal(item.prepared.input, alone.input)
        assert np.array_equal(item.prepared.display, alone.display)


def test_a_slow_file_holds_its_place(samples, monkeypatch):
    others_are_read = threading.Event()

    def slow_at_first(sample, preprocessing):
        if sample is samples[0]:
            assert others_are_read.wait(30)
        elif sample is samples[1]:
            others_are_read.set()
        return load(sample, preprocessing)

    monkeypatch.setattr(loading, "load", slow_at_first)
    items = [item for batch in load_batches(samples[:4], SMALL, batch_size=2) for item in batch]
    assert [item.sample for item in items] == samples[:4]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_are_taken_one_batch_ahead_and_no_further(samples, batch_size):
    taken = []

    def rows():
        while True:  # endless: reading all before the first batch would never end
            for sample in samples:
                taken.append(sample)
                yield sample

    batches = load_batches(rows(), SMALL, batch_size=batch_size)
    assert taken == []
    for number in range(1, 6):
        assert len(next(batches)) == batch_size
        assert len(taken) <= (number + 1) * batch_size
    batches.close()


def test_an_unreadable_file_is_an_item_with_its_reason(samples):
    samples[2].path.write_bytes(b"not an image")
    samples[5].path.unlink()
    samples[10].path.write_bytes(b"")
    items = [item for batch in load_batches(samples, SMALL, batch_size=3) for item in batch]
    assert [item.sample for item in items] == samples
    for n, item in enumerate(items):
        assert (item.prepared is None) == (item.error is not None) == (n in (2, 5, 10))
        if item.error is not None:
            assert samples[n].path.name in item.error
            assert "\n" not in item.error


def test_an_intensity_rule_that_does_not_fit_is_an_error_of_each_image(samples):
    rule = Preprocessing(size=(8, 8), intensity=Intensity("window", 40, 0))
    items = [item for batch in load_batches(samples[:2], rule, batch_size=2) for item in batch]
    assert all(item.prepared is None and "window" in item.error for item in items)


def test_a_defect_of_ours_is_not_taken_for_a_bad_file(samples, monkeypatch):
    def defect(sample, preprocessing):
        raise ZeroDivisionError

    monkeypatch.setattr(loading, "load", defect)
    with pytest.raises(ZeroDivisionError):
        list(load_batches(samples, SMALL, batch_size=2))


def test_no_rows_give_no_batches():
    assert list(load_batches([], SMALL, batch_size=4)) == []
    assert list(load_batches(iter(()), SMALL, batch_size=1)) == []


def test_large_images_make_short_batches_and_wait_in_bounded_memory(samples, monkeypatch):
    """What was read and not yet taken, and what is being read, never takes more than the bound and one image."""
    monkeypatch.setattr(loading, "WORKERS", 4)
    one = SMALL.size[0] * SMALL.size[1] * 3 * 4 + 16 * 12 * 4
    monkeypatch.setattr(loading, "MAX_BYTES", 3 * one)
    begun, lock = [], threading.Lock()

    def counted(sample, preprocessing):
        with lock:
            begun.append(sample)
        return load(sample, preprocessing)

    monkeypatch.setattr(loading, "load", counted)
    taken = 0
    for batch in load_batches(samples, SMALL, batch_size=8):
        assert len(batch) == min(3, 11 - taken)
        taken += len(batch)
        time.sleep(0.2)  # whoever wants to read on may do so
        assert len(begun) <= max(taken + 3, 4 + 1)
    assert taken == 11


def test_a_single_image_beyond_the_bound_is_read_all_the_same(samples, monkeypatch):
    monkeypatch.setattr(loading, "MAX_BYTES", 1)
    assert [len(batch) for batch in load_batches(samples, SMALL, batch_size=8)] == [1] * 11


def test_the_pixels_as_read_are_not_kept(samples):
    ((item,),) = load_batches(samples[:1], SMALL, batch_size=1)
    assert item.prepared.image.size == (16, 12)
    assert np.isnan(item.prepared.image.pixels).all()
    assert item.prepared.image.pixels.base.nbytes == 4
