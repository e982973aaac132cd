"""Teachers of one stride, and weight files in timm's own names: the levels are those that timm computes itself."""

from functools import cache

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from anatomaly.backbones import build_backbone
from anatomaly.backbones.feature_cache import FeatureCache
from anatomaly.backbones.teacher import Teacher, misfit, small_size
from anatomaly.backbones.timm_features import names_in_whole
from anatomaly.errors import ConfigError, ShapeError, WeightsError

#: Plain, with registers, DINOv2 and DINOv3, EVA, CLIP; then pyramids, one of which timm gives channels last.
ONE_STRIDE = (
    "test_vit",
    "test_vit3",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_xsmall_patch16_clip_224",
)
PYRAMIDS = ("swin_tiny_patch4_window7_224", "test_convnext", "mambaout_femto")


@cache
def whole(name):
    """Timm's own model with weights that a seed decides, taking images of any size."""
    torch.manual_seed(4)
    any_size = {} if name in ("test_convnext", "mambaout_femto") else {"dynamic_img_size": True}
    model = timm.create_model(name, **any_size).eval()
    for key, value in model.named_parameters():
        if "pos_embed" in key or "token" in key:
            torch.nn.init.normal_(value, std=0.5)  # as little as at the start would hide an error
    return model


def saved(state, file):
    save_file({key: value.detach().contiguous().clone() for key, value in state.items()}, file)
    return str(file)


def images(*size, count=2, seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def from_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")

    @cache
    def build(name):
        return build_backbone(f"timm/{name}", weights=saved(whole(name).state_dict(), folder / f"{name}.safetensors"))

    return build


@pytest.mark.parametrize("name", [*ONE_STRIDE, *PYRAMIDS])
def test_levels_are_those_of_timms_model_with_the_files_weights(name, from_file):
    teacher = from_file(name)
    assert len(teacher.channels) == len(teacher.strides) == 4
    for size in ((64, 96), (128, 64)) if teacher.strides[-1] != 14 else ((56, 84), (126, 70)):
        batch = images(*size)
        with torch.no_grad():
            expected = whole(name).forward_intermediates(
                (batch - teacher.mean) / teacher.std, indices=teacher.blocks, intermediates_only=True
            )[-4:]
        levels = teacher(batch)
        for level, truth, channels, stride in zip(levels, expected, teacher.channels, teacher.strides, strict=True):
            assert level.shape == (2, channels, size[0] // stride, size[1] // stride)
            assert level.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(level, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))


@pytest.mark.parametrize("name", ONE_STRIDE)
def test_what_is_declared_of_a_vision_transformer(name, from_file):
    teacher = from_file(name)
    patch = 14 if "patch14" in name else 16
    assert teacher.strides == (patch,) * 4
    depth = {"test_vit": 6, "test_vit3": 9, "vit_xsmall_patch16_clip_224": 10}.get(name, 12)
    assert teacher.blocks == {6: (0, 2, 3, 5), 9: (1, 3, 5, 8), 10: (1, 4, 6, 9), 12: (2, 5, 8, 11)}[depth]
    assert teacher.only_size is None
    assert teacher.signed
    assert teacher.facts().blocks == teacher.blocks


def test_other_blocks_are_other_levels_of_the_same_weights_and_another_teacher():
    one, two, default = (
        build_backbone("timm/test_vit", weights="random", blocks=b) for b in ((0, 1, 3, 5), (1, 2, 4, 5), None)
    )
    assert one.body.state_dict().keys() == two.body.state_dict().keys()
    assert len({one.weights_hash, two.weights_hash, default.weights_hash}) == 3
    batch = images(32, 32)
    torch.testing.assert_close(one(batch)[3], two(batch)[3])
    torch.testing.assert_close(
        one(batch)[1], build_backbone("timm/test_vit", weights="random", blocks=[1, 2, 3, 4])(batch)[0]
    )
    assert build_backbone("timm/test_vit", weights="random", blocks=[0, 2, 3, 5]).weights_hash == default.weights_hash
    fewer = build_backbone("timm/test_vit", weights="random", blocks=(0, 1, 2, 3))
    assert not any("blocks.4" in key for key in fewer.body.state_dict()), "what is behind the last level is dropped"


def test_two_teachers_of_other_blocks_share_no_cached_features(tmp_path):
    store = FeatureCache(memory_bytes=1e9, folder=tmp_path, disk_bytes=1e9, size=(32, 32))
    batch = images(32, 32, count=1)
    for blocks in ((0, 1, 3, 5), (1, 2, 4, 5)):
        teacher = build_backbone("timm/test_vit", weights="random", blocks=blocks)
        found = store.get({"teacher": teacher}, ["image"], lambda positions: batch)["teacher"]
        for level, expected in zip(found, teacher(batch), strict=True):
            torch.testing.assert_close(level, expected.half().float())
    assert (store.misses, store.hits) == (2, 0)


@pytest.mark.parametrize("blocks", [(0, 1, 2, 6), (0, 1, 2), (3, 2, 4, 5), (-1, 0, 1, 2), (0, 1, 1, 2)])
def test_blocks_that_are_not_there_are_refused(blocks):
    with pytest.raises(ConfigError, match=r"^teacher\.blocks: got .* ascending numbers from 0 to 5: .* has 6 blocks"):
        build_backbone("timm/test_vit", weights="random", blocks=blocks)


@pytest.mark.parametrize("name", ["timm/test_convnext", "efficientnet_lite0", "vmamba_tiny"])
def test_blocks_of_a_pyramid_are_refused(name):
    with pytest.raises(ConfigError, match=rf"^teacher\.blocks: got \[0, 1, 2, 3\], but {name} has a pyramid") as error:
        build_backbone(name, weights="random", blocks=(0, 1, 2, 3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "near"), [((40, 64), "32x64 or 48x64"), ((10, 33), "16x32 or 16x48"), ((7, 16), "16x16")]
)
def test_a_size_that_is_no_multiple_of_the_patch_is_told_the_nearest_that_are(vit, size, near):
    with pytest.raises(
        ShapeError, match=rf"got images of {size[0]}x{size[1]}, expected multiples of 16, such as {near}\."
    ):
        vit(images(*size))


def test_two_teachers_take_what_fits_both(vit, from_file, lite0):
    dino = from_file("vit_small_patch14_reg4_dinov2")
    assert misfit([dino, lite0], (256, 224)) == "multiples of 224, such as 224x224 or 448x224"
    assert misfit([dino, lite0], (224, 448)) == misfit([vit, lite0], (96, 64)) == ""
    assert small_size([dino, lite0]) == (224, 224)
    assert (small_size([vit]), small_size([vit, lite0])) == ((64, 64), (128, 128))


def test_a_model_of_one_size_works_at_that_size_alone():
    teacher = build_backbone("timm/coat_tiny", weights="random")
    assert teacher.only_size == small_size([teacher]) == (224, 224)
    assert [tuple(level.shape[2:]) for level in teacher(images(224, 224, count=1))] == [
        (56, 56),
        (28, 28),
        (14, 14),
        (7, 7),
    ]
    with pytest.raises(ShapeError, match="got images of 256x224, expected 224x224, the only size timm/coat_tiny takes"):
        teacher(images(256, 224, count=1))


class Thinned(torch.nn.Module):
    """Four levels of one stride; with a size it takes no other."""

    def __init__(self, size=None):
        super().__init__()
        self.size = size

    def forward(self, batch):
        if self.size not in (None, tuple(batch.shape[2:])):
            raise RuntimeError("the size of tensor a (4) must match\nthe size of tensor b (7)")
        return [(level + 1) * batch[..., ::16, ::16] for level in range(4)]


def test_an_own_network_may_have_one_stride_and_one_size():
    free, fixed = (Teacher.of_module("mine", Thinned(size), size=(112, 112)) for size in (None, (112, 112)))
    assert free.strides == fixed.strides == (16,) * 4
    assert (free.only_size, fixed.only_size) == (None, (112, 112))
    assert free.blocks is None
    with pytest.raises(
        ConfigError, match=r"^mine: takes no images of 64x64 \(the size of tensor a .* tensor b \(7\)\)"
    ) as error:
        Teacher(
            "mine",
            Thinned((112, 112)),
            channels=(3,) * 4,
            strides=(16,) * 4,
            mean=(0,) * 3,
            std=(1,) * 3,
            weights="file",
        )
    assert "\n" not in str(error.value)


def test_positions_of_another_grid_are_resampled_by_timm(tmp_path):
    torch.manual_seed(1)
    large = timm.create_model("test_vit", img_size=224)
    torch.nn.init.normal_(large.pos_embed)
    teacher = build_backbone("timm/test_vit", weights=saved(large.state_dict(), tmp_path / "large.safetensors"))
    expected = resample_abs_pos_embed(large.pos_embed, new_size=[10, 10], num_prefix_tokens=1)
    torch.testing.assert_close(teacher.body.model.pos_embed, expected)
    torch.testing.assert_close(teacher.body.model.blocks[5].mlp.fc2.weight, large.blocks[5].mlp.fc2.weight)


def test_the_head_may_be_missing_or_another_and_pretraining_may_have_left_something(tmp_path, from_file):
    state = dict(whole("test_vit").state_dict())
    hash_ = from_file("test_vit").weights_hash
    headless = {key: value for key, value in state.items() if not key.startswith(("head.", "norm."))}
    for number, changed in enumerate(
        (headless, {**state, "head.weight": torch.zeros(5, 64), "mask_token": torch.zeros(1, 64)})
    ):
        file = saved(changed, tmp_path / f"{number}.safetensors")
        assert build_backbone("timm/test_vit", weights=file).weights_hash == hash_
    short = {key: value for key, value in headless.items() if not key.startswith("blocks.5")}
    fewer = build_backbone("timm/test_vit", weights=saved(short, tmp_path / "short.safetensors"), blocks=(0, 1, 2, 4))
    assert torch.equal(fewer.body.model.blocks[4].mlp.fc2.weight, state["blocks.4.mlp.fc2.weight"])


def broken(state, what):
    changed = dict(state)
    if what == "missing":
        del changed["blocks.3.attn.proj.weight"]
    if what == "unexpected":
        changed["blocks.6.attn.proj.weight"] = torch.zeros(2)
    if what == "of another shape":
        changed["patch_embed.proj.weight"] = torch.zeros(64, 3, 8, 8)
    return changed


@pytest.mark.parametrize("what", ["missing", "unexpected", "of another shape"])
def test_everything_else_is_held_to_the_model(what, tmp_path):
    file = saved(broken(whole("test_vit").state_dict(), what), tmp_path / "broken.safetensors")
    with pytest.raises(
        WeightsError, match=rf"broken\.safetensors: keys do not fit the model: 1 {what} \([a-z.0-9_]+[ )]"
    ) as error:
        build_backbone("timm/test_vit", weights=file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["test_vit", "mambaout_femto"])
def test_a_file_saved_from_a_teacher_gives_it_again(name, from_file, tmp_path):
    teacher = from_file(name)
    again = build_backbone(f"timm/{name}", weights=saved(teacher.body.state_dict(), tmp_path / "own.safetensors"))
    assert again.weights_hash == teacher.weights_hash


@pytest.mark.parametrize(
    "name", ["test_convnext", "test_byobnet", "test_efficientnet", "edgenext_xx_small", "hrnet_w18_small"]
)
def test_every_pyramid_takes_a_file_in_timms_names(name, tmp_path):
    """Whatever timm's extractor calls its modules, and whatever it leaves out."""
    torch.manual_seed(2)
    model = timm.create_model(name).eval()
    teacher = build_backbone(f"timm/{name}", weights=saved(model.state_dict(), tmp_path / "model.safetensors"))
    own, stored = teacher.body.state_dict(), model.state_dict()
    places = names_in_whole(own, stored)
    assert places.keys() == own.keys()
    for key, place in places.items():
        assert torch.equal(own[key], stored[place]), key
    assert any(key not in places.values() for key in stored), "the head is left out"


def test_weights_that_timm_fetches_come_with_the_blocks(monkeypatch):
    create_model = timm.create_model

    def fetched(name, *, pretrained=False, **settings):
        if pretrained:
            settings["pretrained_cfg_overlay"] = {"state_dict": whole("test_vit").state_dict()}
        return create_model(name, pretrained=pretrained, **settings)

    monkeypatch.setattr(timm, "create_model", fetched)
    monkeypatch.setattr("anatomaly.backbones.timm_features._silence", lambda address: None)  # the hub answers
    teacher = build_backbone("timm/test_vit", blocks=(0, 1, 2, 4))
    assert teacher.facts().weights == "auto"
    assert teacher.blocks == (0, 1, 2, 4)
    stored = whole("test_vit").blocks[4].mlp.fc2.weight
    assert torch.equal(teacher.body.model.blocks[4].mlp.fc2.weight, stored)
