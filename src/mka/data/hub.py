"""Is there a hub? Asked once, quickly, because the libraries retry for up to a minute before they give up."""

from collections.abc import Iterator
from contextlib import contextmanager

PROBE_SECONDS = 5
NOT_REACHED = "it is not on this machine, and the hub cannot be reached"


def hub_is_reachable() -> bool:
    """Whether the hub answers at all; False in offline mode (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the HTTP library differs between versions, and each has its own errors
        return False
    return True


@contextmanager
def datasets_without_hub() -> Iterator[None]:
    """Inside, `datasets` looks only at folders and at what it has downloaded before."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def first_line(error: Exception) -> str:
    """What an error of another library says, on one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
