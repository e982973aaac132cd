"""Frozen teachers: what they declare is what they compute, and nothing ever moves them."""

import pytest
import timm
import torch
import torchvision

from anatomaly.backbones import BACKBONES, build_backbone
from anatomaly.backbones.teacher import Teacher
from anatomaly.backbones.weights import find_weights, read_state, state_digest
from anatomaly.errors import ConfigError, ShapeError, WeightsError

NAMES = ("lite0", "wide_resnet50_2", "timm/resnet18", "timm/mobilenetv3_small_050")


@pytest.fixture(scope="module")
def teachers(lite0):
    return {
        "lite0": lite0,
        **{name: build_backbone(name, weights="random") for name in NAMES if name != "lite0"},
    }


@pytest.fixture(params=NAMES)
def teacher(request, teachers):
    return teachers[request.param]


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_channels_and_strides_are_those_of_the_features(teacher):
    levels = teacher(images(2, 3, 64, 96))
    assert len(levels) == len(teacher.channels) == len(teacher.strides) == 4
    for level, channels, stride in zip(levels, teacher.channels, teacher.strides, strict=True):
        assert level.shape == (2, channels, 64 // stride, 96 // stride)
        assert level.dtype == torch.float32


def test_known_pyramids(teachers):
    assert teachers["lite0"].channels == (24, 40, 112, 320)
    assert teachers["wide_resnet50_2"].channels == (256, 512, 1024, 2048)
    assert teachers["lite0"].strides == teachers["wide_resnet50_2"].strides == (4, 8, 16, 32)


def test_signed_says_whether_features_can_be_negative(teacher):
    below_zero = any(bool((level < 0).any()) for level in teacher(images(2, 3, 64, 64, seed=1)))
    assert teacher.signed == below_zero == (teacher.name not in ("wide_resnet50_2", "timm/resnet18"))


def test_it_stays_in_eval_mode_and_does_not_learn(teacher):
    before = state_digest(teacher.body.state_dict())
    batch = images(2, 3, 64, 64)
    features = teacher(batch)
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    again = teacher(batch.clone().requires_grad_())
    assert not any(level.requires_grad for level in again)
    assert all(torch.equal(one, other) for one, other in zip(features, again, strict=True))
    assert state_digest(teacher.body.state_dict()) == before == teacher.weights_hash


def test_images_do_not_see_their_neighbours_in_the_batch(teacher):
    batch = images(3, 3, 64, 64)
    for together, alone in zip(teacher(batch), teacher(batch[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_normalise_scales_the_input_by_the_models_own_statistics():
    scaled, plain = (build_backbone("timm/resnet18", weights="random", normalise=n) for n in (True, False))
    batch = images(1, 3, 64, 64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for one, other in zip(scaled(batch), plain((batch - mean) / std), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(scaled(batch)[0], plain(batch)[0])
    assert (scaled.facts().normalise, plain.facts().normalise) == (True, False)


def test_lite0_is_normalised_like_its_tensorflow_original(lite0):
    assert torch.equal(lite0.mean.flatten() * 255, torch.full((3,), 127.0))
    assert torch.equal(lite0.std.flatten() * 255, torch.full((3,), 128.0))


@pytest.mark.parametrize("size", [(48, 64), (64, 80)])
def test_a_size_that_the_stride_does_not_divide_is_refused(lite0, size):
    with pytest.raises(
        ShapeError, match=rf"got images of {size[0]}x{size[1]}, expected multiples of 32, such as .*\. Change"
    ):
        lite0(images(1, 3, *size))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("wide_resnet50", "Did you mean 'wide_resnet50_2'?"), ("efficientnet-lite0", "'efficientnet_lite0'?"), ("x", "")],
)
def test_an_unknown_name_is_told_its_nearest(name, hint):
    with pytest.raises(ConfigError) as error:
        build_backbone(name, weights="random")
    message = str(error.value)
    assert f"unknown name {name!r}, expected one of {', '.join(BACKBONES)} or timm/<model>." in message
    assert message.endswith(hint or ".")


def test_an_unknown_timm_model_is_one_line():
    with pytest.raises(WeightsError, match=r"timm cannot build 'resnet_eighteen' .*See timm\.list_models\(\)\.$"):
        build_backbone("timm/resnet_eighteen", weights="random")


def test_weights_that_timm_cannot_fetch_are_one_line(monkeypatch):
    create_model = timm.create_model

    def offline(name, *, pretrained=False, **settings):
        if pretrained:
            raise ConnectionError("no route to huggingface.co\nmany\nlines")
        return create_model(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr("anatomaly.backbones.timm_features._silence", lambda address: None)  # the hub answers
    with pytest.raises(WeightsError) as error:
        build_backbone("timm/resnet18")
    message = str(error.value)
    assert "\n" not in message
    for part in ("timm/resnet18", "no route to huggingface.co", "--teacher.weights FILE", "efficientnet_lite0"):
        assert part in message


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    asked = []

    def silence(address):
        asked.append(address)
        return OSError("no route")

    monkeypatch.setattr("anatomaly.backbones.timm_features._silence", silence)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))  # nothing was fetched before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("timm/resnet18", "timm/hf-hub:nobody/nothing"):
        with pytest.raises(WeightsError, match=rf"^{name}: .*{constants.ENDPOINT} cannot be reached: no route"):
            build_backbone(name)
    assert asked == [constants.ENDPOINT] * 2
    assert constants.HF_HUB_OFFLINE is False


def test_a_folder_is_no_timm_model(tmp_path):
    with pytest.raises(WeightsError, match=r"expected the name of a timm model\. See timm\.list_models\(\)\.$"):
        build_backbone(f"timm/local-dir:{tmp_path}")


def test_a_teacher_whose_levels_are_not_finite_is_refused(lite0):
    with pytest.raises(WeightsError, match="mine: its levels are not finite numbers"):
        Teacher.of_module("mine", Overflow(), size=(64, 64))


class Overflow(torch.nn.Module):
    """Four levels, the last beyond float32."""

    def forward(self, images):
        levels = [images[:, :, :: 2**i, :: 2**i] for i in range(1, 5)]
        return [*levels[:3], levels[3] * 1e38 * 1e38]


def test_random_weights_are_seeded_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_backbone("timm/resnet18", weights="random")
    build_backbone("efficientnet_lite0")
    assert torch.equal(torch.rand(3), expected)
    assert first.weights_hash == build_backbone("timm/resnet18", weights="random").weights_hash


def test_an_own_file_is_taken_and_its_name_stays_out_of_the_facts(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("resnet18")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "patients.pth")
    teacher = build_backbone("timm/resnet18", weights=str(tmp_path / "patients.pth"))
    assert torch.equal(teacher.body.conv1.weight, model.conv1.weight)
    assert teacher.facts().weights == "file"
    assert "patients" not in str(teacher.facts())
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"other\.pth: keys do not fit the model: \d+ unexpected"):
        build_backbone("timm/resnet18", weights=str(tmp_path / "other.pth"))


def lite0_file():
    return find_weights("efficientnet_lite0", BACKBONES["efficientnet_lite0"].source)


def test_lite0_holds_the_packages_weights_under_timms_names(lite0):
    stored, body = read_state(lite0_file()), lite0.body.state_dict()
    assert torch.equal(stored["_conv_stem.weight"], body["conv_stem.weight"])
    assert torch.equal(stored["_bn0.running_var"], body["bn1.running_var"])
    for own, theirs in (("conv_dw", "_depthwise_conv"), ("conv_pw", "_expand_conv"), ("conv_pwl", "_project_conv")):
        assert torch.equal(stored[f"_blocks.1.{theirs}.weight"], body[f"blocks.1.0.{own}.weight"])
    last = max(int(key.split(".")[1]) for key in stored if key.startswith("_blocks."))
    assert torch.equal(stored[f"_blocks.{last}._project_conv.weight"], body["blocks.6.0.conv_pwl.weight"])


def test_lite0s_batchnorms_expect_what_its_convolutions_give(lite0):
    """Were a weight under a wrong name, running statistics would be far from those of natural input."""
    from anatomaly.data.transforms import fit_to_input
    from anatomaly.synthetic.phantom import draw
    from anatomaly.types import Preprocessing

    scans = [draw("histology", seed=seed, size=128).pixels for seed in range(4)]
    batch = torch.stack([torch.from_numpy(fit_to_input(scan, Preprocessing((128, 128)))) for scan in scans])
    ratios = []

    def note(norm, inputs):
        spread = inputs[0].std(dim=(0, 2, 3)) / norm.running_var.sqrt()
        ratios.append(float(spread.median()))

    norms = [m for m in lite0.body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    lite0(batch)
    for hook in hooks:
        hook.remove()
    assert len(ratios) == len(norms) > 40
    assert 0.3 < min(ratios) <= max(ratios) < 3


def test_a_lite0_file_of_another_order_is_refused(tmp_path):
    stored = read_state(lite0_file())
    torch.save(dict(reversed(stored.items())), tmp_path / "reversed.pth")
    with pytest.raises(WeightsError, match=r"do not match the model's \d+ in order and shape"):
        build_backbone("efficientnet_lite0", weights=str(tmp_path / "reversed.pth"))


def test_a_teacher_saved_from_the_model_is_read_by_name(lite0, tmp_path):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in lite0.body.state_dict().items()}, tmp_path / "teacher.safetensors")
    again = build_backbone("efficientnet_lite0", weights=str(tmp_path / "teacher.safetensors"))
    assert again.weights_hash == lite0.weights_hash


def test_torchvisions_wide_resnet_is_the_same_network(golden_files):
    teacher = build_backbone("wide_resnet50_2", weights=str(golden_files["teacher"]), normalise=False)
    model = torchvision.models.wide_resnet50_2()
    model.load_state_dict(torch.load(golden_files["teacher"], weights_only=True))
    model.eval()
    batch = images(1, 3, 64, 64)
    expected = []
    with torch.no_grad():
        x = model.maxpool(model.relu(model.bn1(model.conv1(batch))))
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = layer(x)
            expected.append(x)
    for level, truth in zip(teacher(batch), expected, strict=True):
        assert float((level - truth).norm() / truth.norm()) < 1e-5


def test_levels_of_another_form_than_declared_are_refused():
    facts = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "weights": "random", "strides": (2, 4, 8, 16)}
    with pytest.raises(ConfigError, match=r"mine: its levels are .*, expected \(B, C, h, w\) with \(3, 3, 3, 4\)"):
        Teacher("mine", Overflow(), channels=(3, 3, 3, 4), **facts)
