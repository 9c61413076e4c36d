"""`pipeline info`: devices, the kernels they get, versions, caches, and what was measured."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from pipeline import __version__
from pipeline.cli.parser import Commands
from pipeline.cli.shell import one_line
from pipeline.errors import DeviceError


def add_commands(commands: Commands) -> None:
    commands.add("info", _info, "Show devices, the kernels they get, versions and caches.")


def _gpu_info(ordinal: int) -> dict[str, Any]:
    """What one GPU is, and the kernel that each type and precision gets there (selected, not compiled)."""
    from pipeline.dtypes import BFLOAT16, FLOAT16, FLOAT32
    from pipeline.kernels.choose import Problem, select
    from pipeline.kernels.launch import Launcher

    try:
        gpu = Launcher.for_device(ordinal)
    except DeviceError as error:
        return {"error": one_line(error)}
    kernels = {}
    for dtype, precision in ((FLOAT32, "fp32"), (FLOAT32, "ieee"), (FLOAT32, "tf32"), (BFLOAT16, ""), (FLOAT16, "")):
        problem = Problem(dtype, dtype, precision or dtype.name, 4096, 4096)
        chosen = select(gpu.arch, problem, 4096, 16, multiprocessors=gpu.multiprocessors)
        kernels[f"{dtype} {precision}".strip()] = chosen.description
    info = {"name": gpu.name, "arch": gpu.arch, "multiprocessors": gpu.multiprocessors}
    info["free_bytes"], info["memory_bytes"] = gpu.memory_bytes()
    torch_version, torch_cuda = _torch_versions()
    if torch_cuda == "none":
        info["note"] = f"torch {torch_version} has no CUDA: files and host arrays stream, CUDA tensors can't be used"
    return {**info, "kernels": kernels}


def _torch_versions() -> tuple[str, str]:
    """torch's version and that of its CUDA, as torch.version has them: importing torch takes seconds."""
    from importlib.metadata import PackageNotFoundError, distribution
    from runpy import run_path

    try:
        path = distribution("torch").locate_file("torch/version.py")
        about = run_path(str(path))
    except (PackageNotFoundError, OSError):
        return "not installed", "none"
    return str(about["__version__"]), about["cuda"] or "none"


def collect() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    from pipeline import config
    from pipeline.devices.cuda import count_gpus
    from pipeline.devices.names import open_device
    from pipeline.kernels.cache import kept_bytes
    from pipeline.tuning import tune

    versions = {"pipeline": __version__, "python": sys.version.split()[0]}
    for package in ("numpy", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"], versions["torch's CUDA"] = _torch_versions()
    devices: dict[str, Any] = {}
    try:
        devices = {f"cuda:{i}": _gpu_info(i) for i in range(count_gpus())}
    except DeviceError as error:  # there is a driver, and it doesn't work
        devices["cuda"] = {"error": one_line(error)}
    cpu = open_device("cpu")
    devices["cpu"] = {"name": cpu.description, "kernels": {"all": f"torch {versions['torch']} and NumPy"}}
    cpu.close()
    names = [f"{gpu['name']} ({gpu['arch']})" for gpu in devices.values() if "arch" in gpu]
    measured = tune.known(tune.machine_facts(names)) if names else None
    staging = config.Staging.chosen(None if measured is None else measured.staging())
    sizes = kept_bytes(config.cache_dir() / "kernels")
    return {
        "versions": versions,
        "devices": devices,
        "cache": {"path": str(config.cache_dir()), "kernels": len(sizes), "bytes": sum(sizes)},
        "host": {
            "copy_workers": staging.workers,
            "piece_bytes": staging.piece_bytes,
            "ring_pieces": staging.ring_pieces,
            "origin": staging.origin,
            "measured": asdict(measured) if measured is not None else None,
        },
    }


def _info(args: argparse.Namespace) -> int:
    info = collect()
    if args.json:
        print(json.dumps(info))
    else:
        _print(info)
    return 0


def _print(info: dict[str, Any]) -> None:
    print(", ".join(f"{name} {version}" for name, version in info["versions"].items()))
    if next(iter(info["devices"])) == "cpu":
        print("no NVIDIA GPU is visible: runs take the CPU")
    for name, device in info["devices"].items():
        about = [device.get("name", device.get("error"))]
        if "arch" in device:
            about.append(f"{device['arch']}, {device['multiprocessors']} multiprocessors")
        if "memory_bytes" in device:
            about.append(f"{device['free_bytes'] / 2**30:.1f} of {device['memory_bytes'] / 2**30:.1f} GiB free")
        print(f"{name}: {'; '.join([*about, *filter(None, [device.get('note')])])}")
        for data, kernel in device.get("kernels", {}).items():
            print(f"  {data:<14}{kernel}")
    cache, host = info["cache"], info["host"]
    print(f"cache: {cache['path']}, {cache['kernels']} kernels, {cache['bytes'] / 2**20:.1f} MiB")
    print(
        f"host path: {host['copy_workers']} copy workers, {host['ring_pieces']} pinned pieces of "
        f"{host['piece_bytes'] / 2**20:g} MiB in each direction; {host['origin']}"
    )
    if host["measured"] is not None:
        measured = host["measured"]
        raised = f", raised by a run at {measured['raised']}" if measured["raised"] else ""
        print(
            f"GB/s each way{raised}: {measured['duplex_gb_per_s']:.1f} with pinned memory at both ends, "
            f"{measured['staged_gb_per_s']:.1f} with ordinary memory, the copy workers alone "
            f"{measured['host_gb_per_s']:.1f}"
        )
