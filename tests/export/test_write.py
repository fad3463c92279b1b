import copy
import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunetune.core.errors import ExportError, UnsupportedModelError
from prunetune.export import write
from prunetune.export.write import METADATA_FILE, export_config, export_model, probe
from prunetune.model.architecture import describe
from prunetune.model.plan import Plan
from prunetune.model.shards import ShardReader
from prunetune.model.surgery import slice_model
from tests.export.export_support import FAMILIES, adapt, base_of
from tests.support import random_plan, tiny_tokenizer


def quick(model, folder, **options):
    return export_model(model, tiny_tokenizer(chat=True), folder, **{"verify": False, **options})


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_and_tuned_model_opens_with_stock_transformers(family, tmp_path):
    tuned = adapt(base_of(family))
    plan = random_plan(describe(tuned.get_base_model().config), ("mlp_channels", "kv_groups"))
    slice_model(tuned, plan)
    exported = quick(tuned, tmp_path / "out", dtype="float32", plan=plan, metadata={"licence": "MIT"})
    plain, loading = AutoModelForCausalLM.from_pretrained(exported.folder, output_loading_info=True)
    assert not any(loading.values())
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert (plain(ids).logits - tuned(ids).logits).abs().max() < 1e-4
    assert plain.config.head_dim == tuned.get_base_model().config.head_dim
    assert plain.config._name_or_path == str(exported.folder)
    assert Plan.load(exported.folder / "plan.json") == plan
    facts = json.loads((exported.folder / METADATA_FILE).read_text())
    assert facts["metadata"] == {"licence": "MIT"}
    assert facts["parameters"] == sum(p.numel() for p in plain.parameters())
    assert facts["weights_bytes"] == ShardReader(exported.folder).size_bytes()
    assert plain.generation_config.eos_token_id == 2
    template = AutoTokenizer.from_pretrained(exported.folder).chat_template
    assert template == tiny_tokenizer(chat=True).chat_template


def test_config_has_no_traces_of_training_or_quantisation(tmp_path):
    base = base_of("llama")
    base.config._name_or_path = "/somewhere/private"
    base.config.quantization_config = {"quant_method": "gguf"}
    base.config.use_cache = False
    base.is_quantized = True
    quick(adapt(base), tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "/somewhere" not in json.dumps(config)
    assert (config["dtype"], config["use_cache"], config["architectures"]) == (
        "bfloat16",
        True,
        ["LlamaForCausalLM"],
    )
    assert base.config.use_cache is False


def test_shards_respect_the_size(tmp_path):
    quick(adapt(base_of("llama")), tmp_path / "out", shard_size=40_000)
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 1
    assert max(path.stat().st_size for path in files) < 60_000
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_sampling_values_beside_greedy_decoding_do_not_stop_the_export(tmp_path):
    base = base_of("llama")
    base.generation_config.do_sample, base.generation_config.temperature = False, 0.3
    quick(base, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.3


def test_existing_folder_is_refused_and_untouched(tmp_path):
    model, folder = adapt(base_of("llama")), tmp_path / "out"
    quick(model, folder)
    before = content(folder)
    with pytest.raises(ExportError, match="exists"):
        quick(model, folder, dtype="float32")
    assert content(folder) == before
    quick(model, folder, dtype="float32", replace=True)
    assert content(folder) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("years of work")
    with pytest.raises(ExportError, match="something else than an export"):
        quick(base_of("llama"), folder, replace=True)
    assert (folder / "chapter.txt").read_text() == "years of work"


def test_no_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(ExportError, match=r"needs 64\.\d MB, but the disk has 1\.0 MB free"):
        quick(base_of("llama"), tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
        ),
        (PermissionError(13, "Permission denied"), "writing failed"),
    ],
)
def test_a_disk_that_fails_midway_leaves_the_previous_export(error, reason, tmp_path, monkeypatch):
    model, folder = adapt(base_of("llama")), tmp_path / "out"
    quick(model, folder)
    before = content(folder)
    real, calls = write.ShardWriter._flush, []

    def flush(writer):
        calls.append(1)
        if len(calls) == 2:
            raise error
        real(writer)

    monkeypatch.setattr(write.ShardWriter, "_flush", flush)
    with pytest.raises(ExportError, match=reason):
        quick(model, folder, shard_size=40_000, replace=True)
    assert content(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_check_leaves_the_previous_export(tmp_path, monkeypatch):
    model, folder = adapt(base_of("llama")), tmp_path / "out"
    quick(model, folder)
    before = content(folder)

    def fail(*_):
        raise ExportError("differs")

    monkeypatch.setattr(write, "verify_export", fail)
    with pytest.raises(ExportError, match="differs"):
        quick(model, folder, replace=True, verify=True)
    assert content(folder) == before


def test_probe_lists_what_does_not_fit():
    base = base_of("llama")
    shapes = {name: tuple(value.shape) for name, value in base.state_dict().items()}
    config = export_config(base, torch.float32)
    probe(config, shapes)
    wrong = copy.deepcopy(config)
    wrong.intermediate_size = 40
    with pytest.raises(ExportError, match=r"9 tensors do not fit(.|\n)*mlp.down_proj.weight: config says \(48, 40\)"):
        probe(wrong, shapes)
    del shapes["model.norm.weight"]
    with pytest.raises(ExportError, match=r"model\.norm\.weight: config says \(48,\), the model has none"):
        probe(config, shapes)


def test_head_counts_that_the_class_refuses_are_an_export_error():
    base = base_of("llama")
    config = export_config(base, torch.float32)
    config.num_attention_heads = 5
    with pytest.raises(ExportError, match="refuses the exported config"):
        probe(config, {})


def test_custom_class_is_refused():
    base = base_of("llama")
    base.__class__ = type("OwnForCausalLM", (type(base),), {})
    with pytest.raises(UnsupportedModelError, match="no stock transformers class"):
        export_config(base, torch.float32)


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ExportError, match="float32, bfloat16 or float16"):
        quick(base_of("llama"), tmp_path / "out", dtype="int8")
