"""Fixed support lists: what is written is found again by content, and nothing else is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from anatomaly.data.manifest import Manifest
from anatomaly.errors import ConfigError
from anatomaly.evaluation.protocols import draw_supports
from anatomaly.evaluation.support_lists import lists_digest, read_support_lists, write_support_lists


@pytest.fixture(scope="module")
def hashed(phantom):
    return phantom.with_hashes()


@pytest.fixture
def lists(hashed):
    return {
        task: {seed: draw_supports(hashed, task=task, shots=3, draws=2, seed=seed) for seed in (0, 7)}
        for task in hashed.tasks
    }


def edited(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def test_lists_come_back_as_they_were(lists, hashed, tmp_path):
    file = tmp_path / "supports.json"
    digest = write_support_lists(lists, file)
    assert read_support_lists(file, hashed) == lists
    assert digest == lists_digest(lists)


def test_images_are_found_by_content_wherever_they_lie(lists, hashed, tmp_path):
    file = tmp_path / "supports.json"
    write_support_lists(lists, file)
    moved = Manifest(tuple(replace(row, path=Path("/elsewhere") / row.path.name) for row in hashed), Path("moved.csv"))
    found = read_support_lists(file, moved)
    assert lists_digest(found) == lists_digest(lists)
    assert found["head_ct"][0][0][0].path.parent == Path("/elsewhere")


def test_a_file_names_no_folder_above_the_data_set(lists, tmp_path, hashed):
    file = tmp_path / "supports.json"
    write_support_lists(lists, file)
    first = json.loads(file.read_text())["supports"]["head_ct"]["0"][0][0]["path"]
    row = lists["head_ct"][0][0][0]
    assert first == "/".join(row.path.parts[-3:])
    assert str(tmp_path) not in file.read_text()
    assert str(hashed.source.parent) not in file.read_text()


def test_the_digest_says_which_images_stand_where(lists):
    task = {seed: [list(draw) for draw in draws] for seed, draws in lists["head_ct"].items()}
    task[0][0].reverse()
    assert lists_digest({**lists, "head_ct": task}) != lists_digest(lists)
    assert lists_digest({"head_ct": {1: lists["head_ct"][0]}}) != lists_digest({"head_ct": {0: lists["head_ct"][0]}})


def test_rows_without_a_digest_cannot_be_listed(phantom, tmp_path):
    rows = [replace(row, sha256=None) for row in phantom.select(task="head_ct", split="train")]
    with pytest.raises(ValueError, match="with_hashes"):
        write_support_lists({"head_ct": {0: [rows]}}, tmp_path / "supports.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=99), "format 99, expected 1"),
        (lambda c: c.pop("supports"), "not a list of supports"),
        (lambda c: c["supports"]["head_ct"]["0"][0][0].update(sha256="ab" * 32), "1 supports of task 'head_ct'.*abab"),
        (lambda c: c["supports"]["head_ct"]["0"][0].reverse(), "somebody edited it"),
        (lambda c: c["supports"]["head_ct"]["0"][0].__setitem__(1, c["supports"]["head_ct"]["0"][0][0]), "twice"),
        (lambda c: c["supports"].update(liver=c["supports"].pop("head_ct")), "no task 'liver'"),
        (lambda c: c["supports"]["head_ct"].update(x=[]), "not a list of supports"),
    ],
)
def test_unusable_files_are_refused(lists, hashed, tmp_path, change, message):
    file = tmp_path / "supports.json"
    write_support_lists(lists, file)
    with pytest.raises(ConfigError, match=message):
        read_support_lists(edited(file, change), hashed)


def test_an_anomalous_support_is_refused(hashed, tmp_path):
    rows = hashed.select(task="head_ct", split="test").samples
    anomalous = next(row for row in rows if row.label == 1)
    file = tmp_path / "supports.json"
    write_support_lists({"head_ct": {0: [(anomalous,)]}}, file)
    with pytest.raises(ConfigError, match="anomalous"):
        read_support_lists(file, hashed)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1, "digest": "", "supports": []}'])
def test_other_files_are_refused(tmp_path, hashed, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match="not a list of supports"):
        read_support_lists(tmp_path / "x.json", hashed)


def test_a_missing_file_is_called_missing(tmp_path, hashed):
    with pytest.raises(ConfigError, match=r"x.json: no such file"):
        read_support_lists(tmp_path / "x.json", hashed)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1, "supports": {"ct": {"1e9": []}}}', "5"])
def test_a_list_that_is_none_is_refused(hashed, tmp_path, text):
    (tmp_path / "supports.json").write_text(text)
    with pytest.raises(ConfigError, match="not a list of supports"):
        read_support_lists(tmp_path / "supports.json", hashed)
