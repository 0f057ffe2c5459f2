"""Plans through a model that only looks at what it is given."""

from __future__ import annotations

from array import array

import pytest
import torch
from torch import Tensor

from mixattn.config import ModelConfig, RopeConfig
from mixattn.executor.executor import LocalExecutor
from mixattn.ops.kv_dtypes import KvCache
from mixattn.ops.metadata import AttentionMetadata
from mixattn.types import BatchPlan, SamplingParams, Slice

VOCAB = 32
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=VOCAB,
    hidden_size=8,
    intermediate_size=8,
    num_layers=3,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_model_len=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(rotary_dim=8),
    window_left=(None, 7, None),
    eos_token_ids=frozenset({3}),
)


class SuccessorModel:
    """Prefers the token that follows the last one it reads; writes every row's position and token into its slot."""

    def __init__(self, margin: float = 5.0, distance: int = 1) -> None:
        self.margin = margin
        self.distance = distance
        self.metas: list[AttentionMetadata] = []

    def forward(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> Tensor:
        self.metas.append(meta)
        for k_cache, v_cache, *_ in kv:
            k_cache.view(-1, 2, 8)[meta.slot_mapping] = positions.float()[:, None, None]
            v_cache.view(-1, 2, 8)[meta.slot_mapping] = input_ids.float()[:, None, None]
        return input_ids[:, None].float().expand(-1, 8)

    def logits(self, hidden: Tensor) -> Tensor:
        successor = (hidden[:, 0].long() + self.distance) % VOCAB
        return torch.nn.functional.one_hot(successor, VOCAB).float() * self.margin


def make_executor(model: SuccessorModel) -> LocalExecutor:
    return LocalExecutor(
        model, CONFIG, num_pages=8, page_size=4, max_model_len=64, kv_dtype=torch.float32, device=torch.device("cpu")
    )


def make_slice(request_id: str, token_ids: list[int] | None, kv_len: int, **changes) -> Slice:
    fields = {
        "page_ids": array("i", [7, 2, 5, 0]),
        "is_sampled": True,
        "sampling": SamplingParams(temperature=0),
        "output_idx": 0,
        "history": token_ids or [],
        "prompt_len": len(token_ids or []),
        **changes,
    }
    return Slice(request_id, 1 if token_ids is None else len(token_ids), kv_len, token_ids, **fields)


def test_execute_mixed_batch_samples_only_the_sampled_slices() -> None:
    model = SuccessorModel()
    chunk = make_slice("b", [1, 2, 3], 3, is_sampled=False)
    plan = BatchPlan(0, (make_slice("a", [9], 6), chunk, make_slice("c", [4, 5], 2)))
    assert make_executor(model).execute(plan).token_ids == {"a": 10, "c": 6}


def test_execute_no_sampled_slice_gives_no_tokens() -> None:
    plan = BatchPlan(0, (make_slice("a", [1, 2], 2, is_sampled=False),))
    assert make_executor(SuccessorModel()).execute(plan).token_ids == {}


def test_execute_plans_once_per_window() -> None:
    model = SuccessorModel()
    make_executor(model).execute(BatchPlan(0, (make_slice("a", [1, 2], 2),)))
    assert set(model.metas[0].plans) == {None, 7}


def test_execute_unknown_token_is_the_previous_step_s() -> None:
    executor = make_executor(SuccessorModel())
    executor.execute(BatchPlan(0, (make_slice("a", [1, 2], 2), make_slice("b", [20], 1))))
    decode = {"output_idx": 1, "history": [], "prompt_len": 0}
    second = BatchPlan(1, (make_slice("b", None, 2, **decode), make_slice("a", None, 3, **decode)))
    assert executor.execute(second).token_ids == {"b": 22, "a": 4}


@pytest.mark.parametrize("is_committed", [False, True])
@pytest.mark.parametrize(("margin", "expected"), [(3.0, 0), (5.0, 6)])
def test_execute_penalty_counts_the_uncommitted_token_once(is_committed: bool, margin: float, expected: int) -> None:
    """Token 6 came twice, the second time in a plan that may not be committed: 2 x 2 is taken off its margin."""
    executor = make_executor(SuccessorModel(margin, distance=0))
    sampling = SamplingParams(temperature=0, frequency_penalty=2.0)
    executor.execute(BatchPlan(0, (make_slice("a", [6], 1),)))
    history = [6, 6, 6] if is_committed else [6, 6]
    decode = make_slice("a", None, 2, sampling=sampling, output_idx=2, history=history, prompt_len=1)
    assert executor.execute(BatchPlan(1, (decode,))).token_ids == {"a": expected}


def test_execute_min_tokens_holds_back_the_model_s_eos() -> None:
    plan = BatchPlan(0, (make_slice("a", [2], 1, sampling=SamplingParams(temperature=0, min_tokens=1)),))
    assert make_executor(SuccessorModel()).execute(plan).token_ids["a"] != 3


def test_execute_same_seed_same_token_whatever_the_place_in_the_batch() -> None:
    def tokens(order: list[int]) -> dict[str, int]:
        slices = tuple(make_slice(str(i), [1], 1, sampling=SamplingParams(seed=i)) for i in order)
        return make_executor(SuccessorModel(margin=0.0)).execute(BatchPlan(0, slices)).token_ids

    assert tokens(list(range(8))) == tokens(list(range(8))[::-1]) == tokens([5]) | tokens([0, 1, 2, 3, 4, 6, 7])
    assert len(set(tokens(list(range(8))).values())) > 3


def test_execute_rows_are_written_to_their_slots() -> None:
    executor = make_executor(SuccessorModel())
    executor.execute(BatchPlan(0, (make_slice("a", [11, 12, 13, 14, 15], 5),)))
    k_cache, v_cache, *_ = executor._kv[2]
    assert k_cache[7, :, 0, 0].tolist() == [0, 1, 2, 3]  # page_ids[0]
    assert v_cache[2, 0, 1, 7] == 15  # page_ids[1]
