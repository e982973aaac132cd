"""Matching against loops over places and a solver of its own for the mixtures."""

import pytest
import torch

from anatomaly.errors import ConfigError, ShapeError
from anatomaly.methods.matching import Matching
from anatomaly.methods.settings import MatchingSettings
from anatomaly.scoring import anomaly_map, compare_tensor, predict_tensor
from anatomaly.types import Scoring

GEOMETRIC = Scoring(pooling="topk", top_fraction=0.05, levels="geometric")


ALL = MatchingSettings(places=(1, 2, 3, 4), wholes=(3, 4))


@pytest.fixture
def model(lite0):
    """All levels, so that each is looked at."""
    return Matching(lite0, settings=ALL)


def features(batch, *, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 4, 6), (7, 2, 3), (3, 2, 3), (4, 1, 2)]
    return {"teacher": [torch.randn(batch, *shape, generator=generator) for shape in shapes]}


def best_of_all(query, supports):
    """Per place of (C, h, w), the largest cosine to any place of (K, C, h, w) and the support that has it."""
    places = [place / place.norm() for support in supports for place in support.flatten(1).T]
    cosines = torch.stack([torch.stack([place @ (one / one.norm()) for place in places]) for one in query.flatten(1).T])
    best, where = cosines.max(dim=1)
    return best.view(query.shape[1:]), where // supports[0, 0].numel()


@pytest.mark.parametrize("shots", [1, 3])
def test_every_place_meets_its_nearest(model, shots):
    query, support = features(2, seed=1), features(shots, seed=2)
    comparisons = model.compare(model.encode(query), model.embed_support(support))
    assert len(comparisons) == 6  # four levels of places, two of whole images
    averaged = [torch.nn.functional.avg_pool2d(each["teacher"][0], 2) for each in (query, support)]
    for i, comparison in enumerate(comparisons[:4]):
        asked, shown = averaged if i == 0 else (query["teacher"][i], support["teacher"][i])
        for b in range(2):
            cosines, owners = best_of_all(asked[b], shown)
            found = torch.cosine_similarity(comparison.student[b], comparison.target[b], dim=0)
            torch.testing.assert_close(found, cosines, rtol=1e-4, atol=1e-5)
            share = torch.bincount(owners, minlength=shots) / owners.numel()
            torch.testing.assert_close(comparison.weights[b], share)
            assert comparison.scale == 1.0


def test_whole_images_meet_the_best_mixture(model):
    query, support = features(2, seed=1), features(3, seed=2)
    mixed = model.compare(model.encode(query), model.embed_support(support))[4:]
    for level, comparison in zip((2, 3), mixed, strict=True):
        asked, shown = (
            torch.nn.functional.normalize(each["teacher"][level].mean(dim=(2, 3)), dim=1) for each in (query, support)
        )
        # Least squares with a ridge are least squares with more rows.
        ridge = (0.01 * shown.square().sum(dim=1).mean()).sqrt() * torch.eye(3)
        rows, wanted = torch.cat([shown.T, ridge]), torch.cat([asked.T, torch.zeros(3, 2)])
        shares = torch.linalg.lstsq(rows, wanted).solution
        torch.testing.assert_close(comparison.target[:, :, 0, 0], (shown.T @ shares).T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(comparison.student[:, :, 0, 0], asked)
        assert (comparison.weights, comparison.scale) == (None, 0.25)


def test_a_mixture_of_supports_is_normal_as_a_whole(model):
    support = features(2, seed=3)
    query = {"teacher": [level.mean(dim=0, keepdim=True) for level in support["teacher"]]}
    *places, _, deepest = model.compare(model.encode(query), model.embed_support(support))
    assert float(anomaly_map([deepest], (1, 1))) < 1e-3 < float(anomaly_map([places[-1]], (1, 1)))


@pytest.mark.parametrize(
    ("settings", "grids"),
    [
        (MatchingSettings(), [(2, 3), (2, 3), (1, 1)]),
        (MatchingSettings(places=(4, 1), wholes=()), [(2, 3), (1, 2)]),
        (MatchingSettings(places=[3], wholes=[2, 4]), [(2, 3), (1, 1), (1, 1)]),
    ],
)
def test_the_settings_say_which_levels_are_compared(settings, grids, lite0):
    model = Matching(lite0, settings=settings)
    query, support = features(2, seed=1), features(2, seed=2)
    encoded = model.encode(query)
    assert [tuple(level.shape[2:]) for level in encoded] == grids
    channels = [query["teacher"][number - 1].shape[1] for number in (*settings.places, *settings.wholes)]
    assert [level.shape[1] for level in encoded] == channels
    scales = [comparison.scale for comparison in model.compare(encoded, model.embed_support(support))]
    assert scales == [1.0] * len(settings.places) + [settings.whole_weight] * len(settings.wholes)


@pytest.mark.parametrize(
    "values", [{"places": ()}, {"places": (0,)}, {"wholes": (5,)}, {"places": (2, 2)}, {"wholes": 3}]
)
def test_levels_that_are_not_there_are_refused(values):
    with pytest.raises(
        ConfigError, match=r"method\.matching\.(places|wholes): got .*, expected .*some of the levels 1 to 4"
    ):
        MatchingSettings(**values)


def test_levels_of_a_second_teacher_count_beside_those_of_the_first(lite0, model):
    both = Matching(lite0, lite0, settings=ALL)
    queries, supports = features(2, seed=1), features(3, seed=2)
    others = [{"global_teacher": features(batch, seed=seed)["teacher"]} for batch, seed in ((2, 3), (3, 4))]
    found = both.compare(both.encode(queries | others[0]), both.embed_support(supports | others[1]))
    apart = [
        model.compare(
            model.encode({"teacher": query["teacher" if role else "global_teacher"]}),
            model.embed_support({"teacher": support["teacher" if role else "global_teacher"]}),
        )
        for role, query, support in ((True, queries, supports), (False, *others))
    ]
    expected = [*apart[0][:4], *apart[1][:4], *apart[0][4:], *apart[1][4:]]
    assert len(found) == 12
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.target, other.target)
        assert one.scale == other.scale


def test_a_support_image_is_not_anomalous(model):
    images = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    bank = model.embed_support(model.extract_support(images))
    known = predict_tensor(model, images, bank, scoring=GEOMETRIC)
    new = predict_tensor(model, images[:1], {name: tensor[1:] for name, tensor in bank.items()}, scoring=GEOMETRIC)
    assert float(known.scores.max()) < 1e-4 < 1e-2 < float(new.scores)


def test_a_score_does_not_depend_on_the_batch(model):
    images = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    bank = model.embed_support(model.extract_support(images[:4]))
    together = predict_tensor(model, images[4:], bank, scoring=GEOMETRIC)
    for i in range(5):
        alone = predict_tensor(model, images[4 + i : 5 + i], bank, scoring=GEOMETRIC)
        torch.testing.assert_close(alone.scores, together.scores[i : i + 1], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone.maps, together.maps[i : i + 1], rtol=0, atol=1e-5)


def test_a_bank_of_another_size_is_refused(model):
    bank = model.embed_support(features(2, seed=1))
    other = {"teacher": [level[..., :-1] for level in features(1, seed=2)["teacher"][:3]]}
    other["teacher"].append(features(1, seed=2)["teacher"][3])
    with pytest.raises(ShapeError, match=r"level 1 of the query .* Make the bank anew"):
        model.compare(model.encode(other), bank)


def test_there_is_nothing_to_train(model):
    assert not list(model.parameters())
    with pytest.raises(NotImplementedError, match="no trainable part"):
        model.training_loss({}, {})


def test_what_is_spread_all_over_is_seen_as_a_whole(model):
    """Every place of the query is a place of some support, but the mixture is none of theirs: only the whole tells."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.nn.functional.normalize(torch.randn(2, 4, generator=generator), dim=1)

    def filled(*counts):
        """An image of 2 x 3 places, so many of each kind."""
        places = torch.cat([kinds[i].repeat(count, 1) for i, count in enumerate(counts)])
        level = places.T.reshape(1, 4, 2, 3)
        return level.repeat_interleave(2, 2).repeat_interleave(2, 3), level, level, level

    support = {"teacher": list(filled(5, 1))}
    bank, size = model.embed_support(support), (4, 6)
    like, unlike = (model.encode({"teacher": list(filled(*counts))}) for counts in ((5, 1), (1, 5)))
    scores = [compare_tensor(model, query, bank, size=size, scoring=GEOMETRIC).scores for query in (like, unlike)]
    assert float(scores[0]) < 1e-5
    places = anomaly_map(model.compare(unlike, bank)[:4], size)
    assert float(places.max()) < 1e-5  # no place of it is new
    assert float(anomaly_map(model.compare(unlike, bank)[4:], size).min()) > 1e-2
