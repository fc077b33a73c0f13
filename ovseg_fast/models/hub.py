"""The Hugging Face hub, asked once before a download: its own client repeats a request that fails for half a minute."""

from __future__ import annotations

from pathlib import Path

SECONDS = 5.0  # until the hub has to answer


def cached(repository: str, file: str, kind: str = "model") -> Path | None:
    """The file in the hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, repo_type=kind)
    return Path(found) if isinstance(found, str) else None


def find(repository: str, file: str, kind: str = "model") -> Path | None:
    """The file in the hub's cache, or None once the hub has answered, so that a download can begin.

    The hub's own settings hold, such as `HF_HOME` for the cache and `HF_HUB_OFFLINE=1` for using only that.

    Raises:
        ConnectionError: neither; the message is the reason, without a full stop.
    """
    import huggingface_hub as hub

    if found := cached(repository, file, kind):
        return found
    if hub.constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set and the hub's cache does not hold it")
    own = hub.constants.HF_HUB_ETAG_TIMEOUT
    seconds = SECONDS if own == hub.constants.DEFAULT_ETAG_TIMEOUT else own
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file, repo_type=kind), timeout=seconds)
    except Exception as error:  # requests', httpx' or the hub's own, depending on its version
        if getattr(getattr(error, "response", None), "status_code", None) != 404:  # an answer: the download will say it
            raise ConnectionError(reason(error)) from error
    return None


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
