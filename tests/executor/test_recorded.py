"""Recorded steps: the bits of the model's own forward pass, whatever grows or moves between them."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

from mixattn import env
from mixattn.config import EngineConfig
from mixattn.executor import executor as executor_module
from mixattn.executor import recorded
from mixattn.executor.executor import LocalExecutor
from mixattn.models.loader import LoadedModel, load_model
from mixattn.models.registry import TINY_CONFIGS
from mixattn.ops.elementwise import rms_norm, silu_mul
from mixattn.ops.plan import cpu_hardware
from mixattn.ops.recording import Recording
from mixattn.types import BatchPlan, SamplingParams, Slice

GREEDY = SamplingParams(temperature=0)
NUM_PAGES, PAGE_SIZE = 128, 16


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """And plans for them, which split along the keys, whatever threads the tests are given."""
    monkeypatch.setattr(env, "num_threads", lambda: 3)
    monkeypatch.setattr(executor_module, "device_hardware", lambda device: cpu_hardware(3))


def make_executor(loaded: LoadedModel, is_recorded: bool, kv_dtype: torch.dtype = torch.float32) -> LocalExecutor:
    generator = torch.Generator().manual_seed(0)
    executor = LocalExecutor(
        loaded.model,
        loaded.config,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        max_model_len=2048,
        kv_dtype=kv_dtype,
        device=loaded.device,
        is_recorded=is_recorded,
    )
    for kv in executor._kv:
        for tensor in kv:
            if tensor is not None and tensor.is_floating_point():
                tensor.uniform_(0.01, 0.02, generator=generator)
            elif tensor is not None:
                tensor.random_(-100, 100, generator=generator)
    return executor


def batch(lengths: list[tuple[int, int]], token_id: int = 7) -> BatchPlan:
    """Slices of these (q_len, kv_len), each in pages of its own."""
    slices, page = [], 0
    for idx, (q_len, kv_len) in enumerate(lengths):
        num_pages = -(-kv_len // PAGE_SIZE)
        pages = array("i", range(page, page + num_pages))
        page += num_pages
        tokens = [(token_id + 13 * idx + i) % 256 for i in range(q_len)]
        slices.append(Slice(f"r{idx}", q_len, kv_len, tokens, pages, True, GREEDY, 1, tokens, 0))
    return BatchPlan(0, tuple(slices))


class KeepsHidden:
    """A model that keeps what it gave last."""

    def __init__(self, model: executor_module.Model) -> None:
        self._model = model

    def forward(self, *arguments: Any) -> Tensor:
        self.hidden = self._model.forward(*arguments)
        return self.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._model.logits(hidden)
        self.logits_before_sampling = logits.clone()
        return logits


STEPS = [
    batch([(1, 20)]),
    batch([(1, 21)], token_id=3),
    batch([(1, 700)]),  # splits along the keys
    batch([(1, 1500)]),
    batch([(1, 22)]),
    batch([(1, 40), (1, 300), (5, 9)]),
    batch([(1, 41), (1, 301), (5, 14)], token_id=50),
    batch([(1, 42), (4, 303), (2, 16)]),  # as many rows and sequences, other lengths
    batch([(70, 70)]),
    batch([(60, 100), (4, 20), (6, 9)]),
    batch([(300, 400)]),  # more rows than there is room for: recorded anew
    batch([(290, 400), (9, 700)]),
    batch([(1, 23)]),
    batch([(1, 14)] * 70),  # more sequences
    batch([(1, 15)] * 69, token_id=9),
    batch([(2, 24)]),
]


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [*((name, torch.float32) for name in TINY_CONFIGS), ("tiny-llama", torch.int8), ("tiny-llama", torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_recorded_steps_leave_the_bits_of_plain_ones(name: str, kv_dtype: torch.dtype) -> None:
    loaded = load_model(EngineConfig(name, load_format="dummy"), show_progress=False)
    plain, recording = make_executor(loaded, False, kv_dtype), make_executor(loaded, True, kv_dtype)
    kept = [KeepsHidden(executor._model) for executor in (plain, recording)]
    plain._model, recording._model = kept
    for plan in STEPS:
        assert plain.execute(plan).token_ids == recording.execute(plan).token_ids
        assert torch.equal(kept[0].hidden, kept[1].hidden)
        assert torch.equal(kept[0].logits_before_sampling, kept[1].logits_before_sampling)
    for ours, theirs in zip(plain._kv, recording._kv, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def forwards_of(steps: list[BatchPlan], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of the model's own forward pass, plain or to be recorded."""
    loaded = load_model(EngineConfig("tiny-llama", load_format="dummy"), show_progress=False)
    executor = make_executor(loaded, True)
    calls: list[int] = []
    forward = loaded.model.forward
    monkeypatch.setattr(loaded.model, "forward", lambda *rest: (calls.append(len(rest[0])), forward(*rest))[1])
    for step in steps:
        executor.execute(step)
    return calls


def test_steps_are_recorded_again_only_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_FIRST_ROOM", recorded._FIRST_ROOM._replace(num_rows=4, num_seqs=2))
    steps = [batch([(1, 20)]), batch([(5, 9)]), batch([(8, 9)]), batch([(1, 9)] * 3), batch([(2, 9)] * 4)]
    assert forwards_of(steps, monkeypatch) == [4, 8, 8]


@pytest.mark.parametrize("field", ["max_pages", "plan_words", "num_merges", "num_partial_rows"])
def test_room_grows_to_what_a_step_needs(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_FIRST_ROOM", recorded._FIRST_ROOM._replace(**{field: 1}))
    steps = [batch([(1, 1000)]), batch([(1, 20)]), batch([(1, 1001)])]  # split along the keys, and not
    assert forwards_of(steps, monkeypatch) == [256]
    steps = [batch([(1, 20)]), batch([(1, 1000), *[(1, 9)] * 60]), batch([(1, 1001), *[(1, 10)] * 60])]
    assert forwards_of(steps, monkeypatch) == ([256] if field == "max_pages" else [256, 256])


def test_recording_of_more_layers_keeps_no_more_memory() -> None:
    def layers(x: Tensor, count: int) -> Tensor:
        for _ in range(count):
            x = rms_norm(x, weight, 1e-5)
        return x

    weight = torch.ones(64)
    few, many = (Recording(layers, torch.ones(4, 64), count, num_rows=4) for count in (3, 30))
    assert len(many) == 30 and 0 < few.num_bytes == many.num_bytes


def test_recording_gives_the_memory_of_zeros_to_zeros_only() -> None:
    """Nobody zeroes the tickets of attention again: what else was written there would be taken for tickets."""
    addresses: dict[str, list[int]] = {"zeros": [], "empty": []}

    def make() -> None:
        for _ in range(3):
            for name, new in (("zeros", torch.zeros), ("empty", torch.empty)):
                addresses[name].append(new(16).data_ptr())

    recording = Recording(make, num_rows=1)
    assert recording.num_bytes == 2 * 16 * 4
    assert len(set(addresses["zeros"])) == len(set(addresses["empty"])) == 1
    assert addresses["zeros"][0] != addresses["empty"][0]


def test_recording_of_torch_arithmetic_raises() -> None:
    with pytest.raises(RuntimeError, match=r"aten::add\.Tensor|aten\.add\.Tensor computes outside of mixattn's"):
        Recording(lambda x: silu_mul(x) + 1, torch.zeros(2, 4), num_rows=2)
    x = torch.tensor([[1.0, 2.0]])
    assert silu_mul(x).item() != 0  # nothing is recorded any more: this runs


def test_recording_of_other_rows_than_the_steps_raises() -> None:
    with pytest.raises(ValueError, match=r"silu_mul cannot be recorded: it must have the step's 2 rows .*got 1 rows"):
        Recording(lambda x: silu_mul(x[:1]), torch.zeros(2, 4), num_rows=2)


def test_recording_reads_what_its_first_rows_hold_when_it_runs() -> None:
    x = torch.zeros(3, 4)
    recording = Recording(silu_mul, x, num_rows=3)
    assert len(recording) == 1
    for value in (1.0, 2.0):
        x.fill_(value)
        recording.run(3)
        assert torch.equal(recording.result, silu_mul(x))
    x.fill_(4.0)
    recording.run(2)
    assert torch.equal(recording.result[:2], silu_mul(x)[:2])
    assert torch.equal(recording.result[2:], silu_mul(torch.full((1, 4), 2.0)))  # not touched
    for num_rows in (-1, 4):
        with pytest.raises(ValueError, match=rf"num_rows must be in \[0, 3\], what was recorded, got {num_rows}"):
            recording.run(num_rows)


def test_recorded_calls_see_what_the_threads_of_those_before_have_written() -> None:
    """Rows are drawn by 3 threads in 10 pieces; only the ends of their regions order the 40 calls."""

    def chain(x: Tensor) -> Tensor:
        for _ in range(40):
            x = rms_norm(x, weight, 1e-5)
        return x

    weight, x = torch.linspace(0.5, 1.5, 256), torch.empty(600, 256)
    recording = Recording(chain, x, num_rows=600)
    for seed in range(60):
        x.normal_(generator=torch.Generator().manual_seed(seed))
        recording.run(600)
        assert torch.equal(recording.result, chain(x))


def test_recorded_step_that_fails_leaves_its_threads_free() -> None:
    loaded = load_model(EngineConfig("tiny-llama", load_format="dummy"), show_progress=False)
    executor = make_executor(loaded, True)
    good, bad = batch([(40, 90)]), batch([(40, 90)])
    token_ids = executor.execute(good).token_ids
    bad.slices[0].page_ids[2] = NUM_PAGES
    for _ in range(3):
        with pytest.raises(ValueError, match=rf"block_table|slot_mapping.*{NUM_PAGES}"):
            executor.execute(bad)
        assert executor.execute(good).token_ids == token_ids
