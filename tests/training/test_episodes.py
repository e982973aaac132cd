"""Who becomes query and support: distinct images of one task, drawn from seed and epoch alone."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from anatomaly.errors import ConfigError
from anatomaly.training.episodes import Batch, Episodes, EpisodeSampler, as_is
from anatomaly.training.parts import Parts

TASKS = ["brain"] * 5 + ["lung"] * 4 + ["brain"] * 2 + ["eye"] * 9


def epoch(number, *, tasks=TASKS, shots=3, **choices):
    sampler = EpisodeSampler(tasks, shots=shots, **choices)
    sampler.set_epoch(number)
    return list(sampler)


def supports(episodes):
    return {query: tuple(chosen) for query, *chosen in episodes}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 9), min_size=1, max_size=4),
    shots=st.integers(1, 2),
    seed=st.integers(0, 2**32),
    number=st.integers(0, 1000),
    resample=st.booleans(),
)
def test_supports_are_other_distinct_images_of_the_task(sizes, shots, seed, number, resample):
    tasks = [f"task {i}" for i, size in enumerate(sizes) for _ in range(size)]
    episodes = epoch(number, tasks=tasks, shots=shots, seed=seed, resample=resample)
    assert sorted(query for query, *_ in episodes) == list(range(len(tasks)))  # each is the query once
    for query, *chosen in episodes:
        assert query not in chosen
        assert len(set(chosen)) == len(chosen) == shots
        assert {tasks[index] for index in chosen} == {tasks[query]}


def test_all_others_are_taken_where_there_are_just_enough():
    for query, *chosen in epoch(0, tasks=["a"] * 4, shots=3):
        assert {query, *chosen} == {0, 1, 2, 3}


def test_every_other_image_of_the_task_gets_its_turn():
    seen = Counter(index for number in range(40) for index in supports(epoch(number, shots=1))[5])
    assert set(seen) == {6, 7, 8}


def test_resampling_draws_anew_and_without_it_the_supports_stay():
    assert supports(epoch(0)) != supports(epoch(1))
    assert supports(epoch(0, resample=False)) == supports(epoch(1, resample=False)) == supports(epoch(0))


def test_the_order_changes_from_epoch_to_epoch():
    for resample in (True, False):
        orders = {tuple(query for query, *_ in epoch(number, resample=resample)) for number in range(5)}
        assert len(orders) == 5
        assert tuple(range(len(TASKS))) not in orders


def test_an_epoch_depends_on_seed_and_number_only():
    sampler = EpisodeSampler(TASKS, shots=3, seed=7)
    torch.manual_seed(1)
    first = list(sampler)
    sampler.set_epoch(5)
    fifth = list(sampler)
    torch.manual_seed(2)
    assert fifth == list(sampler) == epoch(5, seed=7)  # nobody passed epochs 1 to 4
    sampler.set_epoch(0)
    assert first == list(sampler)
    other = epoch(0, seed=8)
    assert [query for query, *_ in other] != [query for query, *_ in first]
    assert supports(other) != supports(first)
    assert len(sampler) == len(first) == len(TASKS)


def test_too_few_images_for_the_shots_are_refused():
    assert len(epoch(0, shots=3)) == len(TASKS)
    with pytest.raises(ConfigError) as error:
        EpisodeSampler(TASKS, shots=4)
    message = str(error.value)
    assert message.startswith("training: task 'lung' has 4 normal training images, 4 shots need at least 5.")
    assert "--training.shots" in message


def test_episodes_become_one_batch_of_tensors():
    """Queries (B, ...) and supports (B, K, ...) in the order the sampler drew them, whatever the workers do."""
    values = torch.arange(float(len(TASKS)))

    def fetch(index, levels):
        return {"teacher": [values[index], values[index][..., None].expand(*index.shape, 2)][levels]}

    sampler = EpisodeSampler(TASKS, shots=3)
    sampler.set_epoch(2)
    episodes = Episodes(fetch, support_levels=slice(-1, None))
    batches = list(DataLoader(episodes, batch_sampler=Parts(sampler, batch_size=8), collate_fn=as_is))
    assert all(isinstance(batch, Batch) for batch in batches)
    assert [len(batch.query["teacher"][0]) for batch in batches] == [8, 8, 4]
    drawn = torch.tensor(epoch(2)).float()
    assert torch.equal(torch.cat([batch.query["teacher"][0] for batch in batches]), drawn[:, 0])
    assert [len(batch.support["teacher"]) for batch in batches] == [1, 1, 1], "the deepest level only"
    assert torch.equal(torch.cat([batch.support["teacher"][0][..., 0] for batch in batches]), drawn[:, 1:])
    assert batches[0].support["teacher"][0].shape == (8, 3, 2)


def test_without_shots_there_is_no_support():
    sampler = EpisodeSampler(TASKS, shots=0)
    parts = Parts(sampler, batch_size=7)
    batches = list(DataLoader(Episodes(lambda index, _: {"x": [index]}), batch_sampler=parts, collate_fn=as_is))
    assert all(batch.support == {} for batch in batches)
    assert sorted(torch.cat([batch.query["x"][0] for batch in batches]).tolist()) == list(range(len(TASKS)))
