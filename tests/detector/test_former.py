"""Bundles, banks and calibrations that the version before wrote, of drawn images: they load and judge as they did."""

import lzma
import shutil
from pathlib import Path

import pytest

from anatomaly.detector.detector import Detector

FORMER = Path(__file__).parent / "former"
QUERIES = ("haemorrhage_p0011_0.png", "normal_p0008_1.png")
#: Score and p-value of the two queries, as that version gave them.
EXPECTED = {
    "nearest": ((1.1109143495559692, 0.4444444444444444), (1.2312180995941162, 0.1111111111111111)),
    "attention": ((0.6558595895767212, 0.2222222222222222), (0.5385298132896423, 1.0)),
    "d24fad": ((0.25870585441589355, 0.1111111111111111), (0.17863868176937103, 0.6666666666666666)),
}


@pytest.fixture(scope="module")
def former(tmp_path_factory):
    folder = shutil.copytree(FORMER, tmp_path_factory.mktemp("former"), dirs_exist_ok=True)
    for packed in folder.rglob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
    return folder


@pytest.fixture
def load(former):
    def load_(name):
        return Detector.load(former / name, device="cpu", teacher_weights=str(former / "teacher.safetensors"))

    return load_


def judged(detector, former):
    return list(detector.predict([former / "images" / name for name in QUERIES], task="head_ct"))


@pytest.mark.parametrize("name", EXPECTED)
def test_former_bundles_and_calibrations_judge_as_they_did(name, load, former):
    detector = load(name)
    supports = sorted((former / "images").glob("p000*.png"))
    assert len(supports) == 2
    detector.set_support(supports, task="head_ct")
    for found, (score, p_value) in zip(judged(detector, former), EXPECTED[name], strict=True):
        assert found.score == pytest.approx(score, abs=1e-4)
        assert found.p_value == p_value


def test_a_former_bank_judges_as_it_did(load, former):
    detector = load("nearest").load_support(former / "nearest.bank")
    assert detector.bank.precision == "fp32"
    for found, (score, p_value) in zip(judged(detector, former), EXPECTED["nearest"], strict=True):
        assert found.score == pytest.approx(score, abs=1e-4)
        assert found.p_value == p_value


def test_a_former_bank_saved_again_has_a_digest_of_its_content(load, former, tmp_path):
    detector = load("nearest").load_support(former / "nearest.bank")
    detector.save_support(tmp_path / "bank")
    assert b"digest" in (tmp_path / "bank").read_bytes()
    assert b"digest" not in (former / "nearest.bank").read_bytes()
    again = load("nearest").load_support(tmp_path / "bank")
    assert again.bank.digest == detector.bank.digest
