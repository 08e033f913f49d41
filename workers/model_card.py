"""The model card: what the student is, what it was taught from, how good it is, and how its rows were chosen."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from app.pretrained import Source
from workers.training.evaluation import warnings_of


def model_card(facts: dict[str, Any], source: Source) -> str:
    """README.md of a checkpoint: the hub's YAML header, then the facts of metrics.json for people.

    Label names and texts are the client's: they stand in code spans and tables with Markdown's signs escaped.
    """
    spec, evaluation, selection = facts["spec"], facts["evaluation"], facts["selection"]
    test = (evaluation.get("test") or {}).get("student")
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["understudy", "knowledge-distillation", spec["method"]["kind"]],
        base_model=source.name if source.kind == "hub" else None,
        model_name=facts["checkpoint_id"] if test else None,
        eval_results=_results(facts, test) if test else None,
    )
    lines = [
        "---",
        header.to_yaml().strip(),
        "---",
        "",
        f"# {_plain(spec.get('name') or 'Student')} ({facts['checkpoint_id']})",
        "",
        f"A RoBERTa text classifier, distilled by Understudy with `{spec['method']['kind']}` from a"
        f" `{spec['teacher']['kind']}` teacher. Start: `{source.name}` ({source.kind}).",
        "",
        "```python",
        "from transformers import pipeline",
        'classify = pipeline("text-classification", model=".")  # this directory',
        "```",
        "",
        "## Scores",
        "",
        "| set | model | rows | accuracy | 95 % interval | macro-F1 | 95 % interval |",
        "|---|---|---|---|---|---|---|",
        *_score_rows(evaluation),
        "",
        _validation_sentence(evaluation),
        "",
        *(f"**Beware**: {_plain(warning['message'])}.\n" for warning in warnings_of(evaluation)),
        *_abstention(evaluation.get("calibration")),
        "## Which rows it was trained on",
        "",
        f"{selection['selected']:,} of {selection['seen']:,} rows seen were trained on"
        f" ({selection['ratio']:.1%} of epochs x rows).",
        "",
        "| epoch | seen | selected | share |",
        "|---|---|---|---|",
        *(f"| {e['epoch']} | {e['seen']:,} | {e['selected']:,} | {e['ratio']:.1%} |" for e in selection["epochs"]),
        "",
        *_waves(facts["waves"]),
        *_labels(facts["label_report"]),
        "## Where it comes from",
        "",
        f"- dataset `{facts['dataset']['id']}`, {facts['dataset']['rows']:,} rows, sha256 `{facts['dataset']['sha256']}`",
        f"- job `{facts['job_id']}`, checkpoint of step {facts['step']} (epoch {facts['epoch']:g})",
        f"- teacher: `{json.dumps(facts['teacher'], ensure_ascii=True)}`",
        "",
        "The job's spec:",
        "",
        "```json",
        json.dumps(spec, indent=2, ensure_ascii=True).replace("```", "\\u0060\\u0060\\u0060"),
        "```",
        "",
    ]
    return "\n".join(lines)


def _results(facts: dict[str, Any], test: dict[str, Any]) -> list[EvalResult]:
    dataset_id = facts["spec"]["test_dataset_id"]
    return [
        EvalResult("text-classification", dataset_id, dataset_id, name, test[name], dataset_split="test")
        for name in ("accuracy", "macro_f1")
    ]


def _score_rows(evaluation: dict[str, Any]) -> list[str]:
    rows = []
    for split in ("validation", "test"):
        for model in ("student", "teacher"):
            scores = (evaluation.get(split) or {}).get(model)
            if scores:
                low, high = scores["accuracy_interval"]
                f1_low, f1_high = scores["macro_f1_interval"]
                rows.append(
                    f"| {split} | {model} | {scores['rows']:,} | {scores['accuracy']:.4f} | {low:.4f} – {high:.4f}"
                    f" | {scores['macro_f1']:.4f} | {f1_low:.4f} – {f1_high:.4f} |"
                )
    return rows


def _validation_sentence(evaluation: dict[str, Any]) -> str:
    if (evaluation.get("validation") or {}).get("source") == "held_back_pseudo_labels":
        return (
            "There was no validation set: the checkpoint was chosen on pseudo-labeled rows held back from training, so the"
            " validation row tells agreement with the teacher, not accuracy."
        )
    return "The checkpoint was chosen on the validation set; the test set was looked at once, at the end."


def _abstention(calibration: dict[str, Any] | None) -> list[str]:
    if calibration is None:
        return []
    threshold, curve = calibration["threshold"], calibration["curve"]
    if threshold is None:
        rule = "no confidence was high enough for that, so abstain from everything that matters"
    elif threshold == 0:
        rule = "it is that good on every row, so it need not abstain"
    else:
        rule = f"abstain where the confidence is below {threshold:.4f}"
    return [
        "## When to abstain",
        "",
        f"Confidence is the largest of softmax(logits / {calibration['temperature']:.4f}). To be right in"
        f" {calibration['target_accuracy']:.1%} of what it answers: {rule}. Found on {calibration['rows']:,} rows"
        f" ({calibration['source'].replace('_', ' ')}); `calibration.json` has the numbers for programs.",
        "",
        f"What it gains, on the {curve['split']} rows; the last column when the teacher answers the rest:",
        "",
        "| answered | from confidence | accuracy of the answered | of all, with the teacher |",
        "|---|---|---|---|",
        *(
            f"| {point['coverage']:.0%} | {point['threshold']:.4f} | {point['accuracy']:.4f}"
            f" | {'' if point['with_teacher'] is None else format(point['with_teacher'], '.4f')} |"
            for point in curve["points"]
        ),
        "",
    ]


def _waves(waves: dict[str, Any] | None) -> list[str]:
    """What the teacher was not asked about, and why."""
    if waves is None or not waves["history"]:
        return []
    cost = "" if waves["cost_withheld"] is None else f" and {waves['cost_withheld']:g} in the operator's currency"
    saved = f", which saved about {waves['tokens_withheld']:,} tokens{cost}" if waves["rows_withheld"] else ""
    return [
        f"The teacher was asked in waves, about {waves['rows_asked']:,} rows in all and not about {waves['rows_withheld']:,}"
        f"{saved}. It ended there because {waves['history'][-1]['stopped']}.",
        "",
        "| wave | rows asked about | epochs | rows selected | validation macro-F1 | above the wave before, at most |",
        "|---|---|---|---|---|---|",
        *(
            f"| {wave['wave']} | {wave['rows']:,} | {wave['epochs'] or ''} | {wave['selected']:,}"
            f" | {'' if wave['macro_f1'] is None else format(wave['macro_f1'], '.4f')}"
            f" | {'' if wave['gain_at_most'] is None else format(wave['gain_at_most'], '.4f')} |"
            for wave in waves["history"]
        ),
        "",
    ]


def _labels(report: dict[str, Any] | None) -> list[str]:
    """The label report in short: no row's text leaves the server with the checkpoint."""
    if report is None:
        return []
    counts, wrong = report["class_counts"], report["likely_wrong"]
    rarest, commonest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    lines = [
        f"- {report['rows_labeled']:,} rows labeled: from {counts[rarest]:,} as {_plain(rarest)} to {counts[commonest]:,} as"
        f" {_plain(commonest)}, of {len(counts)} labels"
    ]
    if report["mean_confidence"] is not None:
        lines.append(f"- mean confidence {report['mean_confidence']:.4f}")
    for split, agreement in report["agreement_with_gold"].items():
        error = report["expected_calibration_error"][split]
        calibration = "" if error is None else f", expected calibration error {error:.4f}"
        lines.append(f"- {split}: {agreement:.1%} agree with the true labels{calibration}")
    if wrong["rows_scored"]:
        lines.append(
            f"- {wrong['found']:,} of {wrong['rows_scored']:,} rows that were never trained on look wrongly labeled"
        )
    pairs = report["near_duplicates_with_different_labels"]
    return ["## The labels", "", *lines, f"- {pairs:,} pairs of near-duplicates have different labels", ""]


def _plain(text: str) -> str:
    """Client text without Markdown's and HTML's signs."""
    escaped = "".join(f"\\{sign}" if sign in "\\`*_{}[]()#+-!|" else sign for sign in " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
