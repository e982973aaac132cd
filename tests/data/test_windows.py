"""Intensity rules as words."""

import pytest

from anatomaly.data.windows import CT_WINDOWS, ct_window_of, parse_intensity, spell_intensity
from anatomaly.errors import ConfigError
from anatomaly.types import Intensity

SPELLED = {
    "auto": Intensity(),
    "brain": Intensity("window", 40, 80),
    "window:41/80": Intensity("window", 41, 80),
    "window:-600.5/1500": Intensity("window", -600.5, 1500),
    "range:0..4095": Intensity("range", 0, 4095),
    "range:-1024..3071": Intensity("range", -1024, 3071),
    "range:-0.5..1e-05": Intensity("range", -0.5, 1e-5),
    "percentile:0.5..99.5": Intensity("percentile", 0.5, 99.5),
}


@pytest.mark.parametrize("text", SPELLED)
def test_a_rule_is_spelled_as_it_is_read(text):
    assert parse_intensity(text) == SPELLED[text]
    assert spell_intensity(SPELLED[text]) == text


def test_every_ct_window_is_read_by_its_name_in_any_case_and_with_either_line():
    for name, (centre, width) in CT_WINDOWS.items():
        assert width > 0
        for text in (name, name.upper(), name.replace("-", "_"), f" {name} ", f"window:{centre}/{width}"):
            assert ct_window_of(parse_intensity(text)) == name
    assert ct_window_of(Intensity("range", 40, 80)) is None


@pytest.mark.parametrize(
    "text", ["", "brane", "window", "window:40", "window:40..80", "range:0/4095", "range:a..b", "5"]
)
def test_anything_else_is_refused_with_what_is_meant(text):
    with pytest.raises(
        ConfigError, match=r"expected auto, window:40/80 .*, range:0\.\.4095, .*: brain, subdural"
    ) as err:
        parse_intensity(text)
    assert ("do you mean brain?" in str(err.value)) == (text == "brane")
