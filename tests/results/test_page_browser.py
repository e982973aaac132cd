"""The report in a browser: keys, sorting, slider, contours, zoom, filter, width, paper; skipped where there is none.

It needs the package playwright and a Chromium of the system (Debian: apt-get install chromium); nothing is downloaded.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anatomaly.detector.conformal import Call
from anatomaly.results.page import write_report
from anatomaly.types import Prediction, Sample


def prediction(name, score, *, label=None, p_value=None, size=(120, 90)):
    y, x = np.mgrid[: size[0], : size[1]]
    hot = 3 * np.exp(-((y - 90) ** 2 + (x - 70) ** 2) / 200)  # below and right of the middle
    image = np.clip(np.stack([x / 90, y / 120, 0 * x]), 0, 1)
    weights = np.full((1, 2), 0.5, np.float32)
    sample = Sample(Path("/scans") / name, "headct", label=label)
    return Prediction(sample, score, hot.astype(np.float32), image.astype(np.float32), weights, p_value=p_value)


RUN = (
    prediction("b10.png", 5.0, label=1, p_value=0.3),
    prediction("b9.png", 4.0, label=0, p_value=0.2),
    prediction("a.png", 3.0, label=1, p_value=0.1),
)


@pytest.fixture
def opened(browser, tmp_path):
    """Open a report; at the end it must have said nothing on the console and asked for nothing but itself."""
    contexts, complaints, asked = [], [], []

    def open_report(predictions=RUN, *, width=1300, height=900, script=True, scheme="light", **settings):
        settings = {"title": "Run", "bank_names": ("one", "two"), "scale": (0.0, 2.0)} | settings
        file = write_report(tmp_path / "report.html", predictions, **settings)
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, java_script_enabled=script, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in asked if not url.startswith("data:image/")} == {(tmp_path / "report.html").as_uri()}


def shown(page):
    """Names of the cases that can be seen."""
    return [each.inner_text() for each in page.locator(".case h3").all() if each.is_visible()]


def listed(page):
    return page.locator("#rows li").evaluate_all(
        "all => all.filter(e => e.getClientRects().length).map(e => e.querySelector('.who b').textContent)"
    )


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.querySelector('b')?.textContent")


def opacity(page):
    return float(page.locator(".case.on .map").evaluate("map => getComputedStyle(map).opacity"))


def test_one_case_is_shown_and_keys_walk_through_all(opened):
    page = opened()
    assert shown(page) == ["b10.png"]
    for key, name in [
        ("j", "b9.png"),
        ("ArrowRight", "a.png"),
        ("j", "a.png"),
        ("k", "b9.png"),
        ("ArrowLeft", "b10.png"),
    ]:
        page.keyboard.press(key)
        assert shown(page) == [name], key
    assert "Case 1 of 3: b10.png" in page.locator("#told").inner_text()
    page.keyboard.press("Control+j")
    assert shown(page) == ["b10.png"]


def test_everything_is_reached_with_the_tab_key_and_the_focus_can_be_seen(opened):
    page = opened()
    met = []
    for _ in range(14):
        page.keyboard.press("Tab")
        met.append(focused(page))
        style = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert style == "3px", met[-1]
    for control in ("part", "label", "sort", "next", "overlay", "strength", "contours", "zoom", "help"):
        assert control in met
    assert met.count("b10.png") == 1  # the list is one stop
    assert page.locator(".case.on .view").evaluate("view => view.tabIndex") == 0


def test_in_the_list_arrows_home_and_end_move_focus_and_case(opened):
    page = opened()
    page.locator("#rows a").first.focus()
    for key, name in [("ArrowDown", "b9.png"), ("End", "a.png"), ("ArrowUp", "b9.png"), ("Home", "b10.png")]:
        page.keyboard.press(key)
        assert (shown(page), focused(page)) == ([name], name)
    assert page.locator("#rows a[aria-current=true]").count() == page.locator("#rows a[tabindex='0']").count() == 1
    page.locator("#rows a").nth(2).click()
    assert shown(page) == ["a.png"]


def test_sorting_by_score_name_and_p_value_keeps_the_case(opened):
    page = opened()
    page.keyboard.press("j")
    assert listed(page) == ["b10.png", "b9.png", "a.png"]
    page.keyboard.press("s")
    assert listed(page) == ["a.png", "b9.png", "b10.png"]  # 9 before 10
    assert page.locator("#sort").input_value() == "name"
    assert shown(page) == ["b9.png"]
    page.keyboard.press("j")
    assert shown(page) == ["b10.png"]
    page.locator("#sort").select_option("p")
    assert listed(page) == ["a.png", "b9.png", "b10.png"]
    page.locator("#sort").select_option("score")
    assert listed(page) == ["b10.png", "b9.png", "a.png"]


def test_without_p_values_one_cannot_sort_by_them(opened):
    page = opened([prediction("a.png", 1.0), prediction("b.png", 2.0)])
    assert page.locator("#sort option[value=p]").is_disabled()
    page.keyboard.press("s")
    page.keyboard.press("s")
    assert page.locator("#sort").input_value() == "score"
    assert not page.locator("#label").is_visible()  # no label is known


def test_the_slider_sets_the_opacity_of_the_overlay_and_o_switches_it(opened):
    page = opened()
    assert opacity(page) == 0.75
    page.locator("#strength").fill("30")
    assert opacity(page) == pytest.approx(0.3)
    page.keyboard.press("o")
    assert opacity(page) == 0
    assert "grayscale(0)" in page.locator(".case.on .base").evaluate("image => getComputedStyle(image).filter")
    page.keyboard.press("o")
    assert opacity(page) == pytest.approx(0.3)
    page.keyboard.press("+")
    page.keyboard.press("j")
    assert opacity(page) == pytest.approx(0.4)  # the same for all cases
    page.keyboard.press("o")
    page.locator("#strength").fill("40")  # who moves the slider wants to see it
    page.keyboard.press("ArrowRight")
    assert (opacity(page), shown(page)) == (pytest.approx(0.45), ["b9.png"])


def test_contours_are_drawn_twice_for_dark_and_bright_and_can_be_hidden(opened):
    page = opened()
    lines = page.locator(".case.on .lines")
    assert lines.locator(".top, .high").count() == 2  # the map goes beyond the scale
    strokes = [
        lines.locator(f".top > {part}").evaluate("line => getComputedStyle(line).stroke") for part in ("path", "use")
    ]
    assert strokes == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    box, peak = lines.locator(".high > path").bounding_box(), page.locator(".case.on .stack").bounding_box()
    x, y = ((box[side] + box[size] / 2 - peak[side]) / peak[size] for side, size in (("x", "width"), ("y", "height")))
    assert (x, y) == (pytest.approx(70.5 / 90, abs=0.02), pytest.approx(90.5 / 120, abs=0.02))
    page.keyboard.press("c")
    assert not lines.is_visible()
    page.locator("#contours").check()
    assert lines.is_visible()


def test_zoom_shows_the_highest_spot_or_what_was_clicked(opened):
    page = opened()
    view, stack = page.locator(".case.on .view"), page.locator(".case.on .stack")
    before = stack.bounding_box()

    def middle():
        """What part of the picture is in the middle of the window on it, in percent."""
        return view.evaluate(
            "v => [100 * (v.scrollLeft + v.clientWidth / 2) / v.scrollWidth,"
            " 100 * (v.scrollTop + v.clientHeight / 2) / v.scrollHeight]"
        )

    page.keyboard.press("z")
    assert stack.bounding_box()["width"] > 2 * before["width"]
    assert middle() == [pytest.approx(78, abs=3), pytest.approx(75, abs=3)]
    assert page.locator("#zoom").get_attribute("aria-pressed") == "true"
    page.keyboard.press("j")
    view, stack = page.locator(".case.on .view"), page.locator(".case.on .stack")
    assert middle() == [pytest.approx(78, abs=3), pytest.approx(75, abs=3)]  # in the next case too
    view.focus()
    left = view.evaluate("v => v.scrollLeft")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("v => v[0].scrollLeft < v[1]", arg=[view.element_handle(), left])
    page.wait_for_timeout(500)  # browsers scroll softly
    assert shown(page) == ["b9.png"]
    page.keyboard.press("z")
    assert stack.bounding_box()["width"] == before["width"]
    stack.click(position={"x": 0.3 * before["width"], "y": 0.4 * before["height"]})
    assert middle() == [pytest.approx(30, abs=3), pytest.approx(40, abs=3)]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_filter_counts_and_moves_on_to_a_case_that_is_left(opened):
    page = opened()
    page.keyboard.press("/")
    page.keyboard.type("A.Png")
    assert (listed(page), shown(page)) == (["a.png"], ["a.png"])
    assert page.locator("#found").inner_text() == "1 of 3 shown"
    page.keyboard.type("zoc?")  # letters typed there are no commands
    assert (listed(page), shown(page)) == ([], [])
    page.locator("#part").fill("")
    page.locator("#label").select_option("anomalous")
    assert listed(page) == ["b10.png", "a.png"]
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    assert shown(page) == ["a.png"]


def test_the_question_mark_shows_the_keys_and_they_can_be_switched_off(opened):
    page = opened()
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("j")
    assert "next case" in page.locator("#keys").inner_text()
    page.locator("#letters").uncheck()
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible()
    page.keyboard.press("j")
    assert shown(page) == ["b10.png"]
    page.locator("#help").click()
    page.locator("#close").click()
    assert not page.locator("#keys").is_visible()


@pytest.mark.parametrize("script", [True, False])
def test_a_narrow_window_needs_no_sideways_scrolling(opened, script):
    from anatomaly.tables import Table

    wide = Table("Wide", [f"column {n}" for n in range(20)], [["0.123456789"] * 20])
    long = prediction("x" * 150 + ".png", 9.0, label=1, p_value=0.5)
    calls = [Call("5 % false-positive rate and some more words", 0.5, 1.0)]
    failed = Prediction(Sample(Path("/" + "y" * 200), "t"), float("nan"), error="/" + "y" * 200 + ": is empty.")
    page = opened([*RUN, long, failed], width=400, tables=[wide], calls=calls, script=script, title="z" * 90)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    too_wide = page.locator("body *:not(.scroll *):not(.unseen):not(svg *)").evaluate_all(
        "all => all.filter(e => e.getBoundingClientRect().right > 401).map(e => e.tagName + '.' + e.className)"
    )
    assert too_wide == []
    case, rows = (page.locator(each).first.bounding_box()["y"] for each in (".case", "#rows"))
    assert case < rows


def test_without_script_all_cases_stand_below_each_other_and_no_dead_control(opened):
    page = opened(script=False)
    assert shown(page) == ["b10.png", "b9.png", "a.png"]
    assert listed(page) == ["b10.png", "b9.png", "a.png"]
    assert opacity(page) == 0.75
    assert page.locator(".lines").first.is_visible()
    assert [each for each in page.locator("input, button, select").all() if each.is_visible()] == []


def test_paper_has_all_cases_in_the_order_of_the_list_and_no_controls(opened):
    page = opened(max_cases=2)
    page.keyboard.press("s")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert shown(page) == ["b9.png", "b10.png"]
    assert listed(page) == ["a.png"]  # the one without a picture
    assert [each for each in page.locator("input, button, select").all() if each.is_visible()] == []
    assert re.search(rb"/Type\s*/Page\b", page.pdf())
    page.locator("#part").evaluate("part => { part.value = 'b9'; part.form.dispatchEvent(new Event('input')); }")
    assert (shown(page), listed(page)) == (["b9.png"], [])


def test_two_thousand_images_are_listed_and_few_pictures_are_held(opened):
    light = replace(RUN[0], image=None, anomaly_map=None)
    many = [replace(light, sample=Sample(Path(f"/scans/{n}.png"), "t"), score=1 - n / 3000) for n in range(1997)]
    page = opened([*RUN, *many], max_cases=3)
    assert page.locator("#rows li").count() == 2000
    assert page.locator("#rows img").count() == page.locator("article").count() == 3
    assert page.locator("*").count() < 40_000
    page.locator("#rows a").first.focus()
    page.keyboard.press("End")
    assert shown(page) == [focused(page)] == ["1996.png"]
    assert "highest scores only" in page.locator("#listed").inner_text()
    box = page.locator("#rows a[aria-current]").bounding_box()
    assert 0 <= box["y"] <= 900 - box["height"]
    page.locator("#part").fill("77.png")
    assert page.locator("#found").inner_text() == "20 of 2000 shown"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_background(opened, scheme):
    """WCAG AA: 4.5 to 1."""
    calls, failed = [Call("rate", 0.5, 1.0)], Prediction(Sample(Path("/f.png"), "t"), float("nan"), error="/f.png: no.")
    page = opened([*RUN, failed], scheme=scheme, calls=calls, about={"a": "b"}, normal_scores=(1.0, 3.5))
    found = page.evaluate(
        """() => {
          const rgb = text => text.match(/[\\d.]+/g).map(Number);
          const linear = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
          const light = colour => colour.slice(0, 3).map(linear)
            .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
          const behind = e => {
            for (; e; e = e.parentElement) {
              const colour = rgb(getComputedStyle(e).backgroundColor);
              if (colour.length < 4 || colour[3] > 0) return colour;
            }
          };
          const words = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
          return [...document.querySelectorAll('body *')].filter(e => words(e) && e.checkVisibility() && !e.disabled)
            .map(e => {
              const [a, b] = [rgb(getComputedStyle(e).color), behind(e)].map(light).sort((x, y) => y - x);
              return [(a + 0.05) / (b + 0.05), e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 30)];
            });
        }"""
    )
    assert len(found) > 50
    assert [each for each in found if each[0] < 4.5] == []
