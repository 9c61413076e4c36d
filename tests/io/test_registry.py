"""Which function opens what: registered in the process, by installed distributions, or by the package itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits
from helpers.ends import IN, LAYER, OUT, X
from helpers.leaks import nothing_left_behind

import pipeline
from pipeline import OptionError, PipelineError, run_pipelined
from pipeline.arrays import HostArray
from pipeline.io import registry
from pipeline.testing import check_sink, check_source


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    for each in (registry.SOURCES, registry.SINKS):
        monkeypatch.setattr(each, "_openers", dict(each._openers))


class CsvSource(pipeline.Source):
    """A format from outside, as simple as it gets."""

    kind = ".csv file"

    def __init__(self, path: Any, request: pipeline.SourceRequest) -> None:
        self.path, self.array = Path(path), np.loadtxt(path, np.float32, delimiter=",", ndmin=2)
        self.rows, self.features = self.array.shape
        self.dtype = pipeline.parse_dtype("float32")

    def read(self, first: int, piece: HostArray) -> None:
        piece[...] = self.array[first : first + len(piece)]


class CsvSink(pipeline.Sink):
    def __init__(self, path: Any, request: pipeline.SinkRequest) -> None:
        self.path, self.rows = Path(path), {}

    def write(self, first: int, piece: HostArray) -> None:
        self.rows.update(enumerate(piece.tolist(), first))

    def finish(self, rows: int) -> Path:
        self.path.write_text("".join(",".join(map(repr, self.rows[row])) + "\n" for row in range(rows)))
        return self.path


def read_csv(path: Path) -> HostArray:
    text = path.read_text()
    return np.loadtxt(path, np.float32, delimiter=",", ndmin=2) if text else np.empty((0, 7), np.float32)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    np.savetxt(tmp_path / "x.csv", X, delimiter=",", fmt="%.9g")
    return tmp_path / "x.csv"


def test_register_a_suffix_from_outside(csv: Path) -> None:
    with pytest.raises(pipeline.InputError, match=r"doesn't end in \.npy"):
        run_pipelined(LAYER, csv, devices="cpu")
    pipeline.register_source(".csv", CsvSource)
    pipeline.register_sink(".csv", CsvSink)
    with nothing_left_behind():
        result = run_pipelined(LAYER, str(csv), csv.with_name("y.csv"), devices="cpu", chunk_rows=7)
    assert result.stats.source == ".csv file"
    assert_same_bits(read_csv(result.out), LAYER(X))
    check_source(lambda: csv, X)
    check_sink(lambda rows: csv.with_name("z.csv"), read_csv)


def test_register_checks_what_an_outside_source_says(csv: Path) -> None:
    pipeline.register_source(".csv", CsvSource)
    wide = pipeline.FusedLinear(np.ones((OUT, IN + 1), np.float32))
    with pytest.raises(pipeline.ShapeError, match=rf"the array in .*x\.csv has {IN} features a row .* takes {IN + 1};"):
        run_pipelined(wide, csv, devices="cpu")
    with pytest.raises(pipeline.DTypeError, match=r"the array in .*x\.csv is float32, the layer's weights are float64"):
        run_pipelined(pipeline.FusedLinear(np.ones((OUT, IN))), csv, devices="cpu")


@pytest.mark.parametrize("rows", [-1, 50.0, "50"])
def test_register_refuses_a_source_without_a_number_of_rows(rows: Any, csv: Path) -> None:
    def opened(path: Any, request: pipeline.SourceRequest) -> pipeline.Source:
        source = CsvSource(path, request)
        source.rows = rows
        return source

    pipeline.register_source(".csv", opened)
    with nothing_left_behind(csv.parent):
        with pytest.raises(pipeline.InputError, match=rf"has {rows!r} rows, expected a whole number, or None"):
            run_pipelined(LAYER, csv, csv.with_name("y.npy"), devices="cpu")
    assert not csv.with_name("y.npy").exists()


class Table:
    """A type from outside."""

    def __init__(self, array: HostArray) -> None:
        self.array = array


class Subtable(Table):
    pass


def open_table(value: Table, request: pipeline.SourceRequest) -> pipeline.Source:
    return registry.SOURCES.find(value.array)(value.array, request)  # type: ignore[misc]


@pytest.mark.parametrize("kind", [Table, f"{Table.__module__}.Table"])
def test_register_a_type_and_what_derives_from_it(kind: str | type) -> None:
    pipeline.register_source(kind, open_table)
    for value in (Table(X), Subtable(X)):
        assert_same_bits(run_pipelined(LAYER, value, devices="cpu").out, LAYER(X))


def test_register_prefers_the_nearest_type() -> None:
    pipeline.register_source(Table, open_table)
    pipeline.register_source(Subtable, lambda value, request: open_table(Table(-value.array), request))
    assert_same_bits(run_pipelined(LAYER, Subtable(X), devices="cpu").out, LAYER(-X))


@pytest.mark.parametrize(
    ("kind", "known"), [(".npy", ".npy"), ("numpy.ndarray", np.ndarray), (np.ndarray, "numpy.ndarray")]
)
def test_register_takes_a_known_place_only_when_told_to(kind: Any, known: Any) -> None:
    for register in (pipeline.register_source, pipeline.register_sink):
        with pytest.raises(OptionError, match=r"is registered already; pass replace=True"):
            register(kind, open_table)
        register(kind, open_table, replace=True)
        with pytest.raises(OptionError, match=r"is registered already"):
            register(known, open_table)


@pytest.mark.parametrize("kind", ["csv", "", ".", ".tar.gz", ".a/b", "a b.c", 5, None, [".csv"]])
def test_register_refuses_what_is_no_kind(kind: Any) -> None:
    with pytest.raises(OptionError, match=r"expected a suffix such as '\.csv', a type or a type's dotted name"):
        pipeline.register_source(kind, open_table)


@pytest.mark.parametrize("returned", [None, X])
def test_register_says_that_an_opener_returned_something_else(returned: Any) -> None:
    pipeline.register_source(Table, lambda value, request: returned)
    pipeline.register_sink(Table, lambda out, request: returned)
    what = rf"the opener of a Table returned a {type(returned).__name__}, expected a pipeline\."
    with pytest.raises(PipelineError, match=what + "Source"):
        run_pipelined(LAYER, Table(X), devices="cpu")
    with pytest.raises(PipelineError, match=what + "Sink"):
        run_pipelined(LAYER, X, Table(X), devices="cpu")


def test_register_refuses_openers_that_cannot_be_called() -> None:
    with pytest.raises(OptionError, match="expected a function of a value and a request"):
        pipeline.register_sink(".csv", "mine")  # type: ignore[arg-type]


# -- entry points ------------------------------------------------------------------------------------------------------

PLUGIN = """
import numpy as np
import pipeline

class Ramp(pipeline.Source):
    kind = "ramp"
    def __init__(self, value, request):
        self.rows, self.features, self.dtype = 50, request.in_features, request.dtype
    def read(self, first, piece):
        piece[...] = np.arange(first, first + len(piece))[:, None]

class Total(pipeline.Sink):
    def __init__(self, value, request):
        self.rows = {}
    def write(self, first, piece):
        self.rows.update(enumerate(piece.sum(axis=1), first))
    def finish(self, rows):
        return len(self.rows)

class Value:
    pass

answer = 42
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Installs distributions of one module each, of these entry points in the two groups, until the test ends."""
    modules = []

    def install(name: str, sources: str = "", sinks: str = "", code: str = PLUGIN) -> None:
        site, module = tmp_path / f"site-{name}", f"plugin_{name}"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        entry_points = f"[pipeline.sources]\n{sources}\n[pipeline.sinks]\n{sinks}\n"
        (info / "entry_points.txt").write_text(entry_points.replace("MODULE", module))
        (site / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(site)
        modules.append(module)

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def test_entry_points_open_suffixes_and_types(installed: Any) -> None:
    installed("ramps", ".ramp = MODULE:Ramp\nMODULE.Value = MODULE:Ramp", ".total = MODULE:Total")
    ramp = np.repeat(np.arange(50, dtype=np.float32)[:, None], IN, axis=1)
    result = run_pipelined(LAYER, "any.ramp", devices="cpu", chunk_rows=7)
    assert_same_bits(result.out, LAYER(ramp))
    assert run_pipelined(LAYER, "any.ramp", "y.total", devices="cpu").out == 50
    value = sys.modules["plugin_ramps"].Value()
    assert_same_bits(run_pipelined(LAYER, value, devices="cpu").out, LAYER(ramp))


def test_entry_points_are_loaded_when_something_else_is_not_known(installed: Any, tmp_path: Path) -> None:
    installed("ramps", ".ramp = MODULE:Ramp\n.npy = MODULE:Ramp", "numpy.ndarray = MODULE:Total")
    np.save(tmp_path / "x.npy", X)
    out = np.empty((50, OUT), np.float32)
    run_pipelined(LAYER, tmp_path / "x.npy", out, devices="cpu")
    assert_same_bits(out, LAYER(X))
    with pytest.raises(pipeline.InputError, match=r"doesn't end in \.npy"):
        run_pipelined(LAYER, tmp_path / "x.other", devices="cpu")
    assert "plugin_ramps" not in sys.modules


@pytest.mark.parametrize(
    ("opener", "message"),
    [
        ("no_such_module:Ramp", r"can't be loaded: ModuleNotFoundError.*no_such_module"),
        ("MODULE:Missing", r"can't be loaded: AttributeError.*Missing"),
        ("MODULE:answer", "is 42, expected a function of a value and a request"),
    ],
)
def test_entry_points_that_are_broken_name_their_distribution(opener: str, message: str, installed: Any) -> None:
    installed("cracked", f".ramp = {opener}", f".ramp = {opener}")
    text = rf"the entry point of the distribution cracked for '\.ramp' in pipeline\.{{}} {message}.*; repair or remove"
    with pytest.raises(PipelineError, match=text.format("sources")):
        run_pipelined(LAYER, "x.ramp", devices="cpu")
    with pytest.raises(PipelineError, match=text.format("sinks")):
        run_pipelined(LAYER, X, "y.ramp", devices="cpu")


def test_entry_points_that_fail_on_import_keep_the_cause(installed: Any) -> None:
    installed("cracked", ".ramp = MODULE:Ramp", code="1 / 0")
    with pytest.raises(PipelineError, match=r"cracked .*ZeroDivisionError") as caught:
        run_pipelined(LAYER, "x.ramp", devices="cpu")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_entry_points_of_two_distributions_for_one_kind_name_both(installed: Any) -> None:
    installed("one", ".ramp = MODULE:Ramp")
    installed("two", ".ramp = MODULE:Ramp")
    with pytest.raises(PipelineError, match=r"distributions (one, two|two, one) each open '\.ramp' .*; keep one"):
        run_pipelined(LAYER, "x.ramp", devices="cpu")
    pipeline.register_source(".ramp", lambda value, request: open_table(Table(X), request))
    assert_same_bits(run_pipelined(LAYER, "x.ramp", devices="cpu").out, LAYER(X))
