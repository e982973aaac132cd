"""Cached features are those the teacher would compute, and each image is asked for once."""

import pytest
import torch

from anatomaly.feature_cache import FeatureCache, bytes_per_image

IMAGES = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Pyramid:
    """A method whose features are pooled images; counts the images it sees."""

    def __init__(self):
        self.seen = 0

    def extract(self, images):
        self.seen += len(images)
        pooled = [torch.nn.functional.avg_pool2d(images, step) for step in (2, 4)]
        return {"teacher": pooled, "second": [pooled[1].bfloat16()]}


@pytest.mark.parametrize("sizes", [[7], [3, 3, 1]])
@pytest.mark.parametrize(
    "index",
    [torch.tensor([4]), torch.tensor([6, 0, 0, 3]), torch.tensor([[1, 2], [5, 1]]), torch.tensor([], dtype=int)],
)
def test_features_come_in_the_shape_of_the_index(sizes, index):
    method = Pyramid()
    cache = FeatureCache(method, iter(IMAGES.split(sizes)))
    cached = cache(index)
    assert method.seen == 7
    direct = method.extract(IMAGES)
    assert cached.keys() == direct.keys()
    for name, levels in cached.items():
        assert len(levels) == len(direct[name])
        for level, truth in zip(levels, direct[name], strict=True):
            assert level.shape == (*index.shape, *truth.shape[1:])
            assert level.dtype == truth.dtype
            assert torch.equal(level, truth[index])


def test_a_teachers_features_are_cached_to_the_bit(lite0):
    class Method:
        def extract(self, images):
            return {"teacher": lite0(images)}

    images = torch.rand(3, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    cached = FeatureCache(Method(), [images])(torch.tensor([2, 0]))["teacher"]
    for level, truth in zip(cached, lite0(images), strict=True):
        assert torch.equal(level, truth[[2, 0]])


@pytest.mark.parametrize("batch", [1, 5])
def test_bytes_of_one_image(batch):
    features = Pyramid().extract(IMAGES[:batch])
    assert bytes_per_image(features) == 3 * (4 * 4 * 4 + 2 * 2 * 4 + 2 * 2 * 2)
