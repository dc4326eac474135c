"""Whether code that comes with a model's tokenizer may run: in this process, and in those that it starts."""

import os

_NAME = "BITSMOE_TRUST_REMOTE_CODE"


def trust_remote_code(wanted: bool) -> None:
    """Allow it, or take it back."""
    if wanted:
        os.environ[_NAME] = "1"
    else:
        os.environ.pop(_NAME, None)


def trusts_remote_code() -> bool:
    """Whether it was allowed."""
    return os.environ.get(_NAME) == "1"
