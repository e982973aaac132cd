"""Long work says how far it has come: a bar on a terminal, a line every half minute elsewhere."""

import io
import logging
import sys

import pytest
from rich.console import Console

from anatomaly.commands.progress import progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pipe():
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100, force_interactive=True)


def lines(console):
    return console.file.getvalue().splitlines()


def test_a_line_every_half_minute_says_how_far_it_is(clock, pipe):
    with progress("predict", 2000, clock=clock, console=pipe) as advance:
        for _ in range(900):
            clock.now += 0.071
            advance("an image")
    assert lines(pipe) == [
        "predict: 423 of 2,000 images, 14.1 images/s, 2 min left",
        "predict: 846 of 2,000 images, 14.1 images/s, 82 s left",
    ]


def test_short_work_says_nothing(clock, pipe):
    with progress("predict", 100, clock=clock, console=pipe) as advance:
        for _ in range(100):
            clock.now += 0.29
            advance()
    assert lines(pipe) == []


def test_images_done_before_are_counted_but_not_in_the_rate(clock, pipe):
    with progress("predict", 400, clock=clock, console=pipe) as advance:
        clock.now += 10
        advance.begin(400, done=120)
        clock.now += 40
        for _ in range(20):
            advance()
    assert lines(pipe)[0] == "predict: 121 of 400 images, 1.5 images/min, 3.1 h left"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.5, "2.0 images/s, 30 s left"),
        (2, "30.0 images/min, 2 min left"),
        (120, "30.0 images/h, 2.0 h left"),
        (36000, "0.1 images/h, 600.0 h left"),
    ],
)
def test_rate_and_time_left_have_units_that_fit(seconds, said, clock, pipe):
    with progress("audit", 61, clock=clock, console=pipe) as advance:
        clock.now += seconds
        advance()
        assert str(advance) == f"1 of 61 images, {said}"


def test_other_work_starts_anew_and_says_its_unit(clock, pipe):
    with progress("fit", clock=clock, console=pipe) as told:
        assert str(told) == ""
        told.at(32, 64, "images")
        clock.now += 20
        told.at(64, 64, "images")
        told.at(0, 100, "steps")
        clock.now += 20
        told.at(10, 100, "steps")
        clock.now += 31
        told.at(20, 100, "steps", "now cell 3")
    assert lines(pipe) == [
        "fit: 10 of 100 steps, 30.0 steps/min, 3 min left",
        "fit: 20 of 100 steps, 23.5 steps/min, 3 min left, now cell 3",
    ]


def test_who_reads_the_lines_may_go_away(clock):
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    with progress("predict", 9, clock=clock, console=Console(file=Gone())) as advance:
        clock.now += 60
        advance()


def test_a_terminal_shows_a_bar_and_leaves_nothing_of_it(clock, terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with progress("predict", 20, clock=clock, console=terminal) as advance:
        clock.now += 2
        advance()
        clock.now += 100
        advance()
    shown = terminal.file.getvalue()
    assert "2 of 20 images, 1.2 images/min, 15 min left" in shown
    assert "━" in shown
    assert shown.endswith("\x1b[2K"), "the last line is wiped"


def test_what_is_logged_meanwhile_stands_above_the_bar(terminal, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with progress("fit", 20, console=terminal):
        logging.getLogger().warning("epoch 0")
    assert stream.getvalue() == ""
    assert "epoch 0\n" in terminal.file.getvalue().replace("\x1b[2K", "").replace("\r", "")
    assert handler.stream is stream


def test_what_is_printed_into_a_pipe_stays_there(terminal, monkeypatch):
    piped = io.StringIO()
    monkeypatch.setattr(sys, "stdout", piped)
    with progress("predict", 20, console=terminal):
        print("out: continues")
    assert piped.getvalue() == "out: continues\n"
