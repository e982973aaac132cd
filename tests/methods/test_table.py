"""The table of methods: what the records promise, and methods that come from elsewhere."""

from dataclasses import dataclass, is_dataclass, replace
from importlib.metadata import EntryPoint

import pytest

from anatomaly.errors import ConfigError
from anatomaly.methods import METHODS, MethodRecord, build_method
from anatomaly.methods import table as table_module
from anatomaly.methods.nearest import PatchNearestNeighbours
from anatomaly.methods.settings import NearestSettings
from anatomaly.methods.table import imported


@dataclass(frozen=True)
class OwnSettings:
    strength: float = 1.0


#: What an entry point of a package may point to.
OWN = MethodRecord(
    "own", "of a package", PatchNearestNeighbours, OwnSettings, few_shot=True, one_class=False, learns_from=""
)
NO_RECORD = "a text"
OTHER_NAME = replace(OWN, name="another")
PLAIN_SETTINGS = replace(OWN, settings=dict)


@pytest.fixture
def table(monkeypatch):
    """A table of its own, of the built-in records, so that what a test adds does not stay."""
    monkeypatch.setattr(table_module, "entry_points", lambda **_: ())
    return table_module._Table(*(METHODS[name] for name in METHODS.built_in))


@pytest.fixture
def installed(monkeypatch, table):
    """installed(own="module:record", ...): the table where packages declare these methods."""

    def install(**places):
        def found(*, group):
            assert group == "anatomaly.methods"
            return [EntryPoint(name, place, group) for name, place in places.items()]

        monkeypatch.setattr(table_module, "entry_points", found)
        return table

    return install


@pytest.mark.parametrize("name", METHODS.built_in)
def test_a_built_in_record_says_what_its_class_does(name, lite0):
    record = METHODS[name]
    kind = imported(record.method)
    assert record.name == name
    assert kind.needs_support == record.few_shot
    assert is_dataclass(record.settings)
    settings = record.settings()
    assert settings == record.settings()
    built = build_method(name, [lite0] * record.teachers)
    assert type(built) is kind
    assert record.trained == bool(list(built.parameters())), "what has weights has to be trained"
    assert built.settings == settings
    assert len(built.teachers) == record.teachers
    assert bool(record.release) == bool(record.load_release)
    assert not record.release or callable(imported(record.load_release))


def test_the_built_in_methods_are_listed_in_their_order():
    assert METHODS.built_in[:4] == ("attention", "d24fad", "pdd", "nearest"), "new ones come after them"
    assert list(METHODS)[: len(METHODS.built_in)] == list(METHODS.built_in)


def test_a_record_can_be_registered_and_its_method_is_built(monkeypatch, lite0):
    monkeypatch.setattr(METHODS, "_records", dict(METHODS._records))
    own = replace(OWN, settings=NearestSettings)
    METHODS.register(own)
    METHODS.register(own)  # the same once more changes nothing
    assert METHODS["own"] is own
    assert "own" in METHODS
    assert list(METHODS).count("own") == 1
    assert "own" in METHODS.loadable()
    assert "own" not in METHODS.built_in
    assert isinstance(build_method("own", lite0), PatchNearestNeighbours)


def test_what_a_test_registered_is_gone():
    assert "own" not in METHODS
    with pytest.raises(ConfigError, match=r"^method: unknown name 'own'"):
        METHODS["own"]


def test_a_taken_name_is_refused(table):
    table.register(OWN)
    for record in (replace(OWN, name="pdd"), replace(OWN, summary="of another package")):
        before = table[record.name]
        message = rf"^method: the name '{record.name}' is taken\. Choose another one\.$"
        with pytest.raises(ConfigError, match=message):
            table.register(record)
        assert table[record.name] is before


def test_an_installed_method_is_found(installed):
    table = installed(own=f"{__name__}:OWN", pdd=f"{__name__}:OWN")
    assert list(table) == [*METHODS.built_in, "own"]
    assert len(table) == len(METHODS.built_in) + 1
    assert table["own"] is OWN
    assert table["pdd"] is METHODS["pdd"], "an entry point takes no built-in name"
    assert table.loadable() == list(table)
    with pytest.raises(ConfigError, match=r"expected one of .*, nearest, .*own\. Did you mean own\?$"):
        table["owm"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (
            "no_such_package.method:RECORD",
            r"cannot be loaded \(ModuleNotFoundError: No module named 'no_such_package'\)",
        ),
        (f"{__name__}:ABSENT", r"cannot be loaded \(AttributeError: .*'ABSENT'\)"),
        (f"{__name__}:NO_RECORD", "got str, expected a MethodRecord of this name whose settings are a dataclass"),
        (f"{__name__}:OTHER_NAME", "got MethodRecord, expected a MethodRecord of this name"),
        (f"{__name__}:PLAIN_SETTINGS", "got MethodRecord, expected .* whose settings are a dataclass"),
    ],
)
def test_a_broken_entry_point_is_refused_in_one_line_and_left_out(installed, place, reason):
    table = installed(broken=place, own=f"{__name__}:OWN")
    with pytest.raises(ConfigError, match=reason) as refused:
        table["broken"]
    message = str(refused.value)
    assert message.startswith(f"method 'broken' of {place}: ")
    assert message.endswith("Mend or remove its package.")
    assert "\n" not in message
    assert "broken" in table
    assert table.loadable() == [*METHODS.built_in, "own"]


def test_an_import_error_of_many_lines_is_still_refused_in_one(installed, tmp_path, monkeypatch):
    (tmp_path / "package_of_many_lines.py").write_text('raise RuntimeError("first line\\nsecond line")\n')
    monkeypatch.syspath_prepend(tmp_path)
    table = installed(broken="package_of_many_lines:RECORD")
    with pytest.raises(ConfigError, match=r"cannot be loaded \(RuntimeError: first line") as refused:
        table["broken"]
    assert "\n" not in str(refused.value)
