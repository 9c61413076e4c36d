"""Blocks of rows shared among threads: each once, errors raised, torch's own threads left as they were, same bits."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.data import assert_close, assert_same_bits, random_layer, random_rows

from pipeline import fused_gemm_sigmoid_scale_add
from pipeline.errors import uninterrupted
from pipeline.layer import host_threads


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(host_threads, "cores", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("count", [0, 1, 2, 37])
@pytest.mark.parametrize("threads", [1, 2, 9])
def test_each_start_is_computed_once(count: int, threads: int) -> None:
    done: list[int] = []
    host_threads.each(done.append, range(0, 5 * count, 5), threads)
    assert sorted(done) == list(range(0, 5 * count, 5))


def test_interrupt_while_work_is_handed_out_waits_for_what_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, submitted, running = host_threads._Pool.submit, [0], [0]
    begun = threading.Event()

    def interrupted(pool: host_threads._Pool, work: Any) -> Any:
        submitted[0] += 1
        if submitted[0] == 2:
            assert begun.wait(5)
            raise KeyboardInterrupt
        return submit(pool, work)

    def compute(start: int) -> None:
        running[0] += 1
        begun.set()
        time.sleep(0.1)
        running[0] -= 1

    monkeypatch.setattr(host_threads._Pool, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host_threads.each(compute, range(100), 2)
    assert running == [0] and submitted == [2]


def test_what_must_not_be_left_half_done_goes_on_through_interrupts() -> None:
    calls: list[int] = []

    def do() -> None:
        calls.append(len(calls))
        if len(calls) < 3:
            raise KeyboardInterrupt(len(calls))

    with pytest.raises(KeyboardInterrupt, match="1"):
        uninterrupted(do)
    assert calls == [0, 1, 2]


def test_error_is_raised_once_nothing_runs_any_more() -> None:
    running = [0]

    def compute(start: int) -> None:
        if start == 3:
            raise ValueError("block 3")
        running[0] += 1
        time.sleep(0.01)
        running[0] -= 1

    with pytest.raises(ValueError, match="block 3"):
        host_threads.each(compute, range(100), 2)
    assert running == [0]
    done: list[int] = []
    host_threads.each(done.append, range(4), 2)
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("with_mkl", [True, False])
def test_single_task_has_one_thread_for_its_product(with_mkl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the calling thread, or where torch has no MKL in one of the pool."""
    set_mkl_threads = host_threads._mkl_threads()
    if not with_mkl:
        monkeypatch.setattr(host_threads, "_mkl_threads", lambda: None)
    elif set_mkl_threads is None:
        pytest.skip("torch without MKL")
    here: list[bool] = []

    def compute(fails: bool) -> None:
        here.append(threading.current_thread() is threading.main_thread())
        assert set_mkl_threads(1) == 1 if with_mkl and set_mkl_threads else torch.get_num_threads() == 1
        if fails:
            raise ValueError

    host_threads.each(compute, [False], 2)
    with pytest.raises(ValueError):
        host_threads.each(compute, [True], 2)
    assert here == [with_mkl] * 2 and torch.get_num_threads() == 2
    if set_mkl_threads is not None:
        assert set_mkl_threads(2) == 2  # as the fixture's torch.set_num_threads left it


def test_few_tasks_dont_wait_for_the_end_of_many() -> None:
    done: list[int] = []
    begun = threading.Event()

    def compute(task: int) -> None:
        begun.set()
        time.sleep(0.01)
        done.append(task)

    many = threading.Thread(target=host_threads.each, args=(compute, range(100), 2))
    many.start()
    begun.wait()
    host_threads.each(lambda _: None, range(2), 2)
    assert len(done) < 50
    many.join()
    assert len(done) == 100


def test_torchs_own_threads_stay_as_they_were() -> None:
    counts: list[int] = []
    host_threads.each(lambda _: counts.append(torch.get_num_threads()), range(8), 2)
    fresh = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert counts == [1] * 8 + [2] and torch.get_num_threads() == 2


def test_thread_that_first_uses_torch_while_the_pool_is_made_has_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the CPU device's second thread for products may."""
    monkeypatch.setattr(host_threads, "_pools", {})
    counts: list[int] = []
    fresh = threading.Thread(target=lambda: counts.append(host_threads.torch_threads()))
    set_num_threads = torch.set_num_threads

    def set_and_ask(count: int) -> None:
        set_num_threads(count)
        if fresh.ident is None:
            fresh.start()
            fresh.join(0.2)

    monkeypatch.setattr(torch, "set_num_threads", set_and_ask)
    host_threads.each(lambda _: None, range(8), 2)
    fresh.join()
    assert counts == [2]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 65, 700, 1500])
def test_bits_dont_depend_on_threads(dtype: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = random_layer(96, 80, dtype), random_rows(rows, 96, dtype)
    shared = layer(x)
    torch.set_num_threads(1)
    assert_same_bits(shared, layer(x))
    monkeypatch.setattr(host_threads, "_mkl_threads", lambda: None)
    assert_same_bits(shared, layer(x))
    assert_close(shared, layer, x)


def test_torch_op_shares_rows_under_every_mode_of_the_caller() -> None:
    a, b, c = torch.randn(300, 40), torch.randn(30, 40), torch.randn(30)
    expected = fused_gemm_sigmoid_scale_add(a, b, c, 2.0)
    with torch.inference_mode():
        assert torch.equal(fused_gemm_sigmoid_scale_add(a, b, c, 2.0), expected)
    with torch.autocast("cpu"):  # rounds the operands
        rounded = fused_gemm_sigmoid_scale_add(*(tensor.bfloat16() for tensor in (a, b, c)), 2.0)
        assert torch.equal(fused_gemm_sigmoid_scale_add(a, b, c, 2.0), rounded)
    a.requires_grad_()
    fused_gemm_sigmoid_scale_add(a, b, c, 2.0).sum().backward()
    assert a.grad is not None


def _compute_in_child(results: multiprocessing.SimpleQueue[list[int]]) -> None:
    done: list[int] = []
    host_threads.each(done.append, range(8), 2)
    results.put(sorted(done))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_process_has_threads_of_its_own() -> None:
    host_threads.each(lambda _: None, range(4), 2)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_compute_in_child, args=(results,))
    child.start()
    child.join(30)
    assert child.exitcode == 0 and results.get() == list(range(8))
