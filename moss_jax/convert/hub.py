"""Resolves a checkpoint, a local folder or a Hugging Face repo id, to a folder with its files."""

import os
from pathlib import Path

# Top-level files only: some repositories keep optimizer states or other formats in subfolders.
_FILES = ["*.json", "*.safetensors"]
_EXAMPLE = "OpenMOSS-Team/moss-video-preview-realtime-sft"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message lists everything that is wrong with it."""


def resolve(checkpoint: str | os.PathLike, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint, downloading it from the Hugging Face Hub if it is not a local one.

    `huggingface_hub` does the download, so HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN apply.

    Args:
      checkpoint: a folder, or a repo id as `OWNER/NAME` or `OWNER/NAME@REVISION`. A folder of that
        name takes precedence.
      revision: branch, tag or commit of the repository; its default branch if None.

    Raises:
      CheckpointError: it is neither, a revision is given for a folder, or the download fails.
    """
    name = os.fspath(checkpoint)
    if revision is None and not os.path.exists(name):
        name, _, tail = name.partition("@")
        revision = tail or None
    if os.path.isdir(name):
        if revision is not None:
            raise CheckpointError(f"{name} is a local folder, which has no revision; leave out {revision!r}")
        return Path(name)
    if os.path.exists(name) or not _is_repo_id(name):
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint: there is no such folder, and it is not a Hugging Face repo "
            f"id such as {_EXAMPLE}"
        )
    return _download(name, revision)


def _is_repo_id(name: str) -> bool:
    # Imported lazily: importing it is slow, and in a notebook it prints a warning.
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    # The hub also has names without a namespace, but here those are more likely to be misspelt folders.
    return "/" in name


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    hub = constants.ENDPOINT
    name = f"{repo}@{revision}" if revision else repo
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=_FILES, ignore_patterns=["*/*"])
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: request access at {hub}/{repo}, then log in with `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo} has no revision {revision!r}; {hub}/{repo}/commits lists its commits"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {repo}, and {hub} has no such repository; check the name, or log in with "
            "`hf auth login` or set HF_TOKEN if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"there is no folder {repo}, and the cache in {constants.HF_HUB_CACHE} does not hold all of "
                f"{name}; unset HF_HUB_OFFLINE to download it"
            ) from error
        raise CheckpointError(
            f"there is no folder {repo}, and {name} cannot be downloaded from {hub}; check the network "
            f"connection and HF_ENDPOINT ({_one_line(error.__cause__ or error)})"
        ) from error
    # Its HTTP and transfer clients, which differ between versions, raise their own exception types.
    except Exception as error:
        raise CheckpointError(f"{name} cannot be downloaded from {hub}: {_one_line(error)}") from error
    return Path(folder)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
