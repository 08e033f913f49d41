"""The S3 client, with an end to its patience. Imported only where the storage is S3: the client is an extra."""

from __future__ import annotations

import asyncio
from typing import Any

import fsspec
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import ReadTimeoutError

from app.config import settings
from app.storage import PART_BYTES

TRIES = 2
"""Of a request; the second comes within a second, on another connection."""
CONNECTIONS = 100
"""At once, at most: waiting for a free one counts as waiting for the storage."""
PARTS_AT_ONCE = 2


class BoundedSession(AIOHTTPSession):
    """Gives a request `storage_timeout_seconds`, from its first byte to the beginning of its answer.

    The client by itself waits for ever on a server that has stopped reading, or that does not say "100 Continue".
    """

    async def send(self, request: Any) -> Any:
        """The answer. Raises ReadTimeoutError, upon which the client tries once more."""
        try:
            return await asyncio.wait_for(super().send(request), settings().storage_timeout_seconds)
        except TimeoutError:
            raise ReadTimeoutError(endpoint_url=request.url) from None


def connected(url: str) -> tuple[Any, str]:
    """The file system of an `s3://` URL, and the path in it. It asks nothing yet."""
    seconds = settings().storage_timeout_seconds
    filesystem, root = fsspec.core.url_to_fs(
        url,
        use_listings_cache=False,  # other processes write too: a listing that is kept would soon be wrong
        default_block_size=PART_BYTES,
        max_concurrency=PARTS_AT_ONCE,
        config_kwargs={
            "http_session_cls": BoundedSession,
            "connect_timeout": seconds,
            "read_timeout": seconds,
            "retries": {"mode": "standard", "total_max_attempts": TRIES},
            "max_pool_connections": CONNECTIONS,
        },
    )
    filesystem.retries = 1  # its own tries would multiply with those
    return filesystem, root
