"""Patch nearest neighbours against a loop over all patches."""

import pytest
import torch

from anatomaly.methods import build_method, nearest
from anatomaly.methods.nearest import PatchNearestNeighbours
from anatomaly.scoring import anomaly_map


@pytest.fixture
def model(lite0):
    return build_method("nearest", lite0)


def features(batch, *, seed, size=(2, 3)):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 2 * size[0], 2 * size[1]), (7, *size), (3, *size), (4, 1, 1)]
    return {"teacher": [torch.randn(batch, *shape, generator=generator) for shape in shapes]}


def nearest_by_loops(query, supports):
    """Per position of (C, h, w), the largest cosine to any patch of (K, C, h, w) and the support that has it."""
    cosines, owners = torch.zeros(query.shape[1:]), torch.zeros(query.shape[1:], dtype=torch.long)
    for i in range(query.shape[1]):
        for j in range(query.shape[2]):
            best = -2.0
            for k, support in enumerate(supports):
                for patch in support.flatten(1).T:
                    cosine = float(query[:, i, j] @ patch / (query[:, i, j].norm() * patch.norm()))
                    if cosine > best:
                        best, owners[i, j] = cosine, k
            cosines[i, j] = best
    return cosines, owners


@pytest.mark.parametrize("shots", [1, 3])
def test_every_patch_meets_its_nearest(model, shots):
    query, support = features(2, seed=1), features(shots, seed=2)
    comparisons = model.compare(model.encode(query), model.embed_support(support))
    assert len(comparisons) == 3
    for level, (student, target, weights, *_) in enumerate(comparisons):
        assert torch.equal(student, query["teacher"][level])
        assert target.shape == student.shape
        for b in range(2):
            cosines, owners = nearest_by_loops(student[b], support["teacher"][level])
            found = torch.cosine_similarity(student[b], target[b], dim=0)
            torch.testing.assert_close(found, cosines, rtol=1e-4, atol=1e-5)
            share = torch.bincount(owners.flatten(), minlength=shots) / owners.numel()
            torch.testing.assert_close(weights[b], share)


def test_a_support_image_is_not_anomalous(model, lite0):
    images = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    extracted = model.extract(images)
    bank = model.embed_support(extracted)
    maps = anomaly_map(model.compare(model.encode(extracted), bank), (64, 96))
    assert float(maps.abs().max()) < 1e-4
    alone = model.compare(model.encode(model.extract(images[:1])), {name: t[1:] for name, t in bank.items()})
    assert float(anomaly_map(alone, (64, 96)).mean()) > 1e-2
    assert torch.equal(model.compare(model.encode(extracted), bank)[0].weights, torch.eye(3))


def test_the_bank_holds_unit_patches_of_the_first_three_levels(model):
    support = features(2, seed=2)
    bank = model.embed_support(support)
    assert list(bank) == ["patches_0", "patches_1", "patches_2"]
    for level, patches in enumerate(bank.values()):
        assert patches.shape == support["teacher"][level].shape
        torch.testing.assert_close(patches.norm(dim=1), torch.ones(2, *patches.shape[2:]))


def test_query_and_support_may_differ_in_size_and_length_does_not_matter(model):
    query, support = features(1, seed=1), features(2, seed=2, size=(4, 1))
    louder = {"teacher": [3 * level for level in support["teacher"]]}
    quiet, loud = (model.compare(model.encode(query), model.embed_support(s)) for s in (support, louder))
    for one, other in zip(quiet, loud, strict=True):
        torch.testing.assert_close(one.target, other.target)


def test_it_has_no_weights_and_no_loss(model):
    assert isinstance(model, PatchNearestNeighbours)
    assert not list(model.parameters())
    assert not model.state_dict()
    with pytest.raises(NotImplementedError, match="no trainable part"):
        model.training_loss(features(1, seed=1), features(1, seed=2))


@pytest.mark.parametrize("block", [1, 14, 10**6])  # less than the patches of one query, two queries at a time, all
def test_blocks_change_nothing(model, monkeypatch, block):
    bank, query = model.embed_support(features(3, seed=1)), model.encode(features(2, seed=2))
    whole = model.compare(query, bank)
    monkeypatch.setattr(nearest, "_BLOCK", block)
    for one, other in zip(model.compare(query, bank), whole, strict=True):
        torch.testing.assert_close(one.target, other.target, rtol=0, atol=0)
        torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=0)


def test_of_equal_patches_the_first_counts():
    patches = torch.eye(3)[[0, 1, 0, 1, 2]]
    assert nearest.most_similar(torch.eye(3), patches).tolist() == [0, 1, 4]
