"""The CUDA kernel: everywhere through Triton's interpreter, on a GPU for real."""

import os
import subprocess
import sys

import pytest
import torch

from anatomaly.backbones.vmamba.cross_scan import cross_selective_scan
from anatomaly.backbones.vmamba.selective_scan import selective_scan, selective_scan_ref
from anatomaly.errors import NotReadyError

pytest.importorskip("triton")

#: (B, G, D, N, L): one of everything, odd numbers, exactly one block of positions, one more, more states than 2^k.
ROWS = [(1, 1, 1, 1, 1), (2, 3, 5, 4, 70), (1, 2, 3, 5, 64), (1, 2, 3, 5, 65), (1, 1, 2, 17, 9), (2, 4, 3, 1, 130)]
#: (B, H, W, D, R, N)
IMAGES = [(1, 1, 1, 4, 1, 1), (2, 5, 7, 10, 3, 6), (1, 9, 8, 3, 6, 16), (1, 1, 11, 2, 2, 3)]


def rows(batch, groups, channels, states, length, *, seed=0):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    width = groups * channels
    return (
        *(normal(batch, width, length), normal(batch, width, length)),
        -8 * torch.rand(width, states, generator=draw),
        *(normal(batch, groups, states, length), normal(batch, groups, states, length)),
        normal(width),
    )


def image(batch, height, width, channels, ranks, states, *, seed=0):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    return (
        normal(batch, height, width, channels),
        normal(batch, height, width, 4, ranks + 2 * states),
        *(normal(4, channels, ranks) / ranks**0.5, normal(4, channels) - 2),
        -16 * torch.rand(4, channels, states, generator=draw),
        normal(4, channels),
    )


def assert_yardstick(got, reference, truth):
    """design.md: the kernel may err twice as much as the reference in the same precision, against float64.

    Where the reference happens to be exact (a handful of numbers), one rounding of the largest value is allowed.
    """
    assert got.shape == truth.shape
    floor = torch.finfo(torch.float32).eps * truth.abs().max() * truth.numel() ** 0.5
    assert (got - truth).norm() <= max(2 * (reference - truth).norm(), floor)


def strided(arguments):
    """The same values behind other strides."""
    u, delta, a, b, c, skip = arguments
    twice = delta.repeat_interleave(2, dim=2)[..., ::2]
    return u.mT.contiguous().mT, twice, a.mT.contiguous().mT, b.mT.contiguous().mT, c, skip


def extreme(arguments):
    """Steps too small and too large for a careless softplus."""
    u, delta, a, b, c, skip = arguments
    return u, delta + torch.tensor([-60.0, -12.0, 25.0, 90.0])[None, :, None], a, b, c, torch.zeros_like(skip)


CASES = {
    **{f"softplus-{shape}": ("scan_rows", rows(*shape), {"delta_softplus": True}) for shape in ROWS},
    **{
        f"plain-{shape}": ("scan_rows", (u, delta.abs(), *rest), {"delta_softplus": False})
        for shape in ROWS
        for u, delta, *rest in [rows(*shape)]
    },
    "strided": ("scan_rows", strided(rows(2, 2, 3, 4, 20)), {"delta_softplus": True}),
    "extreme": ("scan_rows", extreme(rows(1, 1, 4, 2, 12)), {"delta_softplus": True}),
    **{f"image-{shape}": ("scan_image", image(*shape), {}) for shape in IMAGES},
}

#: Triton decides at its first import whether kernels are interpreted, so they run in a process of their own.
SCRIPT = """
import sys, torch
from anatomaly.backbones.vmamba import _scan_triton
cases = torch.load(sys.argv[1], weights_only=True)
run = lambda name, arguments, options: getattr(_scan_triton, name)(*arguments, **options)
torch.save({key: run(*case) for key, case in cases.items()}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Results of all cases by Triton's interpreter."""
    folder = tmp_path_factory.mktemp("triton")
    torch.save(CASES, folder / "cases.pt")
    command = [sys.executable, "-c", SCRIPT, str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_keeps_to_the_yardstick(interpreted, case):
    name, arguments, options = CASES[case]
    double = [tensor.double() for tensor in arguments]
    if name == "scan_rows":
        reference, truth = (selective_scan_ref(*a, **options) for a in (arguments, double))
    else:
        reference, truth = (cross_selective_scan(*a, backend="ref") for a in (arguments, double))
    assert_yardstick(interpreted[case], reference, truth)
    if case == "extreme":  # the tiny rows would hide behind the large ones
        for row in range(4):
            assert_yardstick(interpreted[case][:, row], reference[:, row], truth[:, row])


def test_a_named_kernel_that_cannot_run_is_refused():
    with pytest.raises(NotReadyError, match=r"backend 'triton' runs on cuda, the tensors are on cpu"):
        selective_scan(*rows(1, 1, 2, 2, 3), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*ROWS, (2, 4, 192, 16, 1024)])
def test_rows_on_a_gpu(shape):
    arguments = rows(*shape)
    reference = selective_scan_ref(*arguments, delta_softplus=True)
    truth = selective_scan_ref(*(tensor.double() for tensor in arguments), delta_softplus=True)
    on_gpu = [tensor.cuda() for tensor in arguments]
    for backend in ("triton", "auto"):
        assert_yardstick(selective_scan(*on_gpu, delta_softplus=True, backend=backend).cpu(), reference, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*IMAGES, (2, 32, 32, 384, 12, 16)])
def test_images_on_a_gpu(shape):
    arguments = image(*shape)
    reference = cross_selective_scan(*arguments, backend="ref")
    truth = cross_selective_scan(*(tensor.double() for tensor in arguments), backend="ref")
    got = cross_selective_scan(*(tensor.cuda() for tensor in arguments), backend="triton").cpu()
    assert_yardstick(got, reference, truth)
