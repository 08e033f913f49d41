"""The teachers by the kind that a job spec names."""

from workers.teachers.causal_lm import CausalLMTeacher
from workers.teachers.dataset import DatasetTeacher
from workers.teachers.embedding import EmbeddingTeacher
from workers.teachers.endpoint import EndpointTeacher
from workers.teachers.lbl2vec import Lbl2VecTeacher
from workers.teachers.teacher import Labeled, Row, Teacher

TEACHERS: dict[str, type[Teacher]] = {
    "causal_lm": CausalLMTeacher,
    "dataset": DatasetTeacher,
    "embedding": EmbeddingTeacher,
    "endpoint": EndpointTeacher,
    "lbl2vec": Lbl2VecTeacher,
}

__all__ = ["TEACHERS", "Labeled", "Row", "Teacher"]
