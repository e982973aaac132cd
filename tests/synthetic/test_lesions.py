import numpy as np
import pytest
from scipy import ndimage

from anatomaly.synthetic import lesions
from anatomaly.synthetic.lesions import KINDS, paste_lesion
from anatomaly.synthetic.phantom import TASKS, draw


def phantom(task: str, seed: int = 0, size: int = 96) -> np.ndarray:
    return np.broadcast_to(draw(task, seed=seed, size=size).pixels, (3, size, size)).copy()


@pytest.mark.parametrize("task", TASKS)
def test_a_lesion_is_visible_inside_its_mask_and_leaves_the_rest_alone(task):
    for seed in range(20):
        image = phantom(task, seed)
        before = image.copy()
        pasted, mask = paste_lesion(image, rng=np.random.default_rng(seed))
        assert np.array_equal(image, before)
        assert pasted.shape == image.shape and pasted.dtype == np.float32
        assert mask.shape == image.shape[1:] and mask.dtype == np.bool_
        assert pasted.min() >= 0.0 and pasted.max() <= 1.0
        assert 0.003 <= mask.mean() <= 0.15
        change = np.abs(pasted - image).mean(axis=0)
        assert change[mask].mean() > 0.03
        far = ndimage.distance_transform_edt(~mask) > 24
        # Spots may leave single pixels of their patch below the mask threshold; all else is beyond the soft margin.
        assert not change[far].any()


def test_the_generator_decides_the_lesion():
    image = phantom("brain_mr")
    first, again, other = (paste_lesion(image, rng=np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_lesions_stay_on_the_foreground():
    image = np.zeros((3, 96, 96), np.float32)
    image[:, 30:70, 20:60] = 0.5 + 0.1 * np.random.default_rng(0).standard_normal((40, 40), dtype=np.float32)
    image = np.clip(image, 0, 1)
    for seed in range(20):
        _, mask = paste_lesion(image, rng=np.random.default_rng(seed))
        rows, columns = np.nonzero(mask)
        assert rows.min() >= 24 and rows.max() < 76 and columns.min() >= 14 and columns.max() < 66


@pytest.mark.parametrize("tone", [0.0, 0.05, 0.5, 1.0])
def test_a_flat_image_still_gets_a_visible_lesion(tone):
    image = np.full((3, 64, 64), tone, np.float32)
    for seed in range(10):
        pasted, mask = paste_lesion(image, rng=np.random.default_rng(seed))
        assert mask.any()
        assert np.abs(pasted - image)[:, mask].mean() > 0.03


def test_the_last_resort_is_visible_too(monkeypatch):
    monkeypatch.setattr(lesions, "_ATTEMPTS", 0)
    for tone in (0.0, 0.5, 1.0):
        image = np.full((3, 48, 80), tone, np.float32)
        pasted, mask = paste_lesion(image, rng=np.random.default_rng(0))
        assert mask.any() and not mask[0].any() and not mask[:, 0].any()
        assert np.abs(pasted - image)[:, mask].mean() > 0.1


def test_images_need_not_be_square():
    image = phantom("histology")[:, :64, :]
    pasted, mask = paste_lesion(image, rng=np.random.default_rng(1))
    assert pasted.shape == (3, 64, 96) and mask.shape == (64, 96)


def test_a_gray_image_stays_gray():
    image = phantom("head_ct")
    for seed in range(12):
        pasted, _ = paste_lesion(image, rng=np.random.default_rng(seed))
        assert np.array_equal(pasted[0], pasted[1]) and np.array_equal(pasted[1], pasted[2])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_changes_only_its_patch(kind):
    image = phantom("histology")
    y, x = np.mgrid[0:96, 0:96]
    patch = np.clip((20 - np.hypot(y - 40, x - 50)) / 4, 0, 1).astype(np.float32)
    changed, opacity = kind(image, patch, np.random.default_rng(3))
    assert np.abs(changed - image)[:, opacity > 0.5].mean() > 0.02
    assert not np.abs(changed - image)[:, patch == 0].any()


@pytest.mark.parametrize("shape", [(1, 64, 64), (64, 64), (3, 8, 64)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(3, H, W\)"):
        paste_lesion(np.zeros(shape, np.float32), rng=np.random.default_rng(0))
