"""The selective scan: every backend against the definition's golden values and against a float64 loop."""

import importlib
import itertools
import logging
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scan
import torch
from golden_io import Golden
from hypothesis import given, settings
from hypothesis import strategies as st

from anatomaly.backbones.vmamba import selective_scan as module
from anatomaly.backbones.vmamba.selective_scan import (
    choose_backend,
    selective_scan,
    selective_scan_chunked,
    selective_scan_ref,
)
from anatomaly.errors import NotReadyError, ShapeError

GOLDEN = Path(__file__).parents[2] / "golden" / "ssm_unit.npz"
BACKENDS = ("ref", "chunked", "numba")
KERNELS = ("chunked", "numba")  # held to the yardstick, which is "ref" itself
ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "delta_bias")


@pytest.fixture
def threads():
    """Set torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def relative(got, truth):
    got, truth = (np.asarray(torch.as_tensor(array).detach().double()) for array in (got, truth))
    return np.linalg.norm(got - truth) / np.linalg.norm(truth)


# ------------------------------------------------------------------------------------------------ golden values


@pytest.fixture(scope="module")
def golden():
    return Golden(GOLDEN)


def golden_inputs(golden, softplus, bias, skip):
    tensors = {name: torch.from_numpy(golden.z[f"scan_in_{name}"].copy()) for name in ARGUMENTS}
    if not softplus:
        tensors |= {name: tensors[name].abs() for name in ("delta", "delta_bias")}
    absent = {name for name, there in (("delta_bias", bias), ("D", skip)) if not there}
    return {name: tensor for name, tensor in tensors.items() if name not in absent}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("softplus", "bias", "skip"), list(itertools.product((0, 1), repeat=3)))
def test_the_golden_values(golden, backend, softplus, bias, skip):
    inputs = golden_inputs(golden, softplus, bias, skip)
    y = selective_scan(**inputs, delta_softplus=bool(softplus), backend=backend)
    assert golden.compare(f"scan_out_softplus{softplus}_bias{bias}_D{skip}", y)["rel_l2"] <= 5e-6


@pytest.mark.parametrize("backend", ["auto", "ref", "chunked"])
def test_the_golden_gradients(golden, backend):
    inputs = {name: tensor.requires_grad_() for name, tensor in golden_inputs(golden, 1, 1, 1).items()}
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    gradients = torch.autograd.grad(y, list(inputs.values()), torch.from_numpy(golden.z["scan_grad_out"]))
    for name, gradient in zip(inputs, gradients, strict=True):
        assert golden.compare(f"scan_grad_{name}", gradient)["rel_l2"] <= 5e-6, name


# --------------------------------------------------------------------------------- the yardstick, any shape


def lay_out(tensor, layout):
    """The same shape in other memory; "strided" has NaN between its values, "expanded" repeats its first entry."""
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([tensor, torch.full_like(tensor, math.nan)], dim=-1)[..., 0]
    if layout == "expanded" and tensor.numel():
        return tensor[:1].expand_as(tensor)
    return tensor


def make_case(shape, *, seed=0, absent=(), softplus=True, dtypes=(torch.float32,) * 7, layouts=("plain",) * 7):
    """Inputs as in a trained model: steps from about 0.003 to 1, decay rates from 1 to N."""
    batch, groups, channels, states, length = shape
    rng, rows = np.random.default_rng(seed), groups * channels
    delta, bias = rng.standard_normal((batch, rows, length)), rng.standard_normal(rows)
    values = {
        "u": rng.standard_normal((batch, rows, length)),
        "delta": delta - 1 if softplus else 0.3 * abs(delta),
        "A": -np.arange(1, states + 1) * np.exp(0.05 * rng.standard_normal((rows, states))),
        "B": rng.standard_normal((batch, groups, states, length)),
        "C": rng.standard_normal((batch, groups, states, length)),
        "D": 1 + 0.1 * rng.standard_normal(rows),
        "delta_bias": 1.5 * bias - 2 if softplus else 0.1 * abs(bias),
    }
    inputs = {
        name: lay_out(torch.from_numpy(values[name]).to(dtype), layout)
        for name, dtype, layout in zip(ARGUMENTS, dtypes, layouts, strict=True)
        if name not in absent
    }
    return inputs, softplus


def oracle(inputs, softplus):
    arrays = {name: tensor.detach().double().numpy() for name, tensor in inputs.items()}
    return scan.selective_scan(**arrays, delta_softplus=softplus)


def magnitude(inputs, softplus):
    """What the outputs would be without any cancellation (for steps that are not negative)."""
    signed = ("u", "B", "C", "D")
    return oracle({name: tensor.abs() if name in signed else tensor for name, tensor in inputs.items()}, softplus)


FEW = 256


def assert_within_yardstick(got, yardstick, truth, size, *, what=""):
    """err(kernel) <= 2 err(yardstick) in L2, where both are distances from the float64 truth.

    The yardstick can be exact, or better than it deserves, by luck.  So there is a floor in units in the last place of
    the output's dtype: one of the outputs' norm; and where the outputs are too few for twice an error to mean anything,
    two of the norm of `size`, the outputs without cancellation.  The yardstick itself may be wrong by rounding only.
    """
    truth, size = torch.as_tensor(truth), torch.as_tensor(size)
    eps = torch.finfo(got.dtype).eps
    own, allowed = (float((y.double() - truth).norm()) for y in (got, yardstick))
    floor = eps * float(truth.norm()) if truth.numel() >= FEW else 2 * eps * float(size.norm())
    assert allowed <= 8 * eps * float(size.norm()), f"the yardstick: {allowed:.3g}"
    assert own <= max(2 * allowed, floor), f"{what}: {own:.3g} > 2 x {allowed:.3g}, floor {floor:.3g}"


def check(inputs, softplus, backends=KERNELS):
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    truth, size = oracle(inputs, softplus), magnitude(inputs, softplus)
    yardstick = selective_scan(**inputs, delta_softplus=softplus, backend="ref")
    for backend in backends:
        y = selective_scan(**inputs, delta_softplus=softplus, backend=backend)
        assert y.shape == inputs["u"].shape
        assert y.dtype == inputs["u"].dtype
        assert_within_yardstick(y, yardstick, truth, size, what=backend)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), f"{name} was modified"


FLOATS = (torch.float32, torch.bfloat16)
LAYOUTS = ("plain", "transposed", "strided", "expanded")
SHAPES = st.tuples(*(st.integers(low, high) for low, high in ((1, 3), (1, 4), (1, 150), (1, 20), (0, 90))))
SEVEN_FLOATS = st.one_of(st.just((torch.float32,) * 7), st.tuples(*[st.sampled_from(FLOATS)] * 7))
SEVEN_LAYOUTS = st.one_of(st.just(("plain",) * 7), st.tuples(*[st.sampled_from(LAYOUTS)] * 7))
ABSENT = st.sets(st.sampled_from(("D", "delta_bias")))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SHAPES, st.integers(0, 2**32 - 1), ABSENT, st.booleans(), SEVEN_FLOATS, SEVEN_LAYOUTS)
def test_any_shape_dtype_and_layout_is_within_the_yardstick(shape, seed, absent, softplus, dtypes, layouts):
    check(*make_case(shape, seed=seed, absent=absent, softplus=softplus, dtypes=dtypes, layouts=layouts))


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("absent", [(), ("D",), ("delta_bias",), ("D", "delta_bias")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_optional_argument_both_ways(softplus, absent, dtype):
    check(*make_case((2, 3, 21, 6, 40), absent=absent, softplus=softplus, dtypes=(dtype,) * 7))


@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1, channels, 3, 5) for channels in (1, 63, 64, 65, 128, 129)],  # blocks of lanes
        *[(1, 1, 3, 4, length) for length in (1, 31, 32, 33, 64, 65)],  # tiles
        *[(2, 2, 3, 4, length) for length in (15, 16, 17, 255, 256, 257, 512, 600)],  # chunks and their sections
    ],
)
def test_sizes_at_the_kernels_seams(shape):
    check(*make_case(shape, seed=5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_blocks_that_need_no_copy_are_not_used_up(layout):
    check(*make_case((2, 1, 64, 16, 40), layouts=(layout,) * 7))


@pytest.mark.parametrize("backend", ["ref", "chunked", "numba"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 0), (0, 3, 4, 5, 6)])
def test_nothing_in_nothing_out(backend, shape):
    inputs, softplus = make_case(shape)
    y = selective_scan(**inputs, delta_softplus=softplus, backend=backend)
    assert (y.shape, y.dtype) == (inputs["u"].shape, torch.float32)


@pytest.mark.parametrize("backend", ["ref", "chunked", "auto"])
def test_float64_is_computed_in_float64(backend):
    inputs, _ = make_case((2, 2, 5, 4, 300), dtypes=(torch.float64,) * 7)
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert y.dtype == torch.float64
    assert relative(y, oracle(inputs, True)) < 1e-13


@pytest.mark.parametrize("backend", ["ref", "chunked", "numba"])
def test_autocast_does_not_reach_the_recurrence(backend):
    inputs, _ = make_case((2, 2, 20, 4, 40))
    expected = selective_scan(**inputs, delta_softplus=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(**inputs, delta_softplus=True, backend=backend), expected)


@pytest.mark.parametrize("length", [3, 16, 40])
def test_chunked_has_the_gradients_of_its_values(length):
    inputs, _ = make_case((2, 2, 2, 3, length), dtypes=(torch.float64,) * 7)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    exact = selective_scan_ref(**inputs, delta_softplus=True)
    fast = selective_scan_chunked(**inputs, delta_softplus=True)
    direction = torch.from_numpy(np.random.default_rng(1).standard_normal(fast.shape))
    expected, got = (torch.autograd.grad(y, list(inputs.values()), direction) for y in (exact, fast))
    for name, one, other in zip(inputs, got, expected, strict=True):
        assert relative(one, other) < 1e-12, name
    if length == 3:
        assert torch.autograd.gradcheck(
            lambda *tensors: selective_scan_chunked(*tensors[:6], delta_bias=tensors[6], delta_softplus=True),
            tuple(inputs.values()),
        )


# ------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [-100.0, -200.0, -1e4])
def test_steps_that_underflow_leave_the_skip_alone(backend, bias):
    inputs, _ = make_case((2, 2, 70, 5, 40))
    inputs["delta_bias"] = torch.full_like(inputs["delta_bias"], bias)
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    torch.testing.assert_close(y, inputs["D"][:, None] * inputs["u"], rtol=1e-6, atol=0)
    del inputs["D"]
    assert float(selective_scan(**inputs, delta_softplus=True, backend=backend).abs().max()) < 1e-30


@pytest.mark.parametrize("scale", [20.0, 1e3, 1e6])
def test_decays_that_underflow_forget_everything(scale):
    inputs, _ = make_case((2, 2, 70, 5, 40), softplus=False)
    inputs["A"] = scale * inputs["A"]
    inputs["delta"] = inputs["delta"] + 5
    check(inputs, False)
    forgetful = dict(inputs, A=torch.full_like(inputs["A"], -math.inf))
    for backend in BACKENDS:
        y = selective_scan(**inputs, backend=backend)
        assert torch.isfinite(y).all()
        torch.testing.assert_close(y, selective_scan_ref(**forgetful), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shift", [-80.0, -40.0, -25.0, -15.0, -8.0, 21.0, 30.0, 300.0])
@pytest.mark.parametrize("skip", [False, True])
def test_softplus_far_from_zero(shift, skip):
    inputs, _ = make_case((2, 2, 70, 5, 40), absent=("delta_bias",) if skip else ("D", "delta_bias"))
    inputs["delta"] += shift
    check(inputs, True)


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.05])
def test_a_state_that_does_not_decay_or_grows_slowly(rate):
    inputs, _ = make_case((2, 2, 70, 5, 90), softplus=False)
    inputs["A"] = rate * inputs["A"].abs()
    check(inputs, False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["u", "delta", "A", "D", "delta_bias"])
@pytest.mark.parametrize("softplus", [False, True])
def test_nan_stays_in_its_channel_and_after_its_position(backend, name, softplus):
    inputs, _ = make_case((2, 2, 70, 5, 60), softplus=softplus)
    clean = selective_scan(**inputs, delta_softplus=softplus, backend=backend)
    row, position = 75, 37
    inputs[name] = inputs[name].clone()
    inputs[name][(1, row, position) if name in ("u", "delta") else row] = math.nan
    y = selective_scan(**inputs, delta_softplus=softplus, backend=backend)
    expected = torch.zeros(clean.shape, dtype=torch.bool)
    if name in ("u", "delta"):
        expected[1, row, position:] = True
    else:
        expected[:, row] = True
    assert torch.equal(torch.isnan(y), expected)
    assert torch.equal(y[~expected], clean[~expected])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["B", "C"])
def test_nan_in_b_or_c_stays_in_its_group_and_image(backend, name):
    inputs, _ = make_case((2, 2, 70, 5, 60))
    clean = selective_scan(**inputs, delta_softplus=True, backend=backend)
    inputs[name][1, 1, 2, 37] = math.nan
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    expected = torch.zeros(clean.shape, dtype=torch.bool)
    expected[1, 70:, 37 : None if name == "B" else 38] = True
    assert torch.equal(torch.isnan(y), expected)
    assert torch.equal(y[~expected], clean[~expected])


# ------------------------------------------------------------------------------------------ the kernel's door


@pytest.fixture
def fresh_door():
    """Forget which kernels were imported, before and after."""

    def clear():
        module.kernel.cache_clear()
        module._fastest.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def without_numba(monkeypatch, fresh_door):
    importlib.import_module("anatomaly.backbones.vmamba._scan_numba")  # so that it is put back as it was
    monkeypatch.delitem(sys.modules, "anatomaly.backbones.vmamba._scan_numba")
    monkeypatch.setitem(sys.modules, "numba", None)


def small(**changes):
    inputs, _ = make_case((2, 3, 4, 5, 6))
    return inputs | changes


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("selective_scan: ")
    return message


def test_auto_takes_numba_and_says_so_once(fresh_door, caplog):
    caplog.set_level(logging.INFO, module.logger.name)
    for _ in range(3):
        y = selective_scan(**small(), delta_softplus=True)
    assert torch.equal(y, selective_scan(**small(), delta_softplus=True, backend="numba"))
    assert [record.message for record in caplog.records] == ["selective_scan: using the numba kernel on cpu."]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_auto_gives_a_gradient_where_one_is_needed(name):
    inputs = small()
    inputs[name] = inputs[name].requires_grad_()
    assert choose_backend("auto", *inputs.values()) == "chunked"
    y = selective_scan(**inputs, delta_softplus=True)
    assert y.requires_grad
    y.square().sum().backward()
    assert torch.isfinite(inputs[name].grad).all()
    assert (inputs[name].grad != 0).any()
    with torch.no_grad():
        assert choose_backend("auto", *inputs.values()) == "numba"
        assert not selective_scan(**inputs, delta_softplus=True).requires_grad


@pytest.mark.parametrize("name", ARGUMENTS)
def test_auto_leaves_float64_to_chunked(name):
    inputs = small()
    inputs[name] = inputs[name].double()
    assert choose_backend("auto", *inputs.values()) == "chunked"
    assert selective_scan(**inputs, delta_softplus=True).dtype == inputs["u"].dtype


@pytest.mark.parametrize("name", ARGUMENTS)
def test_numba_refuses_to_drop_a_gradient(name):
    inputs = small()
    inputs[name] = inputs[name].requires_grad_()
    with pytest.raises(NotReadyError) as error:
        selective_scan(**inputs, backend="numba")
    assert "'numba' has no gradients" in one_line(error)
    assert "chunked" in one_line(error)
    with torch.no_grad():
        selective_scan(**inputs, backend="numba")


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="triton is interpreted on the CPU")
def test_triton_on_a_cpu_is_refused():
    with pytest.raises(NotReadyError) as error:
        selective_scan(**small(), backend="triton")
    assert "'triton' runs on cuda, the tensors are on cpu" in one_line(error)


@pytest.mark.parametrize("backend", ["cuda", "Numba", "", None])
def test_an_unknown_backend_is_told_the_known_ones(backend):
    with pytest.raises(NotReadyError) as error:
        selective_scan(**small(), backend=backend)
    assert f"unknown backend {backend!r}, expected one of auto, ref, chunked, numba, triton" in one_line(error)


def test_without_numba_the_named_backend_is_refused(without_numba):
    with pytest.raises(NotReadyError) as error:
        selective_scan(**small(), backend="numba")
    assert "pip install numba" in one_line(error)
    assert "chunked" in one_line(error)


def test_without_numba_auto_is_chunked_and_warns_once(without_numba, caplog):
    caplog.set_level(logging.INFO, module.logger.name)
    for _ in range(3):
        y = selective_scan(**small(), delta_softplus=True)
    assert torch.equal(y, selective_scan_chunked(**small(), delta_softplus=True))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "pip install numba" in record.message
    assert "\n" not in record.message


BAD_SHAPES = {
    "u of two axes": ({"u": torch.zeros(12, 6)}, ("u is (12, 6)", "(B, G * D, L)")),
    "A of three axes": ({"A": torch.zeros(3, 4, 5)}, ("A (3, 4, 5)", "(G * D, N)")),
    "B of three axes": ({"B": torch.zeros(2, 5, 6)}, ("B (2, 5, 6)", "(B, G, N, L)")),
    "rows that are no multiple": ({"u": torch.zeros(2, 13, 6)}, ("u has 13 rows for 3 groups", "multiple")),
    "no groups": ({"B": torch.zeros(2, 0, 5, 6)}, ("12 rows for 0 groups", "multiple")),
    "delta too short": ({"delta": torch.zeros(2, 12, 5)}, ("delta is (2, 12, 5)", "(2, 12, 6)")),
    "delta of one row": ({"delta": torch.zeros(2, 1, 6)}, ("delta is (2, 1, 6)", "(2, 12, 6)")),
    "A of other rows": ({"A": torch.zeros(4, 5)}, ("A is (4, 5)", "(12, 5)")),
    "B of other states": ({"B": torch.zeros(2, 3, 4, 6)}, ("B is (2, 3, 4, 6)", "(2, 3, 5, 6)")),
    "B of one image": ({"B": torch.zeros(1, 3, 5, 6)}, ("B is (1, 3, 5, 6)", "(2, 3, 5, 6)")),
    "C of other groups": ({"C": torch.zeros(2, 4, 5, 6)}, ("C is (2, 4, 5, 6)", "(2, 3, 5, 6)")),
    "C of three axes": ({"C": torch.zeros(2, 5, 6)}, ("C is (2, 5, 6)", "(2, 3, 5, 6)")),
    "D by group": ({"D": torch.zeros(4)}, ("D is (4,)", "(12,)")),
    "bias of two axes": ({"delta_bias": torch.zeros(12, 1)}, ("delta_bias is (12, 1)", "(12,)")),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
@pytest.mark.parametrize("backend", ["auto", "ref"])
def test_shapes_that_do_not_fit_are_named(case, backend):
    changes, parts = BAD_SHAPES[case]
    with pytest.raises(ShapeError) as error:
        selective_scan(**small(**changes), backend=backend)
    for part in ("expected", *parts):
        assert part in one_line(error)


@pytest.mark.parametrize("name", ARGUMENTS[1:])
def test_tensors_on_two_devices_are_refused(name):
    with pytest.raises(ShapeError) as error:
        selective_scan(**small(**{name: small()[name].to("meta")}))
    assert f"{name} is on meta, u on cpu" in one_line(error)


# --------------------------------------------------------------------------------------------------- threads


def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    inputs, _ = make_case((2, 2, 150, 6, 70))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(selective_scan(**inputs, delta_softplus=True, backend="numba"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_callers_at_once_get_what_one_gets(threads, backend):
    threads(2)
    cases = [make_case((2, 2, 70 + seed, 6, 50), seed=seed)[0] for seed in range(8)]

    def run(inputs):
        return selective_scan(**inputs, delta_softplus=True, backend=backend)

    alone = [run(inputs) for inputs in cases]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for one, expected in zip(pool.map(run, cases), alone, strict=True):
                assert torch.equal(one, expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_a_second_thread_reaches_the_caller(threads):
    from anatomaly.backbones.vmamba._scan_numba import _share_out

    main = threading.current_thread()

    def work(task):
        if threading.current_thread() is not main:
            raise MemoryError(f"task {task}")
        time.sleep(0.01)

    threads(3)
    with pytest.raises(MemoryError):
        _share_out(work, (), itertools.product(range(20)))


# ------------------------------------------------------------------------------------------------- the kernel


FIRST_AND_SECOND_RUN = """
import torch
from anatomaly.backbones.vmamba.selective_scan import selective_scan, selective_scan_ref

u, delta, A = torch.linspace(-1, 1, 12).reshape(1, 4, 3), torch.rand(1, 4, 3), -torch.ones(4, 2)
inputs = (u, delta, A, *torch.ones(2, 1, 2, 2, 3))
torch.testing.assert_close(selective_scan(*inputs, backend="numba"), selective_scan_ref(*inputs))
"""


def test_a_new_process_loads_the_compiled_kernel(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    files = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_AND_SECOND_RUN], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        files.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()})
    assert {file.suffix for file in files[0]} == {".nbi", ".nbc"}
    assert {file.name.split(".")[1].split("-")[0] for file in files[0]} == {"_scan_rows", "_advance"}
    assert files[0] == files[1]


NO_FOLDER = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
from numba.core import caching

for one in vars(caching).values():
    if hasattr(one, "_locator_classes"):
        one._locator_classes = []  # as where neither the package nor the home folder can be written
from anatomaly.backbones.vmamba import _scan_numba

print(_scan_numba._scan_image.stats.cache_path)
"""


def test_without_any_folder_for_compiled_kernels_there_is_no_cache_and_no_error():
    done = subprocess.run([sys.executable, "-c", NO_FOLDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n"
    assert done.stderr.count("compiled at every start") == 1


@pytest.fixture(scope="module")
def polynomials():
    """_exp2 and _softplus over an array, compiled as in the kernel."""
    from numba import njit

    from anatomaly.backbones.vmamba import _scan_numba

    def over_array(function):
        @njit(error_model="numpy", fastmath=_scan_numba._FASTMATH)
        def run(x, out):
            for i in range(len(x)):
                out[i] = function(x[i])

        def call(x):
            x = np.asarray(x, np.float32)
            out = np.empty_like(x)
            run(x, out)
            return out

        return call

    return over_array(_scan_numba._exp2), over_array(_scan_numba._softplus)


def worst(got, truth):
    return float(np.max(np.abs(got.astype(np.float64) / truth - 1)))


@pytest.mark.parametrize(("low", "high"), [(-126, 127.49), (-30, 0), (-1.5, 1.5), (-1e-3, 1e-3)])
def test_the_kernels_power_of_two(polynomials, low, high):
    x = np.linspace(low, high, 2_000_001).astype(np.float32)
    assert worst(polynomials[0](x), np.exp2(x.astype(np.float64))) < 2e-7


@pytest.mark.parametrize(
    ("low", "high"),
    [
        *[(-1, 1), (0, 20), (20, 1000)],
        *[(-5, 0), (-20, -5), (-87, -20)],
    ],
)
def test_the_kernels_softplus(polynomials, low, high):
    x = np.linspace(low, high, 2_000_001).astype(np.float32)
    assert worst(polynomials[1](x), scan.softplus(x.astype(np.float64))) < 3e-7


def test_the_kernels_polynomials_at_their_ends(polynomials):
    power, softplus = polynomials
    tiny = float(np.finfo(np.float32).tiny)
    got = power([0, 1, -1, 10, -126, -127, -1e30, -math.inf, math.nan])
    np.testing.assert_array_equal(got, np.float32([1, 2, 0.5, 1024, tiny, tiny, tiny, tiny, math.nan]))
    assert np.isfinite(power([128, 1e30, math.inf])).all()  # a state that blows up stays a number a while longer
    got = softplus([-1e30, -math.inf, 200, 1e30, math.inf, math.nan])
    assert (np.abs(got[:2]) <= 2 * tiny).all()
    np.testing.assert_array_equal(got[2:], np.float32([200, 1e30, math.inf, math.nan]))
