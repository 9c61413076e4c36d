"""`pipeline info`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import pipeline
from pipeline.cli import main
from pipeline.errors import DeviceNotFoundError


def test_info_describes_the_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIPELINE_CACHE_DIR", str(tmp_path))
    entry = tmp_path / "kernels" / "abcdef.kernel"
    entry.parent.mkdir()
    entry.write_bytes(bytes(1000))
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["pipeline"] == pipeline.__version__
    assert info["cache"] == {"path": str(tmp_path), "kernels": 1, "bytes": 1000}
    assert set(info["host"]) == {"copy_workers", "piece_bytes", "ring_pieces", "origin", "measured"}
    assert "cpu" in info["devices"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"cache: {tmp_path}, 1 kernels" in text and "copy workers, 4 pinned pieces of 8 MiB" in text


class FakeLauncher:
    """What `pipeline info` reads of a GPU."""

    name, arch, multiprocessors = "NVIDIA Test", "sm_90a", 132

    @classmethod
    def for_device(cls, ordinal: int) -> FakeLauncher:
        if ordinal == 1:
            raise DeviceNotFoundError("an old GPU; use devices='cpu'")
        return cls()

    def memory_bytes(self) -> tuple[int, int]:
        return 2**30, 2**32


def test_info_names_the_kernel_of_each_precision(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.devices.cuda.count_gpus", lambda: 2)
    monkeypatch.setattr("pipeline.kernels.launch.Launcher", FakeLauncher)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "cuda:0: NVIDIA Test; sm_90a, 132 multiprocessors; 1.0 of 4.0 GiB free" in text
    for data in ("float32 fp32", "float32 ieee", "float32 tf32", "bfloat16", "float16"):
        assert re.search(rf"^  {data} +fused_linear_(sm90|split_sm90|simt)<", text, re.MULTILINE), text
    assert "cuda:1: an old GPU; use --devices cpu" in text
    assert "no NVIDIA GPU" not in text


def test_info_survives_a_broken_driver(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise DeviceNotFoundError("cuInit failed: CUDA_ERROR_UNKNOWN")

    monkeypatch.setattr("pipeline.devices.cuda.count_gpus", broken)
    assert main(["info"]) == 0
    assert "cuda: cuInit failed: CUDA_ERROR_UNKNOWN" in capsys.readouterr().out
