"""The student mirrors any pyramid, and takes negative values where its teacher does."""

import pytest
import torch
from torch import nn

from anatomaly.methods.decoder import Decoder, UpBlock

PYRAMIDS = {
    "resnet": ((4, 8, 16, 32), (4, 8, 16, 32)),
    "odd channels": ((6, 10, 14, 22), (4, 8, 16, 32)),
    "equal channels": ((12, 12, 12, 12), (4, 8, 16, 32)),
    "one size": ((12, 12, 12, 12), (16, 16, 16, 16)),
    "a step of one": ((8, 12, 16, 20), (4, 4, 8, 16)),
    "a step of four": ((8, 12, 16, 20), (2, 8, 8, 32)),
    "wider when shallow": ((30, 20, 10, 6), (4, 8, 16, 32)),
}


def bottleneck(channels, height=3, width=5, batch=2):
    return torch.randn(batch, channels[-1], height, width, generator=torch.Generator().manual_seed(0))


def decoder(channels, strides, **settings):
    torch.manual_seed(0)
    return Decoder(channels, strides, **settings)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_it_returns_the_teachers_first_three_levels(name):
    channels, strides = PYRAMIDS[name]
    levels = decoder(channels, strides)(bottleneck(channels))
    assert len(levels) == 3
    for level, wide, stride in zip(levels, channels, strides, strict=False):
        assert level.shape == (2, wide, 3 * strides[-1] // stride, 5 * strides[-1] // stride)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PYRAMIDS)
def test_only_the_student_of_a_signed_teacher_is_negative(name, training):
    channels, strides = PYRAMIDS[name]
    for level in map(torch.detach, decoder(channels, strides).train(training)(bottleneck(channels))):
        assert float(level.min()) >= 0
        assert float(level.max()) > 0
    for level in map(torch.detach, decoder(channels, strides, signed=True).train(training)(bottleneck(channels))):
        assert float(level.min()) < 0 < float(level.max())


def test_a_stage_is_signed_at_its_end_only():
    stages = list(decoder(*PYRAMIDS["resnet"], signed=True).children())
    assert [[block.signed for block in stage] for stage in stages] == [
        [False] * 2 + [True],
        [False] * 3 + [True],
        [False] * 5 + [True],
    ]


def test_the_number_of_blocks_is_a_choice():
    assert [len(stage) for stage in decoder(*PYRAMIDS["resnet"], blocks=(2, 1, 3)).children()] == [2, 1, 3]


@pytest.mark.parametrize(("channels", "strides"), [((4, 8, 16), (4, 8, 16)), ((4, 8, 16, 32), (4, 8, 16))])
def test_a_pyramid_of_another_depth_is_refused(channels, strides):
    with pytest.raises(ValueError, match=f"got {len(channels)} channels and {len(strides)} strides, expected 4"):
        Decoder(channels, strides)


def test_a_block_whose_branch_is_silent_is_its_shortcut():
    block = UpBlock(6, 6)
    assert block.upsample is None
    nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    assert torch.equal(block(x), before.clamp(min=0))
    block.signed = True
    assert torch.equal(block(x), before)
    assert torch.equal(x, before)  # the input is not written to


def test_a_cell_grows_into_its_own_square():
    block = UpBlock(2, 4, factor=4).eval()
    x = torch.zeros(1, 2, 2, 3)
    resting = block(x.clone())
    x[0, :, 1, 2] = 10
    changed = (block(x.clone()) != resting)[0].any(dim=0)
    assert changed.shape == (8, 12)
    assert bool(changed[4:, 8:].any())
    changed[4:, 8:] = False
    assert not bool(changed.any())


def test_convolutions_start_kaiming_normal_by_fan_out():
    stage = decoder((64, 64, 64, 64), (8, 8, 8, 8)).layer1
    for conv in (stage[0].conv1, stage[0].conv2, stage[1].conv3):
        fan_out = conv.out_channels * conv.kernel_size[0] ** 2
        assert float(conv.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.06)
