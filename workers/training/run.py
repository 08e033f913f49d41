"""What a training works on and what it remembers: the rows, the ledger, the progress, the models under way."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.options import (
    LLKDLGTM,
    OTHER_LEARNING_RATE,
    PESFKD,
    RCO,
    MetaDistill,
    Method,
    TaughtByEncoder,
    TaughtByInfluence,
    TeacherFirst,
    Training,
)
from workers.algorithms.losses import entropy
from workers.algorithms.selection import RULES
from workers.algorithms.selection.rule import REASONS, Selection, State
from workers.training.data import Tokens
from workers.training.encoders import Student

HELD_OUT_DUPLICATE = len(REASONS)
"""A reason of the loop, not of a rule: the text also stands in the validation or test set, so it is never trained on."""
LEDGER_REASONS = (*REASONS, "in_held_out_set", "held_back", "feedback", "not_labeled")
TREND_POINTS = 32
"""At most so many values of influence are kept of a row; with more epochs, neighbours share a place and the last stays."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that choose the checkpoint or give feedback, with the class index each should get; an index beyond the
    student's classes stands for a class it cannot name."""

    tokens: Tokens
    rows: NDArray[np.int64]
    gold: NDArray[np.int64]
    teacher_tokens: Tokens | None = None
    """The same texts as an encoder teacher reads them; None: as the student does."""


@dataclass(frozen=True)
class Pool:
    """The train rows as the loop sees them."""

    tokens: Tokens
    """Of all N rows of the dataset."""
    teacher: Tensor
    """(N, C) float32 distributions over the labels; rows without a label are NaN and not in `rows`."""
    rows: NDArray[np.int64]
    """The rows to be offered, ascending."""
    barred: NDArray[np.bool_]
    """(N,) rows whose text is also held out; they are seen, and rejected."""
    teacher_tokens: Tokens | None = None
    """The same texts as an encoder teacher reads them; None: as the student does."""
    feedback: HeldOut | None = None
    """Rows whose loss tells what helps the student, for methods that ask; none of them is among `rows`."""


@dataclass(frozen=True)
class Measured:
    """Influence of the S rows of a step, and how the models saw them; float32 on the CPU."""

    influence: Tensor
    """(S,)"""
    student: Tensor
    """(S, C) distributions without dropout."""
    teacher: Tensor
    """(S, C) the encoder teacher's, before its step."""


@dataclass
class Ledger:
    """What happened to each of the N rows; arrays of shape (N,)."""

    offered: NDArray[np.int32]
    selected: NDArray[np.int32]
    reason: NDArray[np.int8]
    """Index into LEDGER_REASONS of the last rejection; 0 when there was none."""
    teacher_threshold: NDArray[np.float32]
    student_threshold: NDArray[np.float32]
    uncertainty: NDArray[np.float32]
    influence: NDArray[np.float32]
    """(N, up to TREND_POINTS) by epoch; NaN where none was measured. (N, 0) for methods that measure none."""
    student_label: NDArray[np.int16]
    """What the student said when influence was last measured; -1: never."""
    student_confidence: NDArray[np.float32]
    encoder_teacher_label: NDArray[np.int16]
    encoder_teacher_confidence: NDArray[np.float32]

    @classmethod
    def empty(cls, rows: int, trend_points: int = 0) -> Ledger:
        def nothing() -> NDArray[np.float32]:
            return np.full(rows, np.nan, np.float32)

        return cls(
            offered=np.zeros(rows, np.int32),
            selected=np.zeros(rows, np.int32),
            reason=np.zeros(rows, np.int8),
            teacher_threshold=nothing(),
            student_threshold=nothing(),
            uncertainty=nothing(),
            influence=np.full((rows, trend_points), np.nan, np.float32),
            student_label=np.full(rows, -1, np.int16),
            student_confidence=nothing(),
            encoder_teacher_label=np.full(rows, -1, np.int16),
            encoder_teacher_confidence=nothing(),
        )

    def note(self, rows: NDArray[np.int64], selection: Selection) -> None:
        """Take in the decisions about one batch."""
        mask = selection.mask.numpy()
        self.offered[rows] += 1
        self.selected[rows[mask]] += 1
        self.reason[rows[~mask]] = selection.reasons.numpy()[~mask]
        for name, values in (
            ("teacher_threshold", selection.teacher_threshold),
            ("student_threshold", selection.student_threshold),
            ("uncertainty", selection.uncertainty),
        ):
            known = ~torch.isnan(values).numpy()
            getattr(self, name)[rows[known]] = values.numpy()[known]

    def note_influence(self, rows: NDArray[np.int64], found: Measured, epoch: int, epochs: int) -> None:
        """Take in the influence of a batch's rows in an epoch, counted from 0, and how the models saw them."""
        points = self.influence.shape[1]
        self.influence[rows, epoch if epochs <= points else epoch * points // epochs] = found.influence.numpy()
        self.uncertainty[rows] = entropy(found.student).numpy()
        for name, view in (("student", found.student), ("encoder_teacher", found.teacher)):
            confidence, label = view.max(dim=1)
            getattr(self, f"{name}_label")[rows] = label.numpy()
            getattr(self, f"{name}_confidence")[rows] = confidence.numpy()

    def bar(self, rows: NDArray[np.int64]) -> None:
        """Take in rows that are seen but may not be trained on."""
        self.offered[rows] += 1
        self.reason[rows] = HELD_OUT_DUPLICATE


@dataclass
class EpochCount:
    """Rows offered and trained on in one epoch."""

    epoch: int
    seen: int = 0
    selected: int = 0


@dataclass
class Interval:
    """What is averaged between two points of the step series."""

    seen: int = 0
    selected: int = 0
    loss: float = 0.0
    steps: int = 0
    class_seen: list[int] = field(default_factory=list)
    class_selected: list[int] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    """Of what the steps tell besides their loss, by series."""
    counts: dict[str, int] = field(default_factory=dict)
    """How many steps told it."""

    def note(self, figures: dict[str, float]) -> None:
        """Take in what one step tells."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Each figure's mean over the steps that told it."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


@dataclass
class Progress:
    """All that the loop remembers between two steps, besides model, optimizer and random state."""

    wave: int = 1
    """Of labels, that the run began with."""
    epoch: int = 0
    position: int = 0
    """Rows of this epoch's order that are done."""
    step: int = 0
    counts: list[EpochCount] = field(default_factory=list)
    interval: Interval = field(default_factory=Interval)
    best_score: float = -1.0
    best_epoch: float = 0.0
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def selection(self) -> dict[str, Any]:
        """The figures the job shows."""
        counts = [count for count in self.counts if count.seen]
        seen = sum(count.seen for count in counts)
        selected = sum(count.selected for count in counts)
        return {
            "seen": seen,
            "selected": selected,
            "ratio": selected / seen if seen else 0.0,
            "epochs": [{**asdict(count), "ratio": count.selected / count.seen} for count in counts],
        }


@dataclass
class Companion:
    """Another model that is trained beside the student."""

    encoder: Student
    optimizer: torch.optim.AdamW
    learning_rate: float
    """Peak of its schedule, which has the shape of the student's."""
    learns: bool = True
    """Whether it still changes while the student learns."""


@dataclass
class Course:
    """A companion's own training before the student's: from the labels, and from another companion where it has one."""

    optimizer: torch.optim.AdamW
    learning_rate: float
    """Peak of its schedule, which has the shape of the student's."""
    epochs: int
    taught_by: str | None = None
    """The companion that teaches it beside the labels."""
    anchors: list[dict[str, Tensor]] = field(default_factory=list)
    """Its weights at equal distances along the way, the last as it ends."""
    anchors_wanted: int = 0
    shown: int | None = None
    """Which anchor the companion has now; None: it has to be looked up, as after a restart."""
    epoch: int = 0
    position: int = 0
    """Rows of this epoch's order that are done."""
    step: int = 0
    loss: float = 0.0
    """Sum since the last point of its series."""
    losses: int = 0
    best_score: float = -1.0
    best_weights: dict[str, Tensor] | None = None
    """Of its best epoch; None before the first, and once the companion has them."""

    def facts(self) -> dict[str, Any]:
        """What it remembers besides tensors."""
        return {name: getattr(self, name) for name in ("epoch", "position", "step", "loss", "losses", "best_score")}


@dataclass
class Run:
    """A training under way: everything that is saved and restored."""

    student: Student
    optimizer: torch.optim.AdamW
    rule_state: State
    generator: torch.Generator
    """Of the rule's random choices."""
    ledger: Ledger
    progress: Progress
    companions: dict[str, Companion] = field(default_factory=dict)
    """By their part, such as `teacher`."""
    courses: dict[str, Course] = field(default_factory=dict)
    """By the part of the companion that takes it, in their order."""
    best_weights: dict[str, Tensor] | None = None


def begin(
    student: Student,
    pool: Pool,
    method: Method,
    training: Training,
    classes: int,
    teacher: Student | None = None,
    assistant: Student | None = None,
) -> Run:
    """A run at its first step. The random state of the process is set from the seed.

    teacher, assistant: the encoders of a method that trains them.
    """
    torch.manual_seed(training.seed)
    rate = training.learning_rate or OTHER_LEARNING_RATE
    companions: dict[str, Companion] = {}
    courses: dict[str, Course] = {}
    if teacher is not None:
        assert isinstance(method, TaughtByEncoder)
        courses = _courses(method, training, teacher, assistant)
        if assistant is not None:
            own_rate = courses["assistant"].learning_rate
            optimizer = make_optimizer(assistant, own_rate, training)
            companions["assistant"] = Companion(assistant, optimizer, own_rate, learns=False)
        companions["teacher"] = _teacher(teacher, method, training, rate, classes)
    if getattr(method, "zero_heads", False):
        for encoder in (student, *(companion.encoder for companion in companions.values())):
            for parameter in encoder.model.classifier.out_proj.parameters():
                torch.nn.init.zeros_(parameter)
    return Run(
        student=student,
        optimizer=make_optimizer(student, rate, training),
        rule_state=make_rule(method).initial(classes),
        generator=torch.Generator().manual_seed(training.seed),
        ledger=Ledger.empty(
            len(pool.tokens), min(training.epochs, TREND_POINTS) if isinstance(method, TaughtByInfluence) else 0
        ),
        progress=Progress(),
        companions=companions,
        courses=courses,
    )


def _courses(
    method: TaughtByEncoder, training: Training, teacher: Student, assistant: Student | None
) -> dict[str, Course]:
    """What teacher and assistant learn before the student does; none where all begin together."""
    rate, epochs = method.teacher.learning_rate or OTHER_LEARNING_RATE, method.epochs_alone(training.epochs)
    if not epochs:
        return {}
    courses = {"teacher": Course(make_optimizer(teacher, rate, training), rate, epochs)}
    if isinstance(method, RCO):
        courses["teacher"].anchors_wanted = method.anchors
    if assistant is not None:
        courses["assistant"] = Course(make_optimizer(assistant, rate, training), rate, epochs, taught_by="teacher")
    return courses


def _teacher(
    teacher: Student, method: TaughtByEncoder, training: Training, student_rate: float, classes: int
) -> Companion:
    """The teacher beside the student, with what of it learns on."""
    rate = method.teacher.learning_rate or OTHER_LEARNING_RATE
    if isinstance(method, PESFKD):
        rate, config = method.adapter_learning_rate or student_rate, teacher.model.config
        adapter = Adapter(config.hidden_size, method.adapter_size, classes, config.hidden_dropout_prob)
        teacher.model.adapter = adapter.to(teacher.model.device)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate, weight_decay=training.weight_decay, fused=True)
        return Companion(teacher, optimizer, rate, learns=False)
    if isinstance(method, MetaDistill):
        rate = method.meta_learning_rate
    learns = isinstance(method, MetaDistill) or not isinstance(method, TeacherFirst)
    return Companion(teacher, make_optimizer(teacher, rate, training), rate, learns)


class Adapter(nn.Module):
    """What PESF-KD adds to a teacher's logits: two layers on its pooled output, which add nothing at first."""

    def __init__(self, width: int, size: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(size, classes))
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, width) -> (B, classes)"""
        added: Tensor = self.layers(pooled)
        return added


def make_optimizer(encoder: Student, rate: float, training: Training) -> torch.optim.AdamW:
    """AdamW; biases and norms are not decayed."""
    parameters = list(encoder.model.parameters())
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    plain = [parameter for parameter in parameters if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": training.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=rate,
        fused=True,
    )


def make_rule(method: Method) -> Any:
    """The rule that chooses a method's rows: the one it names, LLKD's inside `llkd_lgtm`, or else every row."""
    if isinstance(method, LLKDLGTM):
        return RULES["llkd"](**method.selection.model_dump())
    if method.kind not in RULES:
        return RULES["no_selection"]()
    return RULES[method.kind](**method.model_dump(exclude={"kind"}))
