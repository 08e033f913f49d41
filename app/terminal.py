"""Text of others on a terminal: it draws itself there and steers nothing."""

from __future__ import annotations

import re

from rich import markup

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Signs that move the cursor, change colours or titles, or turn the writing round; not tabs and line ends."""


def escape(text: str) -> str:
    """The text for rich's `print` and tables: its brackets are no markup, and what would steer the terminal is a �."""
    return markup.escape(STEERING.sub("�", text))
