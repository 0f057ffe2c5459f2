"""The GPU benchmark of attention without a GPU: its cases, predictions and peers, and its whole path on CPU tensors."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench.kernels import attention_peers, bench_mixed_attention, gpu_attention, predicted, schedules
from bench.kernels.attention_cases import (
    CENTRE,
    SPLIT_HEADS,
    Batch,
    Case,
    cache_bytes,
    cases,
    flops_and_bytes,
    kind_cases,
    make_batch,
    sweep,
    sweep_case,
)
from bench.lib.device_clock import CudaClock, Roofs, measure_roofs, time_launches
from mixattn.compat import flashinfer as our_flashinfer

CPU = torch.device("cpu")
TINY = Case("tiny", 3, 40, 9, 40, num_q_heads=4, num_kv_heads=2, head_dim=64)
DEVICE = gpu_attention.Device(CPU, "a CPU", "none", (9, 0), 132, 8 << 30, 0)


def wall_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


@pytest.fixture(scope="module")
def tiny_batch() -> Batch:
    return make_batch(TINY, torch.bfloat16, CPU)


def test_sweep_has_every_axis_through_the_centre_and_full_their_product() -> None:
    short, full = sweep(False), sweep(True)
    centre = sweep_case(*CENTRE)
    assert short.pop() == full.pop() == SPLIT_HEADS
    assert short[0] == centre and centre not in short[1:]
    assert len({case.name for case in full}) == len(full)
    assert set(short) < set(full)
    for field, values in (
        ("chunk", {128, 256, 512, 1024, 2048, 4096}),
        ("num_decodes", {1, 4, 16, 32, 64, 128, 256}),
        ("decode_kv", {1024, 4096, 16384, 65536, 131072}),
        ("head_dim", {64, 128, 256}),
        ("group_size", {1, 4, 8}),
        ("kv_dtype", {"auto", "fp8_e4m3"}),
    ):
        assert {getattr(case, field) for case in short} == values
        assert {getattr(case, field) for case in full} == values
    assert all(case.chunk <= case.chunk_kv for case in full)


def test_needed_bytes_are_those_of_the_tensors_and_of_the_draw() -> None:
    case = sweep_case(*CENTRE)
    assert case is not None
    caches = 2 * 33 * 4096 * 8 * 128 * 2
    rows = 2 * (32 + 512) * 32 * 128 * 2
    assert gpu_attention.needed_bytes(case) == caches + rows
    # float8: half as much, while one of the two is still there in bfloat16.
    assert gpu_attention.needed_bytes(replace(case, kv_dtype="fp8_e4m3")) == caches // 2 + caches // 2 + rows


def test_case_that_does_not_fit_is_skipped_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    small = replace(DEVICE, free_bytes=gpu_attention.RESERVED_BYTES + gpu_attention.needed_bytes(TINY))
    assert gpu_attention.why_not_here(TINY, small) is None
    large = replace(TINY, name="large", num_decodes=4)
    runner = gpu_attention.Sweep(small, gpu_attention.Options(("triton",), (), 1), wall_clock, Roofs(1.0, 1.0))
    runner.run([large])
    assert "large" in capsys.readouterr().out.splitlines()[1]
    assert gpu_attention.why_not_here(large, small) == "needs 3.0 GiB of the 3.0 GiB that are free"


@pytest.mark.parametrize("gpu", predicted.GPUS, ids=lambda gpu: gpu.name)
def test_prediction_is_the_plans_own_cost(gpu: predicted.PredictedGpu) -> None:
    case = sweep_case(*CENTRE)
    assert case is not None
    ours, *others = predicted.predict(case, gpu)
    cost = predicted.plan_of(case, predicted.hardware_of(case, gpu.base, gpu.num_sms, gpu.capability)).cost
    assert ours.predicted_us == pytest.approx(cost.predicted_s * 1e6)
    assert (ours.imbalance, ours.headroom) == (cost.imbalance, cost.headroom)
    # The two prices of one schedule differ by what each takes for partial results.
    assert ours.bound_us == pytest.approx(ours.predicted_us, rel=0.05)
    assert {one.schedule for one in others} == ({"FA3", "vLLM", "FlashInfer"} if gpu.name == "H100" else {"FlashInfer"})
    assert all(one.predicted_us is None and one.headroom >= 1.0 and one.imbalance >= 1.0 for one in others)
    other_heads = predicted.predict(replace(case, head_dim=64), gpu)
    assert [one.schedule for one in other_heads] == ["mixattn"]


def test_headroom_of_a_schedule_is_what_overlap_of_its_units_could_win() -> None:
    shape, gpu = schedules.Shape(4, 1), schedules.H100_GPU
    compute, memory = schedules.Unit(0, 4096, 512), schedules.Unit(1, 16, 8192)
    made = schedules.Schedule([compute, memory], 1)
    compute_s = 4 * 128 * 4096 * 512 / gpu.flops_per_s
    memory_s = 2 * 128 * 2 * 8192 / gpu.bytes_per_s
    bound = schedules.bound_of(made, [(4096, 512), (1, 8192)], shape)
    assert bound.headroom == pytest.approx((compute_s + memory_s) / max(compute_s, memory_s))
    assert schedules.bound_of(schedules.Schedule([compute], 1), [(4096, 512)], shape).headroom == 1.0


@pytest.mark.parametrize("gpu", predicted.GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("case", [*sweep(False), *cases()], ids=lambda case: case.name)
def test_kinds_add_up_to_the_plan_and_each_has_a_batch_of_its_own(case: Case, gpu: predicted.PredictedGpu) -> None:
    hardware = predicted.hardware_of(case, gpu.base, gpu.num_sms, gpu.capability)
    made = predicted.plan_of(case, hardware)
    costs = predicted.kind_costs(made, case)
    assert sum(cost.flops for cost in costs) == made.cost.flops
    assert sum(cost.bytes for cost in costs) == made.cost.bytes
    assert sum(cost.num_items for cost in costs) == made.num_items
    for kind, kind_case in kind_cases(case).items():
        assert [one.kind for one in predicted.kind_costs(predicted.plan_of(kind_case, hardware), kind_case)] == [kind]


def test_without_a_gpu_the_table_is_called_predicted_and_the_status_is_77(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = tmp_path / "records.jsonl"
    arguments = [
        "bench",
        "--backend",
        "triton",
        "cuda",
        "--cases",
        "mixed-32x4k-chunk-512-hd128",
        "--json",
        str(record),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert bench_mixed_attention.main() == 77
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("No GPU: ") and "nothing is measured" in lines[0]
    assert lines[1].startswith("PREDICTED, not measured")
    assert not record.exists()
    rows = [line.split() for line in lines if line.startswith("mixed-32x4k-chunk-512-hd128-gqa4 ")]
    assert [row[1:3] for row in rows] == [
        ["H100", "mixattn"], ["H100", "FA3"], ["H100", "vLLM"], ["H100", "FlashInfer"], ["A100", "mixattn"],
        ["A100", "FlashInfer"],
    ]  # fmt: skip
    assert all((row[3] == "-") == (row[2] != "mixattn") for row in rows)
    kinds = [line.split() for line in lines if "/" in line.split()[0]]
    assert [row[0].rsplit("/")[-1] for row in kinds] == ["large", "medium", "small"] * 2
    assert all(row[-1] == "-" for row in kinds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "cpu", "triton"], "--backend must be cpu alone"),
        (["--backend", "triton", "--launches", "0"], "--launches must be >= 1, got 0"),
    ],
    ids=["mixed", "launches"],
)
def test_main_refuses_what_cannot_be_run(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    with pytest.raises(SystemExit):
        bench_mixed_attention.main()
    assert message in capsys.readouterr().err


def test_profile_of_an_unknown_case_names_one_that_is_known() -> None:
    with pytest.raises(ValueError, match=r"--profile must name a case, such as mixed-.*, got 'nothing'"):
        gpu_attention.named_case("nothing")


def expected(batch: Batch) -> Tensor:
    """By torch, sequence by sequence, from rows read out of the pages one by one."""
    case, outs = batch.case, []
    k_cache, v_cache = batch.real_caches()
    for seq_idx, rows in enumerate(batch.q.float().split(case.q_lens)):
        kv_len = case.kv_lens[seq_idx]
        pages = batch.block_table[seq_idx].long()
        k, v = (
            torch.stack([cache[pages[j // case.page_size], j % case.page_size] for j in range(kv_len)]).float()
            for cache in (k_cache, v_cache)
        )
        k, v = (x.repeat_interleave(case.group_size, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", rows, k) * case.head_dim**-0.5
        mask = torch.ones(len(rows), kv_len, dtype=torch.bool).tril(kv_len - len(rows))
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hij,jhd->ihd", weights, v))
    return torch.cat(outs)


def our_pod_module() -> SimpleNamespace:
    """BatchPOD's interface, over two of our BatchPrefill."""

    class Pod:
        def __init__(self, workspace: Tensor, kv_layout: str) -> None:
            self.halves = [our_flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, kv_layout) for _ in range(2)]

        def plan(self, *arguments: object, **dtypes: torch.dtype) -> None:
            for half, indices in zip(self.halves, (arguments[:4], arguments[4:8]), strict=True):
                half.plan(*indices, *arguments[8:], causal=True, **dtypes)  # type: ignore[arg-type]

        def run(self, q_p: Tensor, kv_p: object, q_d: Tensor, kv_d: object, causal_p: bool) -> tuple[Tensor, ...]:
            assert causal_p
            return self.halves[0].run(q_p, kv_p), self.halves[1].run(q_d, kv_d)  # type: ignore[arg-type,return-value]

    return SimpleNamespace(BatchPODWithPagedKVCacheWrapper=Pod)


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_peers, "FLASHINFER_WORKSPACE_BYTES", 16)


@pytest.mark.usefixtures("small_workspace")
@pytest.mark.parametrize("changed", [{}, {"decode_q": 3}, {"v_head_dim": 32}], ids=str)
@pytest.mark.parametrize("peer", attention_peers.PEERS)
def test_peers_arguments_mean_the_same_batch(
    peer: str, changed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The drop-ins of mixattn.compat take the very arguments that the libraries do, and check them.
    batch = make_batch(replace(TINY, **changed), torch.bfloat16, CPU)
    monkeypatch.setitem(sys.modules, "our_pod", our_pod_module())
    modules = {
        "flash-attn-2": "mixattn.compat.flash_attn",
        "flash-attn-3": "mixattn.compat.flash_attn_interface",
        "flashinfer-prefill": "mixattn.compat.flashinfer",
        "flashinfer-attention": "mixattn.compat.flashinfer",
        "flashinfer-pod": "our_pod",
    }
    make = attention_peers.PEERS[peer]
    if "v_head_dim" in changed and peer in ("flash-attn-2", "flashinfer-pod"):
        with pytest.raises(NotImplementedError, match="heads of V of K's size only"):
            make(batch, modules[peer])  # type: ignore[call-arg]
        return
    call = make(batch, modules[peer]) if peer in modules else make(batch)  # type: ignore[call-arg]
    torch.testing.assert_close(call().float(), expected(batch), atol=1e-2, rtol=1e-2)


def test_flash_attention_2_gets_pages_of_256_and_3_the_batchs_own(tiny_batch: Batch) -> None:
    second = attention_peers.flash_attention_2_arguments(tiny_batch)
    assert second["k"].shape == (4, 256, 2, 64) and second["block_table"].tolist() == [[0], [1], [2], [3]]
    assert second["cu_seqlens_k"].tolist() == [0, 40, 80, 120, 160]
    assert (second["max_seqlen_q"], second["max_seqlen_k"]) == (9, 40)
    third = attention_peers.flash_attention_3_arguments(tiny_batch)
    assert third["k_cache"] is tiny_batch.k_cache and third["page_table"] is tiny_batch.block_table


def test_flashinfers_pages_end_where_the_keys_do() -> None:
    table = torch.tensor([[5, 3, 9], [2, 0, 0], [7, 1, 0]], dtype=torch.int32)
    indptr, indices, last = attention_peers.flashinfer_pages([48, 1, 17], 16, table)
    assert (indptr.tolist(), indices.tolist(), last.tolist()) == ([0, 3, 4, 6], [5, 3, 9, 2, 7, 1], [16, 1, 1])


def test_peers_say_which_batches_they_do_not_take() -> None:
    float8 = make_batch(replace(TINY, kv_dtype="fp8_e4m3"), torch.bfloat16, CPU)
    for arguments in (attention_peers.flash_attention_2_arguments, attention_peers.flash_attention_3_arguments):
        with pytest.raises(NotImplementedError, match="q"):
            arguments(float8)
    decodes, _ = TINY.parts
    with pytest.raises(NotImplementedError, match="a chunk beside decodes only"):
        attention_peers.pod_plan_arguments(make_batch(decodes, torch.bfloat16, CPU))


def test_time_launches_takes_turns_after_warming_up() -> None:
    ran: list[str] = []
    ticks: Iterator[float] = iter([3.0, 30.0, 1.0, 10.0, 2.0, 20.0])

    def clock(run: Callable[[], object]) -> float:
        run()
        return next(ticks)

    timings = time_launches({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 3, clock)
    assert ran == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3
    assert (timings["a"].median_us, timings["a"].p10_us, timings["b"].p90_us) == (2.0, 1.0, 30.0)


def test_roofs_count_both_ways_of_a_copy_and_two_flops_per_product() -> None:
    def clock(run: Callable[[], object]) -> float:
        run()
        return 4.0

    roofs = measure_roofs(CPU, clock, copy_bytes=1 << 10, gemm_size=16)
    assert roofs.copy_gb_s == pytest.approx(2048 / 4.0 / 1e3)
    assert roofs.gemm_tflop_s == pytest.approx(2 * 16**3 / 4.0 / 1e6)
    assert Roofs(2.0, 3.0).least_us(flops=6_000_000, num_bytes=1) == 2.0
    assert Roofs(2.0, 3.0).least_us(flops=1, num_bytes=8_000) == 4.0


@pytest.fixture
def tiny_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter would take minutes for a batch of 512 rows."""
    small = {"small": Case("tiny/small", 1, 20, 0, 0, 4, 2, 64)}
    monkeypatch.setattr(gpu_attention, "kind_cases", lambda case: small)
    monkeypatch.setattr(predicted, "kind_cases", lambda case: small)


@pytest.mark.usefixtures("tiny_kinds")
def test_whole_run_on_cpu_tensors_verifies_times_and_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.jsonl"
    options = gpu_attention.Options(("triton",), ("torch-sdpa", "flash-attn-2"), 1, file)
    assert gpu_attention.run_on(DEVICE, options, [TINY], wall_clock, Roofs(100.0, 10.0)) == 0
    out = capsys.readouterr().out
    assert "flash-attn-2         left out: not installed" in out and out.count("left out") == 1
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["backend"] for record in records] == ["mixattn-triton", "torch-sdpa"]
    ours = records[0]
    per_slice = flops_and_bytes(TINY, 2, 2 * 128)
    assert ours["flops"] == sum(f for f, _ in per_slice) and ours["bytes"] == sum(b for _, b in per_slice)
    assert ours["share_of_roof"] == pytest.approx(
        Roofs(100.0, 10.0).least_us(ours["flops"], ours["bytes"]) / ours["timing"]["median_us"]
    )
    assert (ours["device"], ours["driver"], ours["extra"]["launches"]) == ("a CPU", "none", 1)
    assert ours["extra"]["overlap"] > 0 and ours["extra"]["predicted_us"] > 0
    assert records[1]["extra"]["predicted_us"] is None
    assert cache_bytes(TINY, torch.bfloat16) == 2 * 4 * 48 * 2 * 64 * 2
    kind_line = next(line for line in out.splitlines() if line.startswith("tiny/small"))
    assert float(kind_line.split()[-1]) > 0


def test_wrong_output_is_named_not_timed_and_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def wrong(batch: Batch) -> Callable[[], Tensor]:
        right = attention_peers.torch_sdpa(batch)
        return lambda: right() * 1.05

    def broken(batch: Batch) -> Callable[[], Tensor]:
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setitem(gpu_attention.PEERS, "wrong", wrong)
    monkeypatch.setitem(gpu_attention.PEERS, "broken", broken)
    monkeypatch.setattr(gpu_attention, "our_call", lambda batch, device, backend: broken(batch))
    file = tmp_path / "records.jsonl"
    options = gpu_attention.Options(("triton",), ("torch-sdpa", "wrong", "broken"), 1, file)
    decodes, _ = TINY.parts
    monkeypatch.setattr(gpu_attention, "kind_cases", lambda case: {})
    assert gpu_attention.run_on(DEVICE, options, [decodes], wall_clock, Roofs(1.0, 1.0)) == 1
    out = capsys.readouterr().out
    assert "WRONG or failing, not timed: differs from torch-sdpa by" in out
    assert "broken               left out: RuntimeError: no kernel image\n" in out
    assert "mixattn-triton       WRONG or failing, not timed: RuntimeError: no kernel image\n" in out
    assert [json.loads(line)["backend"] for line in file.read_text().splitlines()] == ["torch-sdpa"]


def test_profile_launches_each_candidate_once_in_a_range_of_its_name() -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def range_of(name: str) -> Iterator[None]:
        events.append(f"push {name}")
        yield
        events.append("pop")

    decodes = replace(TINY.parts[0], num_decodes=1, decode_kv=20)
    options = gpu_attention.Options(("triton",), ("torch-sdpa",), 1)
    gpu_attention.profile(decodes, DEVICE, options, lambda: events.append("flush"), range_of)
    assert events == ["flush", "push mixattn-triton", "pop", "flush", "push torch-sdpa", "pop"]


def test_cuda_clock_times_the_run_alone_behind_a_cold_cache_and_a_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append("record")

        def elapsed_time(self, end: Event) -> float:
            assert events[-1] == "synchronize", "the events have not happened yet"
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("synchronize"))
    clock = CudaClock(CPU, l2_bytes=1 << 20)
    flush = clock.flush
    monkeypatch.setattr(clock, "flush", lambda: events.append("flush") or flush())  # type: ignore[func-returns-value]
    assert clock(lambda: events.append("run")) == 250.0
    assert events == ["flush", "sleep", "record", "run", "record", "synchronize"]


def test_main_on_a_gpu_measures_its_roofs_then_the_cases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    properties = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    found = gpu_attention.find_device()
    assert found is not None
    assert (found.name, found.capability, found.num_sms, found.free_bytes) == ("H100", (9, 0), 132, 80 << 30)
    assert found.hardware(TINY).num_workers == 264  # two programs share an SM, as in the predictions
    monkeypatch.setattr(gpu_attention, "find_device", lambda: replace(found, torch_device=CPU))
    monkeypatch.setattr(gpu_attention, "CudaClock", lambda device, l2_bytes: wall_clock)
    monkeypatch.setattr(gpu_attention, "measure_roofs", lambda device, clock: Roofs(3000.0, 700.0))
    monkeypatch.setattr(gpu_attention, "kind_cases", lambda case: {})
    decodes, _ = TINY.parts
    assert gpu_attention.main(gpu_attention.Options((), ("torch-sdpa",), 1), [decodes], None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("H100, driver ") and "copy 3000 GB/s, bfloat16 product 700 TFLOP/s" in lines[1]
    assert lines[3].split()[:2] == ["tiny/decodes", "torch-sdpa"]


def test_candidates_that_do_not_fit_together_leave_ours_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausting_clock(run: Callable[[], object]) -> float:
        run()
        return 1.0

    def exhausted() -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    def prepared(batch: Batch, *_: object) -> dict[str, Callable[[], Tensor]]:
        return {"mixattn-triton": lambda: batch.q, "torch-sdpa": exhausted}

    monkeypatch.setattr(gpu_attention, "prepare", prepared)
    options = gpu_attention.Options(("triton",), ("torch-sdpa",), 1)
    result = gpu_attention.time_case(TINY, DEVICE, options, exhausting_clock)
    assert list(result.timings) == ["mixattn-triton"]
    assert result.left_out == {"torch-sdpa": "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB."}
