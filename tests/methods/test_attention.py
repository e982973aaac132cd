"""Patch attention against loops over all patches, and its loss against what prediction compares."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import affine_transform, gaussian_filter
from torch.optim import Adam

from anatomaly.backbones.weights import state_digest
from anatomaly.errors import ShapeError
from anatomaly.methods import attention, build_method
from anatomaly.methods.settings import AttentionSettings
from anatomaly.scoring import anomaly_map, leave_one_out
from anatomaly.types import Scoring

TEACHER = SimpleNamespace(channels=(4, 6, 8, 10), strides=(4, 8, 16, 32))
LEARNED = len(TEACHER.channels)  # the student's levels come first, the teacher's own after them


def method(*, seed=None, **parts):
    """As it is built, or with all its parameters moved at random."""
    model = build_method("attention", TEACHER, AttentionSettings(**parts))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 0.4 if name.startswith("readings") else 0.1
                parameter += spread * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pyramid(*batch, seed, size=(2, 3), channels=TEACHER.channels):
    """Four levels of non-square images, with the given leading shape."""
    generator = torch.Generator().manual_seed(seed)
    sides = [(4 * size[0], 4 * size[1]), (2 * size[0], 2 * size[1]), size, (1, 2)]
    return [torch.randn(*batch, c, *side, generator=generator) for c, side in zip(channels, sides, strict=True)]


def features(*batch, seed, **shape):
    return {"teacher": pyramid(*batch, seed=seed, **shape)}


def both_views(shots, *, seed):
    return {**features(shots, seed=seed), "mirrored": pyramid(shots, seed=seed + 1000)}


def judge(model, query, support):
    with torch.no_grad():
        return model.compare(model.encode(query), model.embed_support(support))


def unit(vector):
    return vector / np.linalg.norm(vector)


def levels_of(levels, index):
    """Image `index` of a pyramid as float64 arrays (C, h, w), the first level averaged over blocks of 2 x 2."""
    first, *deeper = (level[index].double().numpy() for level in levels)
    c, h, w = first.shape
    return [first.reshape(c, h // 2, 2, w // 2, 2).mean(axis=(2, 4)), *deeper]


def patches_by_loops(level, reading):
    """Patches (C,) of a level (C, h, w), each with its place in an image of side 1."""
    _, h, w = level.shape
    return [(unit(reading @ level[:, y, x]), ((y + 0.5) / h, (x + 0.5) / w)) for y in range(h) for x in range(w)]


def attention_by_loops(query, supports, reading, *, pull, temperature):
    """Rebuilt patches (h * w, C) of a level (C, h, w) and the share of every support, each a list of views."""
    rebuilt, shares = [], np.zeros(len(supports))
    patches = [(k, p) for k, views in enumerate(supports) for view in views for p in patches_by_loops(view, reading)]
    rows = patches_by_loops(query, reading)
    for row, (y, x) in rows:
        logits = [(row @ key - pull * ((y - v) ** 2 + (x - u) ** 2)) / temperature for _, (key, (v, u)) in patches]
        weights = np.exp(np.array(logits) - max(logits))
        weights /= weights.sum()
        rebuilt.append(sum(weight * key for weight, (_, (key, _)) in zip(weights, patches, strict=True)))
        for weight, (k, _) in zip(weights, patches, strict=True):
            shares[k] += weight / len(rows)
    return np.stack(rebuilt), shares


def nearest_by_loops(query, supports):
    """The same of the most similar patch alone."""
    same = np.eye(len(query))
    rebuilt, shares = [], np.zeros(len(supports))
    patches = [(k, p) for k, views in enumerate(supports) for view in views for p, _ in patches_by_loops(view, same)]
    rows = patches_by_loops(query, same)
    for row, _ in rows:
        k, nearest = max(patches, key=lambda patch: row @ patch[1])
        rebuilt.append(nearest)
        shares[k] += 1 / len(rows)
    return np.stack(rebuilt), shares


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize(("shots", "few"), [(1, 16), (3, 16), (3, 2)])
def test_every_patch_is_rebuilt_as_the_loops_do_it(shots, few, views, monkeypatch):
    monkeypatch.setattr(attention, "_FEW", few)
    monkeypatch.setattr(attention, "_WEIGHTS", 50)  # a row or two at a time
    model, query = method(seed=4), features(2, seed=1)
    support = both_views(shots, seed=2) if views == 2 else features(shots, seed=2)
    comparisons, learned = judge(model, query, support), model.state_dict()
    assert len(comparisons) > LEARNED
    for b in range(2):
        levels = levels_of(query["teacher"], b)
        banks = [[levels_of(view, k) for view in support.values()] for k in range(shots)]
        for i, (student, target, weights, *_) in enumerate(comparisons):
            supports = [[view[i % LEARNED] for view in bank] for bank in banks]
            level = levels[i % LEARNED]
            if i < LEARNED:
                reading = learned[f"readings.{i}"].double().numpy()
                pull = np.log1p(np.exp(10 * float(learned["locality"][i])))
                temperature = np.exp(10 * float(learned["temperature"][i]))
                expected, shares = attention_by_loops(level, supports, reading, pull=pull, temperature=temperature)
            else:
                reading = np.eye(len(level))
                expected, shares = nearest_by_loops(level, supports)
            rows = [row for row, _ in patches_by_loops(level, reading)]
            np.testing.assert_allclose(student[b].flatten(1).T, rows, atol=1e-5)
            np.testing.assert_allclose(target[b].flatten(1).T, expected, atol=2e-5)
            np.testing.assert_allclose(weights[b], shares, atol=1e-5)


def test_the_learned_scalars_say_how_a_level_counts():
    model = method(seed=4)
    comparisons = judge(model, features(1, seed=1), features(2, seed=2))
    plain = judge(method(), features(1, seed=1), features(2, seed=2))[LEARNED:]
    scales, surrounds = (10 * model.state_dict()[name].double() for name in ("scale", "surround"))
    fixed = [c.scale for c in judge(method(), features(1, seed=1), features(2, seed=2))[:LEARNED]]
    assert fixed == pytest.approx([1.0] * (LEARNED - 1) + [2.0])
    found = [c.scale / factor for c, factor in zip(comparisons, fixed, strict=False)]
    assert found == pytest.approx(scales.exp().tolist(), rel=1e-5)
    assert [c.surround for c in comparisons[:LEARNED]] == pytest.approx(surrounds.sigmoid().tolist(), rel=1e-5)
    assert [c.scale for c in comparisons[LEARNED:]] == [c.scale for c in plain], "the teacher's own is never rescaled"


@pytest.mark.parametrize("levels", [0, 1, 3, 4])
def test_as_many_of_the_teachers_levels_as_wanted_count_beside_the_students(levels):
    query, support = features(2, seed=1), both_views(2, seed=2)
    found = judge(method(seed=4, teacher_levels=levels), query, support)
    assert len(found) == LEARNED + levels
    for one, other in zip(found, judge(method(seed=4, teacher_levels=4), query, support), strict=False):
        torch.testing.assert_close(one.target, other.target)
        assert (one.scale, one.surround) == (other.scale, other.surround)


def test_the_deepest_level_counts_what_it_is_told():
    query, support = features(1, seed=1), features(2, seed=2)
    once, thrice = (
        [comparison.scale for comparison in judge(method(seed=4, deepest=factor), query, support)]
        for factor in (1.0, 3.0)
    )
    assert thrice == pytest.approx([*once[: LEARNED - 1], 3 * once[LEARNED - 1], *once[LEARNED:]])


def test_without_surroundings_neither_map_nor_training_knows_them():
    model, (query, support) = method(seed=4, surroundings=False), episodes(seed=3)
    assert {comparison.surround for comparison in judge(model, features(1, seed=1), features(2, seed=2))} == {0.0}
    model.training_loss(query, support)["total"].backward()
    assert not model.surround.grad.any()
    assert model.scale.grad.abs().min() > 0
    with torch.no_grad():
        one, other = (method(seed=4, surroundings=on).training_loss(query, support)["total"] for on in (True, False))
    assert float(one) != pytest.approx(float(other), rel=1e-3)


@pytest.mark.parametrize(
    ("parts", "views"),
    [
        ({}, ["mirrored", "larger", "smaller"]),
        ({"mirrored": False}, ["larger", "smaller"]),
        ({"resized": False}, ["mirrored"]),
        ({"mirrored": False, "resized": False}, []),
    ],
    ids=str,
)
def test_supports_are_seen_four_ways_unless_told_otherwise(parts, views, lite0, images):
    model = build_method("attention", lite0, AttentionSettings(**parts)).eval()
    with torch.no_grad():
        extracted = model.extract_support(images)
        assert list(extracted) == ["teacher", *views]
        for view in extracted:
            shown = torch.from_numpy(seen(images.numpy(), view)).float()
            for level, expected in zip(extracted[view], lite0(shown), strict=True):
                torch.testing.assert_close(level, expected, rtol=1e-3, atol=1e-3)
        bank = model.embed_support(extracted)
    assert {tensor.shape[1] for tensor in bank.values()} == {1 + len(views)}


def test_it_starts_as_the_teacher_with_the_values_of_the_source():
    """Scalars are stored at a tenth, for Adam's sake."""
    model = method()
    assert [tuple(reading.shape) for reading in model.readings] == [(c, c) for c in TEACHER.channels]
    assert all(torch.equal(reading, torch.eye(len(reading))) for reading in model.readings)
    found = {name: 10 * p.detach() for name, p in model.named_parameters() if not name.startswith("readings")}
    assert {name: len(values) for name, values in found.items()} == {
        **dict.fromkeys(("temperature", "locality", "scale", "surround"), LEARNED),
        **dict.fromkeys(("gain", "bias"), 1),
    }
    expected = {
        "temperature": np.log(attention._TEMPERATURE),
        "locality": attention._LOCALITY,
        "gain": attention._GAIN,
        "bias": attention._BIAS,
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.full_like(found[name], value))
    shares = torch.sigmoid(found["surround"])
    assert shares[:-1].tolist() == pytest.approx([attention._SURROUND] * (LEARNED - 1), rel=1e-5)
    assert float(shares[-1]) == pytest.approx(attention._DEEP_SURROUND, rel=1e-5)
    assert state_digest(method().state_dict()) == state_digest(build_method("attention", TEACHER, seed=9).state_dict())


@pytest.mark.parametrize("seed", [None, 4])
def test_the_weights_are_shares_and_the_order_of_the_supports_does_not_matter(seed):
    model, query, support = method(seed=seed), features(3, seed=1), both_views(4, seed=2)
    turned = judge(model, query, {view: [level.flip(0) for level in levels] for view, levels in support.items()})
    for one, other in zip(judge(model, query, support), turned, strict=True):
        assert one.weights.shape == (3, 4)
        assert float(one.weights.min()) >= 0
        assert float(one.weights.std()) > 1e-4, "the supports must differ for the comparison to mean anything"
        torch.testing.assert_close(one.weights.sum(dim=1), torch.ones(3))
        torch.testing.assert_close(one.target, other.target, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.weights, other.weights.flip(1), rtol=1e-4, atol=1e-5)


def test_a_single_support_has_all_the_weight():
    for comparison in judge(method(seed=4), features(2, seed=1), features(1, seed=2)):
        torch.testing.assert_close(comparison.weights, torch.ones(2, 1))


def test_an_image_alone_is_judged_as_in_a_batch():
    model, query, support = method(seed=4), features(3, seed=1), both_views(2, seed=2)
    together = judge(model, query, support)
    for b in range(3):
        alone = judge(model, {"teacher": [level[b : b + 1] for level in query["teacher"]]}, support)
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one.target[0], many.target[b], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one.weights[0], many.weights[b], rtol=1e-5, atol=1e-6)
            assert (one.scale, one.surround) == (many.scale, many.surround)


def test_louder_features_say_the_same():
    model, query, support = method(seed=4), features(1, seed=1), features(2, seed=2)
    louder = {"teacher": [3 * level for level in support["teacher"]]}
    for one, other in zip(judge(model, query, support), judge(model, query, louder), strict=True):
        torch.testing.assert_close(one.target, other.target, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def seen(images, view):
    """A view of (B, 3, H, W) images, by another library: what is beyond the border is as the border."""
    if view == "mirrored":
        return images[..., ::-1].copy()
    matrix = {"teacher": 1.0, "larger": 1 / 1.1, "smaller": 1.1}[view] * np.eye(2)
    centre = (np.array(images.shape[2:]) - 1) / 2
    transform = partial(affine_transform, matrix=matrix, offset=centre - matrix @ centre, order=1, mode="nearest")
    return np.stack([[transform(channel) for channel in image] for image in images])


def plain_map(comparisons):
    """Map (B, 64, 96) of the teacher's own nearest patches, before any surroundings are subtracted."""
    return anomaly_map([comparison._replace(surround=0.0) for comparison in comparisons[LEARNED:]], (64, 96))


@pytest.mark.parametrize("view", ["teacher", "mirrored", "larger", "smaller"])
def test_no_view_of_a_support_is_anomalous(view, lite0, images):
    model = build_method("attention", lite0).eval()
    support, query = images[:2], torch.from_numpy(seen(images[:2].numpy(), view)).float()
    comparisons = judge(model, model.extract(query), model.extract_support(support))
    assert float(plain_map(comparisons).abs().max()) < 1e-3
    assert all(torch.equal(one.weights, torch.eye(2)) for one in comparisons[LEARNED:])
    if view != "teacher":
        assert float(plain_map(judge(model, model.extract(query), model.extract(support))).mean()) > 1e-2
    other = judge(model, model.extract(images[2:]), model.extract_support(support))
    assert float(plain_map(other).mean()) > 1e-2


def test_a_support_is_rebuilt_better_than_another_image(lite0, images):
    model = build_method("attention", lite0).eval()
    comparisons = judge(model, model.extract(images), model.extract_support(images[:2]))[:LEARNED]
    distance = anomaly_map([one._replace(surround=0.0) for one in comparisons], (64, 96)).mean(dim=(1, 2))
    assert float(distance[:2].max()) < 0.5 * float(distance[2])


def test_every_support_can_be_left_out(lite0, images):
    model = build_method("attention", lite0).eval()
    with torch.no_grad():
        extracted = model.extract_support(images)
        bank, encoded = model.embed_support(extracted), model.encode(extracted)
    assert len(bank) == len(encoded)
    assert {len(tensor) for tensor in bank.values()} == {3}
    maps, *_ = leave_one_out(model, encoded, bank, size=(64, 96), scoring=Scoring(blur=0))
    assert maps.shape == (3, 64, 96)
    for k in range(3):
        others = [i for i in range(3) if i != k]
        expected = judge(model, model.extract(images[k : k + 1]), model.extract_support(images[others]))
        torch.testing.assert_close(maps[k], anomaly_map(expected, (64, 96))[0], rtol=1e-3, atol=1e-4)
        assert float(plain_map(expected).mean()) > 1e-2, "a support without itself is like any image"


def test_a_bank_in_half_precision_is_nearly_as_good():
    model, query = method(), features(2, seed=1)
    with torch.no_grad():
        encoded, bank = model.encode(query), model.embed_support(both_views(2, seed=2))
        half = model.compare([level.bfloat16() for level in encoded], {name: t.bfloat16() for name, t in bank.items()})
        whole = model.compare(encoded, bank)
    distance, expected = (anomaly_map(comparisons, (8, 12)) for comparisons in (half, whole))
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, expected, rtol=0.05, atol=0.05)
    for comparison in half:
        torch.testing.assert_close(comparison.weights.float().sum(dim=1), torch.ones(2))


def test_a_detector_in_half_precision_gives_nearly_the_same_maps(lite0, images):
    model = build_method("attention", lite0).eval()
    maps = []
    for enabled in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            encoded = model.encode(model.extract(images[2:]))
            bank = model.embed_support(model.extract_support(images[:2]))
        with torch.inference_mode():
            maps.append(anomaly_map(model.compare(encoded, bank), (64, 96)))
    assert not torch.equal(*maps)
    torch.testing.assert_close(maps[1], maps[0], rtol=0.05, atol=0.1)


#: Banks whose number of patches is a multiple of the query's.
_MULTIPLES = [{"size": size} for size in ((6, 4), (2, 3))]


@pytest.mark.parametrize(
    "other",
    [{"size": (2, 2)}, {"size": (1, 5)}, {"channels": (5, 6, 8, 10)}, {"channels": (4, 6, 8, 9)}, *_MULTIPLES],
    ids=str,
)
def test_a_bank_of_another_size_or_teacher_is_refused(other):
    with torch.no_grad():
        encoded = method().encode(features(1, seed=1, size=(3, 2)))
        teacher = SimpleNamespace(channels=other.get("channels", TEACHER.channels), strides=TEACHER.strides)
        bank = build_method("attention", teacher).embed_support(features(2, seed=2, **{"size": (3, 2), **other}))
        with pytest.raises(ShapeError) as error:
            method().compare(encoded, bank)
    message = str(error.value)
    assert message.startswith("PatchAttention.compare: level ")
    assert "must match. Make the bank anew" in message
    assert "\n" not in message


def episodes(*, seed, lesion=1.0, batch=3, shots=2):
    """A query pyramid with and without a lesion, its mask at 16 x 24, and supports: all of them noisy copies of one."""
    generator = torch.Generator().manual_seed(seed)
    levels = pyramid(seed=seed)

    def noisy(level, *shape):
        return level + 0.4 * torch.randn(*shape, *level.shape, generator=generator)

    mask = torch.zeros(batch, 16, 24)
    for b in range(batch):
        y, x = (int(torch.randint(0, side - 6, (), generator=generator)) for side in (16, 24))
        mask[b, y : y + 6, x : x + 6] = 1
    normal = [noisy(level, batch) for level in levels]
    shift = [lesion * torch.randn(level.shape[0], 1, 1, generator=generator) for level in levels]
    covered = [F.adaptive_avg_pool2d(mask[:, None], tuple(level.shape[-2:])) for level in levels]
    pasted = [level + where * each for level, where, each in zip(normal, covered, shift, strict=True)]
    query = {"teacher": normal, "pasted": pasted, "mask": [mask.bool()]}
    return query, {"teacher": [noisy(level, batch, shots) for level in levels]}


def maps_of_comparisons(model, levels, support):
    """The student's part of the map of B queries, each against its own supports, on the grid of the second level.

    Surroundings are subtracted at the level's own resolution, where prediction does it at the map's.
    """
    grid, maps = tuple(levels[1].shape[-2:]), []
    for b in range(len(levels[0])):
        query = {"teacher": [level[b : b + 1] for level in levels]}
        comparisons = judge(model, query, {"teacher": [level[b] for level in support["teacher"]]})[:LEARNED]
        total = torch.zeros(grid, dtype=torch.float64)
        for i, (student, target, _, _, surround) in enumerate(comparisons):
            distance = (1 - torch.cosine_similarity(student[0].double(), target[0].double(), dim=0)).numpy()
            distance = distance - surround * gaussian_filter(distance, [3 / 16 * side for side in distance.shape])
            level = torch.from_numpy(distance)[None, None] * float(torch.exp(10 * model.scale[i]))
            total += F.interpolate(level, grid, mode="bilinear", align_corners=True)[0, 0]
        maps.append(total)
    return torch.stack(maps)


@pytest.mark.parametrize("seed", [None, 4])
def test_the_loss_is_of_what_prediction_compares(seed):
    model = method(seed=seed)
    query, support = episodes(seed=3)
    with torch.no_grad():
        losses = model.training_loss(query, support)
        high, low = (maps_of_comparisons(model, query[name], support) for name in ("pasted", "teacher"))
        gain, bias = float(torch.exp(10 * model.gain)), float(10 * model.bias)
    mask = query["mask"][0].double().reshape(3, 4, 4, 6, 4).mean(dim=(2, 4))  # 16 x 24 pixels, 4 x 6 cells
    assert 0 < float(mask.mean()) < 1
    cells = []
    for maps, truth in ((high, mask), (low, torch.zeros_like(mask))):
        logits = gain * maps + bias
        cells.append(attention._LESION_WEIGHT * truth * F.softplus(-logits) + (1 - truth) * F.softplus(logits))
    torch.testing.assert_close(losses["cells"].double(), torch.cat(cells).mean(), rtol=1e-4, atol=1e-6)
    count = round(attention._TOP * 24)
    assert count >= 1
    tops = [[float(np.sort(each.numpy().ravel())[-count:].mean()) for each in maps] for maps in (high, low)]
    pairs = [np.log1p(np.exp(-gain * (sick - normal))) for sick in tops[0] for normal in tops[1]]
    assert float(losses["images"]) == pytest.approx(np.mean(pairs), rel=1e-4)
    assert set(losses) == {"total", "cells", "images"}
    assert float(losses["total"]) == pytest.approx(float(losses["cells"] + losses["images"]), rel=1e-6)


def test_gradients_reach_every_parameter():
    model = method().train()
    model.training_loss(*episodes(seed=3))["total"].backward()
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.isfinite().all()), name
        some = (parameter.grad != 0).any() if name.startswith("readings") else (parameter.grad != 0).all()
        assert bool(some), name


def test_the_teacher_is_neither_trained_nor_stored(lite0, images):
    model = build_method("attention", lite0).train()
    before = state_digest(lite0.body.state_dict())
    query = {
        "teacher": model.extract(images[:1])["teacher"],
        "pasted": model.extract(1 - images[:1])["teacher"],
        "mask": [torch.ones(1, 64, 96, dtype=torch.bool)],
    }
    support = {"teacher": [level[None] for level in model.extract(images[1:])["teacher"]]}
    model.training_loss(query, support)["total"].backward()
    assert not any(p.grad is not None or p.requires_grad for p in lite0.parameters())
    assert not {id(p) for p in lite0.parameters()} & {id(p) for p in model.parameters()}
    assert not any("teacher" in name or "body" in name for name in model.state_dict())
    assert not lite0.training
    assert state_digest(lite0.body.state_dict()) == before
    assert all(bool(p.grad.any()) for p in model.parameters())


def test_a_lesion_that_can_be_seen_is_learned():
    model = method().train()
    optimizer = Adam(model.parameters(), lr=3e-3, betas=(0.5, 0.999))
    totals = []
    for step in range(30):
        losses = model.training_loss(*episodes(seed=3 + step % 2))
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        totals.append(float(losses["total"].detach()))
    assert max(totals[-2:]) < 0.75 * min(totals[:2])


def test_pairs_of_images_are_ranked_by_their_lesions():
    """The same images twice: nothing tells them apart, so the ranking costs log 2; a lesion makes it cost less."""
    model = method()
    query, support = episodes(seed=3, lesion=4.0)
    with torch.no_grad():
        found = model.training_loss(query, support)
        none = model.training_loss({**query, "pasted": query["teacher"]}, support)
        turned = model.training_loss({**query, "teacher": query["pasted"], "pasted": query["teacher"]}, support)
    assert float(found["images"]) < np.log(2) <= float(none["images"]) < float(turned["images"])
    assert float(found["cells"]) < float(none["cells"])
