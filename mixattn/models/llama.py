"""Llama and Mistral: the pre-norm decoder with rotary embeddings, grouped queries and a gated MLP.

Qwen (``qwen.py``) is this decoder with other projections. Source: arXiv:2302.13971, arXiv:2310.06825.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mixattn.config import ModelConfig
from mixattn.models.layers import GatedMlp, Linear, RmsNorm, WeightSlots
from mixattn.ops.attention import attention
from mixattn.ops.kv_cache import append_kv
from mixattn.ops.kv_dtypes import KvCache
from mixattn.ops.metadata import AttentionMetadata
from mixattn.ops.rope import rope_cos_sin


class LlamaAttention(nn.Module):
    """Paged self-attention of one layer; q, k and v come out of one matrix."""

    def __init__(
        self, config: ModelConfig, layer_idx: int, *, backend: str | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = [config.num_q_heads, config.num_kv_heads, config.num_kv_heads]
        self.window_left = config.window_left[layer_idx]
        self.is_interleaved = config.rope.interleaved
        self.backend = backend
        rows = [num_heads * config.head_dim for num_heads in self.num_heads]
        self.qkv_proj = Linear(
            config.hidden_size,
            dict(zip(("q_proj", "k_proj", "v_proj"), rows, strict=True)),
            has_bias=config.has_qkv_bias,
            dtype=dtype,
            device=device,
        )
        self.o_proj = Linear(
            rows[0], {"o_proj": config.hidden_size}, has_bias=config.has_o_bias, dtype=dtype, device=device
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v before rotation, each [total_q, its heads, head_dim], from x [total_q, hidden_size]."""
        heads: Tensor = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = torch.split(heads, self.num_heads, dim=1)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        positions: Tensor,
        rope_table: Tensor,
        kv: KvCache,
        meta: AttentionMetadata,
    ) -> Tensor:
        """residual + attention(x), both [total_q, hidden_size]."""
        q, k, v = self.project(x)
        q = append_kv(
            k,
            v,
            kv.k_cache,
            kv.v_cache,
            meta.slot_mapping,
            q=q,
            positions=positions,
            rope_cos_sin=rope_table,
            interleaved=self.is_interleaved,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
            backend=self.backend,
        )
        out = attention(
            q,
            kv.k_cache,
            kv.v_cache,
            cu_seqlens_q=meta.cu_seqlens_q,
            seq_lens=meta.seq_lens,
            block_table=meta.block_table,
            window_left=self.window_left,
            rounds_q=self.qkv_proj.rounds_x,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
            plan=meta.plan(self.window_left),
            backend=self.backend,
        )
        return self.o_proj(out.flatten(1), residual)  # type: ignore[no-any-return]

    def weight_slots(self, prefix: str) -> WeightSlots:
        yield from self.qkv_proj.weight_slots(prefix)
        yield from self.o_proj.weight_slots(prefix)


class LlamaLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: ModelConfig, self_attn: LlamaAttention, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.self_attn = self_attn
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, dtype=dtype, device=device)

    def forward(
        self, hidden: Tensor, positions: Tensor, rope_table: Tensor, kv: KvCache, meta: AttentionMetadata
    ) -> Tensor:
        hidden = self.self_attn(self.input_layernorm(hidden), hidden, positions, rope_table, kv, meta)
        return self.mlp(self.post_attention_layernorm(hidden), hidden)  # type: ignore[no-any-return]

    def weight_slots(self, prefix: str) -> WeightSlots:
        yield from self.input_layernorm.weight_slots(f"{prefix}input_layernorm.")
        yield from self.self_attn.weight_slots(f"{prefix}self_attn.")
        yield from self.post_attention_layernorm.weight_slots(f"{prefix}post_attention_layernorm.")
        yield from self.mlp.weight_slots(f"{prefix}mlp.")


class LlamaModel(nn.Module):
    """A decoder with its embedding and output matrices; inference only. Weights are uninitialised until loaded.

    Args:
        config: its shape; ``max_model_len`` positions have a row in the rope table.
        backend: of the attention kernels; None is the fastest here.
        dtype: of weights and activations.
        device: where they are; ``meta`` gives a model that only has shapes.
    """

    attention_class = LlamaAttention

    def __init__(
        self, config: ModelConfig, *, backend: str | None = None, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            LlamaLayer(
                config,
                self.attention_class(config, layer_idx, backend=backend, dtype=dtype, device=device),
                dtype=dtype,
                device=device,
            )
            for layer_idx in range(config.num_layers)
        )
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.embed_tokens = self._vocab_matrix("embed_tokens", dtype=dtype, device=device)
        self.lm_head = self.embed_tokens
        if not config.has_tied_embeddings:
            self.lm_head = self._vocab_matrix("lm_head", dtype=dtype, device=device)
        self.rope_table: Tensor
        table = rope_cos_sin(config.rope, config.max_model_len, device=device)
        self.register_buffer("rope_table", table, persistent=False)

    def _vocab_matrix(self, name: str, *, dtype: torch.dtype, device: torch.device) -> Linear:
        """A row of hidden_size per token id."""
        return Linear(
            self.config.hidden_size, {name: self.config.vocab_size}, has_bias=False, dtype=dtype, device=device
        )

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, kv: list[KvCache], meta: AttentionMetadata) -> Tensor:
        """Hidden states after the last norm, of every row of the step.

        Args:
            input_ids: [total_q] int64.
            positions: [total_q] int64, each below ``config.max_model_len``.
            kv: each layer's pages; the rows' keys and values are written to their slots.
            meta: the step's batch.
        Returns:
            [total_q, hidden_size] in the model's dtype.
        """
        hidden = self.embed_tokens.rows(input_ids)
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            hidden = layer(hidden, positions, self.rope_table, layer_kv, meta)
        return self.norm(hidden)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, vocab_size] float32, from rows of what ``forward`` returned."""
        return self.lm_head(hidden).float()  # type: ignore[no-any-return]

    def matrices(self) -> Iterator[tuple[list[str], Linear]]:
        """Every matrix once, with the names that Hugging Face's checkpoints have for its parts."""
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                prefix = "" if module is self.lm_head and not self.config.has_tied_embeddings else "model."
                folder = f"{prefix}{path}".rpartition(".")[0]
                yield [f"{folder}.{part}.weight".lstrip(".") for part in module.parts], module

    def weight_slots(self) -> WeightSlots:
        """Every parameter, in pieces as Hugging Face's checkpoints hold them."""
        yield from self.embed_tokens.weight_slots("model.")
        for layer_idx, layer in enumerate(self.layers):
            yield from layer.weight_slots(f"model.layers.{layer_idx}.")  # type: ignore[operator]
        yield from self.norm.weight_slots("model.norm.")
        if not self.config.has_tied_embeddings:
            yield from self.lm_head.weight_slots("")
