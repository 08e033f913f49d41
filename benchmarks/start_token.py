"""How much the start token, which a student's head reads, says of a text: by the layers that are kept, and by `pooling`.

    python -m benchmarks.start_token [--data sst2-sentences] [--rows 128]

Prints, for the bundled encoder's first layers, the length of the start token's mean state over the texts, the length of its
standard deviation from text to text, and how the states of other tokens below the last layer resemble it (mean cosine).
"""

from __future__ import annotations

import argparse
from typing import Literal

import torch
from torch.nn.functional import cosine_similarity

from app import options, pretrained
from benchmarks.data import read_split
from benchmarks.record import table
from workers.training.encoders import build_student

POOLINGS: tuple[Literal["first", "mean"], ...] = ("first", "mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sst2-sentences")
    parser.add_argument("--rows", type=int, default=128)
    arguments = parser.parse_args()
    texts = [row["text"] for row in read_split(arguments.data, "train", arguments.rows)]
    source = pretrained.resolve(options.DEFAULT_STUDENT, purpose="student", roots=[], allow_hub=False)
    rows = []
    for layers in (1, 3, 6):
        for pooling in POOLINGS:
            wish = options.Student(num_layers=layers, pooling=pooling)
            student = build_student(wish, ["a", "b"], [], None, source, seed=0)
            tokens = student.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            tokens.pop("token_type_ids", None)
            with torch.no_grad():
                *_, below, last = student.model.roberta(**tokens, output_hidden_states=True).hidden_states
            others = tokens["attention_mask"].bool()
            others[:, 0] = False
            alike = cosine_similarity(below[others], below[0, 0].expand(int(others.sum()), -1)).mean()
            first = last[:, 0]
            rows.append(
                [str(layers), pooling, f"{first.mean(0).norm():.2f}", f"{first.std(0).norm():.3f}", f"{alike:.2f}"]
            )
    print("\n".join(table(["layers", "pooling", "length of the mean", "of the deviation", "cosine of others"], rows)))


if __name__ == "__main__":
    main()
