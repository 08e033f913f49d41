"""The table of all methods on real data, produced through the HTTP API; writes docs/results.md, .json and .svg.

    python -m benchmarks.results [--rows 3000] [--epochs 2] [--seeds 2] [--workers 2] [--data-dir build/results]

Starts `understudy up` on --data-dir, uploads the unlabeled rows, the validation and the test set of each data set, and
submits one job for each method and seed. A run that docs/results.json holds, made with the same options, is not made
again, nor is a job that has finished in --data-dir; every run is written to docs/results.json as it ends. So it may be
stopped (Ctrl-C or SIGTERM) and started at will, on this machine or another. --tables-only runs nothing and writes the
tables from docs/results.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from app.client import Client
from benchmarks.data import ROOT, SHARED, few_shot, read_split
from benchmarks.record import Record, end_by_interrupt, find_or_submit, finished, serving, spread, upload, whole_seeds

DATA_SETS = {
    "emotion": {
        "anger": "anger, irritation, resentment",
        "fear": "fear, nervousness, worry",
        "joy": "joy, happiness, contentment",
        "love": "love, affection, tenderness",
        "sadness": "sadness, grief, disappointment",
        "surprise": "surprise, amazement, curiosity",
    },
    "csabstruct": {
        "background": "background and motivation: what was known before",
        "method": "method: what was built, proposed or done",
        "objective": "objective: what the paper aims to do",
        "other": "other: acknowledgements, links, remarks",
        "result": "result: what was found, how well it works",
    },
    "yahoo-answers-titles": {
        "Business & Finance": "business, money, jobs, taxes",
        "Computers & Internet": "computers, software, internet",
        "Education & Reference": "school, study, words, facts",
        "Entertainment & Music": "films, music, television, celebrities",
        "Family & Relationships": "family, dating, marriage, friends",
        "Health": "health, illness, diet, body",
        "Politics & Government": "politics, law, government, war",
        "Science & Mathematics": "science, mathematics, physics, nature",
        "Society & Culture": "religion, culture, customs, holidays",
        "Sports": "sports, teams, players, games",
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "LLKD": {"kind": "llkd"},
    "LLKD_w": {"kind": "llkd", "weighted": True},
    "LLKD w/o TC": {"kind": "llkd", "use_teacher_confidence": False},
    "LLKD w/o SU": {"kind": "llkd", "use_student_uncertainty": False},
    "No_DS": {"kind": "no_selection"},
    "Random": {"kind": "random"},
    "FreeMatch": {"kind": "freematch"},
    "SoftMatch": {"kind": "softmatch"},
    "CCKD_L": {"kind": "cckd_l"},
    "CCKD_T+Reg": {"kind": "cckd_t_reg"},
    "Entropy Score": {"kind": "entropy_score"},
    "UNIXKD": {"kind": "unixkd"},
}
DOCS = ROOT / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="unlabeled rows of each data set; 0 takes all")
    parser.add_argument("--validation-rows", type=int, default=500)
    parser.add_argument("--test-rows", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shots", type=int, default=32, help="examples of each class that the teacher is shown")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "build" / "results")
    parser.add_argument("--data", nargs="*", default=list(DATA_SETS), choices=list(DATA_SETS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=DOCS)
    parser.add_argument("--tables-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tables_only:
        if not SHARED.is_dir():
            sys.exit(f"results: the data sets are not at {SHARED}")
        end_by_interrupt()
        measure(arguments)
    outcome = json.loads((arguments.out / "results.json").read_text())
    (arguments.out / "results.md").write_text(document(outcome))
    plot(outcome, arguments.out / "results.svg")
    print((arguments.out / "results.md").read_text())


# --- running --------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> None:
    """Run every job whose facts are not on record yet, and add each to the record as it ends."""
    record = Record(arguments.out / "results.json", chosen(arguments))
    # One seed of everything first, so that a run that is stopped is of use.
    missing = record.missing(
        {"data": name, "method": method, "seed": seed}
        for seed in range(arguments.seeds)
        for name in arguments.data
        for method in arguments.methods
    )
    if not missing:
        return
    with serving(arguments.data_dir, arguments.workers) as client:
        for run, job in finished(client, submit_all(client, missing, arguments), arguments.workers):
            record.add({**run, **facts(job)})


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that a figure depends on."""
    names = ("rows", "epochs", "shots", "precision", "validation_rows", "test_rows")
    return {name: getattr(arguments, name) for name in names}


def submit_all(client: Client, missing: list[dict[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Submit the missing runs; each with the id of its job."""
    specs = {name: base_spec(client, name, arguments) for name in {run["data"]: None for run in missing}}
    runs = []
    for run in missing:
        training = {
            "epochs": arguments.epochs, "seed": run["seed"], "precision": arguments.precision, "learning_rate": 2e-4,
        }  # fmt: skip
        wanted = {**specs[run["data"]], "method": METHODS[run["method"]], "training": training}
        tags = {
            "results": run["data"], "method": run["method"], "seed": str(run["seed"]), "rows": str(arguments.rows),
        }  # fmt: skip
        runs.append({**run, "job": find_or_submit(client, wanted, tags)})
    return runs


def base_spec(client: Client, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Upload a data set; the teacher's examples come from the train rows and leave the pool."""
    examples, rest = few_shot(read_split(name, "train"), arguments.shots)
    pool = rest[: arguments.rows or None]
    splits = {
        "dataset_id": [{"text": row["text"]} for row in pool],
        "validation_dataset_id": read_split(name, "validation", arguments.validation_rows),
        "test_dataset_id": read_split(name, "test", arguments.test_rows),
    }
    ids = {field: upload(client, f"{name}-{field}-{len(rows)}", rows) for field, rows in splits.items()}
    return {
        **ids,
        "labels": [{"name": label, "description": words} for label, words in DATA_SETS[name].items()],
        "teacher": {
            "kind": "embedding",
            "examples": [{"text": row["text"], "label": row["label"]} for row in examples],
        },
    }


def facts(job: dict[str, Any]) -> dict[str, Any]:
    """What the tables need of one job."""
    test = job["evaluation"]["test"]
    return {
        "accuracy": test["student"]["accuracy"],
        "macro_f1": test["student"]["macro_f1"],
        "teacher_accuracy": test["teacher"]["accuracy"],
        "teacher_macro_f1": test["teacher"]["macro_f1"],
        "ratio": job["selection"]["ratio"],
        "seconds": job["metrics"]["training_seconds"],
    }


# --- writing --------------------------------------------------------------------------------------------------------


def document(outcome: dict[str, Any]) -> str:
    """docs/results.md."""
    options, runs = outcome["options"], outcome["runs"]
    places = {name: place for place, name in enumerate([*DATA_SETS, *METHODS])}
    runs = sorted(whole_seeds(runs), key=lambda run: (places[run["data"]], places[run["method"]], run["seed"]))
    seeds = len({run["seed"] for run in runs})
    lines = [
        "# Results on real data sets",
        "",
        "Made through the HTTP API by `python -m benchmarks.results"
        f" --rows {options['rows']} --epochs {options['epochs']} --seeds {seeds} --shots {options['shots']}"
        f" --precision {options['precision']} --validation-rows {options['validation_rows']} --test-rows {options['test_rows']}`; the raw figures are in [results.json](results.json). LGTM and the methods of its"
        " table, on MRPC, RTE and SST-2 too: [lgtm-results.md](lgtm-results.md).",
        "",
        f"{options['rows']} unlabeled train rows of each set, {options['epochs']} epochs, {seeds} {'seed' if seeds == 1 else 'seeds'},"
        f" batch 32, learning rate 2e-4. Teacher: `embedding` with {options['shots']} examples a class (taken from the train"
        " rows and removed from the pool). Student: the bundled all-MiniLM-L6-v2, all six layers. The checkpoint is chosen on"
        f" {options['validation_rows']} validation rows; the scores are of the first {options['test_rows']} test rows (all where there are fewer),"
        " in per cent, mean ± standard deviation over the seeds. *Seen* is the share of rows x epochs that was trained on;"
        " *time* is the training's wall time relative to No_DS, two jobs at a time on two cores.",
        "",
        "![score against share of rows trained on](results.svg)",
    ]
    ranks: dict[str, list[float]] = {}
    names = list(dict.fromkeys(run["data"] for run in runs))
    everywhere = set.intersection(*({run["method"] for run in runs if run["data"] == name} for name in names))
    for name in names:
        mine = [run for run in runs if run["data"] == name]
        methods = list(dict.fromkeys(run["method"] for run in mine))
        scores = {m: statistics.mean(run["macro_f1"] for run in mine if run["method"] == m) for m in methods}
        for method in everywhere:
            better = sum(scores[other] > scores[method] for other in everywhere)
            ranks.setdefault(method, []).append(1.0 + better)
        lines += ["", f"## {name}", "", "| method | accuracy | macro-F1 | seen | time |", "|---|---|---|---|---|"]
        teacher = mine[0]
        lines.append(
            f"| Teacher | {100 * teacher['teacher_accuracy']:.1f} | {100 * teacher['teacher_macro_f1']:.1f} | – | – |"
        )
        base = statistics.median([run["seconds"] for run in mine if run["method"] == "No_DS"] or [float("nan")])
        for method in methods:
            group = [run for run in mine if run["method"] == method]
            lines.append(
                f"| {method} | {spread([run['accuracy'] for run in group])} | {spread([run['macro_f1'] for run in group])}"
                f" | {100 * statistics.mean(run['ratio'] for run in group):.1f} %"
                f" | {statistics.median(run['seconds'] for run in group) / base:.2f} |"
            )
    lines += [
        "",
        "## Average rank by macro-F1",
        "",
        "Among the methods that ran on every data set.",
        "",
        "| method | rank |",
        "|---|---|",
    ]
    ordered = sorted((statistics.mean(places), method) for method, places in ranks.items())
    lines += [f"| {method} | {rank:.1f} |" for rank, method in ordered]
    remarks = DOCS / "results-remarks.md"
    if remarks.exists():
        lines += ["", remarks.read_text().strip()]
    return "\n".join(lines) + "\n"


def plot(outcome: dict[str, Any], path: Path) -> None:
    """Macro-F1 against the share of rows trained on, one panel a data set."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "understudy"
    from matplotlib import pyplot

    runs = whole_seeds(outcome["runs"])
    names = list(dict.fromkeys(run["data"] for run in runs))
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(5.2 * len(names), 4.2), squeeze=False, layout="constrained"
    )
    for panel, name in zip(panels[0], names, strict=True):
        mine = [run for run in runs if run["data"] == name]
        for method in dict.fromkeys(run["method"] for run in mine):
            group = [run for run in mine if run["method"] == method]
            share = 100 * statistics.mean(run["ratio"] for run in group)
            score = 100 * statistics.mean(run["macro_f1"] for run in group)
            ours = method.startswith("LLKD")
            panel.scatter(share, score, marker="o" if ours else "s", color="tab:red" if ours else "tab:blue")
            panel.annotate(method, (share, score), xytext=(4, 3), textcoords="offset points", fontsize=7)
        panel.axhline(100 * mine[0]["teacher_macro_f1"], color="grey", linestyle="--", linewidth=1, label="teacher")
        panel.set(title=name, xlabel="rows trained on, % of rows x epochs", ylabel="macro-F1 on test, %", xlim=(0, 112))
        panel.legend(loc="lower right", fontsize=7)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
