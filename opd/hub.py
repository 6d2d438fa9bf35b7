"""What the Hugging Face hub says of a name. Imports nothing heavy."""

from __future__ import annotations

from functools import cache

SECONDS = 5.0  # for an answer


@cache
def refused(name: str) -> str:
    """Why the hub has no model of this name for us, asked once and without retries; empty: it has, or its cache here.

    A model's id is owner/name; a few old ones, such as gpt2, have no owner, and a mistyped folder looks like them.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=SECONDS)
    except Exception as e:  # no such model, no such name, no network: it cannot be loaded in any case
        return str(e).strip().partition("\n")[0] or type(e).__name__
    return ""
