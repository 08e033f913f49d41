"""Can this job succeed? Everything that can be known at POST is checked at POST, and every problem is told at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

from sqlalchemy.orm import Session

from app import endpoints, labels, pretrained, records, webhooks
from app.config import Settings
from app.errors import Fault, InvalidSpec
from app.models import Dataset
from app.options import (
    SCRATCH_LAYERS,
    TAKD,
    DatasetTeacher,
    EndpointTeacher,
    Example,
    FeedsBack,
    JobSpec,
    Label,
    Lbl2VecTeacher,
    LLMTeacher,
    TaughtByEncoder,
    Teacher,
    TeacherAlone,
    Webhook,
    needs_confidence,
)
from app.storage import storage

MIN_ROWS = 2
MAX_CANDIDATES = 500
CANDIDATE_ROWS = 20_000
"""Rows that are looked through for examples; the dataset is meant to be small."""
CANDIDATE_CHARACTERS = 4000
SPLIT_FIELDS = {"train": "dataset_id", "validation": "validation_dataset_id", "test": "test_dataset_id"}


@dataclass
class Plan:
    """What a checked spec amounts to."""

    spec: JobSpec
    labels: list[Label]
    datasets: dict[str, Dataset]
    """By split: train, and validation and test where given."""
    fingerprint: str
    splits_to_label: list[str]
    warnings: list[dict[str, str]] = field(default_factory=list)

    def rows_of(self, split: str) -> int:
        """How many rows of a split the teacher may be asked about, and the student trained or judged on: its first."""
        rows, limit = self.datasets[split].rows, self.spec.budget.max_labeled_rows
        return min(rows, limit) if split == "train" and limit is not None else rows


class Faults(list[Fault]):
    """What is wrong with a spec, each with a pointer to where."""

    def note(self, pointer: str, code: str, message: str) -> None:
        self.append({"line": None, "pointer": pointer, "code": code, "message": message})

    def refuse(self) -> None:
        """Raises InvalidSpec when there are any."""
        if self:
            raise InvalidSpec(f"{(self[0]['pointer'] or '').lstrip('/')}: {self[0]['message']}", errors=self)


def check(session: Session, tenant: str, spec: JobSpec, settings: Settings) -> Plan:
    """The plan of a job that can succeed. Raises InvalidSpec with every reason why it cannot."""
    faults = Faults()
    check_webhook(spec.webhook, settings, faults)  # before the datasets are held: a name may take a while to resolve
    datasets = _datasets(session, tenant, spec, faults)
    spec, leaks = _with_candidates(session, tenant, spec, datasets, faults)
    chosen = _labels(spec, datasets.get("train"), faults)
    warnings = leaks + _check_held_out(datasets, chosen, faults)
    _check_feedback(spec, faults)
    _check_alone(spec, faults)
    revision = _check_models(spec, settings, faults)
    if isinstance(spec.teacher, Lbl2VecTeacher):  # its answers depend on the texts it looks through
        revision = f"{revision}/{spec.dataset_id}"
    if isinstance(spec.teacher, EndpointTeacher):
        revision = _check_endpoint(session, spec, spec.teacher, settings, faults)
    faults.refuse()
    for split, dataset in datasets.items():
        warnings += [{**warning, "split": split} for warning in dataset.warnings]
    if spec.labeling.waves is not None and "validation" not in datasets:
        warnings.append({
            "code": "waves_without_validation", "split": "train",
            "message": "there is no validation set, so waves are judged by agreement with the teacher on rows held back, which are others in each wave",
        })  # fmt: skip
    scored: list[str] = [
        split
        for split in ("validation", "test")
        if split in datasets and getattr(spec.teacher, "score_held_out", False)
    ]
    alone = isinstance(spec.method, TeacherAlone)
    return Plan(
        spec=spec,
        labels=chosen,
        datasets=datasets,
        fingerprint=labels.fingerprint(spec.teacher, chosen, revision),
        splits_to_label=scored if alone else ["train", *scored],
        warnings=warnings,
    )


def check_webhook(webhook: Webhook | None, settings: Settings, faults: Faults) -> None:
    """A webhook leads to where the service may call."""
    if webhook is not None and not settings.webhook_allow_private and webhooks.leads_inside(webhook.url):
        faults.note(
            "/webhook/url",
            "webhook_not_public",
            "leads to a private, loopback, link-local or reserved address; name a host that is reached from the internet",
        )


def _datasets(session: Session, tenant: str, spec: JobSpec, faults: Faults) -> dict[str, Dataset]:
    found: dict[str, Dataset] = {}
    for split, name in SPLIT_FIELDS.items():
        dataset_id = getattr(spec, name)
        if dataset_id is None:
            continue
        # Held until the job is stored, so that nobody deletes the dataset in between.
        dataset = session.get(Dataset, dataset_id, with_for_update={"read": True})
        if dataset is None or dataset.tenant != tenant:
            faults.note(
                f"/{name}", "dataset_not_found", f"there is no dataset {dataset_id}; upload it with POST /datasets"
            )
        else:
            found[split] = dataset
    ids = [dataset.id for dataset in found.values()]
    if len(set(ids)) < len(ids):
        faults.note(
            "/validation_dataset_id"
            if spec.validation_dataset_id in (spec.dataset_id, spec.test_dataset_id)
            else "/test_dataset_id",
            "same_dataset_twice",
            "train, validation and test must be different datasets; scores on rows that were learned from prove nothing",
        )
    train = found.get("train")
    if train is not None and train.rows < MIN_ROWS:
        faults.note("/dataset_id", "too_few_rows", f"the dataset has {train.rows} row; at least {MIN_ROWS} are needed")
    pairs = {split: dataset.has_text_pair for split, dataset in found.items()}
    if len(set(pairs.values())) > 1:
        with_pair = ", ".join(split for split, has in pairs.items() if has)
        faults.note(
            "/dataset_id", "text_pair_mismatch", f"only {with_pair} has text pairs; all datasets of a job must, or none"
        )
    return found


def _with_candidates(
    session: Session, tenant: str, spec: JobSpec, datasets: dict[str, Dataset], faults: Faults
) -> tuple[JobSpec, list[dict[str, str]]]:
    """The spec with the candidates for few-shot examples in it, so that nothing later depends on their dataset; and a
    warning for each held-out set in which an example stands. Candidates that do are left out."""
    few_shot = spec.teacher.few_shot if isinstance(spec.teacher, LLMTeacher) else None
    if few_shot is None or few_shot.dataset_id is None:
        examples: list[Example] = getattr(spec.teacher, "examples", [])
        found = _held_out({labels.text_hash(example.text, example.text_pair) for example in examples}, datasets)
        return spec, [
            {
                "code": "example_in_held_out_set", "split": split,
                "message": f"{len(hashes)} of the teacher's examples also stand in the {split} set, whose rows it is told the "
                "answers of; the scores on that set are too good by them. Take examples from other rows.",
            }
            for split, hashes in found.items()
        ]  # fmt: skip
    train = datasets.get("train")
    where = "/teacher/few_shot/dataset_id"
    dataset = session.get(Dataset, few_shot.dataset_id)
    if dataset is None or dataset.tenant != tenant:
        faults.note(
            where,
            "dataset_not_found",
            f"there is no dataset {few_shot.dataset_id}; upload it with POST /datasets",
        )
    elif few_shot.dataset_id in (spec.validation_dataset_id, spec.test_dataset_id):
        faults.note(
            where, "same_dataset_twice", "examples from a set that scores the teacher would tell it the answers"
        )
    elif train is not None and dataset.has_text_pair != train.has_text_pair:
        faults.note(where, "text_pair_mismatch", "either its rows or those to label are pairs; both must be, or none")
    elif not (names := {label.name for label in spec.labels} & set(dataset.label_counts)):
        faults.note(
            where, "labels_differ", f"none of its labels ({_some(dataset.label_counts)}) is among the job's labels"
        )
    else:
        with storage().open(dataset.key) as stream:
            rows = records.read_rows(stream, 0, CANDIDATE_ROWS, columns=["text", "text_pair", "label"]).to_pylist()
        hashes = [labels.text_hash(row["text"], row["text_pair"]) for row in rows]
        found = _held_out(set(hashes), datasets)
        barred = set().union(*found.values())
        kept = [row for row, key in zip(rows, hashes, strict=True) if key not in barred]
        teacher = spec.teacher.model_copy(update={"examples": (examples := _candidates(kept, names))})
        if not examples:
            faults.note(where, "examples_held_out", "every labeled row of it also stands in the validation or test set")
        return spec.model_copy(update={"teacher": teacher}), [
            {
                "code": "example_in_held_out_set", "split": split,
                "message": f"{len(hashes)} texts of the dataset of examples also stand in the {split} set; they are not used as examples.",
            }
            for split, hashes in found.items()
        ]  # fmt: skip
    return spec, []


def _held_out(hashes: set[bytes], datasets: dict[str, Dataset]) -> dict[str, frozenset[bytes]]:
    """Which of these texts stand in the validation and in the test set, by split; splits with none are left out."""
    splits = [split for split in ("validation", "test") if hashes and split in datasets]
    found = {split: _common(frozenset(hashes), datasets[split].key) for split in splits}
    return {split: common for split, common in found.items() if common}


@lru_cache(maxsize=16)
def _common(hashes: frozenset[bytes], key: str) -> frozenset[bytes]:
    """Those of the texts that stand in the dataset at `key`. Kept: every arm of a comparison asks, and datasets never change."""
    texts = chain.from_iterable(labels.texts_of(storage(), key))
    return frozenset(name for text, pair in texts if (name := labels.text_hash(text, pair)) in hashes)


def _candidates(rows: list[dict[str, Any]], names: set[str]) -> list[Example]:
    """The first rows of each label, an even share of MAX_CANDIDATES; long texts are cut."""
    share = max(1, MAX_CANDIDATES // len(names))
    taken: dict[str, list[Example]] = {name: [] for name in sorted(names)}
    for row in rows:
        if row["label"] in taken and row["text"].strip() and len(taken[row["label"]]) < share:
            pair = row["text_pair"]
            taken[row["label"]].append(
                Example(
                    text=row["text"][:CANDIDATE_CHARACTERS],
                    text_pair=None if pair is None else pair[:CANDIDATE_CHARACTERS],
                    label=row["label"],
                )
            )
    return [example for of_label in taken.values() for example in of_label][:MAX_CANDIDATES]


def _labels(spec: JobSpec, train: Dataset | None, faults: Faults) -> list[Label]:
    if not isinstance(spec.teacher, DatasetTeacher):
        if not spec.labels:
            faults.note(
                "/labels",
                "labels_missing",
                f"name the classes: a teacher of kind {spec.teacher.kind!r} has to choose among them",
            )
        _check_names(spec.teacher, spec.labels, faults)
        if isinstance(spec.teacher, LLMTeacher):
            _check_verbalised(spec.teacher, spec.labels, faults)
        return spec.labels
    if train is None:
        return spec.labels
    if not train.label_counts:
        faults.note(
            "/dataset_id", "dataset_has_no_labels",
            "the teacher is the dataset itself, but the dataset holds no labels; upload one with a label column, or name it with label_column",
        )  # fmt: skip
        return spec.labels
    if not spec.labels:
        if len(train.label_counts) < 2:
            faults.note(
                "/dataset_id", "one_class_only", "the dataset holds only one label; a classifier needs at least two"
            )
        chosen = [Label(name=name) for name in sorted(train.label_counts)]
    else:
        chosen = spec.labels
    classes = len(chosen)
    if classes > 1 and spec.teacher.default_confidence <= 1 / classes:
        faults.note(
            "/teacher/default_confidence", "confidence_too_low",
            f"with {classes} labels a confidence of {spec.teacher.default_confidence:g} makes another label the likeliest; use more than {1 / classes:.3g}",
        )  # fmt: skip
    names = {label.name for label in chosen}
    if not names & set(train.label_counts):
        faults.note(
            "/labels",
            "labels_unused",
            f"none of these stands in the dataset, whose labels are: {_some(train.label_counts)}",
        )
    elif spec.labels and len(names & set(train.label_counts)) < 2:
        faults.note(
            "/labels", "one_class_only", "only one of these stands in the dataset; a classifier needs at least two"
        )
    return chosen


def _check_names(teacher: Teacher, chosen: list[Label], faults: Faults) -> None:
    """Every label that the teacher's options name is one of the job's."""
    examples: list[Example] = getattr(teacher, "examples", [])
    named = [(f"/teacher/examples/{position}/label", example.label) for position, example in enumerate(examples)]
    for option in ("keywords", "verbalised"):
        named += [(f"/teacher/{option}", name) for name in getattr(teacher, option, {})]
    names = {label.name for label in chosen}
    for pointer, name in named if names else ():
        if name not in names:
            message = f"{name!r} is not among the job's labels ({_some(names)}); correct it, or add it to `labels`"
            faults.note(pointer, "unknown_label", message)


def _check_verbalised(teacher: LLMTeacher, chosen: list[Label], faults: Faults) -> None:
    """Every label is written in words of its own."""
    seen: dict[str, str] = {}
    for position, label in enumerate(chosen):
        written = teacher.written(label.name)
        if not written or written in seen:
            other = f"as {seen[written]!r} is" if written else "with no words at all"
            faults.note(
                f"/labels/{position}", "labels_written_alike",
                f"{label.name!r} is written {written!r}, {other}; say in teacher.verbalised how to tell them apart",
            )  # fmt: skip
        seen.setdefault(written, label.name)


def _check_held_out(datasets: dict[str, Dataset], chosen: list[Label], faults: Faults) -> list[dict[str, str]]:
    names = {label.name for label in chosen}
    warnings = []
    for split in ("validation", "test"):
        dataset = datasets.get(split)
        if dataset is None:
            continue
        where = f"/{SPLIT_FIELDS[split]}"
        if not any(dataset.label_counts.values()):
            faults.note(
                where,
                f"{split}_without_labels",
                f"the {split} set holds no labels, so nothing can be scored on it; upload it with a label column, or name the column with label_column",
            )
            continue
        unknown = sorted(set(dataset.label_counts) - names)
        if names and len(unknown) == len(dataset.label_counts):
            faults.note(
                where,
                "labels_differ",
                f"none of the {split} set's labels ({_some(unknown)}) is among the job's labels ({_some(names)})",
            )
        elif unknown and names:
            rows = sum(dataset.label_counts[name] for name in unknown)
            warnings.append({
                "code": "label_unknown_to_job", "split": split,
                "message": f"{rows} {split} rows carry labels the job lacks ({_some(unknown)}); they count as errors of the student",
            })  # fmt: skip
    return warnings


def _check_feedback(spec: JobSpec, faults: Faults) -> None:
    method = spec.method
    if isinstance(method, FeedsBack) and method.feedback_from == "validation" and not spec.validation_dataset_id:
        faults.note(
            "/method/feedback_from", "feedback_without_validation",
            "there is no validation set to take feedback rows from; name one in validation_dataset_id, or say 'train'",
        )  # fmt: skip


def _check_alone(spec: JobSpec, faults: Faults) -> None:
    if not isinstance(spec.method, TeacherAlone):
        return
    if not (spec.validation_dataset_id or spec.test_dataset_id):
        faults.note(
            "/method/kind", "nothing_to_score",
            "the teacher alone is scored, and there is nothing to score it on; name a test_dataset_id",
        )  # fmt: skip
    if not getattr(spec.teacher, "score_held_out", False):
        faults.note(
            "/method/kind", "nothing_to_score",
            "the teacher alone is scored, but this one says nothing about the test set; choose another teacher than "
            "'dataset', with score_held_out",
        )  # fmt: skip
    if spec.labeling.waves is not None:
        faults.note(
            "/labeling/waves", "no_student_to_ask_for",
            "waves go on while a student gains by them, and the teacher alone trains none; leave them out",
        )  # fmt: skip


def _check_models(spec: JobSpec, settings: Settings, faults: Faults) -> str | None:
    """The teacher's revision, where it is a model."""
    revision = None
    depths: dict[str, int] = {}
    wanted: list[tuple[str, str, pretrained.Purpose]] = [("/student/model", spec.student.model, "student")]
    encoders = {"/student/model": spec.student}
    if isinstance(spec.method, TaughtByEncoder):
        encoders["/method/teacher/model"] = spec.method.teacher
        wanted.append(("/method/teacher/model", spec.method.teacher.model, "student"))
    if (model := getattr(spec.teacher, "model", None)) is not None:
        wanted.append(("/teacher/model", model, pretrained.teacher_purpose(spec.teacher.kind)))
    for pointer, name, purpose in wanted:
        try:
            source = pretrained.resolve(name, purpose=purpose, roots=settings.model_roots, allow_hub=settings.allow_hub)
        except InvalidSpec as error:
            faults.note(pointer, "model_unresolvable", error.detail)
        else:
            if pointer == "/teacher/model":
                revision = source.revision
                continue
            asked = encoders[pointer].num_layers
            if depth := asked or source.layers or (SCRATCH_LAYERS if source.kind == "scratch" else None):
                depths[pointer] = depth
            if source.layers is not None and (asked or 0) > source.layers:
                faults.note(
                    pointer.replace("model", "num_layers"), "too_many_layers",
                    f"{name!r} has {source.layers} layers; ask for at most that many, or leave num_layers out to keep all",
                )  # fmt: skip
    if isinstance(spec.method, TAKD) and len(depths) == 2:
        _check_assistant(spec.method, depths["/method/teacher/model"], depths["/student/model"], faults)
    return revision


def _check_assistant(method: TAKD, teacher: int, student: int, faults: Faults) -> None:
    layers = method.layers_between(teacher, student)
    if layers > teacher:
        faults.note(
            "/method/assistant_layers", "assistant_too_deep",
            f"the assistant, of {layers} layers, is deeper than its teacher of {teacher}; ask for fewer, or for a teacher that is "
            "deeper than the student",
        )  # fmt: skip


def _check_endpoint(
    session: Session, spec: JobSpec, teacher: EndpointTeacher, settings: Settings, faults: Faults
) -> str | None:
    """What the labels will depend on, as far as it is known; a worker finds out the rest."""
    endpoint = settings.endpoints.get(teacher.endpoint)
    if endpoint is None:
        offered = f"those are: {_some(settings.endpoints)}" if settings.endpoints else "there is none"
        faults.note(
            "/teacher/endpoint", "unknown_endpoint",
            f"{teacher.endpoint!r} is not an endpoint that the operator has configured; {offered}",
        )  # fmt: skip
        return None
    how = endpoints.reading(teacher, endpoint, endpoints.known(session, teacher.endpoint, endpoint))
    if how == "none" and needs_confidence(spec.method):
        faults.note("/method/kind", "confidence_missing", endpoints.no_confidence(spec.method.kind))
    return endpoints.revision(endpoint, how)


def _some(names: object) -> str:
    ordered = sorted(names)  # type: ignore[call-overload]
    return ", ".join(repr(name) for name in ordered[:5]) + (" …" if len(ordered) > 5 else "")
