"""What the mail server of a development system has taken: a folder with a Maildir, `messages`."""

from __future__ import annotations

from collections.abc import Sequence
from email import message_from_binary_file, policy
from email.message import EmailMessage
from pathlib import Path

MESSAGES_MAX = 500


def messages(folder: Path) -> Sequence[EmailMessage]:
    """What arrived in the folder of a mail server, the oldest first; the last MESSAGES_MAX."""
    files = [file for part in ("new", "cur") for file in (folder / "messages" / part).glob("*")]
    found = []
    for file in sorted(files, key=lambda it: it.stat().st_mtime_ns)[-MESSAGES_MAX:]:
        with file.open("rb") as content:
            found.append(message_from_binary_file(content, policy=policy.default))
    return found
