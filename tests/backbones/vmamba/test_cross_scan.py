"""The four walks over an image: golden values, and the fused kernel against a float64 loop."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scan
import torch
from golden_io import Golden
from hypothesis import given, settings
from hypothesis import strategies as st

from anatomaly.backbones.vmamba.cross_scan import cross_merge, cross_scan, cross_selective_scan
from anatomaly.errors import NotReadyError, ShapeError

GOLDEN = Path(__file__).parents[2] / "golden" / "ssm_unit.npz"
BACKENDS = ("ref", "chunked", "numba")
KERNELS = ("chunked", "numba")  # held to the yardstick, which is "ref" itself
ARGUMENTS = ("u", "projected", "dt_weight", "dt_bias", "A", "D")


@pytest.fixture
def threads():
    """Set torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------- unroll and merge


@pytest.fixture(scope="module")
def golden():
    return Golden(GOLDEN)


def test_the_golden_walks(golden):
    x = torch.from_numpy(golden.z["cross_scan_in"])
    assert golden.compare("cross_scan_out", cross_scan(x))["max_abs"] == 0


def test_the_golden_merge(golden):
    y = torch.from_numpy(golden.z["cross_merge_in"])  # (B, 4, D, H, W)
    merged = cross_merge(y.flatten(3), tuple(y.shape[-2:]))
    assert merged.shape == (*y.shape[::2][:1], y.shape[2], *y.shape[-2:])
    assert golden.compare("cross_merge_out", merged.flatten(2))["max_abs"] <= 1e-6


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (3, 5)])
def test_a_walk_visits_the_pixels_in_its_order(size):
    height, width = size
    pixels = torch.arange(height * width).reshape(1, 1, height, width)
    for walk, order in zip(cross_scan(pixels)[0, :, 0].tolist(), scan.walks(height, width), strict=True):
        assert walk == [row * width + column for row, column in order]


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (3, 5)])
def test_every_walk_is_merged_back_at_its_pixels(size):
    height, width = size
    pixels = torch.arange(float(height * width)).reshape(1, 1, height, width)
    walks = cross_scan(pixels)
    for alone in range(4):
        only = torch.zeros_like(walks)
        only[:, alone] = walks[:, alone]
        assert torch.equal(cross_merge(only, size), pixels)


# ----------------------------------------------------------------------------------- the yardstick, any shape


def lay_out(tensor, layout):
    """The same shape in other memory; "strided" has NaN between its values, "expanded" repeats its first entry."""
    if layout == "transposed":
        return tensor.movedim(-1, 1).contiguous().movedim(1, -1)  # channels first, as a convolution leaves it
    if layout == "strided":
        return torch.stack([tensor, torch.full_like(tensor, math.nan)], dim=-1)[..., 0]
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    return tensor


def make_case(shape, *, seed=0, dtypes=(torch.float32,) * 6, layouts=("plain",) * 6):
    """Inputs as in a trained model: steps from about 0.003 to 1, decay rates from 1 to N."""
    batch, height, width, channels, ranks, states = shape
    rng = np.random.default_rng(seed)
    values = (
        rng.standard_normal((batch, height, width, channels)),
        rng.standard_normal((batch, height, width, 4, ranks + 2 * states)),
        rng.standard_normal((4, channels, ranks)) / math.sqrt(ranks),
        1.5 * rng.standard_normal((4, channels)) - 3,
        -np.arange(1, states + 1) * np.exp(0.05 * rng.standard_normal((4, channels, states))),
        1 + 0.1 * rng.standard_normal((4, channels)),
    )
    return {
        name: lay_out(torch.from_numpy(value).to(dtype), layout)
        for name, value, dtype, layout in zip(ARGUMENTS, values, dtypes, layouts, strict=True)
    }


def oracle(inputs):
    return scan.cross_selective_scan(**{name: tensor.detach().double().numpy() for name, tensor in inputs.items()})


def magnitude(inputs):
    """What the outputs would be without any cancellation."""
    projected, ranks = inputs["projected"], inputs["dt_weight"].shape[2]
    sizes = torch.cat([projected[..., :ranks], projected[..., ranks:].abs()], dim=-1)
    return oracle(inputs | {"u": inputs["u"].abs(), "projected": sizes, "D": inputs["D"].abs()})


FEW = 256


def check(inputs):
    """err(kernel) <= 2 err(yardstick) in L2; for the floor see test_selective_scan.assert_within_yardstick."""
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    truth, size = torch.from_numpy(oracle(inputs)), torch.from_numpy(magnitude(inputs))
    yardstick = cross_selective_scan(**inputs, backend="ref")
    allowed = 2 * float((yardstick.double() - truth).norm())
    eps = torch.finfo(inputs["u"].dtype).eps
    floor = eps * float(truth.norm() if truth.numel() >= FEW else 2 * size.norm())
    assert allowed <= 16 * eps * float(size.norm()), f"the yardstick: {allowed:.3g} / 2"
    for backend in KERNELS:
        y = cross_selective_scan(**inputs, backend=backend)
        assert (y.shape, y.dtype) == (inputs["u"].shape, inputs["u"].dtype)
        own = float((y.double() - truth).norm())
        assert own <= max(allowed, floor), f"{backend}: {own:.3g} > {allowed:.3g}, floor {floor:.3g}"
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), f"{name} was modified"


FLOATS = (torch.float32, torch.bfloat16)
LAYOUTS = ("plain", "transposed", "strided", "expanded")
SHAPES = st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (1, 9), (1, 9), (1, 130), (1, 6), (1, 17))))
SIX_FLOATS = st.one_of(st.just((torch.float32,) * 6), st.tuples(*[st.sampled_from(FLOATS)] * 6))
SIX_LAYOUTS = st.one_of(st.just(("plain",) * 6), st.tuples(*[st.sampled_from(LAYOUTS)] * 6))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(SHAPES, st.integers(0, 2**32 - 1), SIX_FLOATS, SIX_LAYOUTS)
def test_any_shape_dtype_and_layout_is_within_the_yardstick(shape, seed, dtypes, layouts):
    check(make_case(shape, seed=seed, dtypes=dtypes, layouts=layouts))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 8), (8, 4), (4, 8), (5, 7), (16, 17)])
@pytest.mark.parametrize("channels", [1, 64, 65, 128])
def test_sizes_at_the_kernels_seams(size, channels):
    check(make_case((2, *size, channels, 2, 3), seed=3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_blocks_that_need_no_copy_are_not_used_up(layout):
    check(make_case((2, 5, 6, 64, 4, 16), layouts=(layout,) * 6))


@pytest.mark.parametrize(
    ("backend", "size"),
    [
        *[("ref", (2, 0, 3)), ("ref", (2, 3, 0)), ("chunked", (2, 0, 3)), ("chunked", (2, 3, 0))],
        *[(backend, (0, 2, 3)) for backend in BACKENDS],
        *[("numba", size) for size in ((2, 0, 3), (2, 3, 0))],
    ],
)
def test_nothing_in_nothing_out(backend, size):
    inputs = make_case((*size, 5, 2, 3))
    assert cross_selective_scan(**inputs, backend=backend).shape == inputs["u"].shape


@pytest.mark.parametrize("backend", ["ref", "chunked", "auto"])
def test_float64_is_computed_in_float64(backend):
    inputs = make_case((2, 5, 7, 9, 3, 4), dtypes=(torch.float64,) * 6)
    y = cross_selective_scan(**inputs, backend=backend)
    assert y.dtype == torch.float64
    assert float((y - torch.from_numpy(oracle(inputs))).norm() / y.norm()) < 1e-13


@pytest.mark.parametrize("backend", ["ref", "chunked", "numba"])
def test_autocast_does_not_reach_the_recurrence(backend):
    inputs = make_case((2, 5, 7, 9, 3, 4))
    expected = cross_selective_scan(**inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cross_selective_scan(**inputs, backend=backend), expected)


def test_it_has_gradients():
    inputs = make_case((1, 2, 3, 2, 2, 2), dtypes=(torch.float64,) * 6)
    tensors = tuple(tensor.requires_grad_() for tensor in inputs.values())
    assert torch.autograd.gradcheck(cross_selective_scan, tensors)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_auto_gives_a_gradient_where_one_is_needed_and_numba_refuses(name):
    inputs = make_case((2, 3, 4, 5, 2, 3))
    inputs[name].requires_grad_()
    y = cross_selective_scan(**inputs)
    assert torch.equal(y, cross_selective_scan(**inputs, backend="chunked"))
    y.square().sum().backward()
    assert torch.isfinite(inputs[name].grad).all()
    assert (inputs[name].grad != 0).any()
    with pytest.raises(NotReadyError, match="'numba' has no gradients"):
        cross_selective_scan(**inputs, backend="numba")
    with torch.no_grad():
        assert torch.equal(cross_selective_scan(**inputs), cross_selective_scan(**inputs, backend="numba"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["u", "dt_weight", "dt_bias", "A", "D"])
def test_nan_stays_in_its_channel(backend, name):
    inputs = make_case((2, 3, 4, 70, 2, 3))
    clean = cross_selective_scan(**inputs, backend=backend)
    if name == "u":
        inputs["u"][1, 1, 2, 66] = math.nan
    else:
        inputs[name][2, 66] = math.nan
    y = cross_selective_scan(**inputs, backend=backend)
    expected = torch.zeros(clean.shape, dtype=torch.bool)
    if name == "u":
        expected[1, ..., 66] = True  # the walks there and back reach every pixel
    else:
        expected[..., 66] = True
    assert torch.equal(torch.isnan(y), expected)
    assert torch.equal(y[~expected], clean[~expected])


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_that_underflow_leave_the_skips_alone(backend):
    inputs = make_case((2, 3, 4, 70, 2, 3))
    inputs["dt_bias"] -= 1e3
    y = cross_selective_scan(**inputs, backend=backend)
    torch.testing.assert_close(y, inputs["D"].sum(0) * inputs["u"], rtol=1e-6, atol=1e-7)


def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    inputs = make_case((2, 7, 9, 150, 3, 6))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(cross_selective_scan(**inputs, backend="numba"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_callers_at_once_get_what_one_gets(threads, backend):
    threads(2)
    cases = [make_case((2, 5, 7, 70 + seed, 3, 6), seed=seed) for seed in range(8)]

    def run(inputs):
        return cross_selective_scan(**inputs, backend=backend)

    alone = [run(inputs) for inputs in cases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for one, expected in zip(pool.map(run, cases), alone, strict=True):
                assert torch.equal(one, expected)


# Of images (2, 3, 4) with 5 channels, rank 2 and 3 states.
BAD_SHAPES = [
    ("u", (3, 4, 5), "(B, H, W, D)"),
    ("dt_weight", (4, 5), "(4, D, R)"),
    ("A", (4, 5), "(4, D, N)"),
    ("projected", (2, 4, 3, 4, 8), "(2, 3, 4, 4, 8)"),
    ("projected", (2, 3, 4, 32), "(2, 3, 4, 4, 8)"),
    ("projected", (2, 3, 4, 4, 7), "(2, 3, 4, 4, 8)"),
    ("dt_weight", (4, 6, 2), "(4, 5, 2)"),
    ("dt_weight", (1, 5, 2), "(4, 5, 2)"),
    ("dt_bias", (20,), "(4, 5)"),
    ("A", (20, 3, 3), "(4, 5, 3)"),
    ("A", (4, 1, 3), "(4, 5, 3)"),
    ("D", (5,), "(4, 5)"),
]


@pytest.mark.parametrize(("name", "shape", "expected"), BAD_SHAPES)
@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_shapes_that_do_not_fit_are_named(name, shape, expected, backend):
    inputs = make_case((2, 3, 4, 5, 2, 3))
    with pytest.raises(ShapeError) as error:
        cross_selective_scan(**inputs | {name: torch.zeros(shape)}, backend=backend)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("cross_selective_scan: ")
    assert f"{name} is {shape}, expected {expected}" in message


@pytest.mark.parametrize("name", ARGUMENTS[1:])
def test_tensors_on_two_devices_are_refused(name):
    inputs = make_case((2, 3, 4, 5, 2, 3))
    with pytest.raises(ShapeError, match=f"{name} is on meta, u on cpu"):
        cross_selective_scan(**inputs | {name: inputs[name].to("meta")})


def test_autocast_does_not_reach_a_kernel_that_multiplies_matrices(monkeypatch):
    """The Triton kernel projects the time step with torch; here a stand-in for it looks around."""
    seen = []

    class Kernel:
        @staticmethod
        def scan_image(u, *rest):
            seen.append(torch.is_autocast_enabled("cpu"))
            return u

    monkeypatch.setattr("anatomaly.backbones.vmamba.cross_scan.kernel", lambda backend: Kernel)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cross_selective_scan(**make_case((1, 2, 3, 4, 2, 3)), backend="numba")
    assert seen == [False]
