"""Runs a plan on this process's device: inputs, model, tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mixattn.config import ModelConfig
from mixattn.executor.inputs import InputBuilder, StepInputs
from mixattn.executor.kv_pool import Prefault, allocate
from mixattn.executor.recorded import RecordedModel
from mixattn.ops.attention import device_hardware
from mixattn.ops.kv_dtypes import KvCache
from mixattn.ops.metadata import AttentionMetadata
from mixattn.ops.plan import WorkPlan, plan
from mixattn.ops.sampling import SamplingRow, sample
from mixattn.types import BatchPlan, Slice, StepResult


class Model(Protocol):
    """What the executor asks of a model."""

    def forward(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> Tensor:
        """Hidden states [total_q, hidden_size], the step's K and V being written to ``kv``."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, vocab_size] float32."""
        ...


class LocalExecutor:
    """Owns the KV tensors and the input buffers of one model on one device.

    Args:
        model: already on ``device``.
        config: the model's shape.
        num_pages, page_size: of the KV pool; the scheduler hands out ids in [0, num_pages).
        max_model_len: the longest kv_len, in tokens.
        kv_dtype: of the cache tensors; quantised ones get scales per token and head.
        is_recorded: whether the model is recorded and steps run without Python (``recorded.py``); for models that are
            made of mixattn's operators, with the CPU kernels.
    """

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        kv_dtype: torch.dtype,
        device: torch.device,
        is_recorded: bool = False,
    ) -> None:
        self._model: Model = RecordedModel(model) if is_recorded else model
        self._config = config
        self._kv_dtype = kv_dtype
        self._device = device
        self._kv = allocate(config, num_pages, page_size, kv_dtype, device)
        self._prefault = Prefault(self._kv) if device.type == "cpu" else None
        self._inputs = InputBuilder(page_size, max_model_len)
        self._last_token_ids: dict[str, int] = {}

    @torch.inference_mode()
    def execute(self, plan: BatchPlan) -> StepResult:
        """One token for every sampled slice.

        Raises:
            RuntimeError: the model's logits are not finite, or the device failed.
        """
        inputs = self._inputs.build(plan, self._last_token_ids)
        if self._prefault is not None:
            self._prefault.advance(inputs.last_page, plan.num_tokens)
        hidden = self._model.forward(
            inputs.input_ids.to(self._device), inputs.positions.to(self._device), self._kv, self._metadata(inputs)
        )
        sampled = [part for part in plan.slices if part.is_sampled]
        token_ids: list[int] = []
        if sampled:
            if len(sampled) < plan.num_tokens:
                hidden = hidden[torch.tensor(inputs.sampled_rows, device=self._device)]
            logits = self._model.logits(hidden)
            token_ids = sample(logits, [self._sampling_row(part) for part in sampled], self._config.eos_token_ids)
        self._last_token_ids = {part.request_id: token for part, token in zip(sampled, token_ids, strict=True)}
        return StepResult(self._last_token_ids)

    def _metadata(self, inputs: StepInputs) -> AttentionMetadata:
        """The step's batch, planned once per window that a layer has, for all layers."""
        return AttentionMetadata(
            cu_seqlens_q=inputs.cu_seqlens_q.to(self._device),
            seq_lens=inputs.seq_lens.to(self._device),
            block_table=inputs.block_table.to(self._device),
            slot_mapping=inputs.slot_mapping.to(self._device),
            positions=inputs.positions.to(self._device),
            plans={window: self._plan(inputs, window) for window in dict.fromkeys(self._config.window_left)},
        )

    def _plan(self, inputs: StepInputs, window_left: int | None) -> WorkPlan:
        return plan(
            inputs.cu_seqlens_q,
            inputs.seq_lens,
            num_q_heads=self._config.num_q_heads,
            num_kv_heads=self._config.num_kv_heads,
            head_dim=self._config.head_dim,
            kv_element_bytes=self._kv_dtype.itemsize,
            window_left=window_left,
            hardware=device_hardware(self._device),
        )

    def _sampling_row(self, part: Slice) -> SamplingRow:
        history = part.history
        if part.sampling.uses_history and len(history) < part.prompt_len + part.output_idx:
            # The plan that gave the token which this step reads is not committed yet.
            history = [*history, self._last_token_ids[part.request_id]]
        assert part.sampling.seed is not None or part.sampling.is_greedy, "the engine gives every request a seed"
        return SamplingRow(part.sampling, part.output_idx, history, part.prompt_len)
