import base64
import hashlib
import io
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anatomaly.errors import OutputError
from anatomaly.results.page import write_report
from anatomaly.results.pictures import render_map
from anatomaly.tables import Table
from anatomaly.types import Prediction, Sample

SCALE = (0.0, 2.0)
VOID = {"meta", "img", "input", "br", "line", "rect"}


class Page(HTMLParser):
    """What a reader of the page meets: elements with their attributes, text, and whether the tags match."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def picture(self, alt):
        """(H, W, 3) pixels of the picture with this text alternative."""
        source = next(each["src"] for each in self.all("img") if each["alt"] == alt)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))


def prediction(name="a.png", score=0.5, *, label=None, shape=(20, 30), **changes):
    made = Prediction(
        Sample(Path("/scans") / name, "headct", label=label),
        score,
        anomaly_map=np.full(shape, 0.5, np.float32),
        image=np.full((1, *shape), 0.25, np.float32),
        support_weights=np.array([[0.9, 0.1], [0.5, 0.5]], np.float32),
    )
    return replace(made, **changes)


def failed(name, error):
    return Prediction(Sample(Path("/scans") / name, "headct"), float("nan"), error=error)


def page(tmp_path, *predictions, **settings):
    settings = {"title": "Run", "bank_names": ("first", "second"), "scale": SCALE} | settings
    return Page(write_report(tmp_path / "report.html", predictions, **settings).read_text(encoding="utf-8"))


def test_nothing_is_fetched_and_the_policy_says_so(tmp_path):
    made = page(tmp_path, prediction(), bank_images=[np.zeros((1, 9, 9))] * 2)
    assert not any(tag in ("link", "iframe", "object", "base") for tag, _ in made.elements)
    assert all(each["src"].startswith("data:image/") for each in made.all("img"))
    assert all("src" not in each for each in made.all("script"))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import", html)
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(each["content"] for each in made.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_warning_opens_and_closes_the_page(tmp_path):
    text = page(tmp_path, prediction()).text.strip().removeprefix("Run").strip()
    assert text.startswith("Not for clinical use. Research only")
    assert text.endswith("Research only: do not use for diagnosis or treatment decisions.")


def test_every_string_from_outside_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    clean = page(tmp_path, prediction(), failed("b.png", "b.png: no"))
    made = page(
        tmp_path,
        prediction(evil.replace("/", ":"), sample=Sample(Path(evil), evil, label=1)),
        failed(evil, evil),
        title=evil,
        bank_names=(evil, evil),
        about={evil: evil},
        tables=[Table(evil, (evil,), [(evil,)], evil)],
    )
    assert len(made.all("script")) == len(clean.all("script")) == 1
    assert made.text.count("<script>alert(1)") >= 12


def test_cases_come_highest_score_first_with_rank_and_label(tmp_path):
    made = page(tmp_path, prediction("low.png", 0.25), prediction("high.png", 4.0, label=1), prediction("mid.png", 1.5))
    assert [Path(each["data-name"]).name for each in made.all("article")] == ["high.png", "mid.png", "low.png"]
    assert made.all("article")[0]["data-label"] == "anomalous"
    assert re.findall(r"score (\d\.\d+)", made.text) == ["4.000", "1.500", "0.2500"]
    assert next(each["title"] for each in made.all("span") if each.get("class") == "rank") == "rank 1 of 3"
    assert made.text.count("known to be anomalous") == 2  # the overview's count and the case's badge


def test_cases_beyond_the_limit_are_counted_and_stay_in_the_overview(tmp_path):
    many = [prediction(f"{n}.png", n) for n in range(7)]
    made = page(tmp_path, *many, max_cases=3)
    assert [Path(each["data-name"]).name for each in made.all("article")] == ["6.png", "5.png", "4.png"]
    assert "3 images, highest score first." in made.text
    assert "4 images with lower scores are left out here; all of them are in scores.csv." in made.text
    assert "Distribution of the 7 scores" in made.text
    assert "left out" not in page(tmp_path, *many).text
    assert "1 image, highest score first." in page(tmp_path, many[0]).text


def test_unreadable_images_are_listed_with_their_reason(tmp_path):
    made = page(
        tmp_path,
        prediction(),
        failed("b.png", "b.png: is empty."),
        failed("c.dcm", "Not an image."),
        prediction("d.png", float("nan")),
        prediction("e.png", float("inf")),
    )
    assert "4 images could not be scored" in made.text
    assert "b.png: is empty." in made.text
    assert "b.png b.png" not in made.text
    assert "c.dcm Not an image." in made.text
    assert "d.png: the score is not a finite number." in made.text
    assert len(made.all("article")) == 1


@pytest.mark.parametrize("predictions", [[], [failed("b.png", "b.png: is empty.")]])
def test_a_run_without_a_score_still_makes_a_page(tmp_path, predictions):
    assert "No image was scored." in page(tmp_path, *predictions).text


def bars(made):
    return [(each["fill"], round(float(each["height"]), 1)) for each in made.all("rect")]


def test_the_histogram_stacks_labels_and_counts_every_score(tmp_path):
    scores = [(0.0, 0), (0.01, 0), (0.02, None), (1.0, 1)]
    made = page(tmp_path, *(prediction(f"{n}.png", s, label=k) for n, (s, k) in enumerate(scores)))
    heights = [height for _, height in bars(made)]
    assert len({colour for colour, _ in bars(made)}) == 3
    assert sum(heights) == pytest.approx(130 * 4 / 3, abs=0.2)  # the fullest bar has 3 images and the full height
    assert min(float(each["y"]) for each in made.all("rect")) == 0
    assert "fullest bar 3 images" in made.text
    assert "Scores by known label" in made.text


@pytest.mark.parametrize(
    "scores", [[0.5], [0.5, 0.5], [1.0, np.nextafter(1.0, 2.0)], [-1e30, 1e30], [-1.7e308, 1.7e308]]
)
def test_the_histogram_bears_extreme_spreads(tmp_path, scores):
    made = page(tmp_path, *(prediction(f"{n}.png", s) for n, s in enumerate(scores)))
    assert sum(height for _, height in bars(made)) == pytest.approx(130 * len(set(scores)))
    assert "Scores by known label" not in made.text


def test_the_fixed_scale_is_printed_and_drawn(tmp_path):
    made = page(tmp_path, prediction(), scale=(0.125, 3.5))
    assert "0.1250as in normal images" in made.text
    assert "3.500 and above" in made.text
    alt = next(each["alt"] for each in made.all("img") if each["alt"].startswith("Colour scale"))
    bar = made.picture(alt)
    np.testing.assert_array_equal(bar[0], render_map(np.linspace(0, 1, 256)[None], (0.0, 1.0))[0])


def test_a_case_shows_image_overlay_and_map_on_the_fixed_scale(tmp_path):
    hot = np.zeros((40, 60), np.float32)
    hot[:, 30:] = 2.0
    made = page(tmp_path, prediction(anomaly_map=hot, image=np.full((1, 40, 60), 0.25, np.float32)))
    assert made.picture("Image of a.png").shape == (40, 60, 3)
    np.testing.assert_allclose(made.picture("Image of a.png"), 64, atol=3)
    map_picture, overlaid = made.picture("Map of a.png").astype(int), made.picture("Overlay of a.png").astype(int)
    np.testing.assert_allclose(map_picture[20, 50], (252, 255, 164), atol=6)
    np.testing.assert_allclose(map_picture[20, 10], (0, 0, 4), atol=6)
    np.testing.assert_allclose(overlaid[20, 10], 64, atol=6)
    assert overlaid[20, 50].sum() > 500


def test_pictures_are_small_and_have_true_proportions(tmp_path):
    made = page(tmp_path, prediction(shape=(1000, 500)), bank_images=[np.zeros((3, 600, 900))])
    assert made.picture("Image of a.png").shape == (256, 128, 3)
    assert made.picture("Reference image first").shape == (171, 256, 3)
    flat = page(tmp_path, prediction(shape=(100, 200), spacing=(5.0, 1.0)))  # a sagittal slice, 5 mm apart
    for kind in ("Map", "Image", "Overlay"):
        assert flat.picture(f"{kind} of a.png").shape == (200, 80, 3)


def test_every_picture_has_a_text_alternative(tmp_path):
    made = page(tmp_path, prediction(), bank_images=[np.zeros((1, 9, 9))] * 2)
    assert len(made.all("img")) == 1 + 2 + 3 + 1  # scale, references, views, top reference
    assert all(each["alt"] for each in made.all("img"))
    assert all(each["aria-label"] for each in made.all("svg"))


def test_a_prediction_without_arrays_says_so(tmp_path):
    assert page(tmp_path, prediction(image=None, anomaly_map=None)).text.count("not kept") == 3
    assert page(tmp_path, prediction(image=None)).text.count("not kept") == 2


def test_missing_map_values_do_not_break_the_pictures(tmp_path):
    holes = np.full((20, 30), np.nan, np.float32)
    with np.errstate(invalid="raise"):
        made = page(tmp_path, prediction(anomaly_map=holes, image=holes[None]))
    np.testing.assert_allclose(made.picture("Map of a.png"), 128, atol=3)
    np.testing.assert_allclose(made.picture("Overlay of a.png"), 0, atol=3)


@pytest.mark.parametrize("changes", [{"image": np.zeros((2, 20, 30))}, {"anomaly_map": np.zeros((0, 0))}])
def test_an_odd_array_costs_its_picture_only(tmp_path, changes):
    made = page(tmp_path, prediction("odd.png", 0.75, **changes), prediction())
    assert [Path(each["data-name"]).name for each in made.all("article")] == ["odd.png", "a.png"]
    assert made.text.count("not kept") >= 1
    assert made.picture("Overlay of a.png").shape == (20, 30, 3)


def test_image_values_beyond_the_display_range_are_clipped(tmp_path):
    image = np.repeat(np.array([9.0, -9.0], np.float32), 100).reshape(1, 20, 10)
    picture = page(tmp_path, prediction(image=image, anomaly_map=image[0] * 0)).picture("Image of a.png")
    assert picture[2].min() > 250
    assert picture[-2].max() < 5


def test_the_reference_that_mattered_is_named_with_its_share(tmp_path):
    weights = np.array([[0.2, 0.8], [0.4, 0.6]], np.float32)
    made = page(tmp_path, prediction(support_weights=weights))
    assert "Counted most: second" in made.text
    assert "second70%first30%" in made.text
    assert "width:70%" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_equal_weights_are_not_told_as_a_preference(tmp_path):
    made = page(tmp_path, prediction(support_weights=np.full((3, 2), 0.5, np.float32)))
    assert "All references counted about equally." in made.text
    assert "Counted most" not in made.text


def test_many_references_are_cut_and_unnamed_ones_numbered(tmp_path):
    weights = np.linspace(0.0, 0.2, 11, dtype=np.float32)[None]
    text = page(tmp_path, prediction(support_weights=weights)).text
    assert "Counted most: reference 11" in text
    assert text.count("%reference") == 7  # eight bars
    assert "and 3 more" in text


@pytest.mark.parametrize("weights", [None, np.full((1, 2), np.nan, np.float32), np.empty((0, 2), np.float32)])
def test_without_weights_nothing_is_said_about_them(tmp_path, weights):
    text = page(tmp_path, prediction(support_weights=weights)).text
    assert "Counted most" not in text
    assert "References." not in text


def test_a_method_without_references_has_no_word_of_them(tmp_path):
    assert "reference" not in page(tmp_path, prediction(support_weights=None), bank_names=()).text.lower()


def test_tables_and_run_are_printed(tmp_path):
    table = Table("By task", ("task", "AUROC"), [("headct", "0.94")], "With intervals.")
    text = page(tmp_path, prediction(), about={"Model": "m1"}, tables=[table]).text
    for words in ("Modelm1", "Measured quality", "By task", "headct0.94", "With intervals."):
        assert words in text
    assert "Measured quality" not in page(tmp_path, prediction()).text


def test_a_folder_gets_report_html_and_the_path_is_returned(tmp_path):
    made = write_report(tmp_path, [prediction()], title="Run", bank_names=(), scale=SCALE)
    assert made == tmp_path / "report.html"
    assert made.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_page_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"report\.html: cannot be written: .*Choose an output folder"):
        write_report(tmp_path / "file" / "report.html", [prediction()], title="Run", bank_names=(), scale=SCALE)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are byte strings on Linux only")
def test_a_file_name_that_is_not_unicode_can_be_read(tmp_path):
    assert r"scan\udcff.png" in page(tmp_path, prediction(os.fsdecode(b"scan\xff.png"))).text


def test_the_same_run_makes_the_same_page(tmp_path):
    pages = []
    for _ in range(2):
        page(tmp_path, prediction(), prediction("b.png", 0.25, label=0))
        pages.append((tmp_path / "report.html").read_bytes())
    assert pages[0] == pages[1]
