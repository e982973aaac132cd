"""Batches with pasted lesions: who is query and support of whom, and that images, lesions and masks stay together."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from anatomaly.errors import ConfigError
from anatomaly.synthetic import phantom
from anatomaly.synthetic.phantom import TASKS, draw, write_benchmark
from anatomaly.training import lesion_episodes
from anatomaly.training.episodes import Batch
from anatomaly.training.lesion_episodes import STEPS, LesionEpisodes, StepSampler, synthetic_images

NAMES = ["brain"] * 5 + ["lung"] * 4 + ["brain"] * 2 + ["eye"] * 9


def image(index):
    """A textured image that no other index has."""
    values = np.random.default_rng(index).random((3, 32, 48), dtype=np.float32)
    return torch.from_numpy(0.3 + 0.4 * values)


#: Which image these pixels are of.
NUMBERS = {image(index).numpy().tobytes(): index for index in range(30)}


def make(names=NAMES, **choices):
    """Episodes whose frozen features are the pixels of the queries and the numbers of the supports."""
    return LesionEpisodes(
        names,
        lambda indices: torch.stack([image(index) for index in indices]),
        lambda index, levels: {"teacher": [index, index[..., None]][levels]},
        lambda images: {"teacher": [images]},
        **{"shots": 3, "batch_size": 4, **choices},
    )


@pytest.fixture
def no_lesions(monkeypatch):
    """Spare the time to draw lesions where only the indices matter."""
    monkeypatch.setattr(
        lesion_episodes, "paste_lesion", lambda image, rng: (image, np.zeros(image.shape[1:], dtype=np.bool_))
    )


def drawn(dataset, when):
    """Queries and their supports: {query: (support, ...)}."""
    batch = dataset[when]
    queries = [NUMBERS[pixels.numpy().tobytes()] for pixels in batch.query["teacher"][0]]
    supports = batch.support["teacher"][0].tolist()
    assert len(set(queries)) == len(queries) == len(supports)
    return {query: tuple(chosen) for query, chosen in zip(queries, supports, strict=True)}


def test_supports_are_other_distinct_images_of_the_task(no_lesions):
    dataset = make(seed=5)
    for step in range(60):
        for query, chosen in drawn(dataset, (step // 20, step)).items():
            assert query not in chosen
            assert len(set(chosen)) == len(chosen)
            assert {NAMES[index] for index in (query, *chosen)} == {NAMES[query]}


@pytest.mark.parametrize(("shots", "found"), [(1, {1}), (2, {2}), (3, {2, 3})])
def test_the_number_of_supports_is_drawn_from_two_up(no_lesions, shots, found):
    sizes = [{len(chosen) for chosen in drawn(make(shots=shots), (0, step)).values()} for step in range(30)]
    assert all(len(each) == 1 for each in sizes), "one number of supports per batch"
    assert set.union(*sizes) == found


def test_every_image_of_a_task_becomes_query_and_support(no_lesions):
    asked, shown = Counter(), Counter()
    for step in range(120):
        for query, chosen in drawn(make(), (0, step)).items():
            asked[query] += 1
            shown.update(chosen)
    assert set(asked) == set(shown) == set(range(len(NAMES)))


def test_the_tasks_take_turns_whatever_their_size_and_go_on_in_the_next_epoch(no_lesions):
    dataset = make(batch_size=1)
    turns = [
        NAMES[next(iter(drawn(dataset, (epoch, step))))]
        for epoch, steps in ((0, range(STEPS - 4, STEPS)), (1, range(5)))
        for step in steps
    ]
    assert turns == turns[:3] * 3
    assert len(set(turns[:3])) == 3


def test_a_batch_depends_on_seed_epoch_and_step_only():
    def numbers(batch):
        return [*batch.query["teacher"], *batch.query["pasted"], *batch.query["mask"], *batch.support["teacher"]]

    dataset = make(seed=7)
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    torch.manual_seed(1)
    first = numbers(dataset[(2, 5)])
    assert dataset[(2, 6)].query["teacher"][0].tolist()  # others are drawn in between
    again = numbers(make(seed=7)[(2, 5)])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize(("seed", "when"), [(8, (2, 5)), (7, (5, 5)), (7, (2, 8)), (7, (5, 2))])
def test_another_seed_epoch_or_step_is_another_batch(seed, when):
    names = ["a"] * 30
    one, other = (make(names, seed=each, shots=2)[at] for each, at in ((7, (2, 5)), (seed, when)))
    assert one.query["teacher"][0].tolist() != other.query["teacher"][0].tolist()
    assert one.support["teacher"][0].tolist() != other.support["teacher"][0].tolist()
    assert not torch.equal(one.query["mask"][0], other.query["mask"][0])


def test_every_query_comes_with_its_own_lesion_and_mask():
    for step in range(6):
        query = make()[(0, step)].query
        assert set(query) == {"teacher", "pasted", "mask"}
        (normal,), (pasted,), (masks,) = query["teacher"], query["pasted"], query["mask"]
        assert {pixels.numpy().tobytes() for pixels in normal} <= set(NUMBERS)
        assert pasted.shape == normal.shape == (len(normal), 3, 32, 48)
        assert masks.shape == (len(normal), 32, 48)
        assert masks.dtype == torch.bool
        assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)
        for before, lesion, mask in zip(normal, pasted, masks, strict=True):
            change = (lesion - before).abs().mean(dim=0)
            assert 0 < float(mask.float().mean()) < 0.3
            assert float(change[mask].mean()) > 0.03
            assert float(change[mask].mean()) > 5 * float(change[~mask].mean())
            assert float((change == 0).float().mean()) > 0.3, "the rest is the very image"


def test_frozen_features_of_lesions_are_not_tracked():
    weight = torch.ones(1, requires_grad=True)
    dataset = make()
    dataset.extract = lambda images: {"teacher": [weight * images]}
    assert not dataset[(0, 0)].query["pasted"][0].requires_grad


def test_a_small_task_gives_fewer_queries(no_lesions):
    dataset = make(batch_size=8)
    sizes = {}
    for step in range(3):
        queries = list(drawn(dataset, (0, step)))
        sizes[NAMES[queries[0]]] = len(queries)
    assert sizes == {"brain": 7, "lung": 4, "eye": 8}


def test_too_few_images_for_the_shots_are_refused():
    make(shots=3)
    with pytest.raises(ConfigError) as error:
        make(shots=4)
    message = str(error.value)
    assert message.startswith("training: task 'lung' has 4 normal training images, 4 shots need at least 5.")
    assert "--training.shots" in message


def test_an_epoch_is_its_steps():
    sampler = StepSampler()
    assert list(sampler) == [(0, step) for step in range(STEPS)]
    sampler.set_epoch(3)
    assert list(sampler) == [(3, step) for step in range(STEPS)]
    assert len(sampler) == STEPS


def test_the_loader_hands_batches_on_as_they_are(no_lesions, monkeypatch):
    monkeypatch.setattr(lesion_episodes, "STEPS", 3)
    dataset, sampler = make(), StepSampler()
    sampler.set_epoch(2)
    batches = list(DataLoader(dataset, batch_size=None, sampler=sampler))
    assert len(batches) == 3
    for step, batch in enumerate(batches):
        assert isinstance(batch, Batch)
        expected = dataset[(2, step)]
        for one, other in zip(batch[:2], expected[:2], strict=True):
            assert set(one) == set(other)
            assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 32)])
def test_synthetic_images_are_five_tasks_more(size):
    names, images = synthetic_images(3, size)
    assert Counter(names) == {f"synthetic {task}": 3 for task in TASKS}
    assert images.shape == (15, 3, *size)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert len({each.numpy().tobytes() for each in images}) == 15
    gray = [bool((each[0] == each[1]).all() and (each[1] == each[2]).all()) for each in images]
    colour = {name for name, is_gray in zip(names, gray, strict=True) if not is_gray}
    assert colour == {"synthetic fundus", "synthetic histology"}
    again = synthetic_images(3, size)
    assert again[0] == names
    assert torch.equal(again[1], images)


def test_synthetic_images_are_those_of_their_task(monkeypatch):
    """Drawn square, at the larger side, and squashed."""

    def tone(task, *, seed, size):
        assert size == 64
        ramp = np.linspace(0, 0.5, size, dtype=np.float32)[:, None] if seed % 2 else np.zeros(1, np.float32)
        return SimpleNamespace(pixels=np.broadcast_to(list(TASKS).index(task) / 10 + ramp, (1, size, size)))

    monkeypatch.setattr(lesion_episodes, "draw", tone)
    names, images = synthetic_images(4, (32, 64))
    expected = [list(TASKS).index(name.removeprefix("synthetic ")) / 10 for name in names]
    assert images[:, :, 0].mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=0.02)
    rise = (images[:, :, -1] - images[:, :, 0]).mean(dim=(1, 2))
    assert sorted(rise.round(decimals=1).tolist()) == pytest.approx([0.0] * 10 + [0.5] * 10, abs=1e-3)


def test_no_synthetic_images_are_none():
    names, images = synthetic_images(0, (64, 96))
    assert names == []
    assert images.shape == (0, 3, 64, 96)


def test_no_patient_of_the_benchmark_is_a_synthetic_one(tmp_path, monkeypatch):
    patients = {"synthetic": set(), "benchmark": set()}

    def note(where):
        def noted(task, *, seed, **choices):
            patients[where].add((task, seed))
            return draw(task, seed=seed, **choices)

        return noted

    monkeypatch.setattr(lesion_episodes, "draw", note("synthetic"))
    monkeypatch.setattr(phantom, "draw", note("benchmark"))
    synthetic_images(4, (32, 32))
    for seed in (0, 1, 999):
        write_benchmark(tmp_path, train=4, test_normal=2, test_anomalous=2, size=32, seed=seed)
    assert len(patients["synthetic"]) == 5 * 4
    assert len(patients["benchmark"]) >= 5 * 3 * 4
    assert not patients["synthetic"] & patients["benchmark"]
