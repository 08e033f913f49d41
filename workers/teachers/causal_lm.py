"""The teacher that is a decoder-only language model: LLaMA, Gemma, Qwen, Mistral and their kin, run here.

It does not generate. Each label gets the mean log-probability of its tokens as the continuation of the prompt, and the
softmax over the labels is the row's distribution. The prompt before the row is read once (prefix_attention.py), then
one forward pass reads a batch of rows together with the tree of their labels (algorithms/label_tree.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import structlog
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from app import options as spec
from app.lifecycle import WorkFailed
from app.options import Label
from app.pretrained import Source
from workers.algorithms import label_tree
from workers.algorithms.label_tree import LabelTree
from workers.teachers import prefix_attention
from workers.teachers.few_shot import Prompts
from workers.teachers.prefix_attention import Branches, CannotShare, SharedPrefix, read_prefix, sharing
from workers.teachers.prompt_tokens import PROBES, PromptTokens, TextAndPair
from workers.teachers.prompts import Prompt
from workers.teachers.teacher import AskedToStop, Labeled, Row, never

log = structlog.get_logger()

# What a batch may hold, by device: a CPU is fastest while its caches hold the states, a GPU wants to be full.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32_768}
LOGITS_PER_BATCH = {"cpu": 2**25, "cuda": 2**30}
CONTENT_FREE: tuple[str, ...] = ("N/A", "[MASK]", "")
"""Texts that say nothing, as in Zhao et al. 2021 (arXiv:2102.09690)."""
TOLERANCE = {torch.float32: 1e-3}
"""How far one label's log-probability may be from the model's ordinary forward pass before that is used instead."""
HALF_TOLERANCE = 0.5
QUANTISED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "int4": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
}


class CausalLMTeacher:
    """Scores the label set behind each row; no row is refused but by numbers that are not finite."""

    cacheable = True

    def __init__(self, options: spec.CausalLMTeacher, labels: list[Label], source: Source | None) -> None:
        """Load the model and read the prompt. Raises WorkFailed: prompt_too_long, labels_read_alike, quantisation_unavailable."""
        if source is None:
            raise ValueError("a causal_lm teacher needs a model")
        self.should_stop: Callable[[], bool] = never
        self._options = options
        self._classes = len(labels)
        self.model, self.tokenizer = load(source, options.precision)
        self.confidence_method = "label_likelihood"
        if options.prior_correction:
            self.confidence_method = "label_likelihood_prior_corrected"
        self._few_shot = Prompts(options, labels)
        self._prompts = [_PromptReader(self.model, self._tokens_of(prompt)) for prompt in self._few_shot.prompts]
        self._tokens_per_batch = TOKENS_PER_BATCH[self.model.device.type]
        self._priors: dict[tuple[int, bool], np.ndarray] = {}
        self._cut = 0

    def label(self, rows: list[Row]) -> Labeled:
        """Probabilities (N, C) for N rows; equal rows are read once. Asked to stop, it leaves the batches not begun."""
        texts = list(dict.fromkeys((row.text, row.text_pair) for row in rows))
        probabilities, tokens = self._probabilities(texts, self._few_shot.assign(texts))
        place = {text: number for number, text in enumerate(texts)}
        order = [place[row.text, row.text_pair] for row in rows]
        probabilities, tokens = probabilities[order], tokens[order]
        unusable = ~np.isfinite(probabilities).all(axis=1)
        probabilities[unusable] = np.nan
        reason = "the model's numbers are not finite; choose precision bf16 or fp32"
        errors = {int(row): reason for row in np.flatnonzero(unusable & (tokens > 0))}
        unasked = frozenset(np.flatnonzero(tokens == 0).tolist())
        return Labeled(probabilities, tokens, errors, unasked=unasked, ended=AskedToStop() if unasked else None)

    def report(self) -> dict[str, Any]:
        reader = self._prompts[0]
        return {
            "mode": "few_shot" if self._options.examples else "zero_shot",
            "examples": len(self._few_shot.prompts[0].examples),
            "prompts": len(self._prompts),
            "chat_template": reader.tokens.is_chat,
            "precision": str(self.model.dtype).removeprefix("torch."),
            "prompt_tokens": len(reader.tokens.prefix),
            "prompt_read_once": reader.shared is not None,
            "label_tokens_read_per_row": len(reader.tree.tokens),
            "texts_cut": self._cut,
            "prior_corrected": self._options.prior_correction,
            **_peak_memory(self.model.device),
        }

    def _tokens_of(self, prompt: Prompt) -> PromptTokens:
        return PromptTokens(
            self.tokenizer,
            prompt,
            chat=self._options.chat == "auto",
            max_length=self._options.max_length,
            context=getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
        )

    def _probabilities(self, texts: Sequence[TextAndPair], prompts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(N, C) float32 and the tokens read, (N,) int32, of texts under the prompts of these numbers; see _scores."""
        scores = np.zeros((len(texts), self._classes), np.float32)
        tokens = np.zeros(len(texts), np.int32)
        for number, reader in enumerate(self._prompts):
            mine = [position for position, prompt in enumerate(prompts) if prompt == number]
            if not mine:
                continue
            scores[mine], tokens[mine] = self._scores(reader, [texts[position] for position in mine])
            if self._options.prior_correction:
                for position in mine:
                    scores[position] -= np.log(self._prior(number, texts[position][1] is not None))
        shifted = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
        return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32), tokens

    def _prior(self, prompt: int, pair: bool) -> np.ndarray:
        """(C,) what the model answers to texts that say nothing: contextual calibration, Zhao et al. 2021."""
        if (prompt, pair) not in self._priors:
            empty: list[TextAndPair] = [(text, text if pair else None) for text in CONTENT_FREE]
            scores, read = self._scores(self._prompts[prompt], empty)
            if not read.all():
                raise AskedToStop
            shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
            self._priors[prompt, pair] = (shifted / shifted.sum(axis=1, keepdims=True)).mean(axis=0)
        return self._priors[prompt, pair]

    def _scores(self, reader: _PromptReader, texts: Sequence[TextAndPair]) -> tuple[np.ndarray, np.ndarray]:
        """Mean log-probabilities (N, C) float32 and tokens read (N,) int32; NaN and 0 for texts left because it was to stop."""
        encoded = reader.tokens.encode(texts)
        self._cut += encoded.cut
        rows, nodes = encoded.rows, len(reader.tree.tokens)
        scores = torch.full((len(texts), self._classes), torch.nan)
        read = np.zeros(len(texts), np.int32)
        if reader.shared is None:
            for number, (shared, own) in enumerate(rows):
                if self.should_stop():
                    break
                ids = [*reader.tokens.prefix[:shared], *own]
                scores[number] = plain_scores(self.model, [ids], reader.labels)[0]
                read[number] = len(ids) * self._classes + sum(map(len, reader.labels))
            return scores.numpy(), read
        order = sorted(range(len(rows)), key=lambda row: (rows[row][0], len(rows[row][1])))
        waiting = list(self._batches(order, rows, nodes))[::-1]
        while waiting and not self.should_stop():
            batch = waiting.pop()
            try:
                with sharing(self.model):
                    scores[batch] = reader.scores([rows[row] for row in batch]).cpu()
                read[batch] = [len(rows[row][1]) + nodes for row in batch]
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if len(batch) == 1 or not _out_of_memory(error):
                    raise
                self._tokens_per_batch = max(1, self._tokens_per_batch // 2)
                log.warning("out_of_memory", rows=len(batch), tokens_per_batch=self._tokens_per_batch)
                waiting += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
            else:
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return scores.numpy(), read

    def _batches(self, order: Sequence[int], rows: Sequence[tuple[int, list[int]]], nodes: int) -> Iterator[list[int]]:
        """Rows of one shared length, near in length, as many as the budget of tokens and logits holds."""
        logits = LOGITS_PER_BATCH[self.model.device.type] // (
            (1 + nodes) * self.model.config.get_text_config().vocab_size
        )
        batch: list[int] = []
        for row in order:
            shared, own = rows[row]
            most = min(logits, self._tokens_per_batch // (len(own) + nodes))
            if batch and (len(batch) >= most or rows[batch[0]][0] != shared):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


class _PromptReader:
    """One prompt as this model has read it, and the labels behind it."""

    def __init__(self, model: PreTrainedModel, tokens: PromptTokens) -> None:
        self.model, self.tokens = model, tokens
        self.labels = label_tree.closed(tokens.answers, tokens.end)
        self.tree = label_tree.build(self.labels).to(model.device)
        self.shared: SharedPrefix | None = None
        self.shared = self._read()

    @torch.inference_mode()
    def scores(self, rows: Sequence[tuple[int, list[int]]]) -> Tensor:
        """(B, C) mean log-probabilities; rows as shared length, the same for all, and own tokens."""
        assert self.shared is not None
        tokens, branches, logits_at = lay_out(rows, self.tree, self.shared)
        return label_tree.mean_log_probabilities(
            prefix_attention.forward(self.model, tokens, branches, logits_at), self.tree
        )

    @torch.inference_mode()
    def _read(self) -> SharedPrefix | None:
        """The prefix in memory; None where this model cannot share it: then every label is read behind the whole prompt."""
        shared, own = self.tokens.encode([PROBES[0]]).rows[0]
        longest = max(range(len(self.labels)), key=lambda number: len(self.labels[number]))
        expected = plain_scores(self.model, [[*self.tokens.prefix[:shared], *own]], [self.labels[longest]])[0, 0]
        try:
            self.shared = read_prefix(self.model, self.tokens.prefix)
            with sharing(self.model):
                found = self.scores([(shared, own)])[0, longest].cpu()
        except (CannotShare, TypeError, ValueError, AttributeError) as error:
            reason = str(error)
        else:
            if abs(found - expected) < TOLERANCE.get(self.model.dtype, HALF_TOLERANCE):
                return self.shared
            reason = f"log-probability {found:.4f} instead of {expected:.4f}"
        log.warning("prompt_not_shared", model=type(self.model).__name__, reason=reason)
        return None


def load(source: Source, precision: str) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer, on the GPU if there is one. Raises WorkFailed: quantisation_unavailable."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(source.path or source.name),
        "revision": source.revision if source.kind == "hub" else None,
        "local_files_only": source.kind != "hub",
        "trust_remote_code": False,
    }
    how: dict[str, Any] = {"dtype": _dtype(precision, device)}
    if precision in QUANTISED:
        if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
            raise WorkFailed(
                "quantisation_unavailable",
                f"precision {precision!r} needs a GPU and the package bitsandbytes on every worker that labels; "
                "choose auto, fp32, bf16 or fp16.",
            )
        how |= {"quantization_config": BitsAndBytesConfig(**QUANTISED[precision]), "device_map": {"": 0}}
    model = AutoModelForCausalLM.from_pretrained(**where, use_safetensors=True, **how).eval()
    return model if precision in QUANTISED else model.to(device), AutoTokenizer.from_pretrained(**where)


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "fp32" or (precision == "auto" and device.type == "cpu"):
        return torch.float32
    if precision == "fp16" or (precision == "auto" and not torch.cuda.is_bf16_supported()):
        return torch.float16
    return torch.bfloat16


def lay_out(
    rows: Sequence[tuple[int, list[int]]], tree: LabelTree, shared: SharedPrefix
) -> tuple[Tensor, Branches, Tensor]:
    """Rows that share the same prefix, each with the tree behind it: tokens (B, S), what they see, where logits are due.

    Rows end at the same column, so that the last token of each prompt stands there, and the tree after it.
    """
    device = tree.tokens.device
    width, nodes = max(len(own) for _, own in rows), len(tree.tokens)
    tokens = torch.zeros(len(rows), width + nodes, dtype=torch.long)
    for number, (_, own) in enumerate(rows):
        tokens[number, width - len(own) : width] = torch.tensor(own)
    tokens = tokens.to(device)
    tokens[:, width:] = tree.tokens
    lengths = torch.tensor([len(own) for _, own in rows], device=device)
    column = torch.arange(width, device=device)
    is_text = column >= width - lengths[:, None]  # (B, width)
    prefix = shared.first(rows[0][0])
    positions = torch.cat(
        [
            prefix.length + (column - width + lengths[:, None]).clamp_min(0),
            prefix.length + lengths[:, None] + tree.depths,
        ],
        dim=1,
    )
    sees = torch.zeros(len(rows), width + nodes, width + nodes, dtype=torch.bool, device=device)
    sees[:, :width, :width] = (column[:, None] >= column) & is_text[:, None, :]
    sees[:, width:, :width] = is_text[:, None, :]
    sees[:, width:, width:] = tree.sees
    sees |= torch.eye(width + nodes, dtype=torch.bool, device=device)  # padding sees itself, or it would divide by zero
    logits_at = torch.arange(width - 1, width + nodes, device=device)
    return tokens, Branches(prefix, positions, sees), logits_at


@torch.inference_mode()
def plain_scores(model: PreTrainedModel, prompts: Sequence[list[int]], labels: Sequence[list[int]]) -> Tensor:
    """(N, C) mean log-probabilities by one ordinary forward pass for each prompt and label: slow, and right for any model."""
    scores = torch.empty(len(prompts), len(labels))
    for row, prompt in enumerate(prompts):
        for number, label in enumerate(labels):
            ids = torch.tensor([[*prompt, *label]], device=model.device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
            chosen = logits.float().log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None])
            scores[row, number] = chosen.mean()
    return scores


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _peak_memory(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    return {"peak_gpu_bytes": torch.cuda.max_memory_allocated(device)}
