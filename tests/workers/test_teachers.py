"""Every kind of teacher keeps the same promises; then each kind's own arithmetic."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from app import pretrained
from app.config import settings
from app.embedded import Embedded
from app.options import (
    CausalLMTeacher,
    DatasetTeacher,
    EmbeddingTeacher,
    EndpointTeacher,
    Example,
    Label,
    Lbl2VecTeacher,
)
from tests.llms import tiny_llama
from tests.openai_server import ALTERNATIVES, World, serving
from workers.teachers import TEACHERS, Row, Teacher, embedding, linear_head
from workers.teachers.embedding import Encoder, pair_features
from workers.teachers.lbl2vec import Lbl2VecTeacher as Lbl2Vec
from workers.teachers.lbl2vec import label_vector
from workers.teachers.linear_head import View
from workers.teachers.teacher import AskedToStop, never

LABELS = [Label(name="sports"), Label(name="food", description="cooking and eating"), Label(name="money")]
SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
LONG = "The striker scored twice before half-time and the crowd sang. " * 25
EXAMPLES = [
    Example(text=text, label=label)
    for label, texts in {
        "sports": ["The team won the final", "She ran a marathon", "A late goal decided the match"],
        "food": ["Add the onions and stir", "Bread needs an hour to rise", "The soup lacks salt"],
        "money": ["Interest rates went up", "My bank charged a fee", "Shares fell on Monday"],
    }.items()
    for text in texts
]
PAIRS = [
    example.model_copy(update={"text_pair": f"{example.text} indeed" if number % 2 else "It rains"})
    for number, example in enumerate(EXAMPLES)
]
ROWS = [
    Row("The goalkeeper saved a penalty", None, "sports", 0.9, None),
    Row("", "", "money", None, None),
    Row("Fry the fish", "in butter", None, None, {"food": 0.75, "money": 0.25}),
    Row(LONG, None, "sports", None, None),
    Row("The goalkeeper saved a penalty", None, "sports", 0.9, None),
    Row("汇率昨天上涨了 🏦", "", "money", 0.5, None),
    Row(" \n\t", None, "food", None, None),
]


@pytest.fixture(scope="session")
def bundled() -> pretrained.Source:
    return pretrained.resolve(pretrained.BUNDLED, purpose="encoder_teacher", roots=[], allow_hub=False)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pretrained.Source:
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "llama", chat=True)
    return pretrained.resolve("llama", purpose="causal_lm", roots=[root], allow_hub=False)


@pytest.fixture(scope="session")
def endpoint(services: Embedded) -> Iterator[None]:
    """The operator's endpoint `world`: a server that lists alternatives."""
    with pytest.MonkeyPatch.context() as patch, serving(World(ALTERNATIVES)) as world:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(settings(), "endpoints", {"world": world.endpoint()})
        yield


@pytest.fixture(scope="session")
def teachers(bundled: pretrained.Source, llama: pretrained.Source, endpoint: None) -> dict[str, Teacher]:
    options = {
        "endpoint": EndpointTeacher(kind="endpoint", endpoint="world"),
        "causal_lm": CausalLMTeacher(kind="causal_lm", model="llama"),
        "causal_lm, examples": CausalLMTeacher(
            kind="causal_lm", model="llama", examples=EXAMPLES, prior_correction=True
        ),
        "dataset": DatasetTeacher(kind="dataset", default_confidence=0.8),
        "embedding": EmbeddingTeacher(kind="embedding"),
        "embedding, examples": EmbeddingTeacher(kind="embedding", examples=EXAMPLES),
        "embedding, pairs": EmbeddingTeacher(kind="embedding", examples=PAIRS),
        "embedding, one example a label": EmbeddingTeacher(kind="embedding", examples=EXAMPLES[::3]),
        "lbl2vec": Lbl2VecTeacher(kind="lbl2vec"),
    }
    made = {
        name: TEACHERS[option.kind](option, LABELS, llama if option.kind == "causal_lm" else bundled)
        for name, option in options.items()
    }
    made["lbl2vec"].learn([Row(example.text) for example in EXAMPLES])  # type: ignore[attr-defined]
    return made


EVERY_KIND = pytest.mark.parametrize(
    "name",
    [
        "causal_lm",
        "causal_lm, examples",
        "dataset",
        "embedding",
        "endpoint",
        "embedding, examples",
        "embedding, pairs",
        "embedding, one example a label",
        "lbl2vec",
    ],
)


def test_the_suite_covers_every_kind(teachers: dict[str, Teacher]) -> None:
    assert {name.split(",")[0] for name in teachers} == set(TEACHERS)


@EVERY_KIND
def test_every_row_gets_a_distribution(teachers: dict[str, Teacher], name: str) -> None:
    answer = teachers[name].label(ROWS)
    assert answer.probabilities.shape == (len(ROWS), len(LABELS))
    assert answer.probabilities.dtype == np.float32
    assert answer.tokens.shape == (len(ROWS),)
    assert answer.tokens.dtype == np.int32
    assert answer.errors == {}
    assert (answer.probabilities >= 0).all()
    np.testing.assert_allclose(answer.probabilities.sum(axis=1), 1, atol=1e-6)


@EVERY_KIND
def test_no_rows_are_no_answers(teachers: dict[str, Teacher], name: str) -> None:
    answer = teachers[name].label([])
    assert answer.probabilities.shape == (0, len(LABELS))
    assert answer.tokens.shape == (0,)


@EVERY_KIND
def test_asking_twice_gives_the_same_answer(teachers: dict[str, Teacher], name: str) -> None:
    once, twice = teachers[name].label(ROWS), teachers[name].label(ROWS)
    np.testing.assert_array_equal(once.probabilities, twice.probabilities)


@EVERY_KIND
def test_a_row_alone_gets_the_answer_it_gets_among_others(teachers: dict[str, Teacher], name: str) -> None:
    together = teachers[name].label(ROWS)
    for number, row in enumerate(ROWS):
        alone = teachers[name].label([row])
        np.testing.assert_allclose(alone.probabilities[0], together.probabilities[number], atol=1e-5)
        assert alone.tokens[0] == together.tokens[number]


@EVERY_KIND
def test_the_order_of_rows_does_not_matter(teachers: dict[str, Teacher], name: str) -> None:
    forward, backward = teachers[name].label(ROWS), teachers[name].label(ROWS[::-1])
    np.testing.assert_allclose(backward.probabilities[::-1], forward.probabilities, atol=1e-5)


@EVERY_KIND
def test_the_report_can_be_stored_as_json(teachers: dict[str, Teacher], name: str) -> None:
    assert json.loads(json.dumps(teachers[name].report(), allow_nan=False))["mode"]


@pytest.mark.parametrize("name", ["causal_lm", "embedding", "lbl2vec"])
def test_a_model_that_is_asked_to_stop_does_so_between_batches_and_answers_the_next_time(
    teachers: dict[str, Teacher], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "BATCH_SIZE", 2)
    teacher, before = teachers[name], teachers[name].label(ROWS)
    teacher.should_stop = lambda: True
    try:
        ended: Exception | None = teacher.label(ROWS).ended
    except AskedToStop as stopped:
        ended = stopped
    finally:
        teacher.should_stop = never
    assert isinstance(ended, AskedToStop)
    np.testing.assert_allclose(teacher.label(ROWS).probabilities, before.probabilities, atol=1e-5)


# --- lbl2vec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "expected", "count"),
    [
        ({"offset": 0.0}, [1.0, 0.0], 1),
        ({"offset": 0.2}, [3.0, 1.0], 2),  # (1, 0) and (0.8, 0.6), of cosines 1 and 0.8: their sum is (1.8, 0.6)
        ({"offset": 0.0, "at_least": 2}, [3.0, 1.0], 2),
        ({"offset": 2.0, "at_most": 2}, [3.0, 1.0], 2),
        ({"offset": 2.0}, [9.0, 8.0], 3),  # (1.8, 1.6)
        ({"offset": 0.0, "at_least": 9}, [9.0, 8.0], 3),
    ],
)
def test_a_label_lies_at_the_centroid_of_the_texts_nearest_to_its_keywords(
    limits: dict[str, float], expected: list[float], count: int
) -> None:
    documents = np.array([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]], np.float32)
    keywords = np.array([1.0, 0.0], np.float32)
    vector, found = label_vector(documents, keywords, **({"at_least": 1, "at_most": None} | limits))  # type: ignore[arg-type]
    np.testing.assert_allclose(vector, np.array(expected) / np.linalg.norm(expected), atol=1e-6)
    assert found == count


def test_keywords_are_those_of_the_options_or_the_words_of_the_description(bundled: pretrained.Source) -> None:
    def labels(options: Lbl2VecTeacher, label: Label) -> np.ndarray:
        return Lbl2Vec(options, [label, LABELS[0]], bundled)._labels[0]

    plain = Lbl2VecTeacher(kind="lbl2vec")
    named = Lbl2VecTeacher(kind="lbl2vec", keywords={"food": ["soup", "fried fish"]})
    described = Label(name="food", description="soup, fried fish")
    np.testing.assert_array_equal(labels(named, Label(name="food")), labels(plain, described))
    assert np.abs(labels(plain, Label(name="food")) - labels(plain, described)).max() > 0.01


# --- dataset --------------------------------------------------------------------------------------------------------


def test_a_label_gets_its_confidence_and_the_others_share_the_rest() -> None:
    teacher = TEACHERS["dataset"](DatasetTeacher(kind="dataset", default_confidence=0.8), LABELS, None)
    answer = teacher.label([Row("a", label="food"), Row("b", label="money", confidence=0.5)])
    np.testing.assert_allclose(answer.probabilities, [[0.1, 0.8, 0.1], [0.25, 0.25, 0.5]], atol=1e-7)
    assert answer.tokens.tolist() == [0, 0]


def test_a_distribution_is_read_over_the_labels_of_the_job() -> None:
    teacher = TEACHERS["dataset"](DatasetTeacher(kind="dataset"), LABELS, None)
    answer = teacher.label([Row("a", label="sports", distribution={"money": 0.7, "food": 0.3, "weather": 0.0})])
    np.testing.assert_allclose(answer.probabilities, [[0, 0.3, 0.7]], atol=1e-7)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row("a"), "row has no label"),
        (Row("a", label="weather"), "'weather' is not one of the job's labels"),
        (Row("a", label="food", confidence=0.3), "not above 0.333"),
        (Row("a", label="food", confidence=1 / 3), "not above 0.333"),
        (Row("a", label="food", confidence=1.2), "not a probability"),
        (Row("a", label="food", confidence=float("nan")), "not a probability"),
        (Row("a", distribution={"food": 0.5, "weather": 0.5}), "gives 0.5 to 'weather'"),
        (Row("a", distribution={"food": 0.5}), "sums to 0.5"),
        (Row("a", distribution={}), "sums to 0"),
        (Row("a", distribution={"food": 1.5, "money": -0.5}), "gives 'money' -0.5"),
    ],
)
def test_a_row_that_says_nothing_usable_is_an_error_and_no_answer(row: Row, reason: str) -> None:
    teacher = TEACHERS["dataset"](DatasetTeacher(kind="dataset"), LABELS, None)
    answer = teacher.label([Row("good", label="food"), row])
    assert reason in answer.errors[1]
    assert np.isnan(answer.probabilities[1]).all()
    assert list(answer.errors) == [1]
    assert answer.probabilities[0].tolist() == [0, 1, 0]


# --- embedding ------------------------------------------------------------------------------------------------------


def test_zero_shot_is_the_softmax_of_cosines_with_the_descriptions(bundled: pretrained.Source) -> None:
    from sentence_transformers import SentenceTransformer

    teacher = TEACHERS["embedding"](
        EmbeddingTeacher(kind="embedding", template="about {label}", temperature=0.1), LABELS, bundled
    )
    answer = teacher.label([Row("Fry the fish", "in butter")])
    model = SentenceTransformer(str(bundled.path), device="cpu")
    text, *prompts = model.encode(
        ["Fry the fish in butter", "about sports", "about cooking and eating", "about money"], normalize_embeddings=True
    )
    np.testing.assert_allclose(answer.probabilities[0], softmax(np.stack(prompts) @ text / 0.1), atol=1e-5)
    assert LABELS[answer.probabilities[0].argmax()].name == "food"


def test_a_long_text_is_read_to_its_end_and_by_the_mean_of_its_chunks(bundled: pretrained.Source) -> None:
    encoder = Encoder(bundled)
    sentence = "one two three four five six seven eight. "  # nine tokens
    text = sentence * 56  # 504 tokens: two chunks of 252, cut between sentences
    whole, half = encoder.embed([text]), encoder.embed([sentence * 28])
    np.testing.assert_allclose(whole.last, half.last, atol=1e-5)
    assert whole.tokens.tolist() == [56 * 9 + 2 * 2]
    ending = encoder.embed([text, text + "The soup lacks salt. " * 20]).last
    assert ending[0] @ ending[1] < 0.99


def test_equal_rows_are_embedded_once(teachers: dict[str, Teacher], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    encode = Encoder._encode
    monkeypatch.setattr(Encoder, "_encode", lambda self, pieces: read.extend(pieces) or encode(self, pieces))
    teachers["embedding"].label([Row("twice"), Row("once"), Row("twice")])
    assert sorted(read) == ["once", "twice"]


def test_pair_features_by_hand() -> None:
    features = pair_features(np.array([[0.6, 0.8]]), np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(features, [[0.6, 0.8, 1, 0, 0.4, 0.8, 0.6, 0, 0.6]])


def test_a_label_without_examples_is_known_by_its_name(bundled: pretrained.Source) -> None:
    examples = [example for example in EXAMPLES if example.label != "money"]
    teacher = TEACHERS["embedding"](EmbeddingTeacher(kind="embedding", examples=examples), LABELS, bundled)
    answer = teacher.label([Row("money in the bank"), Row("The match ended in a draw"), Row("Stir the soup")])
    assert [LABELS[number].name for number in answer.probabilities.argmax(axis=1)] == ["money", "sports", "food"]


def test_examples_of_a_single_label_leave_the_teacher_zero_shot(bundled: pretrained.Source) -> None:
    teacher = TEACHERS["embedding"](EmbeddingTeacher(kind="embedding", examples=EXAMPLES[:3]), LABELS, bundled)
    assert teacher.report() == {"mode": "zero_shot", "temperature": 0.05}
    assert teacher.confidence_method == "cosine_softmax"


def test_an_embedding_teacher_reads_no_labels(teachers: dict[str, Teacher]) -> None:
    told, untold = (teachers["embedding, examples"].label([Row("Rates fell", None, label)]) for label in ("food", None))
    np.testing.assert_array_equal(told.probabilities, untold.probabilities)


def test_sixteen_examples_a_class_beat_prototypes_on_emotion(bundled: pretrained.Source) -> None:
    if not SHARED.is_dir():
        pytest.skip("the public data sets are not beside the repository")
    with gzip.open(SHARED / "emotion/train.jsonl.gz", "rt") as lines:
        train = [json.loads(line) for line in lines]
    with (SHARED / "emotion/test.jsonl").open() as lines:
        test = [json.loads(line) for line in lines][:250]
    names = sorted({row["label"] for row in train})
    examples = [Example(**row) for name in names for row in [row for row in train if row["label"] == name][:16]]
    labels = [Label(name=name) for name in names]
    truth = np.array([names.index(row["label"]) for row in test])
    rows = [Row(row["text"]) for row in test]

    def accuracy(options: EmbeddingTeacher) -> float:
        answer = TEACHERS["embedding"](options, labels, bundled).label(rows)
        return float((answer.probabilities.argmax(axis=1) == truth).mean())

    assert accuracy(EmbeddingTeacher(kind="embedding", examples=examples)) > 0.40


# --- the head -------------------------------------------------------------------------------------------------------


def blobs(count: int, classes: int = 3, noise: float = 0.8) -> tuple[View, np.ndarray, np.ndarray]:
    """`count` points of each class around unit vectors, the similarity to those, and the labels."""
    draw = np.random.default_rng(0)
    centres = np.eye(classes, 6)
    labels = np.repeat(np.arange(classes), count)
    points = centres[labels] + noise * draw.normal(size=(len(labels), 6))
    return View(points, centres), points @ centres.T, labels


def test_the_log_loss_by_hand() -> None:
    scores = np.array([[[0.0, np.log(3)]]])  # one score, one example, two labels: probabilities 1/4 and 3/4
    loss, gradient = linear_head._log_loss(np.array([1.0]), scores, np.array([[0.0, 1.0]]))
    assert loss == pytest.approx(-np.log(0.75))
    assert gradient == pytest.approx([(0.75 - 1) * np.log(3)])


def test_targets_are_softened_by_hand() -> None:
    np.testing.assert_allclose(linear_head._softened(np.array([0, 2]), 3), [[0.75, 0.125, 0.125], [0.125, 0.125, 0.75]])


def test_stacking_weights_are_those_a_slow_search_finds() -> None:
    view, similarity, labels = blobs(20)
    scores = np.stack([linear_head._out_of_fold(view, labels, 1.0), similarity])
    targets = linear_head._softened(labels, 3)
    found, _ = linear_head._log_loss(linear_head._stacking_weights(scores, labels), scores, targets)
    grid = [(first, second) for first in np.linspace(0, 4, 41) for second in np.linspace(0, 4, 41)]
    searched = min(linear_head._log_loss(np.array(pair), scores, targets)[0] for pair in grid)
    assert searched - 1e-2 < found <= searched + 1e-6


@pytest.mark.parametrize("classes", [2, 3])
def test_each_fold_is_predicted_by_a_regression_on_the_other_folds(classes: int) -> None:
    view, _, labels = blobs(7, classes)
    logits = linear_head._out_of_fold(view, labels, 1.0)
    folds = linear_head._folds(labels)
    for number in range(len(labels)):
        seen = folds != folds[number]
        model = LogisticRegression(C=1.0, max_iter=300)
        model.fit(np.vstack([view.examples[seen], view.prompts]), np.append(labels[seen], np.arange(classes)))
        expected = model.predict_proba(view.examples[[number]])[0]
        np.testing.assert_allclose(softmax(logits[number]), expected, atol=1e-6)


def test_every_fold_holds_its_share_of_every_label() -> None:
    folds = linear_head._folds(np.array([0] * 10 + [1] * 5))
    assert [(folds[:10] == fold).sum() for fold in range(5)] == [2] * 5
    assert sorted(folds[10:]) == [0, 1, 2, 3, 4]


def test_confidence_is_about_as_often_right_as_it_says() -> None:
    view, similarity, labels = blobs(300)
    train = np.arange(len(labels)) % 5 == 0
    head = linear_head.fit([View(view.examples[train], view.prompts)], similarity[train], labels[train])
    probabilities = head.probabilities([view.examples[~train]], similarity[~train])
    right = probabilities.argmax(axis=1) == labels[~train]
    assert probabilities.max(axis=1).mean() == pytest.approx(right.mean(), abs=0.05)
    assert head.out_of_fold_accuracy == pytest.approx(right.mean(), abs=0.08)


def test_a_view_of_noise_and_a_meaningless_similarity_get_little_weight() -> None:
    view, _, labels = blobs(40, noise=0.3)
    draw = np.random.default_rng(1)
    noise = View(draw.normal(size=view.examples.shape), draw.normal(size=view.prompts.shape))
    head = linear_head.fit([view, noise], draw.normal(size=(len(labels), 3)), labels)
    assert head.weights[0] > 0.5
    assert head.weights[1] < 0.1 * head.weights[0]
    assert head.similarity_weight < 0.5 * head.weights[0]


def test_two_separable_examples_a_label_do_not_promise_certainty() -> None:
    view, similarity, labels = blobs(2, noise=0.01)
    head = linear_head.fit([view], similarity, labels)
    assert 0.6 < head.probabilities([view.examples], similarity).max() < 0.99


def test_one_example_a_label_is_enough_for_a_head() -> None:
    view, similarity, labels = blobs(1, noise=0.1)
    head = linear_head.fit([view, view], similarity, labels)
    assert head.out_of_fold_accuracy is None
    assert head.weights == [1.0, 0.0]
    assert head.probabilities([view.examples] * 2, similarity).argmax(axis=1).tolist() == [0, 1, 2]
