"""Compiling ahead what serving a model on a GPU launches, so that no request waits for a compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixattn import env
from mixattn.config import ModelConfig
from mixattn.executor.kv_pool import allocate
from mixattn.ops import attention_cuda, cuda_images, kv_cache_cuda
from mixattn.ops.attention_call import AttentionCall, attention_layout
from mixattn.ops.backends import first_backend
from mixattn.ops.kv_cache import append_kv_sizes
from mixattn.ops.kv_dtypes import kv_format
from mixattn.ops.rope import rope_cos_sin
from mixattn.ops.sampling import SamplingRow, draw_arguments
from mixattn.types import SamplingParams

_NUM_ROWS, _NUM_SEQS = 3, 2
"""Of the tensors that stand for a step's. No key of a kernel depends on how many there are."""


@dataclass(frozen=True)
class ServedModel:
    """What the kernels of a server are compiled for.

    Args:
        config: the model's shape. dtype: of weights and activations. kv_dtype: of the cache tensors.
        page_size: tokens per page. max_model_len: the longest kv_len, in tokens; the block table is as wide.
        backend: of attention and append_kv; None: the first that takes them.
    """

    config: ModelConfig
    dtype: torch.dtype
    kv_dtype: torch.dtype
    page_size: int
    max_model_len: int
    backend: str | None = None


@dataclass(frozen=True)
class Warmed:
    """One call of a step. Args: name: of it; kernel: that it launches; how: what has been done for that, in words."""

    name: str
    kernel: str
    how: str


def warm_up(model: ServedModel, device: torch.device, target: tuple[int, int] | None = None) -> list[Warmed]:
    """What a step launches, compiled into Triton's cache, or, of the CUDA kernels, loaded and linked on the device.

    Args:
        device: a GPU; the CPU with ``target``.
        target: a compute capability to compile for, of a GPU that need not be there. There is then nothing to load; all
            that could be launched by Triton is compiled, though CUDA kernels may take it on the GPU.
    Raises:
        NotImplementedError: Triton's interpreter is on, or is not installed, or no kernel is compiled for the target.
        RuntimeError: a driver refuses an image, or a compiler fails.
    """
    if env.triton_interpret():
        raise NotImplementedError("TRITON_INTERPRET=1 compiles nothing; warm up without it")
    try:
        from mixattn.triton_kernels._launch import compiling
        from mixattn.triton_kernels.tiles import choose_tiles
    except ImportError as error:
        raise NotImplementedError(f"the package triton is not installed ({error}): nothing can be compiled") from error
    if target is not None:
        choose_tiles(model.config.head_dim, 2, target)  # refuses what no kernel runs on
    step = _Step(model, device)
    warmed = []
    with torch.inference_mode(), compiling(target) as ahead:
        for name, call in step.calls().items():
            loaded = None if target is not None else step.load_cuda(name)
            if loaded is not None:
                warmed.append(Warmed(name, loaded, "CUDA: loaded and linked"))
                continue
            num_before = len(ahead.kernels)
            call()
            warmed += [Warmed(name, one.kernel, f"Triton: {one.how}") for one in ahead.kernels[num_before:]]
    return warmed


class _Step:
    """The tensors of a small step, laid out as ``LlamaModel`` and ``LocalExecutor`` lay out theirs."""

    def __init__(self, model: ServedModel, device: torch.device) -> None:
        config = model.config
        self._model, self._device = model, device
        self._num_heads = [config.num_q_heads, config.num_kv_heads, config.num_kv_heads]
        one_layer = replace(config, num_layers=1, window_left=(None,))
        (self._kv,) = allocate(one_layer, _NUM_SEQS, model.page_size, model.kv_dtype, device)
        self._max_pages = -(-model.max_model_len // model.page_size)

    def calls(self) -> Mapping[str, Callable[[], object]]:
        """Every call of a step that Triton may serve, by name; one for each window of attention."""
        from mixattn.triton_kernels import elementwise, sampling

        config = self._model.config
        hidden = self._rows(config.hidden_size)
        calls: dict[str, Callable[[], object]] = {
            "rms_norm": lambda: elementwise.rms_norm(hidden, self._rows(config.hidden_size)[0], config.rms_norm_eps),
            "silu_mul": lambda: elementwise.silu_mul(self._rows(2 * config.intermediate_size)),
            "append_kv": self._append_kv,
        }
        if config.has_qk_norm:
            weight = self._rows(config.head_dim)[0]
            for name, x in zip(("q_norm", "k_norm"), self._projected()[:2], strict=True):
                calls[name] = lambda x=x: elementwise.rms_norm(x, weight, config.rms_norm_eps)  # type: ignore[misc]
        for window_left in dict.fromkeys(config.window_left):
            calls[_attention_name(window_left)] = lambda window=window_left: self._attention(window)  # type: ignore[misc]
        logits = torch.zeros(1, config.vocab_size, device=self._device)
        drawn = SamplingRow(SamplingParams(temperature=1.0, seed=0), 0, [], 0)
        arguments = draw_arguments([0], [drawn], [0.0], self._device)
        calls["draw"] = lambda: sampling.draw(logits, *arguments)
        return calls

    def load_cuda(self, name: str) -> str | None:
        """Loads and links the CUDA kernel that takes the call of this name; None if none does."""
        if (self._model.backend or first_backend("cuda")) != "cuda":
            return None
        try:
            if name == "append_kv":
                tensors, interleaved = self._append_kv_tensors(), self._model.config.rope.interleaved
                kernel = kv_cache_cuda.kernel_for(tensors, append_kv_sizes(tensors, interleaved), interleaved)
            elif name.startswith("attention"):
                window = next(w for w in self._model.config.window_left if _attention_name(w) == name)
                call, out = self._attention_call(window)
                kernel = attention_cuda.kernel_for(call, attention_layout(call, out, None), out)
            else:
                return None
        except NotImplementedError:
            return None
        image = cuda_images.image(self._device.index or 0, kernel["image"])
        image.num_blocks(kernel=kernel["name"], num_threads=kernel["num_threads"], shared_bytes=kernel["shared_bytes"])
        return kernel["name"]

    def _rows(self, size: int) -> Tensor:
        return torch.zeros(_NUM_ROWS, size, dtype=self._model.dtype, device=self._device)

    def _projected(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v out of one matrix."""
        head_dim = self._model.config.head_dim
        heads = self._rows(sum(self._num_heads) * head_dim).view(_NUM_ROWS, -1, head_dim)
        q, k, v = torch.split(heads, self._num_heads, dim=1)
        return q, k, v

    def _append_kv_tensors(self) -> dict[str, Tensor | None]:
        """The tensors of ``append_kv``, by name."""
        q, k, v = self._projected()
        if self._model.config.has_qk_norm:
            q, k = q.contiguous(), k.contiguous()
        slots = torch.arange(_NUM_ROWS, device=self._device)
        kv = self._kv
        return {
            "k": k, "v": v, "k_cache": kv.k_cache, "v_cache": kv.v_cache, "slot_mapping": slots, "q": q,
            "positions": slots.clone(), "rope_cos_sin": rope_cos_sin(self._model.config.rope, 8, device=self._device),
            "k_scale": kv.k_scale, "v_scale": kv.v_scale, "q_out": torch.empty_like(q).contiguous(),
        }  # fmt: skip

    def _append_kv(self) -> None:
        from mixattn.triton_kernels.kv_cache import append_kv

        append_kv(
            **self._append_kv_tensors(),
            interleaved=self._model.config.rope.interleaved,
            kv_format=kv_format(self._model.kv_dtype),
        )

    def _attention_call(self, window_left: int | None) -> tuple[AttentionCall, Tensor]:
        config, kv = self._model.config, self._kv
        q = torch.zeros(
            _NUM_ROWS, config.num_q_heads, config.head_dim, dtype=self._model.dtype, device=self._device
        )  # fmt: skip
        missing: dict[str, Any] = dict.fromkeys(AttentionCall._fields)
        given = {
            "q": q, "k_cache": kv.k_cache, "v_cache": kv.v_cache, "k_scale": kv.k_scale, "v_scale": kv.v_scale,
            "cu_seqlens_q": self._int32(_NUM_SEQS + 1), "seq_lens": self._int32(_NUM_SEQS),
            "block_table": self._int32(_NUM_SEQS, self._max_pages),
            "causal": True, "window_left": window_left, "invariant": False, "rounds_q": False, "sm_margin": 0,
        }  # fmt: skip
        return AttentionCall(**{**missing, **given}), torch.empty_like(q)

    def _attention(self, window_left: int | None) -> None:
        from mixattn.triton_kernels.mixed_attention import mixed_attention

        call, out = self._attention_call(window_left)
        partial_out = torch.zeros(1, call.q.shape[2], device=self._device)
        mixed_attention(
            call.q, call.k_cache, call.v_cache, call.cu_seqlens_q, call.seq_lens, call.block_table, self._int32(16),
            out, None, partial_out, partial_out[:, 0].clone(), self._int32(1), softmax_scale=call.q.shape[2] ** -0.5,
            causal=True, window_left=window_left, soft_cap=None, kv_format=kv_format(self._model.kv_dtype),
            k_scale=call.k_scale, v_scale=call.v_scale, num_programs=1,
        )  # fmt: skip

    def _int32(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self._device)


def _attention_name(window_left: int | None) -> str:
    return "attention" if window_left is None else f"attention, window_left {window_left}"
