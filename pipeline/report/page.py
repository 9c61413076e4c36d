"""A timeline as one self-contained HTML page: zoom, hover for details, stage tables, the bound. Drawn with Bokeh (extra
"plot"), whose JavaScript the page carries; it loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from pipeline.instrument import STAGES
from pipeline.report.picture import (
    CHUNKS,
    COLORS,
    NOTHING,
    DrawnLane,
    drawn_lanes,
    excerpt,
    headline,
    parts_text,
    uses_of,
    verdict,
    within,
)
from pipeline.report.stages import rate_text
from pipeline.report.timeline import DeviceUse, Timeline, causes_text

_MEANINGS = {
    "fill": "copies from the source into pinned memory",
    "H2D": "copies to the device",
    "kernel": "the fused layer",
    "D2H": "copies back to the host",
    "drain": "copies from pinned memory to the output",
}
_MOST_OPERATIONS = 12_000  # about 2 MB


def _what_ran(stats: dict[str, Any]) -> str:
    devices = ", ".join(f"{name} ({hardware})" for name, hardware in stats["devices"].items())
    return (
        f"{stats['kernel']} on {devices}; {stats['chunks']:,} chunks of up to {stats['chunk_rows']:,} rows, "
        f"{stats['num_streams']} streams; {stats['copy_workers']}"
    )


def draw_html(path: Path, timeline: Timeline, stats: dict[str, Any] | None) -> None:
    """A page with the timeline (wheel to zoom, drag to move, hover for details), the stage table and the bound. It
    loads nothing from elsewhere."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    uses = uses_of(timeline)
    if not uses:
        path.write_text(f'<!DOCTYPE html>\n<html lang="en"><title>pipeline timeline</title><p>{NOTHING}</p></html>\n')
        return
    figure, shown = _bokeh_figure(timeline)
    script, div = components(figure, wrap_script=True)
    # NOTE: Bokeh names web addresses from which it would load MathJax and icon fonts; this page uses neither, and must
    # not reach for them.
    library = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    for address in _WEB_FONTS:
        library = library.replace(address, "")
    total = sum(len(operations) for operations in timeline.devices.values())
    notes = [f"Read from the {timeline.origin}."]
    if shown < total:
        notes.append(f"The timeline shows {shown:,} of {total:,} operations, those in the middle of the run.")
    if timeline.dropped:
        notes.append(f"The earliest {timeline.dropped:,} operations were not kept.")
    legend = "".join(f'<li><i style="background:{COLORS[s]}"></i><b>{s}</b> {_MEANINGS[s]}</li>' for s in STAGES)
    body = [
        f"<h1>{escape(headline(timeline, stats))}</h1>",
        f"<p>{escape(parts_text(stats))}</p>" if parts_text(stats) else "",
        f'<p id="verdict">{escape(verdict(stats))}</p>',
        f'<p class="kernel">{escape(_what_ran(stats))}</p>' if stats else "",
        f'<ul class="legend">{legend}</ul>',
        "<p>Wheel: zoom in time. Drag: move. Hover over an operation for its chunk, time, bytes and rate. "
        "The reset button shows all again.</p>",
        div,
        *(_use_table(device, timeline.hardware.get(device, ""), use) for device, use in uses.items()),
        _stage_table(stats) if stats else "",
        f'<p class="notes">{escape(" ".join(notes))}</p>',
    ]
    head = f"<title>pipeline timeline</title><style>{_STYLE}</style><script>{library}</script>"
    page = f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{head}</head>\n<body>{"".join(body)}{script}'
    path.write_text(f"{page}</body></html>\n", encoding="utf-8")


_WEB_FONTS = (
    "https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-svg.js",
    "https://cdn.jsdelivr.net/npm/@tabler/icons-webfont@latest",
)
_STYLE = """
body { font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; margin: 1.5em auto; max-width: 1240px; padding: 0 1em;
       color: #222; }
h1 { font-size: 1.25em; margin: 0 0 .3em; } h2 { font-size: 1.05em; margin: 1.4em 0 .3em; }
p { margin: .3em 0; } .notes, .kernel { color: #555; }
table { border-collapse: collapse; } th, td { padding: .2em .9em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2em 1.4em; }
.legend i, td i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
"""


def _bokeh_figure(timeline: Timeline) -> tuple[Any, int]:
    """The timeline as a Bokeh layout, and how many operations it shows."""
    from bokeh.layouts import column
    from bokeh.models import Range1d, RangeTool, WheelZoomTool
    from bokeh.plotting import figure

    busiest = max(timeline.devices.values(), key=len)
    start_s, end_s = min(i.start_s for i in busiest), max(i.end_s for i in busiest)
    total = sum(len(operations) for operations in timeline.devices.values())
    if total > _MOST_OPERATIONS:
        middle, half = (start_s + end_s) / 2, (end_s - start_s) / 2 * _MOST_OPERATIONS / total
        start_s, end_s = middle - half, middle + half
    devices = within(timeline, start_s, end_s)
    lanes = drawn_lanes(devices)
    first_s, last_s = excerpt([i for operations in devices.values() for i in operations], 3 * CHUNKS)
    x_range = Range1d(first_s * 1e3, last_s * 1e3, bounds=(start_s * 1e3, end_s * 1e3))
    y_range = Range1d(lanes[-1].low - 0.2, 0.1)
    wheel = WheelZoomTool(dimensions="width")
    plot = figure(
        height=int(110 - 62 * lanes[-1].low),
        sizing_mode="stretch_width",
        x_range=x_range,
        y_range=y_range,
        tools=["xpan", "xbox_zoom", "reset", "save"],
        active_drag="xpan",
        x_axis_label="ms from the start of the run",
        name="timeline",
    )
    plot.add_tools(wheel)
    plot.toolbar.active_scroll = wheel
    plot.toolbar.logo = None
    overview = figure(
        height=90, sizing_mode="stretch_width", x_range=(start_s * 1e3, end_s * 1e3), y_range=y_range, tools=""
    )
    overview.add_tools(RangeTool(x_range=x_range, start_gesture="pan"))
    overview.toolbar_location = None
    overview.yaxis.visible = False
    overview.title.text = "the whole of it: drag the window"
    overview.title.text_font_size = "11px"
    shown = sum(_draw_lane(plot, overview, lane) for lane in lanes)
    _label_lanes(plot, lanes, many_devices=len(devices) > 1)
    for each in (plot, overview):
        each.ygrid.visible = False
        each.outline_line_color = None
    return column(plot, overview, sizing_mode="stretch_width"), shown


def _draw_lane(plot: Any, overview: Any, lane: DrawnLane) -> int:
    """Draw a lane's operations in both figures, and give how many they are."""
    from bokeh.models import ColumnDataSource, HoverTool

    boxes = list(lane.boxes())
    source = ColumnDataSource(
        {
            "left": [i.start_s * 1e3 for i, _, _ in boxes],
            "right": [i.end_s * 1e3 for i, _, _ in boxes],
            "bottom": [low for _, low, _ in boxes],
            "top": [high for _, _, high in boxes],
            "chunk": [i.chunk for i, _, _ in boxes],
            "us": [(i.end_s - i.start_s) * 1e6 for i, _, _ in boxes],
            "MB": [i.bytes / 1e6 for i, _, _ in boxes],
            "rate": [i.bytes / max(i.end_s - i.start_s, 1e-9) / 1e9 for i, _, _ in boxes],
            "alpha": [1.0 if i.chunk % 2 else 0.62 for i, _, _ in boxes],
        }
    )
    edges = {edge: edge for edge in ("left", "right", "bottom", "top")}
    look = {"fill_color": COLORS[lane.stage], "line_color": "white", "line_width": 0.5, "fill_alpha": "alpha"}
    name = f"{lane.device} {lane.stage}"
    drawn = plot.quad(source=source, name=name, **edges, **look)
    overview.quad(source=source, fill_color=COLORS[lane.stage], line_color=None, **edges)
    details = [("chunk", "@chunk"), ("from", "@left{0,0.000} ms"), ("took", "@us{0,0.0} us")]
    if lane.stage != "kernel" and any(i.bytes for i, _, _ in boxes):
        details += [("moved", "@MB{0,0.00} MB"), ("rate", "@rate{0.0} GB/s")]
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=[(name, ""), *details], point_policy="follow_mouse"))
    return len(boxes)


def _label_lanes(plot: Any, lanes: Sequence[DrawnLane], *, many_devices: bool) -> None:
    from bokeh.models import FixedTicker

    middles = {
        (lane.low + lane.high) / 2: f"{lane.device} {lane.stage}" if many_devices else lane.stage for lane in lanes
    }
    plot.yaxis.ticker = FixedTicker(ticks=list(middles))
    plot.yaxis.major_label_overrides = middles
    plot.yaxis.major_tick_line_color = None
    plot.yaxis.major_label_text_font_size = "13px"


def _use_table(device: str, hardware: str, use: DeviceUse) -> str:
    """Each lane's use in the steady window as an HTML table."""
    rows = "".join(
        f'<tr><td><i style="background:{COLORS[stage]}"></i>{stage}</td><td>{lane.count:,}</td>'
        f"<td>{lane.busy_s * 1e3:,.1f}</td><td>{lane.busy_share:.1%}</td><td>{1 - lane.busy_share:.1%}</td>"
        f"<td>{lane.longest_wait_s * 1e3:,.2f}</td><td>{escape(causes_text(lane.waiting_shares))}</td></tr>"
        for stage, lane in use.lanes.items()
        if lane.count
    )
    return (
        f"<h2>{escape(device)} {escape(hardware)}: steady window of {(use.end_s - use.start_s) * 1e3:,.1f} ms</h2>"
        f'<table class="use"><tr><th>lane</th><th>operations</th><th>busy ms</th><th>busy</th><th>waiting</th>'
        f"<th>longest wait, ms</th><th>waiting for</th></tr>{rows}</table>"
        f"<p>{escape('; '.join(use.hidden_texts()))}</p>"
    )


def _stage_table(stats: dict[str, Any]) -> str:
    """All of the run's stages against their ceilings as an HTML table."""
    rows = []
    for name, stage in stats["stages"].items():
        if stage["count"]:
            ceiling = "not measured" if stage["ceiling"] is None else rate_text(name, stage["ceiling"])
            share = "" if stage["ceiling_share"] is None else f"{stage['ceiling_share']:.0%}"
            rows.append(
                f'<tr><td><i style="background:{COLORS[name]}"></i>{name}</td><td>{stage["bytes"] / 1e9:,.2f}</td>'
                f"<td>{stage['busy_s']:,.3f}</td><td>{stage['busy_share']:.0%}</td>"
                f"<td>{rate_text(name, stage['rate'])}</td><td>{share}</td><td>{ceiling}</td></tr>"
            )
    return (
        '<h2>While rows moved, against the ceilings</h2><table class="stages"><tr><th>stage</th><th>GB</th>'
        "<th>busy s</th><th>busy</th><th>rate</th><th>of its ceiling</th><th>ceiling</th></tr>"
        + "".join(rows)
        + "</table>"
    )
