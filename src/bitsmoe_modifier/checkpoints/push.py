"""A checkpoint to the hub: asked for before the work, uploaded after it."""

from pathlib import Path

from ..errors import BitsMoEError


def check_login(repo: str) -> None:
    """Refuse a repository that nobody is logged in for, before hours of work.

    Raises:
        BitsMoEError: with the remedy.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        HfApi().whoami()
    except HFValidationError as error:
        raise BitsMoEError(f"--push-to-hub {repo}: {error}; write NAME or OWNER/NAME") from None
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise BitsMoEError(f"--push-to-hub {repo}: {_first_line(error)}; log in by `hf auth login`") from None


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a checkpoint's folder, model card included.

    Args:
        folder: of the checkpoint, which stays where it is.
        repo: NAME or OWNER/NAME; made where it does not exist.
        private: whether only its owner sees it, if it is made now.

    Returns:
        The address of the commit.

    Raises:
        BitsMoEError: when the hub refuses it: the checkpoint is on disk, and the message says how to try again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=made.repo_id, commit_message="Upload by bitsmoe"))
    except (HfHubHTTPError, OSError) as error:
        raise BitsMoEError(
            f"{folder} is written, but {repo} could not be uploaded ({_first_line(error)}); try again by "
            f"`hf upload {repo} {folder}`"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
