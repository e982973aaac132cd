import random
from dataclasses import replace
from pathlib import Path

import pytest

from anatomaly.data.manifest import Manifest
from anatomaly.errors import ConfigError, ManifestError
from anatomaly.evaluation import protocols
from anatomaly.evaluation.protocols import (
    Fold,
    draw_supports,
    forbid_leak,
    leave_one_task_out,
    normals_to_train_on,
    split_normals,
    supports_at_most,
)
from anatomaly.types import Sample


def _rows(task, number, *, split="train", label=0, patients=None, root="/data", prefix="scan"):
    """`number` images; with `patients`, image i belongs to patient i % patients."""
    return [
        Sample(
            Path(f"{root}/{task}/{split}/{prefix}{index:03d}.png"),
            task,
            split,
            label,
            patient_id=None if patients is None else f"{task}-p{index % patients}",
        )
        for index in range(number)
    ]


def _manifest(*rows):
    return Manifest(tuple(row for group in rows for row in group), Path("table.csv"))


BRAIN = _manifest(
    _rows("brain", 30),
    _rows("brain", 4, label=1, prefix="odd"),
    _rows("brain", 5, split="val"),
    _rows("brain", 6, split="test"),
    _rows("liver", 20),
)


def test_supports_are_distinct_normal_training_images_of_the_task():
    draws = draw_supports(BRAIN, task="brain", shots=8, draws=20)
    assert len(draws) == 20
    for draw in draws:
        assert len(set(draw)) == 8
        assert {(row.task, row.split, row.label) for row in draw} == {("brain", "train", 0)}
    assert len({frozenset(draw) for draw in draws}) == 20
    assert {row for draw in draws for row in draw} == set(_rows("brain", 30))  # every image gets its chance


def test_draws_depend_on_the_seed_and_not_on_the_order_or_place_of_the_rows():
    expected = draw_supports(BRAIN, task="brain", shots=4, seed=7)
    rows = list(BRAIN)
    random.Random(0).shuffle(rows)
    assert draw_supports(_manifest(rows), task="brain", shots=4, seed=7) == expected
    moved = draw_supports(_manifest(_rows("brain", 30, root="/elsewhere")), task="brain", shots=4, seed=7)
    assert [[row.name for row in draw] for draw in moved] == [[row.name for row in draw] for draw in expected]
    hashed = [replace(row, sha256=f"{index:064x}") for index, row in enumerate(reversed(rows))]
    names = [[row.name for row in draw] for draw in draw_supports(_manifest(hashed), task="brain", shots=4, seed=7)]
    assert names == [[row.name for row in draw] for draw in expected]
    assert draw_supports(BRAIN, task="brain", shots=4, seed=8) != expected


def test_draws_stay_the_same_between_versions():
    """Published numbers name a seed; changing what it draws is a change of results."""
    draws = draw_supports(BRAIN, task="brain", shots=3, draws=2, seed=0)
    assert [[row.name for row in draw] for draw in draws] == [
        ["scan000.png", "scan005.png", "scan015.png"],
        ["scan026.png", "scan025.png", "scan006.png"],
    ]


def test_fewer_shots_are_the_beginning_of_more_shots():
    manifest = _manifest(_rows("brain", 12, patients=5))
    most = draw_supports(manifest, task="brain", shots=12, draws=3)
    for shots in (1, 2, 4, 8):
        assert draw_supports(manifest, task="brain", shots=shots, draws=3) == [draw[:shots] for draw in most]
    assert draw_supports(manifest, task="brain", shots=4, draws=1) == [most[0][:4]]


def test_a_draw_takes_another_patient_while_there_is_one():
    manifest = _manifest(_rows("brain", 60, patients=5))
    for draw in draw_supports(manifest, task="brain", shots=10, draws=10):
        patients = [row.patient_id for row in draw]
        assert len(set(patients[:5])) == len(set(patients[5:])) == 5
        assert len(set(draw)) == 10


def test_slices_of_one_volume_count_as_one_patient():
    volumes = [Sample(Path(f"v{v}.nii"), "brain", "train", 0, frame=f) for v in range(3) for f in range(9)]
    for draw in draw_supports(_manifest(volumes), task="brain", shots=3, draws=10):
        assert len({row.path for row in draw}) == 3


def test_copies_of_a_file_are_drawn_once():
    rows = [replace(row, sha256="a" * 64 if index < 5 else f"{index:064x}") for index, row in enumerate(_rows("x", 8))]
    assert len({row.sha256 for row in draw_supports(_manifest(rows), task="x", shots=4)[0]}) == 4
    with pytest.raises(ConfigError, match="has 4 normal training images, 5 shots asked"):
        draw_supports(_manifest(rows), task="x", shots=5)


def test_unlabelled_training_images_serve_only_where_none_is_labelled():
    unlabelled = _rows("x", 4, label=None)
    assert set(draw_supports(_manifest(unlabelled), task="x", shots=4)[0]) == set(unlabelled)
    mixed = _manifest(unlabelled, _rows("x", 2, prefix="known"))
    with pytest.raises(ConfigError, match="has 2 normal training images, 3 shots asked"):
        draw_supports(mixed, task="x", shots=3)


def test_impossible_draws_are_refused():
    manifest = _manifest(_rows("x", 3), _rows("x", 9, split="test"), _rows("x", 9, label=1, prefix="odd"))
    with pytest.raises(ConfigError, match="task 'x' has 3 normal training images, 8 shots asked"):
        draw_supports(manifest, task="x", shots=8)
    with pytest.raises(ConfigError, match="shots=0"):
        draw_supports(manifest, task="x", shots=0)
    with pytest.raises(ConfigError, match="draws=0"):
        draw_supports(manifest, task="x", shots=1, draws=0)
    with pytest.raises(ManifestError, match="no task 'y'"):
        draw_supports(manifest, task="y", shots=1)


def test_leave_one_task_out_trains_on_every_other_task():
    manifest = _manifest(_rows("liver", 1), _rows("brain", 1), _rows("chest", 1))
    assert leave_one_task_out(manifest) == [
        Fold(("chest", "liver"), "brain"),
        Fold(("brain", "liver"), "chest"),
        Fold(("brain", "chest"), "liver"),
    ]
    with pytest.raises(ConfigError, match="has 1 task, expected at least 2"):
        leave_one_task_out(_manifest(_rows("liver", 5)))


def test_given_validation_rows_are_used_and_other_tasks_hold_out_a_share():
    train, validation = split_normals(_manifest(BRAIN, _rows("brain", 3, split="val", label=1, prefix="odd")))
    assert [row for row in validation if row.task == "brain"] == _rows("brain", 5, split="val")
    assert [row for row in train if row.task == "brain"] == _rows("brain", 30)
    held_out = [row for row in validation if row.task == "liver"]
    assert len(held_out) == 2
    kept = {row for row in train if row.task == "liver"}
    assert kept | {replace(row, split="train") for row in held_out} == set(_rows("liver", 20))
    assert len(kept) == 18
    assert {row.split for row in validation} == {"val"}
    assert {(row.split, row.label) for row in train} == {("train", 0)}


def test_the_split_is_repeatable_and_independent_of_row_order():
    manifest = _manifest(_rows("liver", 40))
    train, validation = split_normals(manifest, validation=0.25, seed=3)
    assert len(validation) == 10
    backwards = split_normals(_manifest(reversed(list(manifest))), validation=0.25, seed=3)
    assert (set(backwards[0]), set(backwards[1])) == (set(train), set(validation))
    assert list(train) == sorted(train, key=lambda row: row.path)  # manifest order is kept
    assert set(split_normals(manifest, validation=0.25, seed=4)[1]) != set(validation)


@pytest.mark.parametrize(("images", "patients", "held_out"), [(60, 12, 5), (60, 4, 15), (7, 3, 2), (2, 2, 1)])
def test_patients_are_held_out_whole(images, patients, held_out):
    """Up to a tenth of the images; the smallest patient where none is that small."""
    train, validation = split_normals(_manifest(_rows("x", images, patients=patients)))
    assert len(validation) == held_out
    assert len(train) == images - held_out
    assert not {row.patient_id for row in train} & {row.patient_id for row in validation}


def test_slices_of_one_volume_are_held_out_together():
    volumes = [Sample(Path(f"v{v}.nii"), "brain", "train", 0, frame=f) for v in range(5) for f in range(4)]
    train, validation = split_normals(_manifest(volumes), validation=0.2)
    assert len(validation) == 4
    assert not {row.path for row in train} & {row.path for row in validation}


def test_a_task_that_cannot_spare_a_patient_keeps_all_its_images():
    lone = _rows("lone", 9, patients=1)
    single = _rows("single", 1)
    train, validation = split_normals(_manifest(lone, single, _rows("x", 10)))
    assert set(lone + single) <= set(train)
    assert {row.task for row in validation} == {"x"}
    with pytest.raises(ConfigError, match="9 normal images, for all that is known of 1 patient; expected"):
        split_normals(_manifest(lone))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 10])
def test_a_share_outside_0_1_is_refused(share):
    with pytest.raises(ConfigError, match=f"validation is {share}"):
        split_normals(BRAIN, validation=share)


def test_splitting_a_data_set_without_normals_is_refused():
    for choose in (split_normals, normals_to_train_on):
        with pytest.raises(ConfigError, match="no normal image of split train"):
            choose(_manifest(_rows("x", 9, split="test"), _rows("x", 3, split="val")))


def test_normals_to_train_on_are_all_of_them_in_order():
    rows = [*_rows("x", 3), *_rows("x", 2, split="test"), *_rows("a", 4)]
    assert list(normals_to_train_on(_manifest(rows))) == [*rows[:3], *rows[5:]]


def test_the_test_set_is_the_tasks_test_split_in_order():
    backwards = _manifest(reversed(list(BRAIN)))
    assert protocols.samples_to_test(backwards, "brain") == tuple(reversed(_rows("brain", 6, split="test")))
    with pytest.raises(ConfigError, match="'liver' has no rows of split 'test'"):
        protocols.samples_to_test(BRAIN, "liver")
    with pytest.raises(ManifestError, match="no task 'lung'"):
        protocols.samples_to_test(BRAIN, "lung")


IMAGE = Sample(Path("a/scan.png"), "x", "train", 0, sha256="a" * 64)
SLICE = Sample(Path("a/volume.nii"), "x", "train", 0, frame=3)
KNOWN = replace(IMAGE, patient_id="Doe^Jane")


@pytest.mark.parametrize(
    ("support", "tested"),
    [
        (IMAGE, replace(IMAGE, split="test", sha256=None)),
        (IMAGE, replace(IMAGE, split="test", path=Path("b/copy.png"))),
        (SLICE, replace(SLICE, split="test", frame=4)),
        (KNOWN, Sample(Path("b/later.png"), "x", "test", 1, patient_id="Doe^Jane")),
        (KNOWN, replace(KNOWN, split="test", sha256=None, patient_id="someone else")),
        (KNOWN, replace(KNOWN, split="test", patient_id=None)),
    ],
    ids=["same path", "same file", "same volume", "same patient", "same image, other patient", "one patient unknown"],
)
def test_supports_that_are_tested_are_refused(support, tested):
    others = _rows("x", 5, split="test")
    with pytest.raises(ConfigError, match=r"1 support images share .*first (scan.png|volume.nii#3) of") as caught:
        forbid_leak([*_rows("x", 2), support], [*others, tested])
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize(
    ("support", "tested"),
    [
        (IMAGE, Sample(Path("b/scan.png"), "x", sha256="b" * 64)),
        (IMAGE, Sample(Path("b/scan.png"), "x")),
        (KNOWN, Sample(Path("b/other.png"), "x", patient_id="someone else")),
        (replace(KNOWN, patient_id="1"), Sample(Path("b/other.png"), "y", patient_id="1")),
        (replace(SLICE, patient_id="1"), replace(SLICE, frame=4, patient_id="2")),
    ],
    ids=["other file", "same name", "other patient", "same number in another data set", "two patients in one file"],
)
def test_unrelated_supports_pass(support, tested):
    forbid_leak([support], [tested])


def test_draws_from_a_clean_manifest_pass_the_guard():
    draws = draw_supports(BRAIN, task="brain", shots=30, draws=1)
    forbid_leak(draws[0], protocols.samples_to_test(BRAIN, "brain"))


def test_as_many_supports_as_there_are_different_normals():
    first, *others = _rows("brain", 5)
    copy = replace(first, path=Path("/data/copy.png"), sha256="ab")
    unknown = replace(first, path=Path("/data/unknown.png"), label=None)
    manifest = _manifest([replace(first, sha256="ab"), *others, copy, unknown])
    assert supports_at_most(manifest, "brain") == 5
    draw_supports(manifest, task="brain", shots=5, draws=1)
    with pytest.raises(ConfigError, match="has 5 normal training images, 6 shots asked"):
        draw_supports(manifest, task="brain", shots=6, draws=1)
