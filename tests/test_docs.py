"""What README.md and docs/ show works: links lead somewhere, Python runs, commands are accepted, cheap ones run."""

import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import anatomaly
from anatomaly import METHODS, cli
from anatomaly.backbones import BACKBONES
from anatomaly.errors import AnatomalyError
from anatomaly.synthetic.phantom import draw, png_bytes

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = {page.relative_to(ROOT).as_posix(): page for page in (ROOT / "README.md", *DOCS)}
LINKED = [*PAGES.values(), *(ROOT / f"{name}.md" for name in ("ARCHITECTURE", "CONTRIBUTING", "SECURITY", "CHANGELOG"))]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
#: Pages whose commands really run, one after the other.
RUN = ("README.md", "docs/start.md", "docs/recipes.md", "docs/calibration.md", "docs/clinic.md")
#: Commands that take a second or two; `fit` is one where nothing is trained.
CHEAP = ("data check", "data phantom", "data list", "fit", "predict", "calibrate", "evaluate", "explain supports")


class Block(NamedTuple):
    language: str
    line: int
    text: str
    skipped: bool


def blocks(page):
    """Fenced blocks; one below `<!-- not run: why -->` is not run."""
    found, before, start = [], "", None
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if start is None and line.startswith("```"):
            language, start, body = line[3:].strip(), number, []
        elif start is not None and line.startswith("```"):
            skipped = re.fullmatch(r"<!-- not run: .+ -->", before) is not None
            found.append(Block(language, start, "\n".join(body), skipped))
            before, start = "", None
        elif start is not None:
            body.append(line)
        elif line.strip():
            before = line.strip()
    return found


def commands(page):
    """Every `anatomaly ...` of the page's bash blocks: line, words, and the file that it is written to, if any."""
    found = []
    for block in blocks(page):
        if block.language == "bash" and not block.skipped:
            text = ""
            for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
                text += line
                try:
                    words, text = shlex.split(text, comments=True), ""
                except ValueError:  # a quotation goes on in the next line
                    text += "\n"
                    continue
                if words[:1] == ["anatomaly"]:
                    end = words.index(">") if ">" in words else len(words)
                    found.append((block.line, words[1:end], words[end + 1] if ">" in words else None))
    return found


def named(words):
    """A command's name and its options."""
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in cli.COMMANDS)
    return name, words[len(name.split()) :]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """The folders that the pages speak of, with small phantom images."""
    root, seeds = tmp_path_factory.mktemp("laid_out"), iter(range(1000))

    def fill(folder, count, *, task="head_ct", anomalous=False):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            picture = draw(task, seed=next(seeds), anomalous=anomalous, size=64)
            (root / folder / f"{i:02}.png").write_bytes(png_bytes(picture.pixels))

    fill("eight_normals", 8)
    fill("more_normals", 24)
    fill("new_normals", 10)
    fill("new_scans", 4)
    for i in range(2):
        (root / f"new_scans/ill_{i}.png").write_bytes(png_bytes(draw("head_ct", seed=i, anomalous=True).pixels))
    fill("labelled/train/good", 8)
    fill("labelled/test/good", 4)
    fill("labelled/test/disease", 4, anomalous=True)
    for task in ("brain_mr", "fundus"):
        fill(f"scans/{task}/train/good", 4, task=task)
        fill(f"scans/{task}/test/good", 2, task=task)
    anatomaly.fit(anatomaly.load_manifest(root / "labelled"), root / "model")
    return root


@pytest.fixture
def folder(laid_out, tmp_path, monkeypatch):
    """A copy of them, which is where the page is followed."""
    for item in laid_out.iterdir():
        shutil.copytree(item, tmp_path / item.name)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METHODS, "_records", dict(METHODS._records))
    return tmp_path


def write_yaml(page):
    """Files whose name stands in the first line of a YAML block."""
    for block in blocks(page):
        if block.language == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", block.text)):
            Path(name[1]).write_text(block.text)


def slugs(page):
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in slugs(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_a_page_says_first_for_whom_it_is(page):
    title, _, first = page.read_text("utf-8").split("\n", 2)
    assert title.startswith("# ")
    assert first.startswith("For ")


@pytest.mark.parametrize("page", [*DOCS, *NOTEBOOKS], ids=lambda page: page.stem)
def test_a_page_can_be_found(page):
    name = page.relative_to(ROOT / "docs").as_posix()
    assert f" {name}\n" in (ROOT / "mkdocs.yml").read_text("utf-8"), "it is in no menu of the site"
    assert name == "index.md" or f"({name})" in (ROOT / "docs/index.md").read_text("utf-8")


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if "```python" in page.read_text("utf-8")])
def test_python_runs(name, folder, capsys):
    space = {"__name__": "page"}
    for block in blocks(PAGES[name]):
        if block.language == "python" and not block.skipped:
            exec(compile("\n" * block.line + block.text, str(PAGES[name]), "exec"), space)


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if commands(page)])
def test_commands_are_accepted(name, folder):
    write_yaml(PAGES[name])
    for line, words, file in commands(PAGES[name]):
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                options = cli._parse(*named(words))
        except (AnatomalyError, StopIteration) as err:
            pytest.fail(f"{name}:{line}: anatomaly {shlex.join(words)}: {err}")
        except SystemExit as stop:  # --print_config
            assert not stop.code
            Path(file).write_text(out.getvalue())
            continue
        for role in ("teacher", "global_teacher"):
            teacher = getattr(options.get(role), "name", None) or "none"
            assert teacher in BACKBONES or teacher == "none" or teacher.startswith("timm/"), f"{name}:{line}"


@pytest.mark.parametrize("name", RUN)
def test_cheap_commands_run(name, folder, capsys):
    page, ran, absent = PAGES[name], 0, set()
    if re.search(r"(fit|calibrate) .*--out model/", page.read_text("utf-8")):  # the page makes it
        shutil.rmtree(folder / "model")
    for line, words, file in commands(page):
        words = [part for word in words for part in (sorted(map(str, folder.glob(word))) if "*" in word else [word])]
        verb, rest = named(words)
        if "--print_config" in words:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                cli.main(words)
            Path(file).write_text(out.getvalue())
            continue
        options = cli._parse(verb, rest)
        trained = verb == "fit" and METHODS[options.method.name].trained
        placeholder = any(re.fullmatch(r"[A-Z]+", word) for word in rest)
        if verb not in CHEAP or trained or placeholder or absent.intersection(words):
            absent.add(options.get("out"))
            continue
        capsys.readouterr()
        assert cli.main(words) == 0, f"{name}:{line}: {capsys.readouterr().err}"
        ran += 1
    assert ran > 1


@pytest.mark.parametrize("name", PAGES)
def test_scripts_and_their_flags_exist(name):
    text = PAGES[name].read_text("utf-8").replace("\\\n", " ")
    for script, rest in re.findall(r"python (?:ANATOMALY/)?((?:benchmarks|docs)/\S+\.py)([^`|\n]*)", text):
        source = (ROOT / script).read_text("utf-8")
        for flag in re.findall(r"--\w+", rest.split("#")[0]):
            assert f'"{flag}"' in source, f"{name}: {script} {flag}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run_and_hold_what_they_gave(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "notebook"}
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"], "was not run before it was saved: make notebooks"
            assert all(output["output_type"] != "error" for output in cell["outputs"])
            exec(compile("".join(cell["source"]), str(notebook), "exec"), space)
