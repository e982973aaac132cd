"""Supports that are slices of volumes: which of them count for a query, and what banks keep of them."""

from dataclasses import replace

import numpy as np
import pytest

from anatomaly.data.cuts import volumes_of
from anatomaly.detector.places import FEWEST, NEAR, nearby
from anatomaly.detector.support import groups_of
from anatomaly.errors import ConfigError, NotReadyError
from anatomaly.types import Intensity, Sample, Scoring

PLACES = [(axis, k / 10) for axis in ("axial", "coronal") for k in range(11)]


@pytest.mark.parametrize(
    ("query", "near", "expected"),
    [
        (("axial", 0.5), None, list(range(11))),
        (("coronal", 0.5), None, list(range(11, 22))),
        (("axial", 0.5), 0.2, [3, 4, 5, 6, 7]),
        (("axial", 0.52), 0.05, [4, 5, 6, 7]),  # too few: the nearest four
        (("axial", 0.0), 0.1, [0, 1, 2, 3]),  # the end of the volume
        (("axial", 1.0), 0.3, [7, 8, 9, 10]),
        (("coronal", 0.94), 0.1, [18, 19, 20, 21]),
        (("sagittal", 0.5), 0.1, []),
    ],
)
def test_supports_at_nearby_places_of_the_same_axis(query, near, expected):
    assert nearby(PLACES, query, near).tolist() == expected


def test_the_window_counts_what_lies_on_its_edge():
    assert NEAR < 0.8 - 0.7  # for a computer
    assert nearby([("axial", k / 40) for k in range(41)], ("axial", 0.7), NEAR).tolist() == list(range(24, 33))
    assert FEWEST < 9


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Three NIfTI volumes of 12 x 12 x 10 voxels, a task of brightness along z."""
    nibabel = pytest.importorskip("nibabel")
    folder, rng = tmp_path_factory.mktemp("volumes"), np.random.default_rng(5)
    files = []
    for number in range(3):
        voxels = rng.uniform(0, 60, (12, 12, 10)) + 15 * np.arange(10)
        files.append(folder / f"v{number}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0])), files[-1])
    return files


def cut(files, *axes, slices=5):
    return [row for each in volumes_of([Sample(f, "t") for f in files], axes, slices=slices) for row in each.samples]


def made(make_detector, name="matching"):
    return make_detector(name, intensity=Intensity("range", 0.0, 255.0), scoring=Scoring(blur=0))


@pytest.mark.parametrize("name", ["matching", "nearest", "d24fad", "attention"])
def test_a_query_is_judged_as_if_the_bank_held_the_chosen_supports_only(make_detector, volumes, name):
    detector = made(make_detector, name)
    rows = cut(volumes[:2], "axial", "coronal")
    detector.set_support(rows, near=0.25)
    bank = detector.ready()
    assert bank.places == tuple((row.cut.axis, row.cut.position) for row in rows)
    for query in cut(volumes[2:], "axial", "coronal")[::4]:
        (found,) = detector.predict([query])
        apart = [abs(row.cut.position - query.cut.position) for row in rows]
        chosen = [k for k, row in enumerate(rows) if row.cut.axis == query.cut.axis and apart[k] <= 0.25 + 1e-9]
        assert 4 <= len(chosen) < 10
        fewer = replace(
            bank,
            tensors={key: tensor[chosen] for key, tensor in bank.tensors.items()},
            names=tuple(bank.names[k] for k in chosen),
            places=(),
            near=None,
        )
        detector.bank = fewer
        (expected,) = detector.predict([query])
        detector.bank = bank
        assert found.score == pytest.approx(expected.score, abs=1e-6)
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-5)
        np.testing.assert_allclose(found.support_weights[:, chosen], expected.support_weights, atol=1e-6)
        others = [k for k in range(len(rows)) if k not in chosen]
        assert not found.support_weights[:, others].any()


def test_without_a_match_all_supports_of_the_axis_count(make_detector, volumes):
    detector = made(make_detector)
    queries = cut(volumes[2:], "axial")
    both = [each.score for each in detector.set_support(cut(volumes[:2], "axial", "sagittal")).predict(queries)]
    bank = detector.ready()
    one = [each.score for each in detector.set_support(cut(volumes[:2], "axial")).predict(queries)]
    plain = replace(detector.ready(), places=())
    detector.bank = plain
    assert both == pytest.approx(one, abs=1e-6)
    assert one == pytest.approx([each.score for each in detector.predict(queries)], abs=1e-6)
    assert len({each.digest for each in (bank, replace(bank, near=0.1), plain)}) == 3


def test_verdicts_do_not_depend_on_the_batch(make_detector, volumes):
    detector = made(make_detector).set_support(cut(volumes[:2], "axial", "coronal"), near=0.2)
    queries = cut(volumes[2:], "coronal", "axial", slices=4)
    queries = [*queries, *cut(volumes[1:2], "coronal", "axial", slices=4)]  # some at the same places
    runs = [list(detector.predict(queries, batch_size=size)) for size in (1, 3, 16)]
    for one, three, all_of_them in zip(*runs, strict=True):
        for other in (three, all_of_them):
            assert one.score == pytest.approx(other.score, abs=1e-5)
            np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, atol=1e-5)
            np.testing.assert_allclose(one.support_weights, other.support_weights, atol=1e-5)


def test_a_support_is_judged_by_other_volumes_only(make_detector, volumes):
    detector = made(make_detector)
    rows = cut(volumes, "axial", slices=4)
    detector.set_support(rows)
    supports = [row for row in rows if row.path != rows[0].path]
    alone = made(make_detector).set_support(supports)
    (expected,) = alone.predict([rows[0]])
    assert detector.ready().normal_scores[0] == pytest.approx(expected.score, abs=1e-5)
    one = detector.make_bank(cut(volumes[:1], "axial", slices=4))
    assert len(one.normal_scores) == 4  # of one volume every slice by the others
    assert detector.make_bank(cut(volumes[:1], "axial", "coronal", slices=1)).normal_scores == ()


def test_slices_of_one_volume_are_of_one_patient(volumes):
    rows = cut(volumes, "axial", slices=2)
    assert groups_of(rows) == (0, 0, 1, 1, 2, 2)
    assert groups_of([replace(row, patient_id="p") for row in rows]) == (0, 0, 1, 1, 2, 2)  # nothing else is there
    assert groups_of([replace(row, patient_id="pqp"[k // 2]) for k, row in enumerate(rows)]) == (0, 0, 1, 1, 0, 0)


def test_of_many_slices_only_some_are_judged(make_detector, volumes, monkeypatch):
    detector = made(make_detector)
    rows = cut(volumes, "axial", slices=4)
    whole = detector.make_bank(rows)
    monkeypatch.setattr("anatomaly.detector.support._MOST_SLICES", 5)
    some = detector.make_bank(rows)
    assert (len(whole.normal_scores), some.normal_scores) == (12, ())
    assert some.map_range != (0.0, 3.5)  # no guess
    assert some.map_range == pytest.approx(whole.map_range, rel=0.5)


def test_banks_keep_places(make_detector, volumes, tmp_path):
    detector = made(make_detector).set_support(cut(volumes[:2], "axial"), near=0.2)
    detector.save_support(tmp_path / "v.bank")
    again = made(make_detector).load_support(tmp_path / "v.bank").ready()
    assert (again.places, again.near, again.digest) == (detector.bank.places, 0.2, detector.bank.digest)
    for wrong in ({"places": (("oblique", 0.5),) * 10}, {"places": (("axial", 2.0),) * 10}, {"near": 7.0}):
        detector.bank = replace(again, **wrong)
        detector.save_support(tmp_path / "w.bank")
        with pytest.raises(NotReadyError, match=r"is damaged or was changed \((places|near)"):
            made(make_detector).load_support(tmp_path / "w.bank")


def test_queries_and_supports_that_do_not_fit_are_refused(make_detector, volumes):
    detector = made(make_detector).set_support(cut(volumes[:2], "axial", slices=2))
    with pytest.raises(ConfigError, match=r"v2.nii.gz#coronal 6: is a coronal slice, the support holds axial slices"):
        list(detector.predict(cut(volumes[2:], "coronal", slices=1)))
    with pytest.raises(ConfigError, match="is an image of no volume, the support holds axial slices of volumes"):
        list(detector.predict(volumes[2:]))
    with pytest.raises(ConfigError, match="holds slices of volumes and other images"):
        detector.make_bank([*cut(volumes[:1], "axial", slices=2), Sample(volumes[1], "t", frame=0)])
