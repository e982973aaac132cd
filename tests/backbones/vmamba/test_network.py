"""VMamba-Tiny: golden values of both checkpoints' architectures, and how official files are read."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from golden_io import Golden, fill_entry, imagenet, uniform
from safetensors.torch import save_file

from anatomaly.backbones import BACKBONES, build_backbone
from anatomaly.backbones.vmamba.network import SS2D, VMamba
from anatomaly.backbones.weights import state_digest
from anatomaly.errors import ConfigError, NotReadyError, ShapeError, WeightsError

FOLDER = Path(__file__).parents[2] / "golden"
KEYS = {"vmamba_tiny": "keys_vanilla_vmamba_tiny.json", "vmamba_tiny_s1l8": "keys_vmamba_tiny_s1l8.json"}
GOLDEN = {"vmamba_tiny": "vmamba_vanilla.npz", "vmamba_tiny_s1l8": "vmamba_s1l8.npz"}
VARIANTS = tuple(KEYS)


@pytest.fixture(scope="module")
def states():
    """Golden weights under the official names, made without our model."""
    shapes = {variant: json.loads((FOLDER / file).read_text("utf-8")) for variant, file in KEYS.items()}
    return {
        variant: {key: torch.as_tensor(fill_entry(key, tuple(shape))) for key, shape in own.items()}
        for variant, own in shapes.items()
    }


@pytest.fixture(scope="module")
def models(states):
    """(variant, merged) -> the model with the golden weights, in eval mode and without gradients."""
    made = {}
    for variant in VARIANTS:
        for merged in (False, True):
            model = VMamba(variant, merged=merged)
            model.load_state_dict(states[variant], assign=True)
            made[variant, merged] = model.eval().requires_grad_(False)
    return made


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def model(models, variant):
    model = models[variant, False]
    yield model
    model.use_scan("auto")


def images(batch, height, width, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def relative(got, truth):
    return float((got - truth).norm() / truth.norm())


# ------------------------------------------------------------------------------------------------ golden values


def test_names_and_shapes_are_the_official_ones(variant, states):
    own = {key: tuple(tensor.shape) for key, tensor in VMamba(variant).state_dict().items()}
    assert own == {key: tuple(tensor.shape) for key, tensor in states[variant].items()}


@pytest.mark.parametrize(
    ("size", "backend"), [(64, "auto"), (256, "auto"), (64, "numba"), (64, "chunked"), (64, "ref")]
)
def test_the_golden_stages_and_logits(models, variant, size, backend):
    golden, model = Golden(FOLDER / GOLDEN[variant]), models[variant, True]
    batch = torch.from_numpy(imagenet(uniform(f"vmamba.{size}x{size}", (1, 3, size, size))))
    model.use_scan(backend)
    try:
        levels, logits = model(batch), model.classify(batch)
    finally:
        model.use_scan("auto")
    for stage, level in enumerate(levels, start=1):
        assert golden.compare(f"{size}x{size}_stage{stage}", level)["rel_l2"] <= 1e-5, stage
    assert golden.compare(f"{size}x{size}_logits", logits)["rel_l2"] <= 1e-5


# ------------------------------------------------------------------------------------------------- the pyramid


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (50, 70), (33, 31), (1, 1)])
def test_channels_and_strides_are_those_of_the_levels(models, variant, merged, size):
    model = models[variant, merged]
    levels = model(images(2, *size))
    assert model.channels == ((192, 384, 768, 768) if merged else (96, 192, 384, 768))
    assert model.strides == ((8, 16, 32, 32) if merged else (4, 8, 16, 32))
    expected = [
        (2, channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        for channels, stride in zip(model.channels, model.strides, strict=True)
    ]
    assert [tuple(level.shape) for level in levels] == expected
    assert all(level.dtype == torch.float32 and bool(torch.isfinite(level).all()) for level in levels)
    assert not any(level.requires_grad for level in levels)


@pytest.mark.parametrize("merged", [False, True])
def test_other_sizes_are_filled_with_zeros_and_cut_back(models, variant, merged):
    model, batch = models[variant, merged], images(2, 50, 70)
    before = batch.clone()
    filled = torch.zeros(2, 3, 64, 96)
    filled[..., :50, :70] = batch
    for level, whole in zip(model(batch), model(filled), strict=True):
        assert torch.equal(level, whole[..., : level.shape[2], : level.shape[3]])
    assert torch.equal(model.classify(batch), model.classify(filled))
    assert torch.equal(batch, before)


def test_levels_after_the_merging_follow_from_those_before_it(models, variant):
    batch = images(1, 64, 96)
    before, after = models[variant, False](batch), models[variant, True](batch)
    for layer, one, other in zip(models[variant, False].layers, before, after, strict=True):
        torch.testing.assert_close(layer.downsample(one.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), other)
    assert torch.equal(before[3], after[3])


def test_logits(model):
    logits = model.classify(images(3, 64, 96))
    assert logits.shape == (3, 1000)
    last = model(images(3, 64, 96))[3].permute(0, 2, 3, 1)
    norm, head = model.classifier["norm"], model.classifier["head"]
    pooled = F.layer_norm(last, (768,), norm.weight, norm.bias, 1e-5).mean((1, 2))
    torch.testing.assert_close(logits, pooled @ head.weight.T + head.bias)


def test_images_do_not_see_their_neighbours_in_the_batch(model):
    batch = images(3, 64, 96)
    together = model(batch)
    for index in range(3):
        for level, alone in zip(together, model(batch[index : index + 1]), strict=True):
            assert relative(level[index], alone[0]) < 1e-5
    assert relative(together[0][0], together[0][1]) > 0.1


def test_a_rerun_is_equal_to_the_last_bit(model):
    batch = images(2, 64, 96)
    once, again = model(batch), model(batch.clone())
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_memory_layout_of_the_input_changes_nothing(model):
    batch = images(2, 64, 96)
    for one, other in zip(model(batch), model(batch.to(memory_format=torch.channels_last)), strict=True):
        assert relative(one, other) < 1e-5


def test_several_callers_at_once_get_what_one_gets(model):
    batches = [images(1, 64, 64, seed=seed) for seed in range(6)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [model(batch) for batch in batches]
        with ThreadPoolExecutor(6) as pool:
            at_once = list(pool.map(lambda batch: model(batch), batches))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(alone, at_once, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------------------------- scan and gradients


def test_use_scan_reaches_every_block_and_gives_the_model_back(model, variant):
    ops = [module for module in model.modules() if isinstance(module, SS2D)]
    assert len(ops) == {"vmamba_tiny": 15, "vmamba_tiny_s1l8": 14}[variant]
    assert {op.scan_backend for op in ops} == {"auto"}
    assert model.use_scan("ref") is model
    assert {op.scan_backend for op in ops} == {"ref"}


def test_use_scan_is_obeyed(model, monkeypatch):
    from anatomaly.backbones.vmamba import cross_scan

    asked = []
    choose = cross_scan.choose_backend
    monkeypatch.setattr(cross_scan, "choose_backend", lambda name, *rest: asked.append(name) or choose(name, *rest))
    model.use_scan("chunked")(images(1, 32, 32))
    assert set(asked) == {"chunked"}
    with pytest.raises(NotReadyError, match="unknown backend 'cuda'"):
        model.use_scan("cuda")(images(1, 32, 32))


def test_it_can_be_trained(variant, states):
    model = VMamba(variant)
    model.load_state_dict(states[variant])
    model.classify(images(1, 32, 64)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name
    with pytest.raises(NotReadyError, match="'numba' has no gradients"):
        model.use_scan("numba")(images(1, 32, 32))


def test_gradients_do_not_depend_on_the_backend(models, variant):
    model, gradients = models[variant, True], []
    for backend in ("ref", "auto"):
        batch = images(1, 32, 64).requires_grad_()
        model.use_scan(backend)(batch)[2].square().sum().backward()
        gradients.append(batch.grad)
    model.use_scan("auto")
    assert relative(gradients[1], gradients[0]) < 1e-4


def test_a_new_model_is_a_sensible_start(variant):
    torch.manual_seed(0)
    model = VMamba(variant).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert round(parameters / 1e6, 1) == {"vmamba_tiny": 22.9, "vmamba_tiny_s1l8": 30.2}[variant]
    for name, tensor in model.named_parameters():
        assert torch.isfinite(tensor).all()
        if name.endswith("dt_projs_bias"):
            step = F.softplus(tensor.detach())
            assert 0.00099 < float(step.min()) <= float(step.max()) < 0.101
    with torch.no_grad():
        assert all(torch.isfinite(level).all() for level in model(images(1, 64, 64)))


def test_an_unknown_variant_is_told_the_known_ones():
    with pytest.raises(ConfigError, match=r"VMamba: unknown variant 'tiny', expected one of vmamba_tiny, vmamba_tiny_"):
        VMamba("tiny")


# ------------------------------------------------------------------------------------------------ loading files


@pytest.fixture(scope="module")
def digests(states):
    return {variant: state_digest(state) for variant, state in states.items()}


def first_spelling(state):
    """The vanilla checkpoint's names as they were in the first release."""
    modules = {
        "patch_embed.0": "patch_embed.proj",
        "patch_embed.2": "patch_embed.norm",
        "classifier.norm": "norm",
        "classifier.head": "head",
    }
    for layer, depth in enumerate((2, 2, 9, 2)):
        modules |= {
            f"layers.{layer}.downsample.{i}": f"layers.{layer}.downsample.{n}"
            for i, n in ((1, "norm"), (2, "reduction"))
        }
        for block in range(depth):
            here = f"layers.{layer}.blocks.{block}"
            modules |= {f"{here}.norm": f"{here}.ln_1", f"{here}.op": f"{here}.self_attention"}
    renamed = {}
    for key, tensor in state.items():
        (module,) = (name for name in modules if key.startswith(f"{name}."))
        renamed[modules[module] + key.removeprefix(module)] = tensor
    return renamed


def with_convolutions(state):
    """Linear maps as 1x1 convolutions, as the s1l8 checkpoint has them."""
    linear = ("in_proj.weight", "x_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "dt_projs.weight")
    return {key: tensor[..., None, None] if key.endswith(linear) else tensor for key, tensor in state.items()}


def as_checkpoint(state):
    return {"model": state, "epoch": 292, "config": {"name": "vssm_tiny"}}


def with_average(state):
    """A second state dict that must not be taken; it shares its memory, so the file stays small."""
    average = dict(state) | {"classifier.head.bias": torch.full((1000,), 9.0)}
    return {"model_ema": average, "model": state}


def of_parallel_training(state):
    return {"model": {f"module.{key}": tensor for key, tensor in state.items()}}


FILES = {
    "plain": ("vmamba_tiny", lambda state: state),
    "checkpoint": ("vmamba_tiny", as_checkpoint),
    "with an average": ("vmamba_tiny", with_average),
    "only an average": ("vmamba_tiny", lambda state: {"model_ema": state}),
    "first spelling": ("vmamba_tiny", lambda state: as_checkpoint(first_spelling(state))),
    "of parallel training": ("vmamba_tiny_s1l8", of_parallel_training),
    "convolutions": ("vmamba_tiny_s1l8", lambda state: as_checkpoint(with_convolutions(state))),
}


@pytest.mark.parametrize("kind", FILES)
def test_official_files_are_read(kind, states, digests, tmp_path):
    variant, change = FILES[kind]
    torch.save(change(states[variant]), tmp_path / "official.pth")
    teacher = build_backbone(variant, weights=str(tmp_path / "official.pth"))
    assert teacher.weights_hash == digests[variant]
    assert state_digest(teacher.body.state_dict()) == digests[variant]


def test_the_first_spelling_shares_no_name_with_the_second(states):
    first = first_spelling(states["vmamba_tiny"])
    assert len(first) == len(states["vmamba_tiny"])
    assert not set(first) & set(states["vmamba_tiny"])
    assert "layers.2.blocks.8.self_attention.out_norm.weight" in first
    assert "layers.0.downsample.reduction.weight" in first


def test_safetensors_are_read(variant, states, digests, tmp_path):
    save_file(states[variant], tmp_path / "official.safetensors")
    assert build_backbone(variant, weights=str(tmp_path / "official.safetensors")).weights_hash == digests[variant]


def without(key):
    return lambda state: {name: tensor for name, tensor in state.items() if name != key}


def replaced(key, shape):
    return lambda state: state | {key: torch.zeros(shape)}


BAD_FILES = {
    "a key is missing": (
        *("vmamba_tiny", without("layers.3.blocks.1.op.Ds")),
        ("1 missing (layers.3.blocks.1.op.Ds)",),
    ),
    "a key too many": (
        *("vmamba_tiny", replaced("layers.0.blocks.2.norm.weight", (96,))),
        ("1 unexpected (layers.0.blocks.2.norm.weight)",),
    ),
    "other classes": (
        *("vmamba_tiny", replaced("classifier.head.weight", (10, 768))),
        ("1 of another shape (classifier.head.weight is (10, 768), expected (1000, 768))",),
    ),
    "all three at once": (
        "vmamba_tiny",
        lambda state: without("patch_embed.0.bias")(replaced("x.y", (1,))(replaced("patch_embed.2.bias", (3,))(state))),
        ("1 missing (patch_embed.0.bias)", "1 unexpected (x.y)", "patch_embed.2.bias is (3,), expected (96,)"),
    ),
    "a transposed convolution": (
        *("vmamba_tiny_s1l8", replaced("layers.0.blocks.0.mlp.fc1.weight", (96, 384, 1, 1))),
        ("layers.0.blocks.0.mlp.fc1.weight is (96, 384, 1, 1), expected (384, 96)",),
    ),
    "a real convolution": (
        *("vmamba_tiny_s1l8", replaced("layers.0.blocks.0.mlp.fc1.weight", (384, 96, 3, 3))),
        ("layers.0.blocks.0.mlp.fc1.weight is (384, 96, 3, 3), expected (384, 96)",),
    ),
}


def refused(name, file):
    with pytest.raises(WeightsError) as error:
        build_backbone(name, weights=str(file))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{file}: keys do not fit the model: ")
    return message


@pytest.mark.parametrize("case", BAD_FILES)
def test_keys_that_do_not_fit_are_named(case, states, tmp_path):
    variant, change, parts = BAD_FILES[case]
    torch.save({"model": change(states[variant])}, tmp_path / "official.pth")
    message = refused(variant, tmp_path / "official.pth")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(("own", "other"), [VARIANTS, VARIANTS[::-1]])
def test_the_other_variants_file_is_refused(own, other, states, tmp_path):
    torch.save({"model": states[other]}, tmp_path / "official.pth")
    message = refused(own, tmp_path / "official.pth")
    for part in ("missing", "unexpected", "of another shape", "Is it another architecture?"):
        assert part in message


# ---------------------------------------------------------------------------------- finding and refusing files


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache folder and no network; notes what was asked for."""
    asked = []

    def download(url, target, hash_prefix):
        asked.append((url, hash_prefix))
        raise URLError("no route to host")

    monkeypatch.setenv("ANATOMALY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache", asked


NAMES = ("vmamba_tiny", "vmamba_tiny_merged", "vmamba_tiny_s1l8", "vmamba_tiny_s1l8_merged")


@pytest.mark.parametrize("name", NAMES)
def test_a_download_that_fails_says_where_from_and_where_to(offline, name):
    cache, asked = offline
    with pytest.raises(WeightsError) as error:
        build_backbone(name)
    message, source = str(error.value), BACKBONES[name].source
    assert "\n" not in message
    assert message.startswith(f"{name}: weights not found")
    for part in ("no route to host", source.url, str(cache), "--teacher.weights FILE"):
        assert part in message
    assert asked == [(source.url, source.sha256)]
    assert source.url.startswith("https://github.com/MzeroMiko/VMamba/releases/download/%23v")
    file = "vssm1_tiny_0230s_ckpt_epoch_264.pth" if "s1l8" in name else "vssmtiny_dp01_ckpt_epoch_292.pth"
    assert source.url.endswith(f"/{file}")
    assert source.file == file


@pytest.mark.parametrize("name", ["vmamba_tiny", "vmamba_tiny_merged"])
def test_a_cached_file_with_another_digest_is_refused(offline, name, states):
    cache, asked = offline
    file = cache / BACKBONES[name].source.file
    torch.save(as_checkpoint(states["vmamba_tiny"]), file)
    with pytest.raises(WeightsError) as error:
        build_backbone(name)
    message = str(error.value)
    assert "\n" not in message
    for part in (f"{name}: {file} has sha256", "expected dbc0cc4f5ec0e45d", "delete it"):
        assert part in message
    assert not asked


def test_a_cached_file_is_found(offline, states, digests):
    cache, asked = offline
    torch.save(as_checkpoint(states["vmamba_tiny_s1l8"]), cache / BACKBONES["vmamba_tiny_s1l8"].source.file)
    teacher = build_backbone("vmamba_tiny_s1l8")
    assert teacher.weights_hash == digests["vmamba_tiny_s1l8"]
    assert teacher.facts().weights == "auto"
    assert not asked


# --------------------------------------------------------------------------------------------------- the teacher


@pytest.fixture(scope="module")
def teachers(states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vmamba")
    made = {}
    for name in ("vmamba_tiny_merged", "vmamba_tiny_s1l8"):
        torch.save(as_checkpoint(states[BACKBONES[name].variant]), folder / "patients.pth")
        made[name] = build_backbone(name, weights=str(folder / "patients.pth"))
    return made


@pytest.fixture(params=["vmamba_tiny_merged", "vmamba_tiny_s1l8"])
def teacher(request, teachers):
    return teachers[request.param]


def test_a_teacher_is_frozen(teacher, digests):
    digest = digests[BACKBONES[teacher.name].variant]
    assert teacher.train() is teacher
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    batch = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    levels = teacher(batch)
    again = teacher(batch.clone().requires_grad_())
    assert not any(level.requires_grad for level in again)
    assert all(torch.equal(one, other) for one, other in zip(levels, again, strict=True))
    assert state_digest(teacher.body.state_dict()) == teacher.weights_hash == digest


def test_a_teachers_facts(teacher):
    assert teacher.signed is True
    assert teacher.channels == ((192, 384, 768, 768) if "merged" in teacher.name else (96, 192, 384, 768))
    assert teacher.strides == ((8, 16, 32, 32) if "merged" in teacher.name else (4, 8, 16, 32))
    assert asdict(teacher.facts()) == {
        "name": teacher.name,
        "weights": "file",
        "normalise": True,
        "hash": teacher.weights_hash,
        "blocks": None,
    }


def test_a_teacher_scales_its_input_by_imagenets_statistics(teacher, models):
    batch = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    scaled = torch.from_numpy(imagenet(batch.numpy()))
    model = models[BACKBONES[teacher.name].variant, BACKBONES[teacher.name].merged]
    for level, expected in zip(teacher(batch), model(scaled), strict=True):
        assert relative(level, expected) < 1e-5


def test_a_teacher_refuses_sizes_that_its_stride_does_not_divide(teacher):
    with pytest.raises(
        ShapeError, match=rf"^{teacher.name}: got images of 50x70, expected multiples of 32, such as 32x64 or 64x96\."
    ):
        teacher(torch.rand(1, 3, 50, 70))


def test_random_weights_are_seeded_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_backbone("vmamba_tiny", weights="random")
    assert torch.equal(torch.rand(3), expected)
    assert first.weights_hash == build_backbone("vmamba_tiny_merged", weights="random").weights_hash
    assert first.facts().weights == "random"
