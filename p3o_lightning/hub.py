"""Sending an exported folder to the Hugging Face hub.

The token comes from the environment (HF_TOKEN, or what `hf auth login` left), never from an argument: so it is in no config, no
checkpoint and no card. A repository is private unless asked otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from p3o_lightning.errors import InputError
from p3o_lightning.text import visible

FIELD = "export.push_to_hub"


def prepare_repository(name: str, private: bool = True) -> str:
    """Make the repository, or find it, which proves before any training that it can be written; its address.

    `private` counts for a new one; one that is there stays as it is.
    """
    _check(name)
    try:
        return str(HfApi().create_repo(name, repo_type="model", private=private, exist_ok=True))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(
            f"{FIELD} is {name!r}, which cannot be written to ({_reason(error)}): name a repository of yours, and a token that may write."
        ) from error


def push_folder(folder: Path, name: str, message: str) -> str:
    """Upload the folder as one commit; its address. The folder stays."""
    _check(name)
    try:
        return str(HfApi().upload_folder(repo_id=name, folder_path=folder, repo_type="model", commit_message=message))
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise InputError(
            f"{FIELD} is {name!r}, where the export could not be sent ({_reason(error)}). It is whole in {str(folder)!r}: "
            f"hf upload {name} {folder}"
        ) from error


def _check(name: str) -> None:
    try:
        validate_repo_id(name)
        valid = "/" in name
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"{FIELD} is {name!r}, which is no name of a repository: give user/model.")
    if get_token() is None:
        raise InputError(f"{FIELD} is {name!r}, but there is no token: set HF_TOKEN in the environment, or run hf auth login.")


def _reason(error: BaseException) -> str:
    """One line without what an answer may repeat of the token."""
    line = visible(" ".join(str(error).split()))
    return re.sub(r"hf_\w+", "hf_...", line if len(line) <= 200 else f"{line[:200]}...")
