"""Trace files: the JSON and its way back, the picture, and the page in a headless browser."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data import assert_same_bits, random_layer, random_rows
from helpers.needs import needs

from pipeline import FusedLinear, OptionError, OutputError, Pipeline, TraceWarning, run_pipelined
from pipeline.errors import FileFormatError
from pipeline.instrument import STAGE_COLORS, STAGES, Ceilings, Interval
from pipeline.report.picture import parts_text, verdict
from pipeline.report.timeline import Timeline
from pipeline.report.trace import check_trace, read_trace, write_trace

PROFILES = Path(__file__).parents[2] / "profiles/timelines"
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
needs_matplotlib, needs_bokeh = needs("matplotlib", "plot"), needs("bokeh", "plot")


@pytest.fixture
def layer() -> FusedLinear:
    return random_layer(24, 16)


def made_up(chunks: int = 40, devices: int = 1) -> Timeline:
    """A timeline of every stage with fills and drains that overlap."""
    lengths = {"fill": 2.5e-3, "H2D": 1e-3, "kernel": 0.6e-3, "D2H": 1e-3, "drain": 2.2e-3}
    found: dict[str, list[Interval]] = {}
    for device in range(devices):
        found[f"cuda:{device}"] = [
            Interval(
                stage, n, 1e-3 * (n + late), 1e-3 * (n + late) + lengths[stage], 0 if stage == "kernel" else 8 << 20
            )
            for late, stage in enumerate(STAGES)
            for n in range(chunks)
        ]
    return Timeline(found, "event record", dict.fromkeys(found, "made up"))


def test_trace_of_a_run_holds_every_operation(layer: FusedLinear, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    stats = run_pipelined(layer, random_rows(300, 24), chunk_rows=64, devices="cpu", trace=path).stats
    timeline, kept = read_trace(path)
    assert kept == json.loads(json.dumps(stats.as_dict()))
    (operations,) = timeline.devices.values()
    for name, stage in stats.stages.items():
        mine = [i for i in operations if i.stage == name]
        assert len(mine) == stage.count and sum(i.bytes for i in mine) == stage.bytes
        assert all(0 <= i.start_s <= i.end_s <= stats.run_s for i in mine)
        if mine:
            assert {i.chunk for i in mine} == set(range(5))


def test_trace_json_is_what_trace_viewers_take(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_trace(path, made_up(devices=2), None)
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert processes == ["cuda:0 made up", "cuda:1 made up"]
    assert {name.split()[0] for name in names.values()} == set(STAGES) and "fill 1" in names.values()
    threads: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            threads.setdefault((event["pid"], event["tid"]), []).append(event)
            assert names[event["pid"], event["tid"]].split()[0] == event["name"]
            assert event["dur"] > 0 and event["args"]["chunk"] >= 0
    for row in threads.values():
        row.sort(key=lambda e: e["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(row)), "no overlaps"
    again, _ = read_trace(path)
    for device, operations in made_up(devices=2).devices.items():
        got = sorted(again.devices[device])
        for a, b in zip(got, sorted(operations), strict=True):
            assert a[:2] == b[:2] and a.bytes == b.bytes and a[2:4] == pytest.approx(b[2:4], abs=1e-8)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"otherData": {"format": "other"}}', '{"otherData": 3}', "\x00"])
def test_trace_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match="isn't a timeline"):
        read_trace(path)


def test_trace_path_is_checked_before_the_run(layer: FusedLinear, tmp_path: Path) -> None:
    (tmp_path / "d.json").mkdir()
    os.mkfifo(tmp_path / "f.json")
    there = set(tmp_path.iterdir())
    for trace, error, text in (
        ("run.gif", OptionError, r"\.json, \.png, \.html"),
        (3, OptionError, r"trace is 3, expected a path that ends in \.json"),
        (tmp_path / "none" / "run.json", OutputError, "make it first"),
        (tmp_path / "d.json", OutputError, "isn't a file; choose another path"),
        (tmp_path / "f.json", OutputError, "isn't a file; choose another path"),
        (tmp_path / f"{'a' * 251}.json", OutputError, r"can't write trace .*\(File name too long\); choose"),
        ("/proc/run.json", OutputError, r"can't write trace '/proc/run.json': .*\(No such file.*\); choose a path"),
    ):
        with pytest.raises(error, match=text):
            run_pipelined(layer, random_rows(30, 24), tmp_path / "y.npy", devices="cpu", trace=trace)
    assert set(tmp_path.iterdir()) == there, "nothing was run or written"


def test_trace_check_leaves_no_file_and_the_one_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    check_trace(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    check_trace(path)
    assert [(p, p.read_text()) for p in tmp_path.iterdir()] == [(path, "old")]


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Writing more to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


KINDS = ["json", pytest.param("png", marks=needs_matplotlib), pytest.param("html", marks=needs_bokeh)]


@pytest.mark.parametrize("suffix", KINDS)
def test_trace_that_cannot_be_written_costs_nothing_but_a_warning(
    suffix: str, layer: FusedLinear, tmp_path: Path
) -> None:
    path, x = tmp_path / f"run.{suffix}", random_rows(300, 24)
    path.write_text("of the run before")
    with Pipeline(layer, devices="cpu", chunk_rows=16) as pipeline:
        with largest_file(1000), pytest.warns(TraceWarning, match=rf"{path}': File too large; free space") as caught:
            result = pipeline.run(x, trace=path)
        assert len(caught) == 1 and "the run is complete" in str(caught[0].message)
        assert_same_bits(result.out, layer(x))
        assert result.stats.rows == 300
        assert [(p, p.read_text()) for p in tmp_path.iterdir()] == [(path, "of the run before")]
        pipeline.run(x, trace=path)
        assert path.stat().st_size > 1000 and list(tmp_path.iterdir()) == [path]


def test_trace_whose_drawing_fails_costs_nothing_but_a_warning(
    layer: FusedLinear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr("pipeline.report.trace.to_json", fail)
    with pytest.warns(TraceWarning, match=r"run\.json: ZeroDivisionError\('odd'\)"):
        result = run_pipelined(layer, random_rows(30, 24), devices="cpu", trace=tmp_path / "run.json")
    assert len(result.out) == 30 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "library"), [("png", "matplotlib"), ("html", "bokeh")])
def test_trace_without_its_library_says_what_to_install(
    suffix: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=rf"needs {library}.*pip install 'pipeline\[plot\]'"):
        check_trace(tmp_path / f"run.{suffix}")
    assert check_trace(tmp_path / "run.json")


@pytest.mark.parametrize("suffix", KINDS)
def test_trace_of_an_empty_run_is_written(suffix: str, layer: FusedLinear, tmp_path: Path) -> None:
    path = tmp_path / f"run.{suffix}"
    run_pipelined(layer, np.zeros((0, 24), np.float32), devices="cpu", trace=path)
    assert path.stat().st_size > 0


@needs_matplotlib
@pytest.mark.parametrize("devices", [1, 2])
def test_trace_picture_is_a_png(devices: int, tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    write_trace(path, made_up(devices=devices))
    head = path.read_bytes()[:24]
    width, height = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and width > 1000 and height > 300


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(layer: FusedLinear, tmp_path: Path) -> Path:
    """The page of a run with a measured ceiling and work for every lane: neither end can be used in place."""
    path = tmp_path / "run.html"
    with Pipeline(layer, devices="cpu", chunk_rows=16) as pipeline:
        pipeline.ceilings["cpu"] = Ceilings(1.0, 1.0, kernel_tflops=1e-3, origin="made up")
        x, y = np.asfortranarray(random_rows(1600, 24)), np.empty((1600, layer.out_features), np.float32, order="F")
        pipeline.run(x, y, trace=path)
    return path


@needs_bokeh
def test_page_carries_all_it_needs(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=", text), "nothing is loaded"
    assert not re.search(r"jsdelivr|unpkg|npmjs|cdnjs", text)
    assert len(text) < 4e6
    for stage, color in STAGE_COLORS.items():
        assert f"#{color:06X}" in text
        assert f"</i>{stage}</td>" in text
    assert "Bound by" in text and "of its ceiling" in text and "steady window" in text


def test_verdict_and_parts_say_what_the_report_says(layer: FusedLinear) -> None:
    cold = run_pipelined(layer, random_rows(300, 24), devices="cpu").stats
    figures = json.loads(json.dumps(cold.as_dict()))
    said = cold.bound_line()
    assert verdict(figures) == f"{said[0].upper()}{said[1:]}. To go faster: {cold.advice}."
    assert parts_text(figures) == cold.parts.text() and "set-up" in parts_text(figures)
    assert parts_text(None) == verdict(None) == ""


@pytest.mark.parametrize("name", ["bus", "reference", "staging"])
def test_records_made_before_setup_was_told_apart_are_read(name: str) -> None:
    _, stats = read_trace(PROFILES / f"{name}.record.json")
    assert stats is not None and "setup_s" not in stats
    assert verdict(stats).startswith(f"Bound by {stats['bound']}, which was busy") and parts_text(stats) == ""


def in_browser(page: Path, script: str) -> Any:
    """What `script`, run in the page once Bokeh has drawn it, hands to `done(value)`."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    harness = f"""<script>
    function done(value) {{
      const found = document.createElement("pre"); found.id = "found"; found.textContent = JSON.stringify(value);
      document.body.appendChild(found);
    }}
    window.addEventListener("error", e => done({{error: e.message}}));
    function ready() {{
      const index = window.Bokeh && Bokeh.index;
      const view = index && [...(index.roots || Object.values(index))][0];
      if (!view || !view.model.document || !view.model.document.is_idle) {{ setTimeout(ready, 50); return; }}
      setTimeout(() => {{ const plot = view.model.document.get_model_by_name("timeline"); {script} }}, 200);
    }}
    ready();
    </script>"""
    target = page.with_name("driven.html")
    target.write_text(page.read_text().replace("</body>", harness + "</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options = ["--window-size=1300,1000", "--virtual-time-budget=20000", "--dump-dom", target.as_uri()]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=100)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page didn't answer: {done.stderr[-500:]}"
    return json.loads(html.unescape(found[1]))


@needs_bokeh
def test_page_draws_every_lane_in_a_browser(page: Path) -> None:
    lanes = in_browser(page, "done(plot.renderers.map(r => [r.name, r.data_source.get_length()]));")
    assert lanes == [[f"cpu {stage}", 100] for stage in STAGES]


DEEP = """
  function deepest(x, y) {
    let node = document.elementFromPoint(x, y);
    while (node.shadowRoot) {
      const inner = node.shadowRoot.elementFromPoint(x, y);
      if (!inner || inner === node) break;
      node = inner;
    }
    return node;
  }
  function all(node, out) {
    for (const child of [...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children]) {
      out.push(child); all(child, out);
    }
    return out;
  }
  const box = all(document.body, []).filter(n => n.tagName === "CANVAS")[0].getBoundingClientRect();
  function send(kind, type, x, y, more) {
    deepest(x, y).dispatchEvent(new kind(type, {bubbles: true, composed: true, cancelable: true, clientX: x,
      clientY: y, pointerType: "mouse", isPrimary: true, ...more}));
  }
"""


@needs_bokeh
def test_page_zooms_and_fits_in_a_browser(page: Path) -> None:
    script = """
      const before = plot.x_range.end - plot.x_range.start;
      send(WheelEvent, "wheel", box.x + box.width / 2, box.y + box.height / 2, {deltaY: -240});
      setTimeout(() => done({before, after: plot.x_range.end - plot.x_range.start,
        page: document.documentElement.scrollWidth, window: window.innerWidth,
        text: document.body.innerText.slice(0, 4000)}), 400);"""
    found = in_browser(page, DEEP + script)
    assert "error" not in found, found
    assert found["after"] < 0.95 * found["before"], "the wheel zooms in time"
    assert found["page"] <= found["window"], "nothing sticks out sideways"
    for expected in ("Bound by", "of its ceiling", "waiting for", "kernel time hidden behind copies"):
        assert expected in found["text"]


@needs_bokeh
def test_page_shows_details_under_the_mouse_in_a_browser(page: Path) -> None:
    script = """
      const kernels = plot.renderers.find(r => r.name === "cpu kernel").data_source.data;
      const low = plot.y_range.start, high = plot.y_range.end;
      const middle = Math.floor(kernels.left.length / 2);
      plot.x_range.start = kernels.left[middle]; plot.x_range.end = kernels.right[middle];
      setTimeout(() => {
        const frame = Bokeh.index.roots[0].child_views[0].frame.bbox;
        const y = box.y + frame.top + frame.height * (high - (kernels.top[middle] + kernels.bottom[middle]) / 2)
          / (high - low);
        send(PointerEvent, "pointermove", box.x + frame.left + frame.width / 2, y, {});
        setTimeout(() => done(all(document.body, []).filter(n => (n.className || "").includes("bk-Tooltip"))
          .map(n => n.shadowRoot ? n.shadowRoot.textContent : n.textContent)), 400);
      }, 400);"""
    (text,) = in_browser(page, DEEP + script)
    for expected in ("cpu kernel", "chunk", "50", "took", "us"):
        assert expected in text
