"""What a launcher loads, and when. A stand-in for the driver takes the machine code."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.dtypes import BFLOAT16, FLOAT32
from pipeline.errors import CompileError
from pipeline.kernels import launch
from pipeline.kernels.choose import Problem, Variant, all_variants
from pipeline.kernels.compile import CompiledKernel, PtxasReport
from pipeline.kernels.fused_layer import describe
from pipeline.kernels.launch import Launcher

FP32 = Problem(FLOAT32, FLOAT32, "fp32", 4096, 4096)


class Compiler:
    """Stands for `compile_variant`, and remembers what it was asked for. `together` compilations await each other."""

    def __init__(self, together: int = 1) -> None:
        self.compiled: list[Variant] = []
        self.fails_for = ""
        self._together = threading.Barrier(together, timeout=30)

    def __call__(self, variant: Variant, arch: str) -> CompiledKernel:
        self.compiled.append(variant)
        self._together.wait()
        if variant.kernel == self.fails_for:
            raise CompileError("NVRTC can't compile", "log", ())
        return CompiledKernel(variant.kernel.encode(), PtxasReport(8, 0, 0, ()))


def launcher_with(monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> Launcher:
    """The launcher of an H200 that isn't there."""
    answers = {
        "cuDeviceGetCount": lambda: 1,
        "cuDeviceGetAttribute": lambda attribute, _: {"major": 9, "minor": 0, "count": 132}[attribute],
        "cuDeviceGetName": lambda *_: b"NVIDIA H200\0",
        "cuDevicePrimaryCtxRetain": lambda _: 1,
        "cuCtxGetCurrent": lambda: 1,
        "cuModuleLoadData": lambda cubin: cubin,
        "cuModuleGetFunction": lambda module, name: (module, name),
    }
    attributes = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="count",
    )
    functions = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    api = SimpleNamespace(CUdevice_attribute=attributes, CUfunction_attribute=functions)

    def call(name: str, *arguments: Any) -> Any:
        return answers[name](*arguments) if name in answers else None

    monkeypatch.setattr(launch, "call", call)
    monkeypatch.setattr(launch, "driver", lambda: api)
    monkeypatch.setattr(launch, "compile_variant", compiler)
    return Launcher(0)


def three_variants() -> list[Variant]:
    found = {variant.kernel: variant for variant in all_variants("sm_90a")}
    return list(found.values())[:3]


def test_launcher_compiles_several_kernels_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, variants = Compiler(together=3), three_variants()
    loaded = launcher_with(monkeypatch, compiler).load_all(variants)
    assert [kernel.variant for kernel in loaded] == variants
    assert [kernel.function[1].decode() for kernel in loaded] == [variant.kernel for variant in variants]
    assert len(compiler.compiled) == 3


def test_launcher_compiles_a_kernel_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, (variant, *_) = Compiler(), three_variants()
    launcher = launcher_with(monkeypatch, compiler)
    threads = [threading.Thread(target=launcher.load, args=(variant,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.compiled == [variant]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_launcher_raises_what_any_of_several_raised(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, variants = Compiler(), three_variants()
    compiler.fails_for = variants[position].kernel
    launcher = launcher_with(monkeypatch, compiler)
    with pytest.raises(CompileError):
        launcher.load_all(variants)
    compiler.fails_for = ""
    assert len(launcher.load_all(variants)) == 3, "a failure isn't remembered"


def test_layer_of_fp32_accuracy_is_described_with_all_its_kernels_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one of them would be compiled inside the first launch of a run."""
    compiler = Compiler(together=3)
    description = describe(launcher_with(monkeypatch, compiler), FP32, 1024)
    kernels = {variant.kernel for variant in compiler.compiled}
    assert kernels == {"fused_linear_split_sm90", "split_rows", "fused_linear_simt"}
    assert any("exact rows" in variant.description for variant in compiler.compiled)
    assert description.startswith("fused_linear_split_sm90<fp32")


def test_layer_of_one_kernel_is_described_with_that_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    description = describe(launcher_with(monkeypatch, compiler), Problem(BFLOAT16, BFLOAT16, "bfloat16", 64, 64), 10)
    assert [variant.description for variant in compiler.compiled] == [description]
