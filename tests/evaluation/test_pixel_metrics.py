"""Pixel metrics against every threshold in turn; counts of one pass against them, within their own bounds."""

import tracemalloc

import metrics_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from anatomaly.evaluation.pixel_metrics import PixelCounts, pixel_metrics, region_shares

ROUNDING = 1e-12


def counted(maps, masks):
    counts = PixelCounts()
    for anomaly_map, mask in zip(maps, masks, strict=True):
        counts.add(anomaly_map, mask)
    return counts


def within_bounds(counts, exact):
    """The counts' figures, after a look at how far they are from the exact ones."""
    found, bounds = counts.metrics(), counts.bounds()
    assert found.keys() == bounds.keys() == exact.keys()
    for name, value in exact.items():
        assert abs(found[name] - value) <= bounds[name] + ROUNDING, name
    assert found["dice_max"] <= exact["dice_max"] + ROUNDING  # some threshold reaches it
    return found


@st.composite
def scored_maps(draw):
    """A few small maps of several sizes, with and without ties, at least one lesion and one normal pixel."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 4, 10, 100_000]))
    maps, masks = [], []
    for _ in range(draw(st.integers(1, 3))):
        size = tuple(draw(st.tuples(st.integers(2, 6), st.integers(2, 6))))
        maps.append((generator.integers(0, levels, size) - 1.5).astype(np.float32))
        masks.append(generator.random(size) < draw(st.sampled_from([0.0, 0.15, 0.4])))
    masks[0][0, 0], masks[0][1, 1] = True, False
    return maps, masks


@settings(max_examples=60, deadline=None)
@given(scored_maps())
def test_pixel_metrics_are_the_references(data):
    maps, masks = data
    measured = pixel_metrics(maps, masks)
    scores = np.concatenate([m.ravel() for m in maps]).tolist()
    labels = np.concatenate([m.ravel() for m in masks]).tolist()
    assert measured["pixel_auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert measured["aupro"] == pytest.approx(reference.aupro(maps, masks), abs=1e-12)
    assert measured["dice_max"] == pytest.approx(reference.f1_max(scores, labels), abs=1e-12)
    assert measured["dice_floor"] == pytest.approx(2 * sum(labels) / (len(labels) + sum(labels)), abs=1e-12)


def _row(*scores):
    return np.array([scores], np.float32)


def test_aupro_by_hand():
    """Ten normal pixels scoring 0 .. 9 and two lesions of one and of two pixels."""
    normal = _row(*range(10))
    no_lesion = np.zeros((1, 10), bool)
    lesion = np.array([[True, False, True, True]])  # its normal pixel brings the normals to 11

    # Lesion A (1 pixel) is above everything: PRO 0.5 at once.  Of lesion B one pixel is above all normals (PRO 0.75),
    # the other is passed by one normal pixel: PRO 1 from FPR 1/11 on.
    measured = pixel_metrics([normal, _row(20, -1, 15, 8.5)], [no_lesion, lesion])
    assert measured["aupro"] == pytest.approx((0.75 * 1 / 11 + 1.0 * (0.3 - 1 / 11)) / 0.3)
    assert measured["pixel_auroc"] == pytest.approx((11 + 11 + 10) / 33)
    assert measured["dice_max"] == pytest.approx(2 * 3 / (2 * 3 + 1))

    # The last lesion pixel beyond the limit (FPR 4/11 > 0.3) adds nothing.
    assert pixel_metrics([normal, _row(20, -1, 15, 5.5)], [no_lesion, lesion])["aupro"] == pytest.approx(0.75)


def test_aupro_interpolates_a_tie_at_the_limit():
    """One lesion pixel tied with all normals: the curve is the diagonal, its area up to 0.3 is 0.045."""
    mask = np.array([[True, False, False, False, False]])
    assert pixel_metrics([np.zeros((1, 5), np.float32)], [mask])["aupro"] == pytest.approx(0.045 / 0.3)


def test_diagonal_neighbours_are_one_region_and_images_are_apart():
    """A found lesion of 2 diagonal pixels and one missed lesion of 1: mean overlap 1/2 (4-connectivity: 2/3)."""
    diagonal, single = np.eye(2, dtype=bool), np.array([[True, False], [False, False]])
    maps = [np.where(diagonal, 5, 0).astype(np.float32), np.where(single, -5, 0).astype(np.float32)]
    assert pixel_metrics(maps, [diagonal, single])["aupro"] == pytest.approx(0.5)


def test_pixel_metrics_take_sequences_that_load_on_demand():
    generator = np.random.default_rng(3)
    maps = [generator.normal(size=(4, 5)).astype(np.float32) for _ in range(3)]
    masks = [generator.random((4, 5)) < 0.3 for _ in range(3)]

    class Loaded:
        def __init__(self, items):
            self.items = items

        def __len__(self):
            return len(self.items)

        def __getitem__(self, index):
            return self.items[index].copy()

    assert pixel_metrics(Loaded(maps), Loaded(masks)) == pixel_metrics(maps, masks)


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        ([np.zeros((2, 2))], [np.zeros((2, 2), bool)], "needs both classes, got 4 normal and 0 lesion pixels"),
        ([np.zeros((2, 2))], [np.ones((2, 2), bool)], "got 0 normal and 4 lesion pixels"),
        ([], [], "got 0 normal and 0 lesion pixels"),
        ([np.zeros((2, 2))], [], "1 maps and 0 masks"),
        ([np.zeros((2, 2))], [np.ones((2, 3), bool)], r"map 0 is \(2, 2\) and its mask \(2, 3\)"),
        ([np.zeros((1, 2, 2))], [np.ones((1, 2, 2), bool)], r"expected \(H, W\)"),
        ([np.zeros((2, 2))], [np.ones((2, 2))], "map 0 has a mask of float64, expected bool"),
        ([np.full((2, 2), np.nan)], [np.eye(2, dtype=bool)], "map 0 holds NaN"),
    ],
)
def test_unusable_maps_or_masks_are_refused(maps, masks, message):
    with pytest.raises(ValueError, match=message):
        pixel_metrics(maps, masks)


# --- one pass ---

ULP = 2.0**-23  # from one float32 to the next above 1; 256 of them fall into a bin


@settings(max_examples=150, deadline=None)
@given(scored_maps(), st.sampled_from([1.0, 1e-30, 1e30, -3.0]), st.sampled_from([0.0, 1.0, ULP, 40 * ULP]))
def test_counts_are_within_their_bounds_of_the_exact_figures(data, scale, step):
    """With a small step all scores crowd in a few bins; step 0 leaves them as they are."""
    maps, masks = data
    if step:
        maps = [1 + step * (m % 1000) for m in maps]
    maps = [(scale * m).astype(np.float32) for m in maps]
    within_bounds(counted(maps, masks), pixel_metrics(maps, masks))


def scene(values, *, lesions=((3, 3, 9, 8), (14, 2, 15, 3), (2, 16, 19, 18)), images=3):
    """Maps filled by `values(generator, shape)`, with lesions of one and of many pixels in all but the last image."""
    generator = np.random.default_rng(11)
    maps = [np.asarray(values(generator, (24, 20)), np.float32) for _ in range(images)]
    masks = [np.zeros((24, 20), bool) for _ in range(images)]
    for mask in masks[:-1]:
        for top, left, bottom, right in lesions:
            mask[top:bottom, left:right] = True
    return maps, masks


CONTINUOUS = {
    "one octave": lambda g, s: g.uniform(1, 2, s),
    "many exponents": lambda g, s: 10.0 ** g.uniform(-40, 38, s) * g.choice([-1, 1], s),
    "huge": lambda g, s: g.uniform(-1, 1, s) * 3.4e38,
    "denormal": lambda g, s: g.uniform(-1, 1, s) * 1e-41,
    "a few bins": lambda g, s: 1 + 3e-5 * g.uniform(0, 3, s),
    "one bin": lambda g, s: 1 + ULP * g.integers(0, 256, s),
    "next to zero": lambda g, s: g.choice([0.0, -0.0, 1e-45, -1e-45, 1.0], s),
    "across zero": lambda g, s: g.normal(size=s) * 1e-6,
    "across a power of two": lambda g, s: 2 + ULP * g.integers(-200, 400, s),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_hard_maps_stay_within_the_bounds(name):
    maps, masks = scene(CONTINUOUS[name])
    within_bounds(counted(maps, masks), pixel_metrics(maps, masks))


QUANTISED = {
    "constant": lambda g, s: np.full(s, 0.3),
    "zeros of both signs": lambda g, s: g.choice([0.0, -0.0], s),
    "zeros of both signs among others": lambda g, s: g.choice([0.0, -0.0, 1e-42, -1e-42, 1.0], s),
    "float16": lambda g, s: g.normal(size=s).astype(np.float16),
    "bfloat16": lambda g, s: (g.normal(size=s).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
    "eight bits": lambda g, s: g.integers(0, 256, s) / 255,
    "largest numbers": lambda g, s: g.choice([-3.4028235e38, 3.4028235e38], s),
    "one distinct score a pixel": lambda g, s: 1 + g.permutation(s[0] * s[1]).reshape(s) * 2.0**-14,
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_maps_are_measured_exactly(name):
    maps, masks = scene(QUANTISED[name])
    counts = counted(maps, masks)
    assert counts.bounds() == dict.fromkeys(counts.metrics(), 0.0)
    assert counts.metrics() == pytest.approx(pixel_metrics(maps, masks), abs=ROUNDING)


@pytest.mark.parametrize(
    "lesions",
    [((5, 5, 6, 6),), ((0, 0, 24, 20),), ((0, 0, 24, 19), (0, 19, 1, 20))],
    ids=["pixel", "all", "nearly all"],
)
def test_lesions_of_one_pixel_and_of_whole_images(lesions):
    for values in (CONTINUOUS["one octave"], CONTINUOUS["one bin"], QUANTISED["float16"]):
        maps, masks = scene(values, lesions=lesions)
        within_bounds(counted(maps, masks), pixel_metrics(maps, masks))


def test_the_slow_definition_of_a_map_that_spans_all_exponents():
    maps, masks = scene(CONTINUOUS["many exponents"], images=2, lesions=((3, 3, 6, 8), (14, 2, 15, 3)))
    maps, masks = [m[:16, :8] for m in maps], [m[:16, :8] for m in masks]
    found = within_bounds(counted(maps, masks), pixel_metrics(maps, masks))
    assert found["aupro"] == pytest.approx(reference.aupro(maps, masks), abs=1e-3)
    scores, labels = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])
    assert found["pixel_auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-3)


@pytest.mark.parametrize("above", [True, False])
def test_the_bounds_are_reached_where_a_bin_hides_a_perfect_order(above):
    """Everything in one bin: the counts see ties only, the truth is a perfect or a perfectly wrong order."""
    mask = np.zeros((10, 10), bool)
    mask[2:4, 2:5] = mask[7, 7] = True
    anomaly_map = (1 + ULP * (mask == above)).astype(np.float32)
    counts, exact = counted([anomaly_map], [mask]), pixel_metrics([anomaly_map], [mask])
    found, bounds = within_bounds(counts, exact), counts.bounds()
    assert found["pixel_auroc"] == 0.5
    assert bounds["pixel_auroc"] == pytest.approx(abs(found["pixel_auroc"] - exact["pixel_auroc"]))
    assert found["aupro"] == pytest.approx(0.15)
    assert bounds["aupro"] == pytest.approx(0.85)  # 1 - 0.15 above; 0.15 below, where it is wider than it need be
    if above:
        assert exact["aupro"] == pytest.approx(found["aupro"] + bounds["aupro"])
        assert exact["dice_max"] == pytest.approx(found["dice_max"] + bounds["dice_max"])


def test_the_bound_counts_only_bins_whose_scores_differ():
    """Bin of 1: two scores, 2 lesion and 4 normal pixels; bin of 2: one score, 1 and 1; those of 3 and 4: one class."""
    row = np.array([[1, 1 + ULP, 1, 1, 1, 1, 2, 2, 3, 3 + 4 * ULP, 4]], np.float32)
    mask = np.array([[True, False, True, False, False, False, True, False, False, False, True]])
    bounds = counted([row], [mask]).bounds()
    assert bounds["pixel_auroc"] == pytest.approx(0.5 * 2 * 4 / (4 * 7))


def test_counts_hold_no_maps():
    generator = np.random.default_rng(0)
    mask = np.zeros((128, 128), bool)
    mask[20:60, 20:40] = True
    counts = PixelCounts()
    tracemalloc.start()
    try:
        sizes = []
        for number in range(41):
            counts.add(generator.uniform(0.5, 1, mask.shape).astype(np.float32), mask)
            if number in (20, 40):
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 64 * 1024  # one map of the 20 in between
    assert sizes[1] < 2 * 2**20  # one factor of two


def test_maps_of_any_memory_layout_and_float_type_count_alike():
    maps, masks = scene(QUANTISED["float16"])
    expected = counted(maps, masks).metrics()
    assert counted([np.asfortranarray(m) for m in maps], [np.asfortranarray(m) for m in masks]).metrics() == expected
    assert counted([m.astype(np.float64) for m in maps], masks).metrics() == expected
    assert counted([m[:, ::-1].T for m in maps], [m[:, ::-1].T for m in masks]).metrics() == pytest.approx(expected)


def test_region_shares_may_be_given():
    maps, masks = scene(CONTINUOUS["one octave"])
    counts = PixelCounts()
    for anomaly_map, mask in zip(maps, masks, strict=True):
        counts.add(anomaly_map, mask, shares=region_shares(mask))
    assert counts.metrics() == counted(maps, masks).metrics()
    assert region_shares(masks[0]).sum() == pytest.approx(3)
    one_missed = PixelCounts()
    one_missed.add(np.float32([[3, 0, -1, 0]]), np.array([[True, False, True, False]]), shares=np.array([0.5, 1.5]))
    assert one_missed.metrics()["aupro"] == pytest.approx(0.25)


def test_maps_and_masks_are_left_as_they_are():
    maps, masks = scene(CONTINUOUS["one octave"], images=1)
    before = maps[0].copy(), masks[0].copy()
    counted(maps, masks)
    np.testing.assert_array_equal(maps[0], before[0])
    np.testing.assert_array_equal(masks[0], before[1])


@pytest.mark.parametrize("masks", [[], [np.zeros((2, 2), bool)], [np.ones((2, 2), bool)]])
def test_counts_of_one_class_have_no_metrics(masks):
    counts = counted([np.zeros((2, 2), np.float32) for _ in masks], masks)
    for figures in (counts.metrics, counts.bounds):
        with pytest.raises(ValueError, match=r"PixelCounts: needs both classes, got \d normal and \d lesion pixels"):
            figures()


@pytest.mark.parametrize(
    ("anomaly_map", "mask", "message"),
    [
        (np.zeros((2, 2)), np.ones((2, 3), bool), r"the map is \(2, 2\) and its mask \(2, 3\)"),
        (np.zeros(4), np.ones(4, bool), r"expected \(H, W\)"),
        (np.zeros((2, 2)), np.ones((2, 2), np.uint8), "a mask of uint8, expected bool"),
        (np.full((2, 2), -np.inf), np.eye(2, dtype=bool), "holds NaN or infinite"),
        (np.full((2, 2), 1e39), np.eye(2, dtype=bool), "holds NaN or infinite"),  # no float32
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_unusable_maps_are_not_counted(anomaly_map, mask, message):
    counts = PixelCounts()
    with pytest.raises(ValueError, match=message):
        counts.add(anomaly_map, mask)
    assert (counts.lesion_pixels, counts.normal_pixels) == (0, 0)
