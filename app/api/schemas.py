"""The shapes of the API's answers."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from app import comparisons, lifecycle, overview
from app.models import Comparison
from app.storage import Storage

Item = TypeVar("Item")


class Read(BaseModel):
    """Base of every answer: read from an ORM row."""

    model_config = ConfigDict(from_attributes=True, populate_by_name=True, use_attribute_docstrings=True)


class FaultRead(Read):
    line: int | None = None
    pointer: str | None = None
    code: str
    message: str


class ProblemRead(Read):
    """RFC 9457, with what went wrong where."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None
    errors: list[FaultRead] = []
    total_errors: int = 0


class PageRead(Read, Generic[Item]):
    """One page of a list."""

    data: list[Item]
    has_more: bool
    next: str | None
    """Send it as `after` for the next page."""


class PhaseRead(Read):
    name: str
    started_at: datetime | None
    finished_at: datetime | None
    done: int
    total: int


class JobError(Read):
    code: str
    message: str
    phase: str | None


class EpochSelection(Read):
    epoch: int
    seen: int
    selected: int
    ratio: float


class SelectionRead(Read):
    seen: int
    """Rows offered to the rule: rows x epochs."""
    selected: int
    """Rows trained on."""
    ratio: float
    """selected / seen."""
    epochs: list[EpochSelection]


class WaveRead(Read):
    """What the student of one wave of labels has shown."""

    wave: int
    """Counted from 1."""
    rows: int
    """Train rows asked about up to it."""
    selected: int
    """Of those, trained on at least once."""
    epochs: int | None = None
    """That its student was trained; null where nothing could be trained."""
    macro_f1: float | None
    """On the validation rows; null where nothing could be trained."""
    gain_at_most: float | None = None
    """How far it may be above the wave before in macro_f1, with 90 % certainty; null where there is none to compare with, or
    its student is still at chance."""
    drifted: bool
    """Whether its labels were mixed otherwise than those of the waves before."""
    seconds: float
    """From its last label to the decision."""
    stopped: str | None
    """Why no further wave was asked about; null when one was."""


class WavesRead(Read):
    """Labeling in waves."""

    history: list[WaveRead]
    rows_asked: int
    """Train rows that the teacher was or is being asked about."""
    rows_withheld: int
    """Train rows that it was not asked about, or not yet."""
    tokens_withheld: int
    """What they would have cost in tokens, at the mean of the rows asked about."""
    cost_withheld: float | None
    """The same in the operator's currency; null where the teacher has no price."""


class LabelingRead(Read):
    """What the teacher did for this job."""

    labels: list[str]
    confidence_method: str | None
    rows_from_cache: int
    rows_failed: int
    tokens: int
    tokens_saved: int
    seconds: float
    """Time the teacher took, added up over all workers."""
    seconds_saved: float
    """Time it had taken for the answers that came from the cache."""
    rows_per_second: float | None
    """Rows of all workers together, from the first one on; null before there are any."""
    eta_seconds: float | None
    """Seconds of labeling to go at this pace; null when it is not labeling."""
    gate: dict[str, Any] | None
    """What the first rows told of the teacher; null before that, and without a gate."""
    waves: WavesRead | None
    """Null when all rows are asked about before anything is trained."""
    cost: float | None
    """What the endpoint's answers cost, in the operator's currency; null where it has no price."""
    teacher: dict[str, Any]


class JobRead(Read):
    """A job as its owner sees it."""

    id: str
    name: str | None
    method: str
    status: str
    is_terminal: bool
    phase: str | None
    progress: float
    phases: list[PhaseRead]
    eta_seconds: float | None
    spec: dict[str, Any]
    attempt: int
    warnings: list[dict[str, Any]]
    error: JobError | None
    labeling: LabelingRead
    selection: SelectionRead | None
    metrics: dict[str, Any]
    """The latest value of each series, and the final scores."""
    evaluation: dict[str, Any] | None
    """Scores of teacher and student on the validation and the test set, with 95 % bootstrap intervals."""
    best_checkpoint_id: str | None
    comparison_id: str | None
    """The comparison that this job is a run of."""
    arm: str | None
    """The row of the comparison's table."""
    metadata: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, shown: overview.Shown) -> JobRead:
        """The job with what is computed from its rows."""
        job = shown.job
        return cls.model_validate(
            {
                **{name: getattr(job, name) for name in cls.model_fields if hasattr(job, name)},
                "metadata": job.metadata_,
                "is_terminal": lifecycle.is_terminal(job),
                "progress": overview.progress(job),
                "eta_seconds": overview.eta_seconds(job),
                "labeling": shown.labeling,
            }
        )


class MeasurementRead(Read):
    """What a worker found when it asked the teacher about a few of the job's rows. Their labels are in the cache now."""

    rows: int
    """Asked about; rows known from the cache do not count."""
    failed: int
    load_seconds: float
    """Until the teacher was ready: nothing, where this worker had it in memory."""
    seconds: float
    """For the rows but the first few, which warm the teacher up."""
    rows_per_second: float
    """Of one worker."""
    tokens_per_row: float
    cost: float | None
    """Of these rows, paid; null where the endpoint has no price."""
    confidence_method: str
    confidence: dict[str, float] | None
    """`min`, `p25`, `median`, `p75` and `max` over the rows; null where the teacher gives a label alone."""
    teacher: dict[str, Any]
    """What the teacher says of itself, as in a job's `labeling.teacher`."""


class DryRunRead(Read):
    """What a job would need; no job is stored."""

    rows: int
    rows_to_label: int
    """Train rows, and held-out rows where the teacher is scored on them, that the label cache lacks."""
    rows_cached: int
    teacher_tokens: int
    """Tokens the teacher would read: by the measured rows, else from all texts' and the prompt's lengths at four
    characters a token."""
    cost: float | None
    """What they would cost where the endpoint has a price, in the operator's currency."""
    estimated_seconds: float
    """The next two together."""
    labeling_seconds: float
    """By one worker; several share them."""
    labeling_basis: Literal["sample", "earlier_jobs", "default_rate"]
    training_seconds: float
    training_basis: Literal["earlier_jobs", "default_rate"]
    estimate_basis: str
    """`measured` when neither of the two is by a default rate, else `default_rates`."""
    measured: bool
    """Whether a worker asked the teacher about a sample of the rows, for this dry run or in the hour before."""
    measurement: MeasurementRead | None
    measurement_note: str | None
    """Why nothing was measured, or what the measured answers say against the job."""
    labels: list[str]
    warnings: list[dict[str, Any]]


class MeanRead(Read):
    """Over the runs that have a score; all null before the first."""

    mean: float | None
    sd: float | None
    """Sample standard deviation; null with fewer than two runs."""
    runs: int


class IntervalRead(Read):
    """A difference to the first arm with its 95 % paired-bootstrap interval."""

    mean: float
    low: float
    high: float


class DifferenceRead(Read):
    """This arm minus the first, over the seeds that both have finished, on the same test rows."""

    seeds: int
    accuracy: IntervalRead
    macro_f1: IntervalRead


class TeacherScores(Read):
    """The teacher's own answers on the test set; intervals are 95 % bootstrap intervals."""

    accuracy: float
    accuracy_interval: tuple[float, float]
    macro_f1: float
    macro_f1_interval: tuple[float, float]


class RunRead(Read):
    """One arm with one seed: a job."""

    seed: int
    job_id: str
    status: str
    progress: float
    error: JobError | None
    accuracy: float | None
    macro_f1: float | None
    seen: int | None
    """Rows offered: rows x epochs."""
    selected: int | None
    """Rows trained on."""
    share: float | None
    """selected / seen."""
    seconds: float | None
    """Wall time of the training."""
    gpu_memory_bytes: int | None
    """The most that was allocated at once; null on a CPU."""


class ArmRead(Read):
    """A row of the table. Figures are means over the runs that have succeeded; scores are of the test set."""

    name: str
    method: str
    status: str
    progress: float
    accuracy: MeanRead
    macro_f1: MeanRead
    rank: float | None
    """By macro-F1 among the arms, 1 the best, averaged over the seeds that every arm has finished."""
    teacher: TeacherScores | None
    """Of the arm's own teacher, where it has one that was asked about the test rows."""
    difference: DifferenceRead | None
    """Null for the first arm."""
    seen: float | None
    selected: float | None
    share: float | None
    seconds: float | None
    gpu_memory_bytes: int | None
    runs: list[RunRead]


class ComparisonBrief(Read):
    """A comparison in a list: without its table."""

    id: str
    name: str | None
    status: str
    is_terminal: bool
    progress: float
    eta_seconds: float | None
    spec: dict[str, Any]
    warnings: list[dict[str, Any]]
    metadata: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def facts(cls, comparison: Comparison) -> dict[str, Any]:
        """What is computed from the comparison's jobs."""
        jobs = comparison.jobs
        ended = all(lifecycle.is_terminal(job) for job in jobs)
        return {
            **{name: getattr(comparison, name) for name in ("id", "name", "spec", "warnings", "created_at")},
            "metadata": comparison.metadata_,
            "status": comparisons.status(jobs),
            "is_terminal": ended,
            "progress": comparisons.progress(jobs),
            "eta_seconds": comparisons.eta_seconds(jobs),
            "started_at": min((job.started_at for job in jobs if job.started_at), default=None),
            "finished_at": max((job.finished_at for job in jobs if job.finished_at), default=None) if ended else None,
        }

    @classmethod
    def brief(cls, comparison: Comparison) -> ComparisonBrief:
        return cls.model_validate(cls.facts(comparison))


class ComparisonRead(ComparisonBrief):
    """A comparison with its table."""

    labeling: LabelingRead | None
    """Of the labels that the arms share; those of an arm with a teacher or rows of its own stand in its jobs."""
    teacher: TeacherScores | None
    arms: list[ArmRead]

    @classmethod
    def of(cls, session: Session, storage: Storage, comparison: Comparison) -> ComparisonRead:
        """The comparison with what is computed from its jobs."""
        own = {arm["name"] for arm in comparison.spec["arms"] if arm["teacher"] is None and arm["dataset_id"] is None}
        jobs = comparison.jobs
        labeled = next((job for job in jobs if job.arm in own), None)
        return cls.model_validate(
            {
                **cls.facts(comparison),
                **comparisons.table(storage, comparison),
                "labeling": labeled and overview.show(session, [labeled.id])[0].labeling,
            }
        )


class EventRead(Read):
    seq: int
    type: str
    level: str
    message: str
    data: dict[str, Any]
    at: datetime


class EventPage(Read):
    data: list[EventRead]
    has_more: bool
    next: int | None


class PointRead(Read):
    step: int
    epoch: float
    value: float | None
    at: datetime


class SeriesRead(Read):
    name: str
    points: list[PointRead]


class SeriesPage(Read):
    data: list[SeriesRead]
    names: list[str]
    """Every series the job has."""


class SampleRead(Read):
    """Why one row was used or not."""

    row: int
    line: int | None
    text: str
    text_pair: str | None
    label: str | None
    """The teacher's label."""
    confidence: float | None
    distribution: dict[str, float] | None
    source: str | None
    """Who gave the label: `teacher`, `cache` or `dataset`; null where nobody was asked."""
    offered: int
    """How often the rule looked at the row."""
    selected: int
    """How often it was trained on."""
    decision: str
    reason: str
    """Why it was last rejected, or `selected` when it never was; see docs/api.md."""
    teacher_threshold: float | None
    student_threshold: float | None
    student_uncertainty: float | None
    influence: float | None
    """Mean over the epochs: how far learning from the row lowers the loss on the feedback rows; below 0 it does harm."""
    influence_trend: list[float | None] | None = None
    """By epoch."""
    student_label: str | None = None
    """What the student said when influence was last measured."""
    student_confidence: float | None = None
    encoder_teacher_label: str | None = None
    """What the encoder teacher said then."""
    encoder_teacher_confidence: float | None = None
    error: str | None


class SamplePage(Read):
    data: list[SampleRead]
    has_more: bool
    next: str | None


class ConfidenceBinRead(Read):
    """Rows with a confidence above `from`, up to `to`."""

    from_: float = Field(alias="from")
    to: float
    rows: int


class ReliabilityBinRead(ConfidenceBinRead):
    """The same with their mean confidence and how many of them are right."""

    confidence: float
    accuracy: float


class ConfidenceRead(Read):
    method: str | None
    mean: float | None
    histogram: list[ConfidenceBinRead]


class ConfusionRead(Read):
    """How often the teacher gave one label where another is true."""

    teacher: str
    gold: str
    rows: int


class GoldRead(Read):
    """The teacher's labels against the true ones."""

    rows: int
    agreement: float
    confusions: list[ConfusionRead]
    expected_calibration_error: float | None
    reliability: list[ReliabilityBinRead] | None


class LabeledRowRead(Read):
    """A train row that a person should look at."""

    row: int
    line: int | None
    text: str
    """Both texts of a pair, on two lines; cut after 300 characters."""
    label: str
    confidence: float


class LikelyWrongRowRead(LabeledRowRead):
    suggested: str
    """What the student says instead."""
    student_probability: float


class LikelyWrongRead(Read):
    """Labels that the student contradicts, the most doubtful first."""

    method: str
    rows_scored: int
    found: int
    rows: list[LikelyWrongRowRead]
    reason: str | None
    """Why no rows were scored."""


class NearDuplicateRead(Read):
    similarity: float
    rows: list[LabeledRowRead]


class NearDuplicatesRead(Read):
    """Almost the same text, another label; the most similar first."""

    rows_compared: int
    similarity: float
    found: int
    pairs: list[NearDuplicateRead]


class LabelReportRead(Read):
    """How good the labels of a job's train rows are."""

    rows: int
    rows_labeled: int
    class_counts: dict[str, int]
    confidence: ConfidenceRead | None
    """Null where the teacher tells none."""
    gold: dict[str, GoldRead | None]
    """By split; null where there are no true labels to hold the teacher's against."""
    likely_wrong: LikelyWrongRead
    near_duplicates: NearDuplicatesRead


class FileRead(Read):
    name: str
    bytes: int
    sha256: str


class CheckpointRead(Read):
    id: str
    job_id: str
    step: int
    epoch: float
    metrics: dict[str, Any]
    bytes: int
    sha256: str
    files: list[FileRead]
    is_best: bool
    created_at: datetime


class Health(Read):
    status: str
    checks: dict[str, str] = Field(default_factory=dict)
