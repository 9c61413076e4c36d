"""`pipeline plan`: what a workload would reach on given hardware."""

from __future__ import annotations

import argparse
import json

from pipeline.cli.parser import Commands, add_options, count, gb_per_s, options_of
from pipeline.options import PLAN_OPTIONS


def add_commands(commands: Commands) -> None:
    plan = commands.add("plan", _plan, "Predict rate, bound, memory and time of a job on given hardware.")
    plan.add_argument("--rows", type=count, required=True, metavar="N")
    plan.add_argument("--in", type=count, required=True, metavar="N", dest="in_features", help="in_features")
    plan.add_argument("--out", type=count, required=True, metavar="N", dest="out_features", help="out_features")
    plan.add_argument("--gpu", default="h200", metavar="NAME", help="a shipped machine, or a .json (default h200)")
    plan.add_argument("--gpus", type=count, default=1, metavar="N", help="of all hosts together (default 1)")
    plan.add_argument("--hosts", type=count, default=1, metavar="N", help="(default 1)")
    plan.add_argument("--dtype", default="float32", help="(default float32)")
    plan.add_argument("--precision", help="for float32 data: fp32 (default), ieee or tf32")
    where = "where the rows are: pinned, array or file (default array)"
    plan.add_argument("--source", default="array", metavar="WHERE", help=where)
    to = "where the result goes: pinned, array, file, or fresh, a new array (default array)"
    plan.add_argument("--to", default="array", metavar="WHERE", help=to)
    add_options(plan, PLAN_OPTIONS)
    shared = "files lie on shared storage: GB/s that all hosts together read and write there"
    plan.add_argument("--storage-gb-per-s", type=gb_per_s, metavar="X", help=shared)
    network = "files lie on shared storage: GB/s each way of a host's network"
    plan.add_argument("--network-gb-per-s", type=gb_per_s, metavar="X", help=network)


def _plan(args: argparse.Namespace) -> int:
    from pipeline.dtypes import parse_dtype, parse_precision
    from pipeline.kernels.choose import Problem, runs_as
    from pipeline.plan.machine import Machine
    from pipeline.plan.predict import predict
    from pipeline.plan.workload import Workload

    options = options_of(args, PLAN_OPTIONS)
    dtype = parse_dtype(args.dtype, "dtype")
    precision = parse_precision(args.precision, dtype)
    wire, wire_out = options.wire_dtypes(dtype, precision)
    problem = Problem(wire, wire_out, precision if wire is dtype else wire.name, args.in_features, args.out_features)
    machine = Machine.load(args.gpu)
    work = Workload(
        args.rows,
        args.in_features,
        args.out_features,
        dtype,
        runs_as(problem, machine.architecture),
        source=args.source,
        out=args.to,
        gpus=args.gpus,
        hosts=args.hosts,
        options=options,
        storage_gb_per_s=args.storage_gb_per_s,
        network_gb_per_s=args.network_gb_per_s,
    )
    prediction = predict(work, machine)
    if args.json:
        print(json.dumps(prediction.as_dict()))
    else:
        print(*prediction.lines(), sep="\n")
    return 0
