"""Whether the hub can be reached: asked once and quickly, because the libraries retry
for up to a minute before they give up."""

from collections.abc import Iterator
from contextlib import contextmanager

PROBE_SECONDS = 5
"""How long to wait for the hub's answer."""
NOT_REACHED = "it is not on this machine, and the hub cannot be reached"


def hub_is_reachable() -> bool:
    """Whether the hub answers at all; False in offline mode (HF_HUB_OFFLINE)."""
    # Imported here, because most runs never ask.
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    # The HTTP library differs between versions, and each has its own errors.
    except Exception:
        return False
    return True


@contextmanager
def datasets_without_hub() -> Iterator[None]:
    """Inside, the package datasets uses only folders and what it has downloaded
    before."""
    # The package reads HF_HUB_OFFLINE on import: setting the variable now would be too
    # late.
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def first_line(error: Exception) -> str:
    """The first line of another library's error message, or the error's class if it has
    none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
