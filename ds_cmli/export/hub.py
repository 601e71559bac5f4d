"""An exported folder on the Hugging Face Hub, or on another server that HF_ENDPOINT names."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ds_cmli.common.errors import UserError, one_line
from ds_cmli.export import encoders

# Folders that an earlier export may have and this one not: their files are of other weights.
FOLDERS = (encoders.IMAGE, encoders.TEXT)


def check(name: str) -> None:
    """Raise `UserError` for a push that would fail only after the export."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push is {name!r}: {error}") from None
    if get_token() is None:
        raise UserError(f"--push is {name!r}: no token, run `hf auth login` or set HF_TOKEN")
    try:
        HfApi().whoami()
    except Exception as error:  # the errors of the HTTP client, which versions choose differently
        raise UserError(f"--push is {name!r}: {one_line(error)}") from None


def push(folder: Path, name: str) -> str:
    """Upload a folder as the model `name`, made if it does not exist, and return its address.

    Raises:
        UserError: the server refuses it, or does not answer.
    """
    api = HfApi()
    try:
        made = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="Export of ds-cmli",
            delete_patterns=[f"{part}/*" for part in FOLDERS],
        )
    except Exception as error:  # as above
        raise UserError(
            f"--push is {name!r}: {one_line(error)}; {str(folder)!r} is whole: "
            f"`hf upload {name} {folder}` pushes it"
        ) from None
    return str(made)
