"""Students: what is carried over is exact, what is new follows the seed, what is saved loads with the Auto classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
    pipeline,
)

from app import options
from app.pretrained import ModelUnresolvable, Source, resolve
from workers.training.data import tokenise
from workers.training.encoders import Student, build_student, save_student
from workers.training.evaluation import predict_probabilities

LABELS = ["negative", "neutral", "positive"]
TEXTS = ["a short text", "a much longer text, which makes the other rows of its batch be padded", "é 漢字 🙂"]
PAIRS = ["its second part", "x", "and a second part that is longer than the first"]
TINY = options.Student(model="scratch", vocab_size=300, hidden_size=16, num_layers=1, max_length=32)


def source(name: str, *roots: Path) -> Source:
    return resolve(name, purpose="student", roots=list(roots), allow_hub=False)


def scratch(seed: int = 0, wish: options.Student = TINY) -> Student:
    return build_student(wish, LABELS, TEXTS, PAIRS, source("scratch"), seed)


def bundled(seed: int = 0, **wishes: Any) -> Student:
    return build_student(options.Student(**wishes), LABELS, [], None, source("all-MiniLM-L6-v2"), seed)


def weights(student: Student) -> dict[str, torch.Tensor]:
    return student.model.state_dict()


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.fixture(scope="module")
def minilm() -> Student:
    return bundled()


def tiny_bert(folder: Path, pad_token_id: int = 0) -> BertModel:
    """A BERT in a directory, with MiniLM's tokenizer: random weights, so that nothing is equal by chance."""
    tokenizer = AutoTokenizer.from_pretrained(source("all-MiniLM-L6-v2").path, local_files_only=True)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, max_position_embeddings=40
    )
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_the_carried_over_minilm_computes_what_minilm_computes(minilm: Student, pairs: list[str] | None) -> None:
    original = BertModel.from_pretrained(source("all-MiniLM-L6-v2").path, local_files_only=True).eval()
    batch = tokenise(minilm.tokenizer, TEXTS, pairs).batch(np.arange(3))
    with torch.no_grad():
        ours = minilm.model.roberta(**batch, output_hidden_states=True).hidden_states
        theirs = original(**batch, output_hidden_states=True).hidden_states
    present = batch["attention_mask"].bool()
    assert not present.all(), "the rows must differ in length for padding to matter"
    assert len(ours) == 7
    assert max(float((a - b)[present].abs().max()) for a, b in zip(ours, theirs, strict=True)) == 0.0


def test_any_bert_in_a_directory_is_carried_over_and_cut_to_its_first_layers(tmp_path: Path) -> None:
    original = tiny_bert(tmp_path / "bert")
    wish = options.Student(model="bert", num_layers=2, max_length=128, pooling="first")
    student = build_student(wish, LABELS, [], None, source("bert", tmp_path), 0)
    assert student.tokenizer.model_max_length == 40
    batch = tokenise(student.tokenizer, TEXTS, PAIRS).batch(np.arange(3))
    with torch.no_grad():
        ours = student.model.roberta(**batch).last_hidden_state
        theirs = original(**batch, output_hidden_states=True).hidden_states[2]
    present = batch["attention_mask"].bool()
    assert ours[present].equal(theirs[present])


def test_the_start_token_of_an_inner_layer_takes_up_the_text_and_other_tokens_stay_as_they_were() -> None:
    """Of layers that are left out it says nothing; `mean` is a change of its last layer's queries alone."""

    def states(student: Student) -> torch.Tensor:
        batch = tokenise(student.tokenizer, [text + " and so on" for text in TEXTS], None).batch(np.arange(3))
        with torch.no_grad():
            return student.model.roberta(**batch).last_hidden_state[:, :5]

    first, mean = states(bundled(num_layers=3, pooling="first")), states(bundled(num_layers=3, pooling="mean"))
    spread = [found[:, 0].std(dim=0).norm() for found in (first, mean)]
    assert spread[1] > 10 * spread[0]
    assert (mean[:, 1:] - first[:, 1:]).norm() < 0.2 * first[:, 1:].norm()
    assert equal(weights(bundled(num_layers=3)), weights(bundled(num_layers=3, pooling="mean")))
    assert equal(weights(bundled()), weights(bundled(num_layers=6, pooling="first")))


def test_a_roberta_in_a_directory_keeps_its_encoder_and_gets_a_new_head(tmp_path: Path) -> None:
    first = scratch()
    save_student(first, tmp_path / "first")
    wish = options.Student(model="first", dropout=0.3)
    again = build_student(wish, ["yes", "no"], [], None, source("first", tmp_path), 1)
    assert equal(first.model.roberta.state_dict(), again.model.roberta.state_dict())
    assert again.model.config.id2label == {0: "yes", 1: "no"}
    assert again.model.classifier.out_proj.weight.shape == (2, 16)
    assert again.tokenizer.model_max_length == 32
    assert again.model.config.classifier_dropout == again.model.config.attention_probs_dropout_prob == 0.3


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    save_student(scratch(), tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelUnresolvable, match="lacks weights"):
        build_student(options.Student(model="short"), LABELS, [], None, source("short", tmp_path), 0)


def test_a_tokenizer_with_another_padding_id_is_refused(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "bert")
    encoder = RobertaModel(
        RobertaConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30522
        )
    )
    encoder.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelUnresolvable, match=r"padding is 0 in the tokenizer, 1 in config\.json"):
        build_student(options.Student(model="bert"), LABELS, [], None, source("bert", tmp_path), 0)


def test_the_seed_decides_new_weights_and_nothing_else_does() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = bundled(seed=1, num_layers=1), bundled(seed=1, num_layers=1), bundled(seed=2, num_layers=1)
    assert torch.get_rng_state().equal(before)
    assert equal(weights(first), weights(second))
    assert equal(first.model.roberta.state_dict(), other.model.roberta.state_dict())
    assert not first.model.classifier.dense.weight.equal(other.model.classifier.dense.weight)
    torch.manual_seed(6)
    assert equal(weights(scratch(seed=1)), weights(scratch(seed=1)))


def test_the_same_texts_give_the_same_vocabulary_though_many_pairs_are_equally_frequent() -> None:
    wish = TINY.model_copy(update={"vocab_size": 320})
    first, *others = [scratch(wish=wish).tokenizer.backend_tokenizer.to_str() for _ in range(4)]
    assert json.loads(first)["model"]["merges"]
    assert all(other == first for other in others)


def test_the_scratch_tokenizer_is_robertas() -> None:
    tokenizer = scratch().tokenizer
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, 4]
    pair = tokenizer("a", "b")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(pair) == ["<s>", "a", "</s>", "</s>", "b", "</s>"]
    for text in (*TEXTS, "\x01 never seen: Ω"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("hidden_size", [16, 100, 200, 384])
def test_a_scratch_student_of_any_width_reads_its_longest_text(hidden_size: int) -> None:
    student = scratch(wish=TINY.model_copy(update={"hidden_size": hidden_size}))
    tokens = tokenise(student.tokenizer, ["word " * 100])
    assert tokens.lengths.tolist() == [32]
    assert predict_probabilities(student.model, tokens).shape == (1, 3)


@pytest.mark.parametrize("build", [lambda: bundled(num_layers=1, max_length=16), scratch], ids=["bundled", "scratch"])
@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_a_saved_student_predicts_the_same_through_the_auto_classes(
    tmp_path: Path, build: Any, pairs: list[str] | None
) -> None:
    student: Student = build()
    tokens = tokenise(student.tokenizer, TEXTS, pairs)
    expected = predict_probabilities(student.model, tokens).numpy()
    save_student(student, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert model.config.model_type == "roberta"
    assert model.config.label2id == {"negative": 0, "neutral": 1, "positive": 2}
    assert tokenizer.model_max_length == student.tokenizer.model_max_length
    assert tokenizer.model_input_names == student.tokenizer.model_input_names
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    inputs = TEXTS if pairs is None else [{"text": a, "text_pair": b} for a, b in zip(TEXTS, pairs, strict=True)]
    for answer, probabilities in zip(classify(inputs, top_k=None, truncation=True), expected, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert [scores[label] for label in LABELS] == pytest.approx(probabilities, abs=1e-5)


def test_a_loaded_student_is_the_saved_one_and_saving_again_writes_the_same_bytes(tmp_path: Path) -> None:
    student = scratch()
    save_student(student, tmp_path / "first")
    model, tokenizer = (
        auto.from_pretrained(tmp_path / "first", local_files_only=True)
        for auto in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    loaded = Student(model, tokenizer, student.source)
    tokenise(loaded.tokenizer, TEXTS)
    save_student(loaded, tmp_path / "second")
    assert equal(weights(student), weights(loaded))
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
