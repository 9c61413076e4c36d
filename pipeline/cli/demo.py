"""`pipeline demo`: a random dataset through a layer, checked, and timed against a plain torch loop."""

from __future__ import annotations

import argparse
import json
import math

from pipeline.cli.parser import Commands, add_options, count
from pipeline.errors import PipelineError
from pipeline.kernels.start import start_gpus


def add_commands(commands: Commands) -> None:
    summary = "Stream a random dataset, check the result and time it against a plain torch loop."
    demo = commands.add("demo", _demo, summary)
    for name, default in (("rows", "65536 on a GPU, else 4096"), ("in-features", "4096, else 1024")):
        demo.add_argument(f"--{name}", type=count, metavar="N", help=f"(default {default})")
    demo.add_argument("--out-features", type=count, metavar="N", help="(default 4096, else 1024)")
    add_options(demo, ["devices"])


def _demo(args: argparse.Namespace) -> int:
    import statistics

    start_gpus(args.devices)  # before NumPy and torch are imported
    from pipeline.demo import run_demo
    from pipeline.devices.names import find_devices

    say = (lambda _: None) if args.json else print
    names = find_devices(args.devices)
    if names == ["cpu"] and args.devices is None:
        say("no NVIDIA GPU is visible: running on the CPU")
    demo = run_demo(names, args.rows, args.in_features, args.out_features, say)
    medians = {"pipeline": statistics.median(demo.seconds), "torch": statistics.median(demo.torch_seconds)}
    if args.json:
        shown = demo.error if math.isfinite(demo.error) else None  # JSON has no NaN
        check = {"rows": demo.sampled_rows, "error": shown, "bound": demo.allowed_error, "passed": demo.passed}
        compared = {"device": demo.torch_device, "median_s": medians, "ratio": demo.ratio}
        compared |= {"all_s": {"pipeline": demo.seconds, "torch": demo.torch_seconds}, "torch_error": demo.torch_error}
        print(json.dumps({"stats": demo.stats.as_dict(), "check": check, "torch_loop": compared}))
    else:
        print(*demo.stats.lines(), sep="\n")
        print(
            f"check: {'right' if demo.passed else 'WRONG'}; {demo.sampled_rows} rows against float64, largest error "
            f"{demo.error:.1e}, allowed {demo.allowed_error:.1e}"
        )
        times = {"pipeline": demo.seconds, "torch": demo.torch_seconds}
        text = {n: f"{medians[n]:.3f} s ({min(t):.3f} to {max(t):.3f})" for n, t in times.items()}
        print(f"pipeline, file to file: {text['pipeline']}")
        print(
            f"plain torch loop on {demo.torch_device}: {text['torch']}, {demo.ratio:.2f} times as long; "
            f"error {demo.torch_error:.1e}"
        )
        print(f"demo figures: median and range of {len(demo.seconds)} interleaved runs, warm, files in the page cache")
    if not demo.passed:
        raise PipelineError(
            f"the demo's result differs from the float64 reference by {demo.error:.1e}, at most "
            f"{demo.allowed_error:.1e} is rounding; run 'pipeline info' and report both"
        )
    return 0
