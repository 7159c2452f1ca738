"""Uploading a folder to the Hugging Face hub."""

from pathlib import Path

from rome_pl.errors import RomeError, first_line

__all__ = ["HubError", "fault_of", "push"]


class HubError(RomeError):
    """A folder that could not be uploaded to the hub."""


def fault_of(repository: str) -> str | None:
    """Why a text cannot be the name of a repository. ``None``: it can."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_url(repository, "README.md")  # builds its address, without network
    except HFValidationError as error:
        return first_line(error)
    return None


def push(folder: Path, repository: str) -> str:
    """Upload a folder's files to a repository of the hub. A new repository is private.

    Args:
        folder: The folder, which is not changed.
        repository: ``NAME`` or ``ORGANISATION/NAME``.

    Returns:
        The address of the upload.

    Raises:
        HubError: If there is no token, the hub cannot be reached, or it refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    # Without a network the client raises an error of its HTTP library, whose name changes with releases.
    failures: tuple[type[Exception], ...] = (ValueError, *HfHubHTTPError.__bases__)
    kept = f"The export stays in {folder}; to try again: hf upload {repository} {folder}"
    if get_token() is None:
        raise HubError(f"push_to_hub: no token of the Hugging Face hub: hf auth login, or set HF_TOKEN. {kept}")
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Edits exported by rome_pl", repo_type="model"
        )
    except failures as error:
        raise HubError(f"push_to_hub: {repository}: {first_line(error)}. {kept}") from error
    return str(address)
