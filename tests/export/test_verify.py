import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunetune.core.errors import ExportError
from prunetune.export import _verify_process, live, verify
from prunetune.export.verify import TOLERANCE, verify_export
from prunetune.export.write import METADATA_FILE, export_model
from tests.export.export_support import adapt, base_of
from tests.support import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat=True)


def exported(model, folder, dtype="float32"):
    return export_model(model, TOKENIZER, folder, dtype=dtype, verify=False).folder


def state_of(model):
    return {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return all(
        after[name].dtype == dtype and torch.equal(after[name], value) for name, (dtype, value) in before.items()
    )


@pytest.mark.parametrize("family", ["llama_tied_mha", "gemma2"])
def test_export_is_proven_in_a_fresh_process(family, tmp_path):
    model = adapt(base_of(family)).train()
    before = state_of(model)
    proof = export_model(model, TOKENIZER, tmp_path / "out", dtype="float32").verification
    assert max(proof[name] for name in proof if name.endswith("_difference")) < TOLERANCE
    assert (proof["generated_tokens"], proof["rounding_difference"]) == (64, 0.0)
    assert proof["class"].startswith("transformers.models.")
    assert json.loads((tmp_path / "out" / METADATA_FILE).read_text())["verification"] == proof
    assert model.training
    assert unchanged(model, before)


def test_sixteen_bit_export_is_exact_up_to_its_stated_rounding(tmp_path):
    model = adapt(base_of("gemma3_text").bfloat16())
    before = state_of(model)
    proof = export_model(model, TOKENIZER, tmp_path / "out", dtype="bfloat16").verification
    assert proof["rounding_difference"] > 10 * TOLERANCE
    assert proof["reload_difference"] < TOLERANCE
    assert unchanged(model, before)


def test_autocast_around_the_live_model_is_seen_through(request: pytest.FixtureRequest):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model, prompts, device = base_of("llama"), [[5, 6, 7]], torch.device("cpu")
    plain = live.logits(live.undecorated(model), prompts, device)
    # Accelerate keeps one state a process; a trainer of another test may have set it differently.
    AcceleratorState._reset_state(reset_partial_state=True)
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert not torch.equal(prepared(torch.tensor(prompts)).logits[0], plain[0])
    assert torch.equal(live.logits(live.undecorated(prepared), prompts, device)[0], plain[0])


def test_one_flipped_bit_is_found(tmp_path):
    model = adapt(base_of("llama"))
    folder = exported(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"].view(torch.int32)[77, 3] ^= 1  # a row that no prompt may use
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"model\.embed_tokens\.weight in model\.safetensors is not the tensor"):
        verify_export(model, TOKENIZER, folder, torch.float32)


def test_noise_of_float32_widens_the_tolerance_and_a_fault_does_not(monkeypatch):
    model = base_of("llama")
    before = state_of(model)
    judge = verify._Judge(model, [[5, 6, 7]], torch.device("cpu"))
    judge.require("anything", 0.9e-4)
    with pytest.raises(ExportError, match=r"a fault \(by 0\.01, allowed 0\.0001\)"):
        judge.require("a fault", 0.01)
    assert 0 < live.float32_noise(model, [[5, 6, 7]], torch.device("cpu")) < 1e-4
    assert unchanged(model, before)
    monkeypatch.setattr(verify, "float32_noise", lambda *_: 1e-3)
    judge.require("anything", 3e-3)
    with pytest.raises(ExportError, match=r"allowed 0\.004"):
        judge.require("not a number", float("nan"))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_config_that_changes_the_arithmetic_is_found(tmp_path):
    model = adapt(base_of("llama"))
    folder = exported(model, tmp_path / "out")
    change_config(folder, rms_norm_eps=0.5)
    with pytest.raises(ExportError, match="merged weights differ from the live model"):
        verify_export(model, TOKENIZER, folder, torch.float32)


def test_what_only_the_fresh_process_sees_is_found(tmp_path, monkeypatch):
    model = adapt(base_of("llama"))
    folder = exported(model, tmp_path / "out")
    compare = verify._require_equal_files

    def then_change(*arguments):
        compare(*arguments)
        change_config(folder, rms_norm_eps=0.5)

    monkeypatch.setattr(verify, "_require_equal_files", then_change)
    with pytest.raises(ExportError, match="reloaded model differs"):
        verify_export(model, TOKENIZER, folder, torch.float32)


def test_a_folder_that_does_not_open_is_an_export_error(tmp_path, monkeypatch):
    model = adapt(base_of("llama"))
    folder = exported(model, tmp_path / "out")
    compare = verify._require_equal_files

    def then_break(*arguments):
        compare(*arguments)
        change_config(folder, num_attention_heads=5)

    monkeypatch.setattr(verify, "_require_equal_files", then_break)
    with pytest.raises(ExportError, match="stock transformers could not use it"):
        verify_export(model, TOKENIZER, folder, torch.float32)


def test_another_tokenizer_is_found(tmp_path):
    folder = exported(base_of("llama"), tmp_path / "out")
    text = "w3 w4 other"
    prompt = TOKENIZER(text)["input_ids"]
    assert _verify_process._tokenizer_faults(str(folder), [text], [prompt]) == []
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["unk_token"] = "w3"
    path.write_text(json.dumps(tokenizer))
    [fault] = _verify_process._tokenizer_faults(str(folder), [text], [prompt])
    assert "into other tokens" in fault


def test_a_process_that_hangs_is_given_up(tmp_path, monkeypatch):
    real = subprocess.run
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **kw: real([sys.executable, "-c", "import time; time.sleep(60)"], **{**kw, "timeout": 0.5}),
    )
    with pytest.raises(ExportError, match="was not done after"):
        verify._run(tmp_path, 0.5)


def test_a_token_that_differs_counts_only_up_to_there():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 2.99999, 0.0], [1.0, 0.0, 0.0]])
    other = logits.clone()
    other[1] = torch.tensor([2.99999, 3.0, 0.0])
    other[2] = 50.0  # after the texts parted
    ties = []
    tokens, others = torch.tensor([2, 0, 0]), torch.tensor([2, 1, 0])
    largest = _verify_process._compare((tokens, logits), (others, other), "left-padded", 4, ties)
    assert largest == pytest.approx(1e-5, rel=0.1)
    assert (ties[0]["position"], ties[0]["prompt"]) == (1, 4)
    assert ties[0]["gap"] <= 2 * ties[0]["difference"] + 1e-6
