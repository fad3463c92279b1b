"""What the card and the HTML page say in words, derived from the run's record; no layout here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetune.core.sizes import format_count, format_fraction
from prunetune.model.plan import Plan
from prunetune.model.units import HIDDEN, KINDS, LAYERS_SITE, parse_site
from prunetune.report.gather import RunRecord, phase_spans
from prunetune.report.templating import version_rows

_ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{4,5})(?!\d)")
_UNIT_NAMES = {
    "mlp_channels": "MLP channels in a layer",
    "kv_groups": "KV groups in a layer",
    "query_heads": "query heads in a layer",
    "layers": "layers",
    HIDDEN: "dimensions of the residual stream",
}


def story(record: RunRecord, folder: str) -> dict[str, Any]:
    """What card and page both tell, by the templates' names; ``folder`` is where the example code loads the model."""
    return {
        "title": title(record),
        "summary": summary(record),
        "warnings": notes(record),
        "how_measured": how_measured(record.settings),
        "plan_rows": plan_rows(record.plan) if record.plan else [],
        "delta_rows": delta_rows(record.delta),
        "delta_said": delta_said(record.delta),
        "code": loading_code(folder, bool(record.facts.get("conversational"))),
        "verification": verification_rows(record),
        "training": training_rows(record),
        "online": record.online,
        "papers": papers(record),
        "config": record.config,
        "versions": version_rows(record.versions),
    }


def summary(record: RunRecord) -> str:
    """What came out, in sentences whose every number was measured; what is not known is not said."""
    if len(record.results) < 2:
        return f"{title(record)} in one run."
    before, after = record.results[0].numbers, record.results[-1].numbers
    said = [_size_sentence(base_name(record), before, after)]
    if "domain_ppl" in before and "domain_ppl" in after:
        verb = "improves" if after["domain_ppl"] < before["domain_ppl"] else "worsens"
        change = f"from {before['domain_ppl']:.2f} to {after['domain_ppl']:.2f}"
        others = [
            f"{result.label}, not pruned: {result.numbers['domain_ppl']:.2f}"
            for result in record.results[1:-1]
            if "domain_ppl" in result.numbers and result.numbers["params_total"] == before["params_total"]
        ]
        aside = f" ({'; '.join(others)})" if others else ""
        said.append(f"Perplexity on held-out rows of the domain {verb} {change}{aside}.")
    if "general_ppl" in before and "general_ppl" in after:
        change = f"from {before['general_ppl']:.1f} to {after['general_ppl']:.1f}"
        said.append(f"On general text it goes {change}.")
    speeds = [
        f"{verb} at {after[name]:.2f}x"
        for verb, name in (("reads prompts", "prefill_speedup_b1"), ("writes text", "decode_speedup_b1"))
        if name in after
    ]
    if speeds:
        said.append(f"It {' and '.join(speeds)} the base model's speed.")
    return " ".join(said)


def _size_sentence(name: str, before: dict[str, float], after: dict[str, float]) -> str:
    total = after["params_total"] / before["params_total"]
    decoder = after["params_decoder"] / before["params_decoder"]
    return (
        f"{name} keeps {format_fraction(total)} of its parameters "
        f"({format_count(before['params_total'])} to {format_count(after['params_total'])}; "
        f"{format_fraction(decoder)} of the decoder)."
    )


def title(record: RunRecord) -> str:
    """What was done to which model."""
    return f"{base_name(record)}, fine-tuned" + (" and pruned" if record.plan else "")


def how_made(record: RunRecord) -> str:
    """What the run did, in general terms."""
    onto = record.facts.get("merged_onto")
    base = f" The base was quantised while training; the adapters are merged onto {onto}." if onto else ""
    if record.plan is None:
        return f"The base model was fine-tuned with LoRA adapters, which are merged; nothing was pruned.{base}"
    return (
        "The base model was fine-tuned with LoRA adapters and pruned in the same run by prunetune: gates on whole "
        "units closed while the adapters learnt, the decision was frozen, the model was cut, and training went on "
        f"with the small model. The adapters are merged.{base}"
    )


def base_name(record: RunRecord) -> str:
    """The base model's name without a folder before it."""
    name = str(record.facts.get("base_model") or "The model")
    return name if is_hub_id(name) else Path(name).name or name


def is_hub_id(name: str) -> bool:
    """Whether a name can be a Hugging Face Hub id (owner/model) rather than a path."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """(what, before, after) for every kind of unit that the plan names."""
    arch = plan.architecture
    staying = set(plan.kept.get(LAYERS_SITE, range(int(arch["layers"]))))
    rows = []
    for kind in (*KINDS, HIDDEN):
        size = int(arch["hidden_size" if kind == HIDDEN else kind])
        if kind == LAYERS_SITE:
            counts = [len(staying)]
        elif kind == HIDDEN:
            counts = [len(plan.kept[HIDDEN])] if HIDDEN in plan.kept else []
        else:
            sites = {parse_site(name): kept for name, kept in plan.kept.items()}
            counts = [len(kept) for (layer, k), kept in sites.items() if k == kind and layer in staying]
        if counts and counts != [size]:
            after = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
            rows.append((_UNIT_NAMES[kind], str(size), after))
    return rows


def delta_rows(delta: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(share dropped, perplexity, q) for every rate that was tried."""
    return [
        (
            format_fraction(point["drop"]),
            f"{point['perplexity']:.2f}",
            f"{point['median_q']:.3g}" if "median_q" in point else "",
        )
        for point in delta.get("curve", ())
    ]


def delta_said(delta: dict[str, Any]) -> str:
    """What was dropped of what the adapters learnt, in a sentence; empty if nothing was."""
    if not delta:
        return ""
    share = "a part" if delta["drop"] is None else format_fraction(delta["drop"])
    return (
        f"Of what the adapters learnt, {delta['method']} dropped {share} before it was merged: perplexity "
        f"{delta['perplexity']:.2f} instead of {delta['whole_perplexity']:.2f} with everything, on {delta['rows']} "
        f"held-out rows. What was left open was searched on {delta['searched_on']}."
    )


def training_rows(record: RunRecord) -> list[tuple[str, str]]:
    """(name, value) facts of the training that are known."""
    facts = record.facts
    spans = phase_spans(record.metrics)
    phases = ", ".join(f"{phase} to step {last:.0f}" for phase, _, last in spans)
    found = [
        ("Base model", _text(facts.get("base_model"))),
        ("Training data", _text(facts.get("data"))),
        ("Chosen in each step", _chosen(record)),
        ("Budget", _text(facts.get("budget"))),
        ("Units ranked by", _text(facts.get("mask"))),
        ("Compensation at the freeze", _text(facts.get("compensation"))),
        ("Ranks of the adapters after it", _text(facts.get("ranks"))),
        ("Phases", phases),
        ("Optimizer steps", _text(facts.get("steps"))),
        ("Training time", _duration(facts.get("seconds"))),
    ]
    return [(name, value) for name, value in found if value]


def _chosen(record: RunRecord) -> str:
    """What online selection left of rows and target tokens; empty if nothing chose."""
    if record.online is None:
        return ""
    parts = [f"{format_fraction(kept / whole)} of the {what}" for what, kept, whole in record.online.amounts if whole]
    return ", ".join(parts) + " (decisions in selection.jsonl)"


def verification_rows(record: RunRecord) -> list[tuple[str, str]]:
    """(check, outcome) of the export's verification, if the caller passed it."""
    checks = dict(record.facts.get("verification") or {})
    nested = checks.pop("from_trained", {})  # of a quantised base
    rows = [(str(name).replace("_", " "), _text(value)) for name, value in checks.items()]
    return rows + [(f"against the trained model: {name.replace('_', ' ')}", _text(nested[name])) for name in nested]


def papers(record: RunRecord) -> list[tuple[str, str]]:
    """(name, link) of the papers passed in; arXiv numbers in a text become links of their own."""
    found: list[tuple[str, str]] = []
    for entry in record.facts.get("papers") or ():
        if isinstance(entry, dict):
            found.append((str(entry["title"]), str(entry["url"])))
            continue
        numbers = _ARXIV.findall(str(entry))
        found += [(f"arXiv:{number}", f"https://arxiv.org/abs/{number}") for number in numbers]
        if not numbers:
            found.append((str(entry), str(entry) if str(entry).startswith("http") else ""))
    return list(dict.fromkeys(found))


def how_measured(settings: dict[str, Any]) -> str:
    """One sentence on how the table's numbers came about."""
    if not settings:
        return ""
    return (
        f"Measured in {settings.get('dtype')} on {settings.get('device')}. Perplexity is over the target tokens "
        f"of held-out rows cut at {settings.get('max_length')} tokens, and over windows of "
        f"{settings.get('window')} tokens of general text. Speed: prompts of {settings.get('prompt_tokens')} "
        f"tokens, {settings.get('new_tokens')} new ones, median of {settings.get('repeats')} turns in which the "
        "models alternate; in brackets the quartiles of the per-turn ratios. Peak memory: a fresh process that "
        "loads the folder as it is (weights stored in another dtype cost extra while loading) and reads one "
        "prompt, libraries included."
    )


def export_folder(record: RunRecord) -> Path:
    """Where the compact model is."""
    return Path(record.facts.get("export") or record.folder / "compact")


def loading_code(folder: str, conversational: bool) -> str:
    """A runnable example for stock transformers."""
    ask = (
        'inputs = tokenizer.apply_chat_template(\n    [{"role": "user", "content": "..."}], '
        'add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
        if conversational
        else 'inputs = tokenizer("...", return_tensors="pt")'
    )
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")\n'
        f"{ask}\n"
        "output = model.generate(**inputs, max_new_tokens=100)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))"
    )


def notes(record: RunRecord) -> Sequence[str]:
    """Warnings of the run, as passed in."""
    return [str(text) for text in record.facts.get("warnings") or ()]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
