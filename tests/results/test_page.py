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

from anatomaly.data.contrast import NOTE
from anatomaly.data.origin import MISLEAD
from anatomaly.errors import OutputError
from anatomaly.results.page import write_report
from anatomaly.results.pictures import render_map
from anatomaly.tables import Table
from anatomaly.types import Prediction, Sample

SCALE = (0.0, 2.0)
VOID = {"meta", "img", "input", "br"}


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

    def picture(self, alt, number=0):
        """(H, W, 3) pixels of the picture with this text alternative; (H, W, 4) where it has clear parts."""
        source = [each["src"] for each in self.all("img") if each["alt"].startswith(alt)][number]
        picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
        return np.asarray(picture.convert("RGBA") if "transparency" in picture.info else picture)

    def cases(self):
        """File names of the list, in its order."""
        return [Path(each["data-name"]).name for each in self.all("li") if "data-name" in each]


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
    assert made.cases() == ["high.png", "mid.png", "low.png"]
    assert next(each for each in made.all("li") if "data-name" in each)["data-label"] == "anomalous"
    assert [each["id"] for each in made.all("article")] == ["case-1", "case-2", "case-3"]
    assert re.findall(r"score (\d\.\d+)", made.text) == ["4.000", "1.500", "0.2500"]
    assert next(each["title"] for each in made.all("span") if "title" in each) == "rank 1 of 3"
    assert made.text.count("known to be anomalous") == 2  # the summary's count and the case's badge


def test_cases_come_before_the_figures_and_after_the_summary(tmp_path):
    text = page(tmp_path, prediction(label=1), failed("b.png", "b.png: is empty."), about={"Model": "m1"}).text
    heads = ("Not for clinical use", "2 images", "1 not scored", "b.png: is empty.", "Cases", "How to read", "Scores")
    assert [text.index(each) for each in heads] == sorted(text.index(each) for each in heads)
    assert text.index("Scores") < text.index("Modelm1")


def test_images_beyond_the_limit_are_lines_of_the_list_without_a_picture(tmp_path):
    many = [prediction(f"{n}.png", n) for n in range(7)]
    made = page(tmp_path, *many, max_cases=3)
    assert made.cases() == [f"{n}.png" for n in range(6, -1, -1)]
    assert len(made.all("article")) == 3
    links = [each["href"] for each in made.all("a") if each["href"] != "#guide"]
    assert links == ["#case-1", "#case-2", "#case-3", *["#listed"] * 4]
    assert "7 images, highest score first." in made.text
    assert "The pictures of 4 images with lower scores are left out here; all scores are in scores.csv." in made.text
    assert "Distribution of the 7 scores" in made.text
    assert "left out" not in page(tmp_path, *many).text
    assert "1 image, highest score first." in page(tmp_path, many[0]).text


def test_a_very_long_list_ends_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("anatomaly.results.cases._LONGEST_LIST", 5)
    made = page(tmp_path, *[prediction(f"{n}.png", n) for n in range(7)], max_cases=3)
    assert len(made.cases()) == 5
    assert "The list ends after 5 of 7." in made.text


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


def test_a_run_of_images_that_show_nothing_says_so_on_top(tmp_path):
    poor = [prediction(f"{k}.png", note=f"one of the support images; {NOTE}") for k in range(2)]
    told = "images show hardly any contrast"
    assert f"2 of 3 {told}" in page(tmp_path, *poor, prediction("c.png")).text
    assert told not in page(tmp_path, *poor, prediction("c.png"), prediction("d.png")).text


def test_images_from_elsewhere_are_told_on_top(tmp_path):
    note = f"modality MR where the support images are CT, {MISLEAD}"
    made = page(tmp_path, prediction("a.png", note=f"dark; {note}"), prediction("b.png"), prediction("c.png"))
    assert f"1 of 3 images: {note}." in made.text
    assert MISLEAD not in page(tmp_path, prediction("a.png", note="dark")).text


@pytest.mark.parametrize("predictions", [[], [failed("b.png", "b.png: is empty.")]])
def test_a_run_without_a_score_still_makes_a_page(tmp_path, predictions):
    assert "No image was scored." in page(tmp_path, *predictions).text


def bars(made):
    return [(each["class"], round(float(each["height"]), 1)) for each in made.all("rect")]


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


def test_a_case_has_the_image_and_the_map_over_it_on_the_fixed_scale(tmp_path):
    hot = np.zeros((40, 60), np.float32)
    hot[:, 30:] = 2.0
    hot[:, 15:30] = 1.0
    made = page(tmp_path, prediction(anomaly_map=hot, image=np.full((1, 40, 60), 0.25, np.float32)))
    assert made.picture("Image of a.png").shape == (40, 60)
    np.testing.assert_allclose(made.picture("Image of a.png"), 64, atol=3)
    over = made.picture("Map of a.png").astype(int)
    np.testing.assert_array_equal(over[20, 50], (252, 255, 164, 255))
    np.testing.assert_allclose(over[20, 22], (*render_map(np.ones((1, 1)), SCALE)[0, 0], 128), atol=6)
    assert over[20, 10, 3] == 0  # clear


def test_pictures_are_small_and_have_true_proportions(tmp_path):
    made = page(tmp_path, prediction(shape=(1000, 500)), bank_images=[np.zeros((3, 600, 900))])
    assert made.picture("Image of a.png").shape == (384, 192)
    assert made.picture("Reference image first").shape == (43, 64, 3)  # beside the case
    assert made.picture("Reference image first", 1).shape == (171, 256, 3)
    flat = page(tmp_path, prediction(shape=(100, 200), spacing=(5.0, 1.0)))  # a sagittal slice, 5 mm apart
    assert flat.picture("Image of a.png").shape == (200, 80)
    assert flat.picture("Map of a.png").shape[:2] == (200, 80)
    view = next(each for each in flat.all("div") if each.get("class") == "view")
    assert view["style"] == "--r:0.4000"


def test_every_picture_has_a_text_alternative(tmp_path):
    made = page(tmp_path, prediction(), bank_images=[np.zeros((1, 9, 9))] * 2)
    assert len(made.all("img")) == 2 + 2 + 2 + 1 + 1  # scales, references, layers, top reference, line of the list
    assert [each["alt"] for each in made.all("img")].count("") == 1  # beside its name
    assert all(each.get("aria-label") or each.get("aria-hidden") for each in made.all("svg"))


def lines(made):
    return [each["class"] for each in made.all("g")]


def test_lines_hold_the_highest_values_of_the_image_and_those_beyond_the_scale(tmp_path):
    steep = np.linspace(0, 1, 40 * 40, dtype=np.float32).reshape(40, 40)
    image = np.zeros((1, 40, 40), np.float32)
    assert lines(page(tmp_path, prediction(anomaly_map=steep, image=image))) == ["top"]
    assert lines(page(tmp_path, prediction(anomaly_map=3 * steep, image=image))) == ["top", "high"]
    made = page(tmp_path, prediction(anomaly_map=steep, image=image))
    assert [float(y) for y in re.findall(r"M\S+ (\d+)l", made.all("path")[0]["d"])] == [pytest.approx(950, abs=15)]
    assert lines(page(tmp_path, prediction())) == []  # nothing is higher than the rest


def test_a_prediction_without_arrays_says_so(tmp_path):
    assert page(tmp_path, prediction(image=None, anomaly_map=None)).text.count("picture not kept") == 1
    assert page(tmp_path, prediction(image=None)).text.count("image not kept") == 1
    assert page(tmp_path, prediction(anomaly_map=None)).text.count("map not kept") == 1
    assert "not kept" not in page(tmp_path, prediction()).text


def test_missing_map_values_do_not_break_the_pictures(tmp_path):
    holes = np.full((20, 30), np.nan, np.float32)
    with np.errstate(invalid="raise"):
        made = page(tmp_path, prediction(anomaly_map=holes, image=holes[None]))
    assert made.picture("Map of a.png")[..., 3].max() == 0
    np.testing.assert_allclose(made.picture("Image of a.png"), 0, atol=3)


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"image": np.zeros((2, 20, 30))}, "image"),
        ({"anomaly_map": np.zeros((0, 0))}, "map"),
        ({"anomaly_map": np.zeros((7, 7))}, "map"),  # not of this image
        ({"anomaly_map": np.zeros(3)}, "map"),
        ({"image": np.zeros((1, 0, 0)), "anomaly_map": np.zeros((0, 0))}, "picture"),
    ],
)
def test_an_odd_array_costs_its_picture_only(tmp_path, changes, lost):
    made = page(tmp_path, prediction("odd.png", 0.75, **changes), prediction(), bank_images=[np.zeros((5, 9, 9))])
    assert made.cases() == ["odd.png", "a.png"]
    assert made.text.count("not kept") == made.text.count(f"{lost} not kept") == 1
    assert made.picture("Map of a.png").shape[:2] == (20, 30)


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


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (0.5, "1 of 2 reference images scores higher"),
        (0.1, "2 of 2 reference images score higher"),
        (0.7, "None of 2 reference images scores higher"),  # as high is not higher
    ],
)
def test_the_references_own_scores_are_a_yardstick(tmp_path, score, words):
    made = page(tmp_path, prediction(score=score), normal_scores=[0.2, 0.7])
    assert words in made.text
    assert "a rough yardstick" in made.text
    assert "Each reference image was also judged by the others" in made.text
    assert "firstscore 0.2000, judged by the others" in made.text
    marks = [each for each in made.all("path") if each.get("class") == "reference"]
    assert len(marks) == 2
    assert "first: 0.2000" in made.text


@pytest.mark.parametrize("scores", [None, [], [float("nan"), float("inf")]])
def test_without_scores_of_the_references_there_is_no_yardstick(tmp_path, scores):
    made = page(tmp_path, prediction(), normal_scores=scores)
    assert "yardstick" not in made.text.lower()
    assert "judged by the others" not in made.text
    assert not any(each.get("class") == "reference" for each in made.all("path"))


def test_the_histogram_reaches_to_the_references(tmp_path):
    made = page(tmp_path, prediction(score=0.5), prediction("b.png", 0.7), normal_scores=[0.1, 1.5])
    assert "0.1000lowest" in made.text
    assert "1.500highest" in made.text
    assert sum(height for _, height in bars(made)) == pytest.approx(130 * 2)
    with np.errstate(over="raise"):
        extreme = page(tmp_path, prediction(score=1.7e308), normal_scores=[-1.7e308, 0.0])
    assert "None of 2 reference images" in extreme.text


def test_one_known_score_of_a_reference_is_told_as_one(tmp_path):
    assert "1 of 1 reference image scores higher" in page(tmp_path, prediction(score=0.5), normal_scores=[0.7]).text


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
