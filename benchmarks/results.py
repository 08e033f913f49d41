"""The table of all methods on real data, produced through the HTTP API; writes docs/results.md, .json and .svg.

    python -m benchmarks.results [--rows 3000] [--epochs 2] [--seeds 2] [--workers 2] [--data-dir build/results]

Starts `understudy up` on --data-dir, uploads the unlabeled rows, the validation and the test set of each data set, and
submits one job for each method and seed. Jobs that an earlier run has finished are not run again, so it may be stopped
and started at will; --finished-only submits nothing and writes the tables from the jobs that have finished, --tables-only
from docs/results.json.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.client import Client
from benchmarks.data import ROOT, SHARED, few_shot, read_split

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
    parser.add_argument("--finished-only", action="store_true")
    parser.add_argument("--tables-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tables_only:
        if not SHARED.is_dir():
            sys.exit(f"results: the data sets are not at {SHARED}")
        outcome = measure(arguments)
        (arguments.out / "results.json").write_text(json.dumps(outcome, indent=1) + "\n")
    outcome = json.loads((arguments.out / "results.json").read_text())
    (arguments.out / "results.md").write_text(document(outcome))
    plot(outcome, arguments.out / "results.svg")
    print((arguments.out / "results.md").read_text())


# --- running --------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every job that is not there yet; the facts of all of them."""
    command = [
        str(Path(sys.executable).parent / "understudy"),
        "up",
        "--port",
        "0",
        "--data-dir",
        str(arguments.data_dir),
    ]
    server = subprocess.Popen([*command, "--workers", str(arguments.workers)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline().split()
        if ready[:1] != ["ready"]:
            sys.exit("results: the server did not start")
        key = (arguments.data_dir / "api-key").read_text().strip()
        with Client(ready[1], key) as client:
            if arguments.finished_only:
                runs, jobs = finished(client)
            else:
                runs = submit_all(client, arguments)
                jobs = wait_for_all(client, [run["job"] for run in runs])
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    options = {
        name: getattr(arguments, name)
        for name in ("rows", "epochs", "seeds", "shots", "precision", "validation_rows", "test_rows")
    }
    return {"options": options, "runs": [{**run, **facts(jobs[run["job"]])} for run in runs]}


def submit_all(client: Client, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Submit what is missing; data set, method, seed and job id of every run."""
    runs = []
    specs = {name: base_spec(client, name, arguments) for name in arguments.data}
    for seed in range(arguments.seeds):  # one seed of everything first, so that a run that is stopped is of use
        for name in arguments.data:
            for method in arguments.methods:
                wanted = {
                    **specs[name],
                    "method": METHODS[method],
                    "training": {
                        "epochs": arguments.epochs,
                        "seed": seed,
                        "precision": arguments.precision,
                        "learning_rate": 2e-4,
                    },
                }
                tags = {"results": name, "method": method, "seed": str(seed), "rows": str(arguments.rows)}
                runs.append({"data": name, "method": method, "seed": seed, "job": find_or_submit(client, wanted, tags)})
    return runs


def finished(client: Client) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The runs that have succeeded on this server, in the order of the tables, and their jobs."""
    jobs = {job["id"]: job for job in client.jobs(status="succeeded") if "results" in job["metadata"]}
    tags = {job_id: job["metadata"] for job_id, job in jobs.items()}
    runs = [
        {"data": tag["results"], "method": tag["method"], "seed": int(tag["seed"]), "job": job_id}
        for job_id, tag in tags.items()
    ]
    places = {name: place for place, name in enumerate([*DATA_SETS, *METHODS])}
    return sorted(runs, key=lambda run: (places[run["data"]], places[run["method"]], run["seed"])), jobs


def find_or_submit(client: Client, spec: dict[str, Any], tags: dict[str, str]) -> str:
    """The job of this very spec that has not failed, or a new one."""
    filters = {f"metadata[{name}]": value for name, value in tags.items()}
    for job in client.jobs(**filters):
        same = all(job["spec"]["training"][name] == value for name, value in spec["training"].items())
        same &= all(job["spec"]["method"].get(name) == value for name, value in spec["method"].items())
        if same and job["status"] not in ("failed", "cancelled"):
            return str(job["id"])
    return str(client.submit({**spec, "metadata": tags})["id"])


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


def upload(client: Client, name: str, rows: list[dict[str, str]]) -> str:
    """Upload rows and return the dataset's id."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(client.upload(path, name=name)["id"])


def wait_for_all(client: Client, ids: list[str]) -> dict[str, dict[str, Any]]:
    """Every job once it has ended; a failed one ends the benchmark with its reason."""
    jobs: dict[str, dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("jobs", total=len(ids))
        for job_id in ids:
            job = client.wait(job_id, every=2.0)
            if job["status"] != "succeeded":
                sys.exit(f"results: {job_id} {job['status']}: {job['error']}")
            jobs[job_id] = job
            progress.advance(task)
    return jobs


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
    lines = [
        "# Results on real data sets",
        "",
        "Made through the HTTP API by `python -m benchmarks.results"
        f" --rows {options['rows']} --epochs {options['epochs']} --seeds {options['seeds']} --shots {options['shots']}"
        f" --precision {options['precision']} --validation-rows {options['validation_rows']} --test-rows {options['test_rows']}`; the raw figures are in [results.json](results.json).",
        "",
        f"{options['rows']} unlabeled train rows of each set, {options['epochs']} epochs, {options['seeds']} seeds,"
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
                f"| {method} | {spread(group, 'accuracy')} | {spread(group, 'macro_f1')}"
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


def spread(runs: list[dict[str, Any]], name: str) -> str:
    """Mean ± standard deviation over the seeds, in per cent."""
    values = [100 * run[name] for run in runs]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def plot(outcome: dict[str, Any], path: Path) -> None:
    """Macro-F1 against the share of rows trained on, one panel a data set."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "understudy"
    from matplotlib import pyplot

    runs = outcome["runs"]
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
