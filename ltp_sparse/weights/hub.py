"""Whether the Hub can be reached. Without torch."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies

_PATIENCE = 3.0  # seconds for the Hub to answer


def hub_answers() -> bool:
    """Whether the Hub can be reached. Tried in a thread, since a name lookup has no time limit."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():  # a proxy may reach it
        return True
    where, answers = urlsplit(constants.ENDPOINT), []

    def connect() -> None:
        port = where.port or (80 if where.scheme == "http" else 443)
        with suppress(OSError), socket.create_connection((where.hostname, port), timeout=_PATIENCE):
            answers.append(True)

    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return bool(answers)
