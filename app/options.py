"""What a client may ask for: the job spec, parsed and checked in one place.

Every `kind` is a class of its own in a discriminated union, so an option that a method does not know is refused at the
door with its path, and the OpenAPI document says what each kind takes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import httpx
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

DEFAULT_STUDENT = "all-MiniLM-L6-v2"
LEARNING_RATES = {DEFAULT_STUDENT: 2e-4, "scratch": 5e-4}
OTHER_LEARNING_RATE = 5e-5
SCRATCH_LAYERS = 4
"""Of a model from scratch, where its number of layers is not asked for."""


def default_learning_rate(model: str) -> float:
    """The peak learning rate of a model that is trained without a wish for one."""
    return LEARNING_RATES.get(model, OTHER_LEARNING_RATE)


class Options(BaseModel):
    """Base of every option class: unknown fields are refused, values never change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _plain_text(value: str) -> str:
    if "\x00" in value:
        raise ValueError("contains a NUL character; remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"contains a lone surrogate at position {error.start}; send valid Unicode") from None
    return value


Text = Annotated[str, AfterValidator(_plain_text)]
DatasetId = Annotated[str, Field(pattern=r"^ds_[0-9a-z]{16,40}$", examples=["ds_0123456789abcdef0123"])]


class Label(Options):
    """One class the student shall know."""

    name: Annotated[Text, Field(min_length=1, max_length=200)]
    """The class name as it stands in labels, predictions and id2label."""
    description: Annotated[Text, Field(max_length=2000)] | None = None
    """What belongs in the class, in a few words; an embedding teacher compares texts with it."""


class Example(Options):
    """One labeled text that shows the teacher what a label means."""

    text: Annotated[Text, Field(min_length=1, max_length=20_000)]
    text_pair: Annotated[Text, Field(max_length=20_000)] | None = None
    label: Annotated[Text, Field(min_length=1, max_length=200)]


# --- teachers -------------------------------------------------------------------------------------------------------


class EmbeddingTeacher(Options):
    """Label by sentence embeddings: zero-shot by the labels' names and descriptions, or by a linear head on examples."""

    kind: Literal["embedding"]
    model: Annotated[Text, Field(min_length=1, max_length=300)] = "all-MiniLM-L6-v2"
    """A sentence-transformers model: the bundled all-MiniLM-L6-v2, a directory under a model root, or a hub name."""
    examples: Annotated[list[Example], Field(max_length=10_000)] = []
    """Few-shot examples. With at least two labels covered, a regularised linear head with calibrated confidence."""
    template: Annotated[Text, Field(max_length=500)] = "{label}"
    """How a label is written before it is embedded; `{label}` is its description, or else its name."""
    temperature: Annotated[float, Field(gt=0, le=10)] | None = None
    """Zero-shot only: softmax temperature on cosine similarities; null chooses 0.05."""
    score_held_out: bool = True
    """Also label the validation and test sets, so that the teacher's own accuracy stands beside the student's."""

    @field_validator("template")
    @classmethod
    def _names_the_label(cls, value: str) -> str:
        if "{label}" not in value:
            raise ValueError("must contain {label}, which is replaced by the label's description or name")
        return value


class FewShot(Options):
    """Which examples a language model is shown."""

    dataset_id: DatasetId | None = None
    """Take the candidates from this labeled dataset, when the job is posted: its first rows of each label, 500 in all.
    They take the place of the teacher's `examples`. Null: the candidates are the `examples` of the spec."""
    how: Literal["balanced", "diverse", "similar"] = "balanced"
    """`balanced`: labels in turn. `diverse`: far apart in meaning. `similar`: near to the row, by clusters of candidates."""
    count: Annotated[int, Field(ge=1, le=100)] = 8
    """Examples in a prompt."""
    clusters: Annotated[int, Field(ge=2, le=64)] = 8
    """`similar` only: how many prompts there are; each is read once and kept."""


class LLMTeacher(Options):
    """What the teachers that prompt a language model have in common."""

    instruction: Annotated[Text, Field(min_length=1, max_length=20_000)] | None = None
    """What the model is told before the list of labels; null is a sentence that asks for the label alone."""
    examples: Annotated[list[Example], Field(max_length=500)] = []
    """Few-shot examples, shown in this order, or the candidates that `few_shot` chooses from."""
    few_shot: FewShot | None = None
    """How examples are chosen; null shows all of them."""
    verbalised: dict[Annotated[Text, Field(max_length=200)], Annotated[Text, Field(max_length=200)]] = {}
    """How a label is written in the prompt and in the answer, by its name; a label not named here is written as it is."""
    answers: Literal["labels", "numbers"] = "labels"
    """What the model answers with: the label as it is written, or the number that it has in the prompt's list. A number
    is a token or a few, so 77 or 151 long labels cost hardly more than six short ones; a small model may take it worse."""
    template: Literal["1"] = "1"
    """The wording around instruction, labels, examples and row. A new wording gets a new number and misses the cache."""
    score_held_out: bool = True
    """Also label the validation and test sets: for the teacher's own scores, and for calibration."""
    calibrate: Literal["auto", "never"] = "auto"
    """`auto`: with 32 labeled validation rows or more, scale the teacher's confidence by one temperature fitted on them.
    Labels in the cache stay what they are."""

    @field_validator("few_shot")
    @classmethod
    def _has_candidates(cls, value: FewShot | None, known: ValidationInfo) -> FewShot | None:
        if value is not None and value.dataset_id is None and not known.data.get("examples"):
            raise ValueError("needs candidates: a `dataset_id` here, or `examples` beside it")
        return value

    @field_validator("verbalised")
    @classmethod
    def _can_be_told_apart(cls, value: dict[str, str]) -> dict[str, str]:
        written: dict[str, str] = {}
        for name, words in value.items():
            if not words.strip() or words != words.strip():
                raise ValueError(f"{name!r} is written as {words!r}; use words without spaces at the ends")
            if words in written:
                raise ValueError(f"{written[words]!r} and {name!r} are both written as {words!r}; tell them apart")
            written[words] = name
        return value

    def written(self, name: str) -> str:
        """How the label of this name stands in the prompt and in the answer."""
        return self.verbalised.get(name, name.strip())


class CausalLMTeacher(LLMTeacher):
    """A decoder-only language model that runs on the workers: the probability of every label as the prompt's continuation."""

    kind: Literal["causal_lm"]
    model: Annotated[Text, Field(min_length=1, max_length=300)]
    """A causal language model: a directory under a model root, or a hub name."""
    chat: Literal["auto", "never"] = "auto"
    """`auto`: with the model's chat template where it has one. `never`: always as plain text."""
    max_length: Annotated[int, Field(ge=8, le=32_768)] = 512
    """Tokens read of a text, or of both texts of a pair together; the prompt comes on top."""
    prior_correction: bool = False
    """Divide by what the model answers to a text that says nothing (contextual calibration, arXiv:2102.09690)."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"] = "auto"
    """`auto`: fp32 on a CPU, bf16 on a GPU, fp16 on one without bf16. `int8`, `int4`: with bitsandbytes, on a GPU."""


class EndpointTeacher(LLMTeacher):
    """A language model behind an OpenAI-compatible server that the operator has configured."""

    kind: Literal["endpoint"]
    endpoint: Annotated[Text, Field(min_length=1, max_length=100)]
    """The name of one of the operator's endpoints; URLs and keys are never sent by clients."""
    samples: Annotated[int, Field(ge=1, le=50)] = 1
    """From 2 on: ask each row so many times at temperature 1 and take the shares of the answers as the distribution. For
    servers that give no log-probabilities; it costs that many answers a row."""


class DatasetTeacher(Options):
    """The dataset's own labels: a label, a label with a confidence, or the whole distribution of each row."""

    kind: Literal["dataset"]
    default_confidence: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The confidence of a row that has a label and nothing else; the rest is spread evenly over the other labels."""


class Lbl2VecTeacher(Options):
    """Lbl2TransformerVec: a label is where those of the unlabeled texts lie that its keywords are nearest to (Schopf 2022)."""

    kind: Literal["lbl2vec"]
    model: Annotated[Text, Field(min_length=1, max_length=300)] = "all-MiniLM-L6-v2"
    """A sentence-transformers model: the bundled all-MiniLM-L6-v2, a directory under a model root, or a hub name."""
    keywords: dict[
        Annotated[Text, Field(max_length=200)],
        Annotated[list[Annotated[Text, Field(min_length=1, max_length=200)]], Field(min_length=1, max_length=100)],
    ] = {}
    """Words that describe a label, by its name. A label not named here has its description, or else its name, split at
    commas."""
    documents: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    """How many of the dataset's first rows are looked through."""
    similarity_offset: Annotated[float, Field(ge=0, le=2)] = 0.1
    """A text counts for a label when its cosine with the keywords is at most this below the nearest text's."""
    min_documents: Annotated[int, Field(ge=1, le=10_000)] = 1
    """At least so many texts count, the nearest first."""
    max_documents: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """At most so many; null: no limit."""
    temperature: Annotated[float, Field(gt=0, le=10)] | None = None
    """Softmax temperature on cosine similarities; null chooses 0.05."""
    score_held_out: bool = True
    """Also label the validation and test sets, so that the teacher's own accuracy stands beside the student's."""


Teacher = Annotated[
    EmbeddingTeacher | DatasetTeacher | CausalLMTeacher | EndpointTeacher | Lbl2VecTeacher, Field(discriminator="kind")
]


# --- student --------------------------------------------------------------------------------------------------------


class Student(Options):
    """The small classifier that comes out: always a RobertaForSequenceClassification."""

    model: Annotated[Text, Field(min_length=1, max_length=300)] = DEFAULT_STUDENT
    """`all-MiniLM-L6-v2` (bundled, pretrained), `scratch`, a directory under a model root, or a hub name."""
    num_layers: Annotated[int, Field(ge=1, le=48)] | None = None
    """Keep this many first layers (null: all). For `scratch`: how many to make (null: 4)."""
    max_length: Annotated[int, Field(ge=8, le=512)] = 128
    """Tokens kept of a text, or of both texts of a pair together."""
    hidden_size: Annotated[int, Field(ge=16, le=1024, multiple_of=4)] = 256
    """`scratch` only: width of the layers."""
    vocab_size: Annotated[int, Field(ge=300, le=50_265)] = 8000
    """`scratch` only: size of the byte-level BPE vocabulary trained on the dataset."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout of hidden states, attention and the classification head."""
    pooling: Literal["first", "mean"] | None = None
    """What the start token, which the head reads, has at first: what the last layer was trained to give it (`first`), or the
    mean of all tokens (`mean`), by attending to all alike. Null: `mean` where `num_layers` leaves layers of a pretrained
    model out, since the start token of an inner layer says next to nothing of the text; else `first`."""


# --- methods: the rows of LLKD's tables -----------------------------------------------------------------------------


class LLKDThresholds(Options):
    """How LLKD's two thresholds move, and when each of them selects."""

    use_teacher_confidence: bool = True
    """False is the ablation `w/o TC`."""
    use_student_uncertainty: bool = True
    """False is the ablation `w/o SU`."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the thresholds' moving averages; above 0.99 they lag and selection starves."""
    class_scaling: Literal["class_mean", "freematch", "none"] = "class_mean"
    """How a threshold depends on the class."""
    class_norm: Literal["mean", "max"] = "mean"
    """What the class averages are divided by: `max` is the paper's MaxNorm, which puts every threshold at or below its
    level and lets most rows pass; `mean` puts the thresholds at the level on average."""
    student_threshold: Literal["batch_level", "moving_average"] = "batch_level"
    """`moving_average` is the paper's; `batch_level` takes the level from the current batch, so it cannot lag."""
    warm_up: Literal["auto", "none"] = "auto"
    """`auto`: until the student's predictions carry information, only the teacher's threshold selects. `none`: paper."""
    warm_up_agreement: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Warm-up ends when chance-corrected agreement of student and teacher (Cohen's kappa) exceeds this."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.05
    """At least this share of every batch is trained on, most uncertain rows first; 0 is the paper's rule."""


class LLKD(LLKDThresholds):
    """Keep rows the teacher is sure of and the student is not (arXiv:2411.08028)."""

    kind: Literal["llkd"]
    weighted: bool = False
    """LLKD_w, Eq. 9: weigh each selected row by confidence x uncertainty."""


class NoSelection(Options):
    """Train on every pseudo-labeled row (the paper's No_DS)."""

    kind: Literal["no_selection"]


class TeacherAlone(Options):
    """No student: the teacher's own scores on the validation and test sets, as a row of a table (Teacher, Teacher-ZS)."""

    kind: Literal["teacher_alone"]


class Random(Options):
    """Train on a random share of every batch."""

    kind: Literal["random"]
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of each batch that is trained on."""


class FreeMatch(Options):
    """Self-adaptive thresholds on the student's confidence (ICLR 2023)."""

    kind: Literal["freematch"]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.999


class SoftMatch(Options):
    """All rows, weighted by a truncated Gaussian of the student's confidence (ICLR 2023)."""

    kind: Literal["softmatch"]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.999
    n_sigma: Annotated[float, Field(gt=0, le=10)] = 2.0
    uniform_alignment: bool = True


class CCKDL(Options):
    """Confidence-conditioned distillation, loss form: weigh teacher and label by the teacher's confidence (2107.06993)."""

    kind: Literal["cckd_l"]
    temperature: Annotated[float, Field(gt=0, le=50)] = 1.0


class CCKDTReg(Options):
    """Confidence-conditioned targets with self-regulation: skip what the student already knows (2107.06993)."""

    kind: Literal["cckd_t_reg"]
    temperature: Annotated[float, Field(gt=0, le=50)] = 1.0
    alpha: Annotated[float, Field(gt=0, le=10)] = 0.01
    """Margin bound 1 - exp(-alpha * epoch)."""


class EntropyScore(Options):
    """Once, before training: keep the rows with the lowest teacher entropy (2206.02914)."""

    kind: Literal["entropy_score"]
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5


class UNIXKD(Options):
    """In every batch, keep the rows the student is most uncertain of (2012.09413)."""

    kind: Literal["unixkd"]
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5


# --- methods with an encoder teacher: the rows of LGTM's tables ------------------------------------------------------


class EncoderTeacher(Student):
    """A classifier that teaches the student and learns itself, from the labels that `teacher` of the job gave."""

    learning_rate: Annotated[Annotated[float, Field(gt=0, le=1)] | None, Field(validate_default=True)] = None
    """Peak of its own AdamW schedule, which has the student's shape. Null chooses by its model, as for the student."""

    @field_validator("learning_rate")
    @classmethod
    def _by_its_model(cls, value: float | None, known: ValidationInfo) -> float | None:
        return value if value is not None or "model" not in known.data else default_learning_rate(known.data["model"])


class TaughtByEncoder(Options):
    """What every method with an encoder teacher takes."""

    teacher: EncoderTeacher = EncoderTeacher()
    """The model that is trained as the teacher."""
    temperature: Annotated[float, Field(gt=0, le=50)] = 1.0
    """Softens teacher and student."""
    distillation_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the distillation loss in the student's loss; the rest is cross-entropy with the label."""

    def epochs_alone(self, epochs: int) -> int:
        """Epochs of the teacher before the student begins, in a training of so many."""
        return 0


class ByDistance(TaughtByEncoder):
    """What the methods take that can be told how to measure the distance between teacher and student."""

    distillation_loss: Literal["kl", "ce", "mse", "dist"] = "kl"
    """How far the student is from the teacher: KL or cross-entropy of the softened distributions, squared difference of
    the logits, or DIST's correlations (arXiv:2205.10536)."""
    temperature: Annotated[float, Field(gt=0, le=50)] = 1.0
    """Softens teacher and student in `kl`, `ce` and `dist`."""


class TaughtTogether(ByDistance):
    """What the methods take whose teacher learns in the same steps as the student."""

    teacher_distillation_share: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Share of the distance to the student in the teacher's loss; the rest is cross-entropy with the label."""
    zero_heads: bool = True
    """Start both models with the last layer of their heads at zero, so that both say nothing at first."""
    teacher_epochs: Annotated[int, Field(ge=0, le=1000)] | None = 0
    """Epochs in which the teacher is fine-tuned on the train rows before the student begins; 0: they begin together;
    null: as many as `training.epochs`."""

    def epochs_alone(self, epochs: int) -> int:
        """Epochs of the teacher before the student begins."""
        return epochs if self.teacher_epochs is None else self.teacher_epochs


class ProKT(TaughtTogether):
    """Teacher and student trained together, each step the teacher first, held near the student (ICLR 2021)."""

    kind: Literal["prokt"]


class Online(TaughtTogether):
    """Online distillation: teacher and student learn the labels and each other at the same time."""

    kind: Literal["online"]


class DML(TaughtTogether):
    """Deep mutual learning: two peers learn the labels and each other, one after the other (1706.00384)."""

    kind: Literal["dml"]
    teacher_distillation_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the distance to the student in its peer's loss; the rest is cross-entropy with the label."""
    zero_heads: bool = False
    """Start both models with the last layer of their heads at zero, so that both say nothing at first."""


class FeedsBack(Options):
    """What the methods take that hold rows back for feedback to the teacher."""

    feedback_from: Literal["train", "validation"] = "train"
    """Where the feedback rows are taken from; they then neither train the models nor choose the checkpoint."""
    feedback_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of those rows that gives feedback."""
    feedback_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Feedback rows a step; null: as many as `training.batch_size`."""


class TaughtByInfluence(TaughtTogether, FeedsBack):
    """What LGTM adds to ProKT: rows held back for feedback, and how each row's influence on them steers the teacher."""

    zero_heads: bool = False
    """Start both models with the last layer of their heads at zero, so that both say nothing at first."""
    teacher_epochs: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Epochs in which the teacher is fine-tuned on the train rows before the student begins; 0: they begin together, as
    the authors have it; null: as many as `training.epochs`."""
    mode: Literal["official", "weighted", "meta"] = "official"
    """The teacher's loss: as the authors' code computes it, as their paper writes it, or influence alone."""
    influence_scale: Annotated[float, Field(ge=0, le=100_000)] = 1.0
    """Multiplies the influence in the teacher's loss; 0 is ProKT."""
    influence_clip: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """`weighted` only: a row's weight, scale x influence, lies between minus and plus this."""
    influence: Literal["exact", "finite_difference"] = "exact"
    """How influence is computed: one forward-mode pass, or the central difference of the authors."""
    finite_difference_radius: Annotated[float, Field(gt=0, le=1)] = 1e-2
    """`finite_difference` only: how far the student's weights move, in Euclidean length."""
    influence_dropout: bool = False
    """Whether dropout is on while influence is computed."""
    influence_every: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Compute influence at every n-th step; the steps between are ProKT's."""


class LGTM(TaughtByInfluence):
    """The teacher learns to teach: it favours what helps the student on rows held back for feedback (ACL 2023)."""

    kind: Literal["lgtm"]


class LLKDLGTM(TaughtByInfluence):
    """LLKD's thresholds choose the rows, and LGTM's teacher and student learn from them."""

    kind: Literal["llkd_lgtm"]
    selection: LLKDThresholds = LLKDThresholds()
    """The thresholds that choose the rows."""


class TeacherFirst(TaughtByEncoder):
    """What the methods take whose teacher is fine-tuned on the train rows before the student begins."""

    teacher_epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Epochs of that fine-tuning; null: as many as `training.epochs`."""

    def epochs_alone(self, epochs: int) -> int:
        """Epochs of the teacher before the student begins, in a training of so many."""
        return self.teacher_epochs or epochs


class Softened(TeacherFirst):
    """What the methods add whose loss compares softened distributions."""

    temperature_squared: bool = True
    """Multiply the distillation loss by the square of `temperature`, so that its gradient keeps its size."""


class SoftenedByDistance(Softened, ByDistance):
    """The same, where the distance can be chosen."""

    temperature_squared: bool = True
    """Multiply `kl` and `ce` by the square of `temperature`, so that their gradient keeps its size."""


class KD(SoftenedByDistance):
    """Knowledge distillation: a teacher that has learned the labels teaches the student (1503.02531)."""

    kind: Literal["kd"]


class SKD(Softened):
    """Spherical distillation: the logits of both are brought to one mean and one spread first (2010.07485)."""

    kind: Literal["skd"]
    multiplier: Annotated[float, Field(gt=0, le=100)] = 2.5
    """That spread: the standard deviation of a row's logits."""


class DIST(TeacherFirst):
    """Correlation in place of divergence: within a row over the classes, and within a class over the batch (2205.10536)."""

    kind: Literal["dist"]
    row_weight: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Of 1 - correlation over the classes, mean over the rows."""
    class_weight: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Of 1 - correlation over the rows of a batch, mean over the classes."""


class PKD(Softened):
    """Patient distillation: the student's inner layers also follow the teacher's (1908.09355)."""

    kind: Literal["pkd"]
    layers: Literal["skip", "last"] = "skip"
    """Which of the teacher's layers: evenly spread over its depth, or its last ones."""
    hidden_weight: Annotated[float, Field(ge=0, le=100_000)] = 100.0
    """Of the distance between the layers, beside the rest of the loss."""


class TAKD(SoftenedByDistance):
    """An assistant of medium depth learns from the teacher, and the student from the assistant (1902.03393)."""

    kind: Literal["takd"]
    assistant_layers: Annotated[int, Field(ge=1, le=100)] | None = None
    """Layers of the assistant, which else is the teacher's model; null: halfway between teacher and student, rounded up."""

    def layers_between(self, teacher: int, student: int) -> int:
        """The assistant's layers, with a teacher and a student of so many."""
        return self.assistant_layers or -(-(teacher + student) // 2)


class RCO(SoftenedByDistance):
    """Route-constrained optimisation: the student follows the teacher along its way, from anchor to anchor (1904.09149)."""

    kind: Literal["rco"]
    anchors: Annotated[int, Field(ge=1, le=100)] = 3
    """How many states of the teacher the student learns from in turn; the last is the one it ends with."""


class PESFKD(Softened):
    """The teacher stays, but a small adapter on it learns with the student to speak more softly (2205.06701)."""

    kind: Literal["pesf_kd"]
    adapter_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Width of the adapter's hidden layer."""
    adapter_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak of the adapter's AdamW schedule; null takes the student's."""


class MetaDistill(SoftenedByDistance, FeedsBack):
    """Learning to teach: the teacher steps so that the student's step helps on feedback rows (2106.04570)."""

    kind: Literal["meta_distill"]
    meta_learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Peak of the teacher's AdamW schedule while it teaches."""
    pilot_learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of the student's tentative step of plain gradient descent; null takes the student's rate at this step."""


Method = Annotated[
    LLKD
    | NoSelection
    | TeacherAlone
    | Random
    | FreeMatch
    | SoftMatch
    | CCKDL
    | CCKDTReg
    | EntropyScore
    | UNIXKD
    | Online
    | DML
    | ProKT
    | LGTM
    | LLKDLGTM
    | KD
    | SKD
    | DIST
    | PKD
    | TAKD
    | RCO
    | PESFKD
    | MetaDistill,
    Field(discriminator="kind"),
]


def needs_confidence(method: Method) -> bool:
    """Whether a method looks at more of the teacher's answer than the label."""
    if isinstance(method, LLKD):
        return method.use_teacher_confidence or method.weighted
    if isinstance(method, LLKDLGTM):
        return method.selection.use_teacher_confidence
    indifferent = NoSelection | TeacherAlone | Random | FreeMatch | SoftMatch | UNIXKD | TaughtByEncoder
    return not isinstance(method, indifferent)


# --- training, budget, webhook, the whole spec ----------------------------------------------------------------------


class Training(Options):
    """How the student is trained."""

    epochs: Annotated[int, Field(ge=1, le=1000)] = 6
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Rows offered to the rule per step."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak of AdamW's schedule: linear warm-up, then linear decay to 0. Null chooses by the student: 2e-4 for the
    bundled model, 5e-4 for `scratch`, 5e-5 for others; the job's spec shows the choice."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.06
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: mixed precision in training and selection, about twice as fast on hardware that has it; scores are always
    computed in fp32."""
    gradient_accumulation: Annotated[int, Field(ge=1, le=4096)] = 1
    """In how many parts the rows of a step go through a model. Gradients add up over the parts, so that the step stays the
    same but for rounding and the draws of dropout; each part is computed a second time, and only one is in memory."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Without a validation set, this share of the pseudo-labeled rows is held back to choose the checkpoint."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Chooses the rows that are held back; null takes `seed`. Jobs that differ in nothing but `seed` are then scored on
    the same rows, as those of a comparison are."""
    near_duplicates: Literal["auto", "apart"] = "auto"
    """`apart`: texts that say almost the same are kept on one side of every split, at about 1 ms a row. `auto`: so for
    methods that take feedback rows; for the others, the very same texts are. A comparison with a method that takes
    feedback rows keeps them apart for every arm."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Budget(Options):
    """When to stop asking the teacher; training goes on with what is labeled."""

    max_labeled_rows: Annotated[int, Field(ge=2, le=10**9)] | None = None
    """Label at most this many rows, the first ones of the dataset."""
    max_teacher_tokens: Annotated[int, Field(ge=1, le=10**15)] | None = None
    """Claim no further shard of train rows once the teacher has read this many tokens."""
    max_seconds: Annotated[float, Field(gt=0, le=10**9)] | None = None
    """Claim no further shard of train rows once labeling has taken this long, added up over all workers."""


class Waves(Options):
    """Ask about the train rows in waves, train a student after each, and stop when another wave would not help."""

    rows: Annotated[int, Field(ge=16, le=10**9)] = 1000
    """Train rows of the first wave."""
    growth: Annotated[float, Field(ge=1, le=10)] = 2.0
    """Each wave has so many times the rows of the one before."""
    min_gain: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Stop when a wave has raised validation macro-F1, from 0 to 1, by less than this: with 90 % certainty, as the
    validation rows show it."""
    max_stretch: Annotated[float, Field(ge=1, le=100)] = 10.0
    """A wave that ends before the last row trains for more epochs, to take as many steps as all rows would: at most so
    many times `training.epochs`. 1: no more epochs."""


class Labeling(Options):
    """How the teacher is asked."""

    smoke_gate: bool = True
    """Ask about the first rows first, and fail early when the teacher says the same of all or does not beat chance."""
    waves: Waves | None = None
    """Null: about all rows before anything is trained."""


def _http_url(value: str) -> str:
    try:
        url = httpx.URL(value)
    except httpx.InvalidURL as error:
        raise ValueError(f"is not a URL: {error}") from None
    if url.scheme not in ("http", "https"):
        raise ValueError("must begin with https:// or http://")
    if not re.fullmatch(r"[A-Za-z0-9._\-]+|[0-9A-Fa-f:.]+", url.raw_host.decode()):
        raise ValueError("has no host, or one that cannot be")
    if url.port is not None and not 0 < url.port < 65536:
        raise ValueError("has a port outside 1 to 65535")
    if url.userinfo:
        raise ValueError("carries credentials; remove them, calls are signed instead")
    if "#" in value:
        raise ValueError("has a fragment, which is never sent; remove it")
    return value


class Webhook(Options):
    """Whom to tell when the job, or every run of the comparison, has ended, by a signed POST (standardwebhooks.com)."""

    url: Annotated[Text, Field(max_length=2000), AfterValidator(_http_url)]
    """An http or https URL without credentials or fragment, on a public address."""


def _small_metadata(value: dict[str, str]) -> dict[str, str]:
    if len(value) > 16:
        raise ValueError(f"holds {len(value)} pairs; at most 16 are kept")
    for key, entry in value.items():
        if not re.fullmatch(r"[\w.\-]{1,64}", key):
            raise ValueError(f"key {key[:80]!r}: use 1 to 64 letters, digits, '_', '-' or '.'")
        if len(entry) > 512:
            raise ValueError(f"value of {key!r} has {len(entry)} characters; at most 512 are kept")
        _plain_text(entry)
    return value


Metadata = Annotated[dict[str, str], AfterValidator(_small_metadata)]


def _names_alone_will_do(value: Any) -> Any:
    if isinstance(value, list):
        return [{"name": entry} if isinstance(entry, str) else entry for entry in value]
    return value


def _are_distinct(value: list[Label]) -> list[Label]:
    seen: dict[str, str] = {}
    for label in value:
        key = " ".join(label.name.split()).casefold()
        if key in seen:
            raise ValueError(f"{seen[key]!r} and {label.name!r} differ at most by case or spaces; keep one of them")
        seen[key] = label.name
    if len(value) == 1:
        raise ValueError("only one label; a classifier needs at least two")
    return value


Labels = Annotated[
    list[Label], Field(max_length=1000), BeforeValidator(_names_alone_will_do), AfterValidator(_are_distinct)
]


class JobSpec(Options):
    """Everything a job needs to know; the body of POST /jobs."""

    dataset_id: DatasetId
    """The unlabeled rows."""
    validation_dataset_id: DatasetId | None = None
    """Labeled rows that choose the checkpoint."""
    test_dataset_id: DatasetId | None = None
    """Labeled rows that are looked at once, at the end."""
    name: Annotated[Text, Field(max_length=200)] | None = None
    labels: Labels = []
    """The classes. May be left out with the `dataset` teacher, which takes those of the dataset."""
    teacher: Teacher
    student: Student = Student()
    method: Method
    training: Annotated[Training, Field(validate_default=True)] = Training()
    budget: Budget = Budget()
    labeling: Labeling = Labeling()
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """What the student shall be right in, of the texts it does not abstain from. Null: the teacher's own accuracy on the
    validation set, or 0.9 where that is not known."""
    metadata: Metadata = {}
    webhook: Webhook | None = None
    """Called when the job has succeeded, failed or been cancelled."""

    @field_validator("training")
    @classmethod
    def _has_a_learning_rate(cls, value: Training, known: ValidationInfo) -> Training:
        if value.learning_rate is not None or "student" not in known.data:
            return value
        return value.model_copy(update={"learning_rate": default_learning_rate(known.data["student"].model)})


# --- comparisons ----------------------------------------------------------------------------------------------------


class Arm(Options):
    """One row of a comparison: a method, and what this row does differently."""

    name: Annotated[Text, Field(min_length=1, max_length=100)]
    """What the table calls it."""
    method: Method
    student: dict[str, Any] = {}
    """Fields of `student` that are different for this arm."""
    training: dict[str, Any] = {}
    """Fields of `training` that are different for this arm; not `seed` and what decides the splits."""
    teacher: Teacher | None = None
    """Another teacher for this arm; null takes the comparison's. Its labels are its own."""
    dataset_id: DatasetId | None = None
    """Other train rows for this arm, such as a few that people labeled; null takes the comparison's."""


class ComparisonSpec(Options):
    """Several methods, each with several seeds, on the same splits and labels; the body of POST /comparisons."""

    dataset_id: DatasetId
    """The unlabeled rows."""
    validation_dataset_id: DatasetId | None = None
    """Labeled rows that choose each run's checkpoint."""
    test_dataset_id: DatasetId
    """Labeled rows that every run is scored on."""
    name: Annotated[Text, Field(max_length=120)] | None = None
    labels: Labels = []
    """The classes. May be left out with the `dataset` teacher, which takes those of the dataset."""
    teacher: Teacher
    student: Student = Student()
    training: Training = Training()
    budget: Budget = Budget()
    labeling: Labeling = Labeling()
    arms: Annotated[list[Arm], Field(min_length=2, max_length=64)]
    """The rows of the table; the others are compared with the first."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1, max_length=20)] = [0, 1, 2]
    """Each arm is run once with each."""
    metadata: Metadata = {}
    """Also given to every job."""
    webhook: Webhook | None = None
    """Called when every run has ended."""

    @field_validator("arms")
    @classmethod
    def _are_told_apart(cls, value: list[Arm]) -> list[Arm]:
        seen: set[str] = set()
        for arm in value:
            if arm.name in seen:
                raise ValueError(f"two arms are called {arm.name!r}; the table could not tell them apart")
            seen.add(arm.name)
        return value

    @field_validator("seeds")
    @classmethod
    def _are_different(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed stands twice; the same run again tells nothing new")
        return value
