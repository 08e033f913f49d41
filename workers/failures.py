"""What to tell the owner of a job about an exception that ended its work."""

from __future__ import annotations

import errno

from pydantic import ValidationError

from app.errors import FULL, Problem
from app.lifecycle import WorkFailed

NO_ROOM = FULL | {errno.EIO, errno.EROFS}
OUT_OF_MEMORY = ("can't allocate memory", "std::bad_alloc", "Cannot allocate memory", "could not create a primitive")
"""How torch, and what lies below it, says that the CPU's memory is full: in a RuntimeError."""


def failure_of(error: Exception, otherwise: str) -> WorkFailed:
    """The error as a code and a sentence: of what an owner or operator can mend, else `otherwise` with the error itself."""
    if isinstance(error, WorkFailed):
        return error
    if isinstance(error, ValidationError):  # the spec was in order when the job was posted
        return WorkFailed(
            "worker_outdated",
            f"This worker does not understand the job ({error.errors()[0]['msg']}): it is of another version than the server. "
            "Retry the job once all workers are up to date.",
        )
    if isinstance(error, Problem):  # a model that this worker lacks, a storage that is away
        return WorkFailed(error.code, error.detail)
    if _is_memory(error):
        return WorkFailed(
            "out_of_memory",
            "The worker ran out of memory; use a smaller training.batch_size or student.max_length, or a smaller student.",
        )
    if getattr(error, "errno", None) in NO_ROOM or type(error).__name__ == "SafetensorError":
        return WorkFailed(
            "no_room", f"The worker could not write its files ({error}). Retry the job once there is room; it goes on from its last saved state."
        )  # fmt: skip
    return WorkFailed(otherwise, f"{type(error).__name__}: {error}")


def _is_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in OUT_OF_MEMORY)
