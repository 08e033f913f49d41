"""One training job from its labels to its checkpoint: build the student, distill, score, pack."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import structlog
import torch
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from app import labels as label_cache
from app import lifecycle, overview, pretrained, shards
from app.config import settings
from app.db import patiently
from app.lifecycle import LeaseLost, WorkFailed
from app.models import Checkpoint, Dataset, Job, LabelSet, LabelShard
from app.options import PKD, TAKD, FeedsBack, JobSpec, LLMTeacher, TaughtByEncoder, TeacherAlone
from app.options import Student as StudentOptions
from app.storage import Storage, storage
from app.waves import stretched
from workers import artifacts, calibration, label_report, waves
from workers.labeling import read_labels
from workers.reporter import Reporter, Stopped, asking
from workers.training import resume
from workers.training.data import Tokens, tokenise
from workers.training.distill import distill
from workers.training.encoders import Student, build_student
from workers.training.evaluation import Answers, Scores, calibrate, evaluate, predict_probabilities, warnings_of
from workers.training.processes import how_many, together
from workers.training.run import HeldOut, Pool, Run, begin
from workers.training.splits import Splits, choose, exact_groups, near_groups
from workers.training.step import interruptible

log = structlog.get_logger()


@dataclass
class Material:
    """Everything a training job reads, in memory."""

    spec: JobSpec
    labels: list[str]
    datasets: dict[str, Dataset]
    tables: dict[str, pa.Table]
    """text, text_pair, label and line of each split's rows."""
    answers: dict[str, pa.Table]
    """What the teacher said about each labeled split."""
    teacher_report: dict[str, Any]
    shards: list[LabelShard]

    def texts(self, split: str) -> list[str]:
        return self.tables[split].column("text").to_pylist()

    def pairs(self, split: str) -> list[str] | None:
        if not self.datasets[split].has_text_pair:
            return None
        return [pair or "" for pair in self.tables[split].column("text_pair").to_pylist()]

    def joined(self, split: str) -> list[str]:
        """Each row's text, or both texts of its pair."""
        pairs = self.pairs(split)
        texts = self.texts(split)
        return texts if pairs is None else [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)]

    def gold(self, split: str) -> list[str | None]:
        return self.tables[split].column("label").to_pylist()

    def hashes(self, split: str) -> list[bytes]:
        """What names each row's text, or pair."""
        pairs = self.tables[split].column("text_pair").to_pylist()
        return [label_cache.text_hash(text, pair) for text, pair in zip(self.texts(split), pairs, strict=True)]

    def probabilities(self, split: str) -> NDArray[np.float32]:
        """(N, C) the teacher's distributions; NaN where it gave none."""
        column = self.answers[split].column("distribution").combine_chunks()
        valid = np.asarray(column.is_valid())
        dense = np.full((len(column), len(self.labels)), np.nan, np.float32)
        dense[valid] = np.asarray(column.drop_null().flatten(), np.float32).reshape(-1, len(self.labels))
        return dense


def run_job(job: Job, report: Reporter) -> None:
    """Train, score and publish. Raises WorkFailed with a reason, Stopped, GivenUp, or LeaseLost."""
    files = storage()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    material = gather(job, files)
    if isinstance(material.spec.method, TeacherAlone):
        score_alone(job, files, material, report)
        return
    probabilities = material.probabilities("train")
    wave = waves.current(job.waves, material.shards)
    tell_calibration(job, material, report)
    try:
        splits = usable_splits(material, probabilities, report)
    except WorkFailed as failure:
        is_mended = failure.code in waves.MENDED_BY_MORE_ROWS and wave.is_followed
        if is_mended and _end_wave(job, waves.shown(wave, probabilities, None), report):
            return
        raise
    models = build_models(material, report)
    pool, held_out = prepare_rows(material, probabilities, splits, models, report)
    student, tokens = models.student, models.tokens
    barred = int(pool.barred[pool.rows].sum())

    training = material.spec.training
    epochs = stretched(training.epochs, wave.rows, wave.of_rows, material.spec.labeling.waves)
    training = training.model_copy(update={"epochs": epochs})
    run = begin(student, pool, material.spec.method, training, len(material.labels), models.teacher, models.assistant)
    run.progress.wave = wave.number
    if resume.restore(run, files, job.id):
        report.event("training.resumed", f"Training goes on from step {run.progress.step}.", step=run.progress.step)

    def save(run: Run) -> None:
        resume.save(run, files, job.id, report.confirm)
        report.saved()

    feedback_rows = splits.feedback if pool.feedback is not None and pool.feedback.tokens is tokens["train"] else None
    # What an encoder teacher learned from, in its course or by its feedback, the student knows something of.
    taught_rows = np.zeros(0, np.int64) if feedback_rows is None else feedback_rows
    if run.courses:
        taught_rows = np.concatenate([taught_rows, pool.rows[~pool.barred[pool.rows]]])

    def write_ledger(run: Run) -> None:
        artifacts.write_ledger(
            files, job.id, material.tables["train"], material.answers["train"], run.ledger, material.labels, pool.rows,
            feedback_rows, report.confirm,
        )  # fmt: skip

    work = (run, pool, held_out, material.labels, material.spec.method, training, report)
    learning = [student.model, *(companion.encoder.model for companion in run.companions.values())]
    with together(how_many(), *work), interruptible(report, learning):
        distill(*work, save=save, save_every_seconds=settings().resume_every_seconds, on_epoch=write_ledger)
    report.selection(run.progress.selection())
    try:
        if material.spec.labeling.waves is not None:
            gain = _gain(job, wave, files, run, held_out, report)
            if _end_wave(job, waves.shown(wave, probabilities, run, gain), report):
                return
        evaluation = score(job, files, material, student, tokens, held_out, probabilities, barred, report)
        about_labels = report_labels(job, files, material, run, tokens["train"], taught_rows, report)
        _publish(job, files, material, run, evaluation, about_labels, report)
    except Stopped:
        save(run)
        raise


def _gain(job: Job, wave: waves.Wave, files: Storage, run: Run, held_out: HeldOut, report: Reporter) -> float | None:
    """How far the best student may be above that of the wave before."""
    predicted = predict_probabilities(run.student.model, held_out.tokens, held_out.rows, should_stop=asking(report))
    answers = np.stack([held_out.rows, held_out.gold, predicted.argmax(dim=1).numpy()])
    macro_f1 = run.progress.best_metrics["validation_macro_f1"]
    return waves.gain_since(job, wave, files, answers, macro_f1, report.confirm)


def _end_wave(job: Job, shown: dict[str, Any], report: Reporter) -> bool:
    """Whether the job waits for more labels now, and is no longer this worker's. Raises Stopped and LeaseLost."""
    report.flush()

    def end(session: Session) -> bool:
        held = lifecycle.held(session, job.id, report.attempt)
        if held.status != "running":
            raise Stopped(held.status)
        return shards.end_wave(session, held, shown)

    return patiently(end)


def gather(job: Job, files: Storage) -> Material:
    """Read the datasets and the teacher's answers."""
    ids = {"train": job.dataset_id, "validation": job.validation_dataset_id, "test": job.test_dataset_id}

    def look(session: Session) -> tuple[LabelSet, list[LabelShard], dict[str, Dataset]]:
        label_set = session.get_one(LabelSet, job.label_set_id)
        datasets = {split: session.get_one(Dataset, id) for split, id in ids.items() if id is not None}
        return label_set, list(label_set.shards), datasets

    label_set, shards, datasets = patiently(look)
    names = [label["name"] for label in label_set.labels]
    scored = {shard.split for shard in shards}
    material = Material(
        spec=JobSpec.model_validate(job.spec),
        labels=names,
        datasets=datasets,
        tables={split: artifacts.read_table(files, dataset) for split, dataset in datasets.items()},
        answers={split: read_labels(files, shards, split, datasets[split].rows) for split in scored},
        teacher_report={"confidence_method": label_set.confidence_method, **label_set.report},
        shards=shards,
    )
    calibrate_teacher(material)
    return material


def calibrate_teacher(material: Material) -> None:
    """Scale what a language model said about the train and test rows by the temperature that the validation rows ask for."""
    teacher = material.spec.teacher
    if not isinstance(teacher, LLMTeacher) or teacher.calibrate == "never" or "validation" not in material.answers:
        return
    if material.teacher_report["confidence_method"] == "none":
        return
    tested = set(material.hashes("test")) if "test" in material.datasets else set()
    named = zip(material.gold("validation"), material.hashes("validation"), strict=True)
    gold = [None if key in tested else name for name, key in named]
    found = calibration.measure(material.probabilities("validation"), gold, material.labels)
    material.teacher_report["calibration"] = found
    if found["temperature"] is not None:
        for split in material.answers.keys() - {"validation"}:
            material.answers[split] = calibration.rescale(material.answers[split], found["temperature"])


def tell_calibration(job: Job, material: Material, report: Reporter) -> None:
    """Record what calibration found, with the labels and as an event."""
    found = material.teacher_report.get("calibration")
    if found is None:
        return

    def keep(session: Session) -> bool:
        known = session.get_one(LabelSet, job.label_set_id, with_for_update=True)
        is_new = known.report.get("calibration") != found
        known.report = {**known.report, "calibration": found}
        return is_new

    if patiently(keep) and found["temperature"] is not None:
        errors = {side: found[side]["expected_calibration_error"] for side in ("before", "after")}
        report.event(
            "training.calibrated",
            f"The teacher's confidence is scaled by the temperature {found['temperature']:g}: over {found['rows']} validation "
            f"rows it was off by {errors['before']:.3f} on average, and is by {errors['after']:.3f}.",
            rows=found["rows"], temperature=found["temperature"], **errors,
        )  # fmt: skip


def split_rows(material: Material, report: Reporter) -> Splits:
    """Who does what. Near-duplicates stay on one side of every split where that is asked for, or feedback is taken."""
    method, training = material.spec.method, material.spec.training
    seed = training.seed if training.split_seed is None else training.split_seed
    labeled = np.flatnonzero(np.asarray(material.answers["train"].column("distribution").is_valid()))
    validation = None
    if "validation" in material.datasets:
        validation = np.flatnonzero([name is not None for name in material.gold("validation")])
    if isinstance(method, FeedsBack) or training.near_duplicates == "apart":
        texts = {split: material.joined(split) for split in material.datasets}
        groups = near_groups(texts, progress=lambda done: report.check())
    else:
        groups = exact_groups({split: material.hashes(split) for split in material.datasets})
    if not isinstance(method, FeedsBack):
        return choose(groups, labeled, validation, seed=seed, validation_share=training.validation_share)
    if method.feedback_from == "validation" and validation is not None:
        # A row of a class that the student cannot name could not tell it anything.
        validation = validation[_indices(material, "validation")[validation] < len(material.labels)]
    return choose(
        groups, labeled, validation, seed=seed, validation_share=training.validation_share,
        feedback_share=method.feedback_share, feedback_from=method.feedback_from,
    )  # fmt: skip


def usable_splits(material: Material, probabilities: NDArray[np.float32], report: Reporter) -> Splits:
    """Who does what, once it is sure that there is something to do. Raises WorkFailed with what is missing."""
    _refuse_a_constant_teacher(material, probabilities)
    splits = split_rows(material, report)
    _refuse_an_empty_split(material, splits)
    return splits


def _refuse_a_constant_teacher(material: Material, probabilities: NDArray[np.float32]) -> None:
    errors = [error for error in material.answers["train"].column("error").to_pylist() if error]
    labeled = probabilities[~np.isnan(probabilities[:, 0])]
    if len(labeled) < 2:
        raise WorkFailed(
            "nothing_labeled",
            f"The teacher labeled {len(labeled)} rows. First reason: {errors[0] if errors else 'none given'}",
        )
    names = {material.labels[index] for index in labeled.argmax(axis=1)}
    if len(names) == 1:
        raise WorkFailed(
            "teacher_constant",
            f"The teacher gave every one of {len(labeled)} rows the label {names.pop()!r}; there is nothing to learn from. "
            "Describe the labels more clearly, give examples, or choose another teacher.",
        )  # fmt: skip


def _refuse_an_empty_split(material: Material, splits: Splits) -> None:
    if splits.barred[splits.train].all():
        raise WorkFailed(
            "nothing_to_train_on",
            "Every labeled train row also stands in the validation or test set, or repeats a row that is held back; "
            "there is nothing left to train on.",
        )
    if len(splits.validation) == 0:
        raise WorkFailed(
            "nothing_to_choose_by",
            "No labeled row is left to choose the checkpoint by that does not also stand in the test set.",
        )
    if isinstance(material.spec.method, FeedsBack) and len(splits.feedback) == 0:
        raise WorkFailed(
            "nothing_to_feed_back",
            f"No labeled row is left in the {material.spec.method.feedback_from} set to give feedback; "
            "upload more rows, or choose another method.feedback_from.",
        )


@dataclass(frozen=True)
class Models:
    """The student, the encoders that teach it, and what they read of every split."""

    student: Student
    tokens: dict[str, Tokens]
    teacher: Student | None = None
    assistant: Student | None = None
    teacher_tokens: dict[str, Tokens] | None = None
    """None: the teacher reads the student's."""


def build_models(material: Material, report: Reporter) -> Models:
    """The models of the job's method at their start. Raises WorkFailed where they do not fit each other."""
    method = material.spec.method
    student = _encoder(material, material.spec.student)
    _tell_parameters(student, report)
    if not isinstance(method, TaughtByEncoder):
        return Models(student, _tokenise(student, material, report))
    teacher = _encoder(material, method.teacher)
    _tell_parameters(teacher, report, "teacher")
    if isinstance(method, PKD):
        _refuse_other_widths(teacher, student)
    assistant = None
    if isinstance(method, TAKD):
        assistant = _assistant(material, method, teacher, student)
        _tell_parameters(assistant, report, "assistant")
    teacher_tokens = None if _read_alike(teacher, student) else _tokenise(teacher, material, report)
    return Models(student, _tokenise(student, material, report), teacher, assistant, teacher_tokens)


def prepare_rows(
    material: Material, probabilities: NDArray[np.float32], splits: Splits, models: Models, report: Reporter
) -> tuple[Pool, HeldOut]:
    """The rows to train on, with those that give feedback, and the rows that choose the checkpoint."""
    tokens, teacher_tokens = models.tokens, models.teacher_tokens

    def held(split: str, rows: NDArray[np.int64]) -> HeldOut:
        gold = _indices(material, split)[rows] if split == "validation" else probabilities[rows].argmax(axis=1)
        return HeldOut(tokens[split], rows, gold, teacher_tokens[split] if teacher_tokens else None)

    held_out = held("validation" if "validation" in material.datasets else "train", splits.validation)
    if "validation" not in material.datasets:
        report.event(
            "training.held_back",
            f"There is no validation set, so {len(splits.validation)} pseudo-labeled rows are held back to choose the checkpoint.",
            rows=len(splits.validation),
        )
    feedback = None
    if isinstance(material.spec.method, FeedsBack):
        source = material.spec.method.feedback_from
        feedback = held(source, splits.feedback)
        report.event(
            "training.feedback",
            f"{len(splits.feedback)} rows of the {source} set give feedback to the teacher; they neither train nor choose the checkpoint.",
            rows=len(splits.feedback), source=source,
        )  # fmt: skip
    if barred := int(splits.barred[splits.train].sum()):
        report.event(
            "training.barred", level="warning", rows=barred,
            message=f"{barred} train rows also stand in the validation or test set; they are seen but never trained on.",
        )  # fmt: skip
    pool = Pool(
        tokens["train"], torch.from_numpy(probabilities), splits.train, splits.barred,
        teacher_tokens["train"] if teacher_tokens else None, feedback,
    )  # fmt: skip
    return pool, held_out


def _encoder(material: Material, wish: StudentOptions) -> Student:
    source = pretrained.resolve(
        wish.model, purpose="student", roots=settings().model_roots, allow_hub=settings().allow_hub
    )
    encoder = build_student(
        wish, material.labels, material.texts("train"), material.pairs("train"), source, material.spec.training.seed
    )
    encoder.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return encoder


def _assistant(material: Material, method: TAKD, teacher: Student, student: Student) -> Student:
    depths = [encoder.model.config.num_hidden_layers for encoder in (teacher, student)]
    layers = method.layers_between(*depths)
    return _encoder(material, method.teacher.model_copy(update={"num_layers": layers}))


def _refuse_other_widths(teacher: Student, student: Student) -> None:
    widths = [encoder.model.config.hidden_size for encoder in (teacher, student)]
    if widths[0] != widths[1]:
        raise WorkFailed(
            "widths_differ",
            f"The teacher's layers have {widths[0]} values and the student's {widths[1]}, so 'pkd' cannot compare them; "
            "choose models of one width, or method 'kd'.",
        )


def _tell_parameters(encoder: Student, report: Reporter, part: str = "student") -> None:
    parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    report.event(
        f"training.{part}", f"The {part} has {parameters:,} parameters in {encoder.model.config.num_hidden_layers} layers.",
        parameters=parameters, layers=encoder.model.config.num_hidden_layers, source=encoder.source.kind,
        device=str(encoder.model.device),
    )  # fmt: skip


def _read_alike(one: Student, other: Student) -> bool:
    """Whether both make the same tokens of every text; asked before either has read one."""
    mine, theirs = one.tokenizer, other.tokenizer
    same = mine.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    return same and mine.model_max_length == theirs.model_max_length and type(mine) is type(theirs)


def _tokenise(encoder: Student, material: Material, report: Reporter) -> dict[str, Tokens]:
    return {
        split: tokenise(
            encoder.tokenizer, material.texts(split), material.pairs(split), progress=lambda done: report.check()
        )
        for split in material.datasets
    }


def _indices(material: Material, split: str) -> NDArray[np.int64]:
    """(N,) class of each row by its gold label; a label the job lacks is a class of its own, beyond the student's."""
    index: dict[str | None, int] = {name: position for position, name in enumerate(material.labels)}
    return np.array([index.setdefault(name, len(index)) for name in material.gold(split)], np.int64)


def score(
    job: Job, files: Storage, material: Material, student: Student, tokens: dict[str, Any], held_out: HeldOut,
    probabilities: NDArray[np.float32], barred: int, report: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Scores of the best student and of the teacher. The test set is looked at here and nowhere else.

    Leaves the answers on the test set in the storage, by which a comparison tells two runs apart.
    """
    seed = material.spec.training.seed
    splits = [split for split in ("validation", "test") if split in material.datasets]
    report.phase("evaluating", sum(material.datasets[split].rows for split in splits) or len(held_out.rows))
    should_stop = asking(report)
    evaluation: dict[str, Any] = {"validation": None, "test": None, "pseudo_labels": None, "barred_rows": barred}
    answers: dict[str, Answers] = {}
    done = 0
    for split in splits:
        gold = material.gold(split)
        predicted = predict_probabilities(student.model, tokens[split], should_stop=should_stop)
        evaluation[split] = {
            "source": "dataset",
            "student": evaluate(predicted, gold, material.labels, seed),
            "teacher": None,
        }
        if split in material.answers:
            evaluation[split]["teacher"] = _teacher_scores(material, split)
        if split == "test":
            asked = material.probabilities(split) if split in material.answers else None
            artifacts.write_predictions(files, job.id, gold, material.labels, predicted.numpy(), asked, report.confirm)
        # What calibrates must not stand in the test set either: the rows that chose the checkpoint.
        chosen = held_out.rows.tolist() if split == "validation" else range(len(gold))
        answers[split] = _answers(material, split, predicted, [row for row in chosen if gold[row] is not None])
        done += material.datasets[split].rows
        report.progress(done)
    if "validation" not in splits:
        predicted = predict_probabilities(student.model, held_out.tokens, held_out.rows, should_stop=should_stop)
        names = [material.labels[index] for index in held_out.gold]
        evaluation["validation"] = {
            "source": "held_back_pseudo_labels", "student": evaluate(predicted, names, material.labels, seed), "teacher": None,
        }  # fmt: skip
        answers["validation"] = Answers(predicted, names)
    evaluation["calibration"] = calibrate(
        answers["validation"], answers.get("test"), material.labels,
        source=evaluation["validation"]["source"], target=material.spec.target_accuracy,
    )  # fmt: skip
    if material.spec.teacher.kind != "dataset" and material.datasets["train"].label_counts:
        labeled = ~np.isnan(probabilities[:, 0])
        known = [name if ok else None for name, ok in zip(material.gold("train"), labeled.tolist(), strict=True)]
        if any(name is not None for name in known):
            scores = evaluate(torch.from_numpy(np.nan_to_num(probabilities)), known, material.labels, seed)
            evaluation["pseudo_labels"] = {name: scores[name] for name in ("rows", "accuracy", "macro_f1")}
    return evaluation


def _teacher_scores(material: Material, split: str) -> Scores | None:
    """Of the rows that it has answered and that have a true label; None where there is none."""
    teacher = torch.from_numpy(material.probabilities(split))
    answered = ~teacher[:, 0].isnan()
    known = [name if ok else None for name, ok in zip(material.gold(split), answered.tolist(), strict=True)]
    if not any(name is not None for name in known):
        return None
    scores = evaluate(teacher.nan_to_num(0.0), known, material.labels, material.spec.training.seed)
    if material.teacher_report["confidence_method"] == "none":
        scores["expected_calibration_error"] = None
    return scores


def score_alone(job: Job, files: Storage, material: Material, report: Reporter) -> None:
    """The end of a job without a student: the teacher's scores, and its answers on the test set in the student's place."""
    tell_calibration(job, material, report)
    rows = sum(material.datasets[split].rows for split in material.answers)
    report.phase("evaluating", rows)
    evaluation: dict[str, Any] = {
        split: {"source": "dataset", "student": None, "teacher": _teacher_scores(material, split)}
        if split in material.answers
        else None
        for split in ("validation", "test")
    }
    if all(not (found and found["teacher"]) for found in evaluation.values()):
        raise WorkFailed("nothing_labeled", "The teacher answered none of the rows that it is scored on.")
    if "test" in material.answers:
        said = material.probabilities("test")
        gold = material.gold("test")
        artifacts.write_predictions(files, job.id, gold, material.labels, said, said, report.confirm)
    report.metrics(0, 0.0, final_metrics(evaluation))
    report.flush()

    def end(session: Session) -> None:
        held = lifecycle.held(session, job.id, report.attempt)
        held.evaluation = evaluation
        lifecycle.advance_phase(session, held.id, "evaluating", rows, finished=True)
        lifecycle.finish(session, held)

    patiently(end)


def report_labels(
    job: Job, files: Storage, material: Material, run: Run, tokens: Tokens, taught_rows: NDArray[np.int64],
    report: Reporter,
) -> dict[str, Any] | None:  # fmt: skip
    """Leave the label report in the storage; its short form. It tells about a job and never fails one: None instead."""

    def rows(split: str) -> label_report.Rows:
        lines = material.tables[split].column("line").to_pylist()
        return label_report.Rows(material.joined(split), lines, material.probabilities(split), material.gold(split))

    def predict(wanted: NDArray[np.int64]) -> NDArray[np.float32]:
        return predict_probabilities(run.student.model, tokens, wanted, should_stop=asking(report)).numpy()

    try:
        full = label_report.report(
            rows("train"), {split: rows(split) for split in ("validation", "test") if split in material.answers},
            material.labels, material.teacher_report["confidence_method"], _never_trained(material, run.ledger.selected, taught_rows),
            predict,
            check=report.check,
        )  # fmt: skip
        content = json.dumps(full, ensure_ascii=False, allow_nan=False).encode()
        files.put_bytes(label_cache.report_key(job.id), content, confirm=report.confirm)
        return label_report.summary(full)
    except (Stopped, LeaseLost):
        raise
    except Exception as error:
        log.exception("label_report_failed", job_id=job.id)
        report.event(
            "labels.report_failed", f"The label report could not be made: {type(error).__name__}.", level="warning"
        )
        return None


def _never_trained(
    material: Material, selected: NDArray[np.int32], taught_rows: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """(N,) train rows whose label the student cannot know: neither the row, nor one of the same text, was trained on.

    `taught_rows`: those that an encoder teacher learned from have told the student something through it.
    """
    never = selected == 0
    never[taught_rows] = False
    hashes = material.hashes("train")
    learned = {key for key, out in zip(hashes, never.tolist(), strict=True) if not out}
    return never & np.array([key not in learned for key in hashes], bool)


def _answers(material: Material, split: str, predicted: torch.Tensor, rows: list[int]) -> Answers:
    gold = material.gold(split)
    teacher = torch.from_numpy(material.probabilities(split))[rows] if split in material.answers else None
    if teacher is not None and teacher.isnan().any():
        teacher = None
    return Answers(predicted[rows], [str(gold[row]) for row in rows], teacher)


def _publish(
    job: Job, files: Storage, material: Material, run: Run, evaluation: dict[str, Any],
    about_labels: dict[str, Any] | None, report: Reporter,
) -> None:  # fmt: skip
    """Pack the checkpoint, then record it and the job's end in one transaction."""
    report.phase("packaging", 1)
    metrics = final_metrics(evaluation)
    about_waves = patiently(lambda session: overview.show(session, [job.id])[0].labeling["waves"])
    checkpoint = artifacts.publish_checkpoint(
        files, job, material.datasets["train"], run.student, step=run.progress.best_step, epoch=run.progress.best_epoch,
        metrics=metrics, evaluation=evaluation, selection=run.progress.selection(), teacher=material.teacher_report,
        label_report=about_labels, waves=about_waves, check=report.check,
    )  # fmt: skip
    # At the step of the checkpoint they belong to: at the last step they would overwrite that epoch's own score.
    report.metrics(run.progress.best_step, run.progress.best_epoch, metrics)
    report.metrics(run.progress.step, float(run.progress.epoch), {"training_seconds": run.progress.seconds})
    if torch.cuda.is_available():
        peak = float(torch.cuda.max_memory_allocated())
        report.metrics(run.progress.step, float(run.progress.epoch), {"gpu_memory_bytes": peak})
    report.progress(1)
    report.flush()

    def end(session: Session) -> None:
        # Asked again after a commit of which nobody knows whether it was done; one that is still being done holds the lock.
        session.get(Job, job.id, with_for_update=True)
        if session.get(Checkpoint, checkpoint.id) is not None:
            return
        held = lifecycle.held(session, job.id, report.attempt)
        session.merge(checkpoint)
        held.evaluation, held.best_checkpoint_id = evaluation, checkpoint.id
        lifecycle.warn(session, held, warnings_of(evaluation))
        lifecycle.advance_phase(session, held.id, "packaging", 1, finished=True)
        lifecycle.emit(session, held.id, "checkpoint.published", "The checkpoint can be downloaded.", metrics=metrics)
        lifecycle.finish(session, held)

    try:
        patiently(end)
    except lifecycle.LeaseLost:
        files.delete(checkpoint.key)
        raise
    files.delete_all(resume.folder(job.id))


def final_metrics(evaluation: dict[str, Any]) -> dict[str, float | None]:
    """The final scores as single numbers: validation_ and test_ accuracy and macro_f1, and teacher_ likewise."""
    values: dict[str, float | None] = {}
    for split in ("validation", "test"):
        for model, prefix in (("student", ""), ("teacher", "teacher_")):
            scores = (evaluation.get(split) or {}).get(model)
            if scores:
                values[f"{prefix}{split}_accuracy"] = scores["accuracy"]
                values[f"{prefix}{split}_macro_f1"] = scores["macro_f1"]
    return values
