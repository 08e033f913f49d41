"""The table of LGTM's paper on MRPC, RTE and SST-2 sentences, and LLKD, LGTM and both at once from unlabeled rows of emotion.

    python -m benchmarks.lgtm_results [--rows 300] [--epochs 3] [--seeds 2] [--workers 2] [--data-dir build/lgtm-results]

Everything goes through the HTTP API, one job for each data set, method and seed; writes docs/lgtm-results.md, .json and .svg.
Every run is written to the .json as it ends, and none that is there with the same options is made again, so it may be
stopped (Ctrl-C or SIGTERM) and started at will, on this machine or another. --tables-only runs nothing and writes the page
from the .json. --cost makes no run that counts: it times one epoch on 32 rows of each method and prints what the whole takes.

Let --cost say what the whole takes on your machine. Batches of 8 cost more a row, but with so few rows the steps of 32 are too few to learn from.
"""

from __future__ import annotations

import argparse
import json
import statistics as means
import sys
from pathlib import Path
from typing import Any

from app import statistics
from app.client import Client
from benchmarks import results
from benchmarks.data import ROOT, SHARED, read_split
from benchmarks.record import (
    Record,
    Run,
    end_by_interrupt,
    find_or_submit,
    finished,
    serving,
    spread,
    table,
    upload,
    whole_seeds,
)

PAIRS = {"mrpc": "F1", "rte": "accuracy", "sst2-sentences": "accuracy"}
"""The data sets with true labels, and the score that ranks the methods on each."""
SHOWN = {
    "mrpc": ["F1", "accuracy", "macro-F1"],
    "rte": ["accuracy", "macro-F1"],
    "sst2-sentences": ["accuracy"],
}
"""Beside F1 and accuracy, macro-F1 shows whose student has but one answer, which MRPC's F1 rewards."""
POSITIVE = "equivalent"
"""The class whose F1 is MRPC's score."""
TEACHER_LAYERS, STUDENT_LAYERS = 6, 3
ALONE = {
    "Teacher alone": ({"kind": "no_selection"}, TEACHER_LAYERS),
    "Student alone": ({"kind": "no_selection"}, STUDENT_LAYERS),
}
"""Trained on the labels without a teacher: what the methods stand between."""
FEEDBACK = {"feedback_from": "validation", "feedback_share": 0.4}
"""Feedback rows come from the validation set, so that every method trains on the same rows."""
TAUGHT: dict[str, dict[str, Any]] = {
    "KD": {"kind": "kd"},
    "PKD": {"kind": "pkd"},
    "SKD": {"kind": "skd"},
    "DIST": {"kind": "dist"},
    "TAKD": {"kind": "takd"},
    "RCO": {"kind": "rco"},
    "DML": {"kind": "dml"},
    "ProKT": {"kind": "prokt"},
    "PESF-KD": {"kind": "pesf_kd"},
    "Meta Distill": {"kind": "meta_distill", **FEEDBACK},
    "Online": {"kind": "online"},
    "LGTM": {"kind": "lgtm", **FEEDBACK},
}
TOGETHER = {"teacher_epochs": 0, "zero_heads": True}
"""As the authors begin."""
VARIED: dict[str, tuple[dict[str, Any], int]] = {
    "LGTM, mse": ({**TAUGHT["LGTM"], "distillation_loss": "mse"}, STUDENT_LAYERS),
    "LGTM, dist": ({**TAUGHT["LGTM"], "distillation_loss": "dist"}, STUDENT_LAYERS),
    "LGTM, weighted": ({**TAUGHT["LGTM"], "mode": "weighted"}, STUDENT_LAYERS),
    "LGTM, meta": ({**TAUGHT["LGTM"], "mode": "meta"}, STUDENT_LAYERS),
    "LGTM, influence x 1000": ({**TAUGHT["LGTM"], "influence_scale": 1000}, STUDENT_LAYERS),
    "LGTM, influence every 4 steps": ({**TAUGHT["LGTM"], "influence_every": 4}, STUDENT_LAYERS),
    "LGTM, both begin together": ({**TAUGHT["LGTM"], **TOGETHER}, STUDENT_LAYERS),
    "LGTM, together, student without labels": (
        {**TAUGHT["LGTM"], **TOGETHER, "distillation_share": 1.0},
        STUDENT_LAYERS,
    ),
    "ProKT, teacher first": ({**TAUGHT["ProKT"], "teacher_epochs": None, "zero_heads": False}, STUDENT_LAYERS),
    "KD, 2 layers": (TAUGHT["KD"], 2),
    "Meta Distill, 2 layers": (TAUGHT["Meta Distill"], 2),
    "LGTM, 2 layers": (TAUGHT["LGTM"], 2),
}
"""Other losses (Table 2 of the paper), LGTM's modes and schedules, and a student of fewer layers (Table 4), on one data set."""
VARIED_ON = "sst2-sentences"
UNLABELED = {
    "No_DS": {"kind": "no_selection"},
    "LLKD": {"kind": "llkd"},
    "KD": {"kind": "kd"},
    "LGTM": {"kind": "lgtm"},
    "LLKD+LGTM": {"kind": "llkd_lgtm"},
}
"""On emotion: labels by the embedding teacher, from which the encoder teachers of KD and LGTM learn; feedback rows are pseudo-labeled
too, so true labels only choose the checkpoint."""
UNLABELED_SIZES: dict[str, Any] = {"rows": 2000, "epochs": 2, "batch_size": 16, "learning_rate": 2e-4}
"""Of emotion, instead of the options: of a few hundred rows LLKD would select a few dozen."""
DRAWN = ("LGTM", "LGTM, both begin together", "Meta Distill", "Online", "KD")
"""Methods whose validation loss is drawn."""
DOCS = ROOT / "docs"
STEM = "lgtm-results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300, help="train rows of each data set; 0 takes all")
    parser.add_argument("--validation-rows", type=int, default=200)
    parser.add_argument("--test-rows", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shots", type=int, default=32, help="examples of each class that emotion's teacher is shown")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of students and encoder teachers")
    parser.add_argument(
        "--pooling", choices=["first", "mean"], default="mean", help="of students of fewer layers than the teacher"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "build" / STEM)
    parser.add_argument("--data", nargs="*", default=[*PAIRS, "emotion"], choices=[*PAIRS, "emotion"])
    parser.add_argument("--methods", nargs="*", help="only these; all when left out")
    parser.add_argument("--out", type=Path, default=DOCS)
    parser.add_argument("--tables-only", action="store_true")
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.tables_only or SHARED.is_dir()):
        sys.exit(f"lgtm_results: the data sets are not at {SHARED}")
    if arguments.cost:
        tell_cost(arguments)
        return
    if not arguments.tables_only:
        end_by_interrupt()
        measure(arguments)
    outcome = json.loads((arguments.out / f"{STEM}.json").read_text())
    (arguments.out / f"{STEM}.md").write_text(document(outcome))
    plot(outcome, arguments.out / f"{STEM}.svg")
    print((arguments.out / f"{STEM}.md").read_text())


def methods_of(name: str) -> dict[str, tuple[dict[str, Any], int]]:
    """By method, its options and the student's layers."""
    if name == "emotion":
        return {method: (wish, STUDENT_LAYERS) for method, wish in UNLABELED.items()}
    taught = {method: (wish, STUDENT_LAYERS) for method, wish in TAUGHT.items()}
    return ALONE | taught | (VARIED if name == VARIED_ON else {})


def sized(name: str, arguments: argparse.Namespace) -> argparse.Namespace:
    """The options, as they are for this data set."""
    return argparse.Namespace(**vars(arguments) | (UNLABELED_SIZES if name == "emotion" else {}))


def wanted(arguments: argparse.Namespace) -> list[Run]:
    """One seed of everything first, so that a run that is stopped is of use."""
    return [
        {"data": name, "method": method, "seed": seed}
        for seed in range(arguments.seeds)
        for name in arguments.data
        for method in methods_of(name)
        if not arguments.methods or method in arguments.methods
    ]


# --- running --------------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> None:
    """Run every job whose facts are not on record yet, and add each to the record as it ends."""
    record = Record(arguments.out / f"{STEM}.json", chosen(arguments))
    missing = record.missing(wanted(arguments))
    if not missing:
        return
    with serving(arguments.data_dir, arguments.workers) as client:
        for run, job in finished(client, submit_all(client, missing, arguments), arguments.workers):
            record.add({**run, **facts(client, job)})


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that a figure depends on."""
    names = (
        "rows",
        "validation_rows",
        "test_rows",
        "epochs",
        "batch_size",
        "shots",
        "max_length",
        "learning_rate",
        "pooling",
    )
    return {name: getattr(arguments, name) for name in names}


def submit_all(client: Client, missing: list[Run], arguments: argparse.Namespace) -> list[Run]:
    """Submit the missing runs; each with the id of its job."""
    specs = {name: base_spec(client, name, sized(name, arguments)) for name in {run["data"]: None for run in missing}}
    runs = []
    for run in missing:
        size = sized(run["data"], arguments)
        wish, layers = methods_of(run["data"])[run["method"]]
        reads = {"max_length": size.max_length}
        if wish["kind"] not in ("no_selection", "llkd"):  # the others have an encoder teacher
            wish = {**wish, "teacher": {**reads, "learning_rate": size.learning_rate}}
        spec = {
            **specs[run["data"]],
            "method": wish,
            "student": {**reads, "num_layers": layers, "pooling": size.pooling if layers < TEACHER_LAYERS else None},
            "training": {
                "epochs": size.epochs, "batch_size": size.batch_size, "seed": run["seed"],
                "learning_rate": size.learning_rate,
                # The same rows give feedback and choose the checkpoint with every seed, and with every method the same train.
                "split_seed": 0,
                "near_duplicates": "apart",
            },
        }  # fmt: skip
        sizes = {name: str(getattr(size, name)) for name in ("rows", "validation_rows", "test_rows", "shots")}
        tags = {STEM: run["data"], "method": run["method"], **sizes}
        runs.append({**run, "job": find_or_submit(client, spec, tags)})
    return runs


def base_spec(client: Client, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Upload a data set: with its labels, which are the teacher's, or emotion without."""
    if name == "emotion":
        return results.base_spec(client, name, arguments)
    limits = {
        "train": arguments.rows or None,
        "validation": arguments.validation_rows,
        "test": arguments.test_rows,
    }
    fields = {"train": "dataset_id", "validation": "validation_dataset_id", "test": "test_dataset_id"}
    ids = {
        fields[split]: upload(client, f"{name}-{split}", read_split(name, split, limit))
        for split, limit in limits.items()
    }
    return {**ids, "teacher": {"kind": "dataset"}}


def facts(client: Client, job: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of one job."""
    scores = job["evaluation"]["test"]
    student, teacher = scores["student"], scores["teacher"]
    series = client.metrics(job["id"], "validation_loss")["validation_loss"]
    return {
        "accuracy": student["accuracy"],
        "macro_f1": student["macro_f1"],
        **({"f1": student["per_class"][POSITIVE]["f1"]} if POSITIVE in student["per_class"] else {}),
        **({f"teacher_{score}": teacher[score] for score in ("accuracy", "macro_f1")} if teacher else {}),
        "ratio": job["selection"]["ratio"],
        "seconds": job["metrics"]["training_seconds"],
        "validation_loss": [[point["step"], point["value"]] for point in series],
    }


def tell_cost(arguments: argparse.Namespace) -> None:
    """Print the CPU-seconds that the runs would take, but for what a worker needs to start and to pack."""
    from benchmarks import lgtm_search

    total = 0.0
    for name in arguments.data:
        size = sized(name, arguments)
        # The test rows are looked at once, by the student alone: a third of the layers that are asked after an epoch.
        looks = size.validation_rows + size.test_rows // (3 * size.epochs)
        arms = {run["method"]: methods_of(name)[run["method"]] for run in wanted(arguments) if run["data"] == name}
        total += lgtm_search.tell_cost(arms, [name], size, {name: looks})
    print(f"\nall data sets: {total:,.0f} CPU-seconds")


# --- writing --------------------------------------------------------------------------------------------------------


def document(outcome: dict[str, Any]) -> str:
    """docs/lgtm-results.md."""
    options, runs = outcome["options"], comparable(outcome["runs"])
    seeds = len({run["seed"] for run in runs})
    names = [name for name in PAIRS if any(run["data"] == name for run in runs)]
    each = {name: _seeds([run for run in runs if run["data"] == name]).lower() for name in names}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    lines = [
        "# Results of LGTM and the methods of its table",
        "",
        f"Made through the HTTP API by `python -m benchmarks.lgtm_results {flags} --seeds {seeds}`; the raw figures are in"
        f" [{STEM}.json]({STEM}.json).",
        "",
        f"The first {options['rows']} train rows of each set (all where there are fewer); epochs: {options['epochs']} (of the"
        f" student, and where the teacher learns first, as many of the teacher before), batch {options['batch_size']}, learning rate"
        f" {options['learning_rate']:g} for both, texts cut at {options['max_length']} tokens. Teacher: the bundled"
        f" all-MiniLM-L6-v2 with its {TEACHER_LAYERS} layers; student: its first {STUDENT_LAYERS}. Every method has its"
        f" default options. The checkpoint is chosen on the first {options['validation_rows']} validation rows; of these,"
        f" {FEEDBACK['feedback_share']:.0%} give feedback to the teachers of LGTM and Meta Distill and choose nothing. Scores"
        f" are of the first {options['test_rows']} test rows, in per cent, mean ± standard deviation over the seeds"
        f" ({'; '.join(f'{name}: {seeds}' for name, seeds in each.items())}).",
        "",
        "![validation loss by step, and macro-F1 on test of every method](lgtm-results.svg)",
    ]
    if names:
        lines += ["", "## MRPC, RTE, SST-2 sentences", "", *pairs_table(runs, names)[1:], "", *rank_note(names)]
    if varied := [run for run in runs if run["method"] in VARIED]:
        lines += [
            "",
            f"## Other losses, modes and schedules, and a student of 2 layers, on {VARIED_ON}",
            *varied_table(runs, varied),
        ]
    if unlabeled := [run for run in runs if run["data"] == "emotion"]:
        lines += ["", *emotion_part(unlabeled, options)]
    remarks = DOCS / f"{STEM}-remarks.md"
    if remarks.exists():
        lines += ["", remarks.read_text().strip()]
    return "\n".join(lines) + "\n"


def comparable(runs: list[Run]) -> list[Run]:
    """Without the methods' runs of a seed that not all of them have on a set yet; variations are as they are."""
    varied = [run for run in runs if run["method"] in VARIED]
    methods = [run for run in runs if run["method"] not in VARIED]
    return [
        run for name in [*PAIRS, "emotion"] for run in whole_seeds([run for run in methods if run["data"] == name])
    ] + varied


def pairs_table(runs: list[Run], names: list[str]) -> list[str]:
    """Every method's scores on the sets with true labels, the time, and the average rank."""
    columns = [(name, score) for name in names for score in SHOWN[name]]
    ranks, fairer = average_ranks(runs, names, PAIRS), average_ranks(runs, names, dict.fromkeys(names, "macro-F1"))
    methods = [method for method in methods_of("mrpc") if any(run["method"] == method and run["data"] in names for run in runs)]  # fmt: skip
    rows = []
    for method in sorted(methods, key=lambda method: (method not in ALONE, ranks.get(method, 0))):
        mine = {name: [run for run in runs if (run["data"], run["method"]) == (name, method)] for name in names}
        cells = [
            spread([run[_key(score)] for run in mine[name]]) if mine[name] else "–" for name, score in columns
        ]  # fmt: skip
        time = sum(means.mean(run["seconds"] for run in group) for group in mine.values() if group)
        rank = [f"{by[method]:.1f}" if method in by else "–" for by in (ranks, fairer)]
        rows.append([method, *cells, *rank, f"{time:.0f}"])
    return table(
        ["method", *(f"{name} {score}" for name, score in columns), "average rank", "by macro-F1", "seconds"], rows
    )


def _key(score: str) -> str:
    return score.lower().replace("-", "_")


def varied_table(runs: list[Run], varied: list[Run]) -> list[str]:
    """The accuracy of what was varied, beside what it was varied from, with the same seeds."""
    seeds = {run["seed"] for run in varied}
    shown = {"KD", "Meta Distill", "ProKT", "LGTM", *(run["method"] for run in varied)}
    rows = []
    for method in methods_of(VARIED_ON):
        mine = [run for run in runs if (run["data"], run["method"]) == (VARIED_ON, method) and run["seed"] in seeds]
        if method in shown and mine:
            rows.append([method, *(spread([run[key] for run in mine]) for key in ("accuracy", "macro_f1"))])
    return ["", f"{_seeds(varied)}.", *table(["method", "accuracy", "macro-F1"], rows)]


def _seeds(runs: list[Run]) -> str:
    seeds = len({run["seed"] for run in runs})
    return "One seed" if seeds == 1 else f"{seeds} seeds"


def rank_note(names: list[str]) -> list[str]:
    """What stands under the table."""
    ranked = ", ".join(f"{PAIRS[name]} on {name}" for name in names)
    return [
        f"Average rank: by {ranked}, averaged over sets and seeds, among the methods with a teacher that ran on every set; beside it,"
        " the same by macro-F1 on every set, which whoever calls everything by one name has at its lowest. Seconds: the"
        " training's wall time, all sets together, with two jobs at a time on two cores.",
    ]


def average_ranks(runs: list[Run], names: list[str], by: dict[str, str]) -> dict[str, float]:
    """Of the methods with a teacher that ran on every set, over the seeds that all of these have; empty for fewer than two.

    by: the score that ranks, by data set.
    """
    scores = {(run["data"], run["method"], run["seed"]): run[_key(by[run["data"]])] for run in runs if run["data"] in names}  # fmt: skip
    ranked = [method for method in TAUGHT if all((name, method, 0) in scores for name in names)]
    cells = [
        (name, seed)
        for name in names
        for seed in sorted({seed for *_, seed in scores})
        if all((name, method, seed) in scores for method in ranked)
    ]
    if len(ranked) < 2:
        return {}
    blocks = [[scores[name, method, seed] for method in ranked] for name, seed in cells]
    return dict(zip(ranked, statistics.average_ranks(blocks), strict=True))


def emotion_part(runs: list[Run], options: dict[str, Any]) -> list[str]:
    """LLKD, LGTM and both at once, from rows that the embedding teacher labels."""
    rows = []
    if first := next((run for run in runs if "teacher_accuracy" in run), None):
        rows.append(["Teacher", *(f"{100 * first[f'teacher_{score}']:.1f}" for score in ("accuracy", "macro_f1")), "–", "–"])  # fmt: skip
    for method in UNLABELED:
        mine = [run for run in runs if run["method"] == method]
        if mine:
            share, time = (means.mean(run[name] for run in mine) for name in ("ratio", "seconds"))
            scores = [spread([run[score] for run in mine]) for score in ("accuracy", "macro_f1")]
            rows.append([method, *scores, f"{100 * share:.1f} %", f"{time:.0f}"])
    return [
        "## From unlabeled rows: emotion",
        "",
        "The first {rows} train rows without their labels; epochs: {epochs}, batch {batch_size}, learning rate {learning_rate:g}.".format(
            **UNLABELED_SIZES
        )
        + f" Labels by the `embedding` teacher with {options['shots']} examples a class; then the encoder teachers learn"
        " from these labels, KD's alone, LGTM's first alone and then beside the student. True labels choose the checkpoint and nothing else: the feedback rows of LGTM"
        f" are a tenth of the pseudo-labeled ones. *Seen* is the share of rows x epochs that was trained on. {_seeds(runs)}.",
        *table(["method", "accuracy", "macro-F1", "seen", "seconds"], rows),
    ]


def plot(outcome: dict[str, Any], path: Path) -> None:
    """For each data set: the validation loss by step (figure 3 of the paper), and every method's macro-F1 on test."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "understudy"
    from matplotlib import pyplot

    runs = comparable(outcome["runs"])
    names = [name for name in [*PAIRS, "emotion"] if any(run["data"] == name for run in runs)]
    figure, panels = pyplot.subplots(2, len(names), figsize=(4.6 * len(names), 7.6), squeeze=False, layout="constrained")  # fmt: skip
    for column, name in enumerate(names):
        mine = [run for run in runs if run["data"] == name]
        losses, scores = panels[0][column], panels[1][column]
        drawn = methods_of(name) if name == "emotion" else DRAWN
        for colour, method in enumerate(drawn):
            group = [run for run in mine if run["method"] == method]
            if group:
                curves = zip(*(run["validation_loss"] for run in group), strict=True)
                points = [(curve[0][0], means.mean(value for _, value in curve)) for curve in curves]
                losses.plot(*zip(*points, strict=True), marker="o", color=f"C{colour}", label=method)
        losses.set(title=name, xlabel="step", ylabel="validation loss")
        losses.legend(fontsize=7)
        shown = [method for method in methods_of(name) if any(run["method"] == method for run in mine)][::-1]
        for place, method in enumerate(shown):
            values = [100 * run["macro_f1"] for run in mine if run["method"] == method]
            ours = "LGTM" in method
            scores.scatter(values, [place] * len(values), color="tab:red" if ours else "tab:blue", s=16)
            scores.scatter([means.mean(values)], [place], color="tab:red" if ours else "tab:blue", marker="|", s=200)
        scores.set_yticks(range(len(shown)), shown, fontsize=7)
        scores.set(xlabel="macro-F1 on test, %")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
