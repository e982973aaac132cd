"""VMamba through timm's own door."""

import pytest
import timm
import torch

import anatomaly.timm_models  # noqa: F401 (registers)
from anatomaly.backbones.vmamba.network import VMamba
from anatomaly.errors import ConfigError, WeightsError


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["vmamba_tiny", "vmamba_tiny_s1l8"])
def test_what_feature_info_declares_is_what_comes_out(name, images):
    model = timm.create_model(f"anatomaly_{name}", features_only=True).eval()
    with torch.no_grad():
        levels = model(images)
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    assert channels == [96, 192, 384, 768]
    assert [tuple(level.shape) for level in levels] == [(2, c, 64 // s, 96 // s) for c, s in zip(channels, strides)]  # noqa: B905
    plain = VMamba(name).eval()
    plain.load_state_dict(model.body.state_dict())
    with torch.no_grad():
        assert all(torch.equal(one, other) for one, other in zip(levels, plain(images), strict=True))


def test_out_indices_choose_levels(images):
    model = timm.create_model("anatomaly_vmamba_tiny", features_only=True, out_indices=(1, -1)).eval()
    with torch.no_grad():
        shallow, deep = model(images)
    assert (shallow.shape[1], deep.shape[1]) == (192, 768) == tuple(model.feature_info.channels())
    assert model.feature_info.reduction() == [8, 32]


def test_a_timm_user_can_train_it(images):
    model = timm.create_model("anatomaly_vmamba_tiny_s1l8", features_only=True)
    model(images[:1, :, :32, :32])[-1].square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if "classifier" not in name]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)


def test_pretrained_looks_where_every_teacher_looks(monkeypatch, tmp_path):
    monkeypatch.setenv("ANATOMALY_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "vssmtiny_dp01_ckpt_epoch_292.pth").write_bytes(b"not it")
    with pytest.raises(WeightsError, match=r"vmamba_tiny: .*vssmtiny_dp01_ckpt_epoch_292\.pth has sha256"):
        timm.create_model("anatomaly_vmamba_tiny", features_only=True, pretrained=True)


def test_only_what_it_can_do_is_accepted():
    with pytest.raises(ConfigError, match=r"anatomaly_vmamba_tiny: is a feature pyramid\. Pass features_only=True"):
        timm.create_model("anatomaly_vmamba_tiny")
    with pytest.raises(ConfigError, match=r"unknown arguments num_classes"):
        timm.create_model("anatomaly_vmamba_tiny", features_only=True, num_classes=3)
