"""Chunked per-token statistics against cross-entropy of the model's own full logits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from prunetune.core.errors import UnsupportedModelError
from prunetune.model.token_stats import head_statistics, token_statistics

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
VOCAB = 97


def tiny_model(model_type: str, **changes):
    torch.manual_seed(0)
    widths = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **(widths | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def batch(rows: int = 3, length: int = 12):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    attention = torch.ones_like(ids)
    attention[1, 8:] = 0
    labels[1, 8:] = -100
    return ids, labels, attention


def reference(model, ids, labels, attention):
    """(nll, entropy, top1), each (B, S-1), from full float32 logits."""
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
    targets = labels[:, 1:]
    mask = targets != -100
    nll = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1) * mask
    return nll, entropy, (logits.argmax(-1) == targets) & mask, mask


@pytest.mark.parametrize("model_type", FAMILIES)
def test_statistics_equal_full_logits(model_type, monkeypatch):
    # A vocabulary block of 40 and one token a block: every running sum crosses a block's border.
    monkeypatch.setattr("prunetune.model.token_stats._VOCAB_BLOCK", 40)
    model = tiny_model(model_type)
    ids, labels, attention = batch()
    nll, entropy, top1, mask = reference(model, ids, labels, attention)
    stats = token_statistics(model, ids, labels, attention, block_bytes=2 * 4 * 40)
    assert stats.nll.shape == (3, 11)
    assert stats.nll.dtype == torch.float32
    assert torch.equal(stats.mask, mask)
    assert torch.allclose(stats.nll, nll, atol=2e-5)
    assert torch.allclose(stats.entropy, entropy, atol=2e-5)
    assert torch.equal(stats.top1, top1)


def test_softcap_is_applied():
    capped = tiny_model("gemma2", final_logit_softcapping=2.0)
    free = tiny_model("gemma2", final_logit_softcapping=None)
    ids, labels, attention = batch()
    found = token_statistics(capped, ids, labels, attention)
    assert torch.allclose(found.nll, reference(capped, ids, labels, attention)[0], atol=2e-5)
    # Logits in [-2, 2] bound the loss: no token can cost more than 4 + log V.
    assert found.nll.max() <= 4 + torch.log(torch.tensor(float(VOCAB)))
    assert token_statistics(free, ids, labels, attention).nll.max() > found.nll.max()


def test_block_size_changes_nothing_but_memory(monkeypatch):
    model = tiny_model("llama")
    ids, labels, attention = batch()
    whole = token_statistics(model, ids, labels, attention)
    monkeypatch.setattr("prunetune.model.token_stats._VOCAB_BLOCK", 10)
    small = token_statistics(model, ids, labels, attention, block_bytes=1)
    assert torch.allclose(whole.nll, small.nll, atol=1e-5)
    assert torch.equal(whole.top1, small.top1)


def test_no_block_exceeds_its_bytes(monkeypatch):
    largest = []
    real = torch.sub

    def spy(x, other):
        largest.append(x.numel() * 4)
        return real(x, other)

    monkeypatch.setattr("prunetune.model.token_stats.torch.sub", spy)
    head = nn.Linear(8, 1000, bias=True)
    head_statistics(head, torch.randn(500, 8), torch.randint(0, 1000, (500,)), block_bytes=40_000)
    assert max(largest) <= 40_000


def test_half_precision_logits_are_not_rounded():
    """A bfloat16 head gives what float32 arithmetic on the same weights gives."""
    torch.manual_seed(0)
    head = nn.Linear(64, 500, bias=False).to(torch.bfloat16)
    hidden, target = 5 * torch.randn(40, 64).to(torch.bfloat16), torch.randint(0, 500, (40,))
    exact = nn.functional.cross_entropy(hidden.float() @ head.weight.float().t(), target, reduction="none")
    assert torch.allclose(head_statistics(head, hidden, target).nll, exact, atol=1e-5)


def test_no_targets_gives_zeros():
    model = tiny_model("llama")
    ids, labels, attention = batch()
    stats = token_statistics(model, ids, torch.full_like(labels, -100), attention)
    assert stats.nll.sum() == 0
    assert not stats.mask.any()


def test_adapters_count_and_a_head_adapter_is_refused():
    ids, labels, attention = batch()
    config = LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config)
    nll = token_statistics(model, ids, labels, attention).nll
    assert torch.allclose(nll, reference(model, ids, labels, attention)[0], atol=2e-5)
    on_head = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UnsupportedModelError, match="leave lm_head out"):
        token_statistics(on_head, ids, labels, attention)


def test_el2n_and_residual_equal_their_definitions(monkeypatch):
    monkeypatch.setattr("prunetune.model.token_stats._VOCAB_BLOCK", 40)
    model = tiny_model("qwen2")
    ids, labels, attention = batch()
    stats = token_statistics(model, ids, labels, attention, block_bytes=2 * 4 * 40)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].double()
    probs = logits.softmax(-1)
    targets = labels[:, 1:].clamp_min(0)
    onehot = nn.functional.one_hot(targets, VOCAB).double()
    el2n = (probs - onehot).norm(dim=-1) * stats.mask
    residual = ((probs - onehot) * logits).sum(-1) * stats.mask
    assert torch.allclose(stats.el2n.double(), el2n, atol=2e-5)
    assert torch.allclose(stats.residual.double(), residual, atol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("block_bytes", "strip"), [(2**20, 16384), (7 * 4 * 30, 30), (1, 10)])
def test_gradient_norms_equal_autograd(monkeypatch, block_bytes, strip, bias):
    monkeypatch.setattr("prunetune.model.token_stats._VOCAB_BLOCK", strip)
    torch.manual_seed(3)
    head = nn.Linear(16, VOCAB, bias=bias)
    sizes = [5, 0, 1, 9, 4]
    hidden, target = 3 * torch.randn(sum(sizes), 16), torch.randint(0, VOCAB, (sum(sizes),))
    target[:3] = target[0]  # a target that comes twice
    stats = head_statistics(head, hidden, target, block_bytes=block_bytes, row_sizes=sizes)
    plain = head_statistics(head, hidden, target)
    assert torch.allclose(stats.nll, plain.nll, atol=1e-5)
    exact = nn.Linear(16, VOCAB, bias=bias).double()
    exact.load_state_dict(head.state_dict())
    start, residual = 0, []
    for size, norm in zip(sizes, stats.grad_norm, strict=True):
        span = slice(start, start + size)
        start += size
        if size == 0:
            assert norm == 0
            continue
        exact.zero_grad()
        nn.functional.cross_entropy(exact(hidden[span].double()), target[span]).backward()
        assert float(norm) == pytest.approx(float(exact.weight.grad.norm()), rel=1e-5)
        residual.append((float((exact.weight * exact.weight.grad).sum()), float(stats.residual[span].mean())))
    if not bias:
        for ours, theirs in residual:
            assert ours == pytest.approx(theirs, abs=1e-5)
