import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from anatomaly.scoring import anomaly_map, blur, compare_tensor, geometric_mean, image_score, level_scores, surroundings
from anatomaly.types import Comparison, Scoring


def turned(degrees):
    """A comparison whose student and target enclose these angles, (h, w), in two channels."""
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32))[None]
    student = torch.stack([torch.ones_like(angle), torch.zeros_like(angle)], dim=1)
    return Comparison(student, 5.0 * torch.stack([angle.cos(), angle.sin()], dim=1))


def test_the_distance_is_one_minus_the_cosine_at_every_position():
    degrees = [[0.0, 60.0, 90.0], [120.0, 180.0, 45.0]]
    expected = 1 - np.cos(np.deg2rad(degrees))
    np.testing.assert_allclose(anomaly_map([turned(degrees)], (2, 3))[0], expected, atol=1e-6)


def test_levels_of_other_sizes_are_brought_to_the_map_with_their_corners_aligned():
    coarse, fine = turned([[0.0, 90.0], [90.0, 180.0]]), turned(90.0 * torch.ones(5, 5))
    total = anomaly_map([coarse, fine], (5, 5))[0]
    row, column = np.mgrid[0:5, 0:5] / 4
    np.testing.assert_allclose(total, row + column + 1, atol=1e-6)  # 0 ... 2 from corner to corner, plus 1


def test_a_map_need_not_be_square_and_a_level_may_be_larger_than_it():
    assert anomaly_map([turned(torch.zeros(8, 16)), turned(torch.zeros(1, 1))], (4, 10)).shape == (1, 4, 10)


def test_half_precision_features_give_a_float32_map():
    generator = torch.Generator().manual_seed(1)
    student, target = torch.randn(2, 2, 16, 4, 4, generator=generator).bfloat16()
    result = anomaly_map([Comparison(student, target)], (8, 8))
    assert result.dtype == torch.float32
    expected = anomaly_map([Comparison(student.float(), target.float())], (8, 8))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_features_that_are_all_zero_count_as_unrelated():
    zero, some = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    total = anomaly_map([Comparison(zero, some), Comparison(zero, zero)], (3, 3))
    assert torch.equal(total, torch.full((1, 3, 3), 2.0))


def test_no_comparison_is_an_error():
    with pytest.raises(ValueError, match="empty sequence, expected at least one"):
        anomaly_map([], (4, 4))


def random_distances(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [(16, 16), (6, 20), (1, 4), (1, 1)])
def test_surroundings_are_scipys_wide_gaussian_of_every_map_alone(size):
    distances = random_distances(3, *size)
    before = distances.clone()
    found = surroundings(distances)
    assert found.dtype == torch.float32
    sigma = [3 / 16 * side for side in size]
    expected = [gaussian_filter(each.double().numpy(), sigma, mode="reflect") for each in distances]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert torch.equal(distances, before)


def test_surroundings_pass_gradients_on_and_are_the_map_itself_where_it_is_flat():
    flat = torch.full((1, 9, 14), 0.7, requires_grad=True)
    found = surroundings(flat)
    torch.testing.assert_close(found.detach(), flat.detach())
    found.sum().backward()
    torch.testing.assert_close(flat.grad, torch.ones_like(flat))


def at_angles(distances, **counts):
    """A comparison with these cosine distances, (h, w)."""
    return turned(torch.rad2deg(torch.arccos(1 - distances)))._replace(**counts)


def test_a_level_counts_as_it_says():
    """At the map's own resolution, so that it does not matter where the surroundings are subtracted."""
    one, two = random_distances(2, 12, 20)
    found = anomaly_map([at_angles(one, scale=2.5, surround=0.8), at_angles(two, scale=0.5)], (12, 20))[0]
    wide = gaussian_filter(one.numpy(), (3 / 16 * 12, 3 / 16 * 20))
    np.testing.assert_allclose(found, 2.5 * (one.numpy() - 0.8 * wide) + 0.5 * two.numpy(), atol=1e-5)
    assert float(found.min()) < 0, "more normal than its surroundings"


def test_what_is_unlike_all_over_counts_less_by_the_share_of_its_surroundings():
    distances = torch.full((3, 5), 0.9)
    for share in (0.0, 0.25, 1.0):
        found = anomaly_map([at_angles(distances, surround=share)], (6, 10))
        np.testing.assert_allclose(found, 0.9 * (1 - share), atol=1e-6)


def test_surroundings_are_those_of_the_image_and_not_of_its_neighbours():
    distances = random_distances(2, 8, 8)
    student, target, *_ = zip(*(at_angles(each) for each in distances), strict=True)
    both = anomaly_map([Comparison(torch.cat(student), torch.cat(target), surround=0.8)], (16, 16))
    alone = [anomaly_map([at_angles(each, surround=0.8)], (16, 16))[0] for each in distances]
    torch.testing.assert_close(both, torch.stack(alone))


def test_blur_of_zero_changes_nothing():
    maps = torch.rand(2, 6, 6)
    assert torch.equal(blur(maps, 0), maps)


@pytest.mark.parametrize("sigma", [0.5, 4.0, 40.0])
def test_blur_is_scipys_gaussian_and_leaves_its_input_alone(sigma):
    maps = torch.rand(2, 17, 30, generator=torch.Generator().manual_seed(2))
    before = maps.clone()
    blurred = blur(maps, sigma)
    assert blurred.dtype == torch.float32
    np.testing.assert_allclose(blurred, [gaussian_filter(each.numpy(), sigma) for each in before], atol=1e-6)
    assert torch.equal(maps, before)


def test_blur_keeps_a_constant_map_and_the_sum_of_a_spot_far_from_the_border():
    torch.testing.assert_close(blur(torch.full((1, 9, 9), 3.0), 2.0), torch.full((1, 9, 9), 3.0))
    spot = torch.zeros(1, 41, 41)
    spot[0, 20, 20] = 7.0
    torch.testing.assert_close(blur(spot, 2.0).sum(), torch.tensor(7.0))


def ramp(count):
    """(2, 1, count): 0 ... count - 1 out of order, and the same plus 100."""
    values = torch.randperm(count, generator=torch.Generator().manual_seed(count)).float()
    return torch.stack([values, values + 100])[:, None]


def test_the_highest_pixel_and_the_mean_are_those_of_each_image():
    maps = ramp(50)
    assert image_score(maps, Scoring(pooling="max")).tolist() == [49.0, 149.0]
    assert image_score(maps, Scoring(pooling="mean")).tolist() == [24.5, 124.5]


@pytest.mark.parametrize(
    ("fraction", "averaged"), [(1e-9, 1), (0.01, 2), (0.02, 4), (0.5, 100), (0.999, 200), (1.0, 200)]
)
def test_top_k_averages_the_highest_share_of_the_pixels_and_at_least_one(fraction, averaged):
    maps = ramp(200)
    expected = [np.mean(np.sort(each.numpy().ravel())[-averaged:]) for each in maps]
    scores = image_score(maps, Scoring(pooling="topk", top_fraction=fraction))
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-6, 1.0), st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40))
def test_top_k_lies_between_mean_and_maximum(fraction, values):
    maps = torch.tensor(values, dtype=torch.float32).reshape(1, 1, -1)
    low, top, high = (
        float(image_score(maps, Scoring(pooling=pooling, top_fraction=fraction))) for pooling in ("mean", "topk", "max")
    )
    slack = 1e-3
    assert low - slack <= top <= high + slack


def test_scores_are_not_normalised():
    for pooling in ("max", "mean", "topk"):
        assert image_score(torch.tensor([[[20.0]], [[-3.0]]]), Scoring(pooling=pooling)).tolist() == [20.0, -3.0]


def test_a_map_that_is_not_a_number_does_not_get_a_score():
    maps = torch.tensor([[[1.0, math.nan]], [[1.0, 2.0]]])
    for pooling in ("max", "mean", "topk"):
        first, second = image_score(maps, Scoring(pooling=pooling)).tolist()
        assert math.isnan(first)
        assert math.isfinite(second)


def levels_at(*distances, side=1):
    """Comparisons whose distances are the same at every place: unit vectors at an angle."""
    for distance in distances:
        cosine = 1.0 - distance
        student, target = torch.tensor([1.0, 0.0]), torch.tensor([cosine, math.sqrt(1.0 - cosine**2)])
        yield Comparison(*(each.view(1, 2, 1, 1).expand(1, 2, side, side) for each in (student, target)))


def test_the_geometric_mean_counts_all_levels_alike_whatever_their_size():
    scores = [
        float(geometric_mean(level_scores(list(levels_at(*distances)), Scoring()), [1.0, 1.0]))
        for distances in ((0.1, 0.8), (0.2, 0.8), (0.1, 1.6))
    ]
    assert scores == pytest.approx([0.08**0.5, 0.16**0.5, 0.16**0.5], rel=1e-4)


def test_every_level_is_pooled_alone_on_the_largest_grid():
    student = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 5)
    angles = torch.linspace(0.0, 1.5, 20).view(1, 4, 5)
    fine = Comparison(student, torch.stack([angles.cos(), angles.sin()], dim=1))
    (coarse,) = levels_at(0.3)
    found = level_scores([coarse, fine], Scoring(pooling="topk", top_fraction=0.1))
    highest = (1.0 - angles.flatten().cos())[-2:].mean()
    torch.testing.assert_close(found, torch.stack([torch.tensor([0.3]), highest[None]]), rtol=1e-4, atol=1e-6)


def test_levels_are_pooled_without_scale_and_surroundings():
    plain = list(levels_at(0.1, 0.4, side=3))
    weighted = [each._replace(scale=7.0, surround=0.9) for each in plain]
    assert torch.equal(level_scores(plain, Scoring()), level_scores(weighted, Scoring()))


@pytest.mark.parametrize(("weights", "expected"), [((1, 1), 0.2), ((3, 1), 0.1**0.75 * 0.4**0.25), ((0, 5), 0.4)])
def test_a_level_counts_in_the_geometric_mean_as_its_weight_says(weights, expected):
    levels = torch.tensor([[0.1, 0.1], [0.4, 0.4]])
    torch.testing.assert_close(geometric_mean(levels, weights), torch.full((2,), expected))


def test_a_level_without_any_distance_leaves_a_finite_score():
    score = float(geometric_mean(level_scores(list(levels_at(0.0, 0.5)), Scoring()), [1.0, 1.0]))
    assert score == pytest.approx((1e-6 * 0.5) ** 0.5, rel=1e-3)


def test_the_scoring_says_which_score_is_taken_and_the_map_stays_the_sum():
    class Two:
        def compare(self, encoded, support):
            return [each._replace(scale=2.0) for each in levels_at(0.1, 0.4, side=2)]

    found = {
        levels: compare_tensor(Two(), [], {}, size=(8, 8), scoring=Scoring(blur=0.0, levels=levels))
        for levels in ("sum", "geometric")
    }
    assert float(found["sum"].scores) == pytest.approx(1.0, rel=1e-4)
    assert float(found["geometric"].scores) == pytest.approx(0.2, rel=1e-4)
    assert torch.equal(found["sum"].maps, found["geometric"].maps)
