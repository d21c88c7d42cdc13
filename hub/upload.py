"""The way to the Hub: one commit that holds everything, or none."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hub.repository import CONFIG, FILES
from timm_decor.training.errors import UserError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """Where to.

    Attributes:
        repo_id: owner/name.
        private: make a new repository private.
        revision: branch; None for main.
        create_pr: as a pull request.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False


def upload(folder: Path, target: Target, api: HfApi | None = None) -> str:
    """Bring a folder's files to the Hub in one commit.

    Files of an earlier publication that the folder lacks are removed in the same commit; other files stay. Where
    nothing differs nothing is done.

    Args:
        folder: what `repository.write` wrote, and the card.
        target: where to.
        api: the Hub's client.

    Returns:
        A sentence on what was done, with the address.

    Raises:
        UserError: no token, no right to write, a repository of another model, or a failure of the Hub or the network,
            after which the repository is what it was.
    """
    api = api or HfApi()

    def tried(call: Callable[[], T], what: str) -> T:
        try:
            return call()
        except Exception as error:  # the client's errors have changed their bases with its HTTP library
            raise _explained(error, target, what) from error

    tried(lambda: api.whoami(), "ask who you are")
    exists = tried(lambda: _exists(api, target.repo_id), "look at the repository")
    if not exists:
        if target.create_pr:
            raise UserError(f"{target.repo_id} does not exist, so there is nothing to open a pull request on")
        tried(lambda: api.create_repo(target.repo_id, private=target.private, exist_ok=True), "create the repository")
    remote = tried(lambda: _files(api, target), "list the repository") if exists else {}
    if exists:
        tried(lambda: _refuse_other(api, target, folder, remote), "read its config.json")
    local = {file.name: file for file in sorted(folder.iterdir())}
    changed = [name for name, file in local.items() if not _same(file, remote.get(name))]
    stale = [name for name in FILES if name in remote and name not in local]
    address = f"{api.endpoint}/{target.repo_id}"
    if not changed and not stale:
        return f"{address} holds exactly this already: nothing was done"
    if target.revision and not target.create_pr:
        tried(lambda: api.create_branch(target.repo_id, branch=str(target.revision), exist_ok=True), "make the branch")
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(name, str(local[name])) for name in changed),
        *(CommitOperationDelete(name) for name in stale),
    ]
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    done = tried(
        lambda: api.create_commit(
            target.repo_id,
            operations,
            commit_message=f"Publish {config['architecture']}.{config['pretrained_cfg']['tag']}",
            revision=target.revision,
            create_pr=target.create_pr,
        ),
        "upload",
    )
    return f"published {', '.join(changed)}: {done.pr_url or address}"


def _exists(api: HfApi, repo_id: str) -> bool:
    try:
        api.model_info(repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return False
    return True


def _files(api: HfApi, target: Target) -> dict[str, RepoFile]:
    """The repository's files by name; a branch that is not there yet will begin as main is."""
    for revision in (target.revision, None) if target.revision else (None,):
        with suppress(RevisionNotFoundError):
            tree = api.list_repo_tree(target.repo_id, revision=revision)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return {}


def _refuse_other(api: HfApi, target: Target, folder: Path, remote: dict[str, RepoFile]) -> None:
    if CONFIG not in remote:
        others = [name for name in remote if name.endswith((".safetensors", ".bin", ".pth"))]
        if others:
            raise UserError(f"{target.repo_id} holds {others[0]} without a config.json: publish to another repository")
        return
    revision = target.revision
    with tempfile.TemporaryDirectory() as place:
        try:
            file = api.hf_hub_download(target.repo_id, CONFIG, revision=revision, local_dir=place, force_download=True)
        except (RevisionNotFoundError, EntryNotFoundError):
            file = api.hf_hub_download(target.repo_id, CONFIG, local_dir=place, force_download=True)
        theirs = json.loads(Path(file).read_text(encoding="utf-8"))
    mine = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if theirs.get("architecture") != mine["architecture"]:
        raise UserError(
            f"{target.repo_id} holds a {theirs.get('architecture', 'model of no known architecture')}, "
            f"not a {mine['architecture']}: publish to another repository"
        )


def _same(file: Path, remote: RepoFile | None) -> bool:
    if remote is None:
        return False
    data = file.read_bytes()
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == hashlib.sha256(data).hexdigest())
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those below it: the client wraps what goes wrong in an upload."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explained(error: Exception, target: Target, what: str) -> UserError:
    """What went wrong in one line, and what would work."""
    if isinstance(error, UserError):
        return error
    repo = target.repo_id
    response: Any = next(
        (found for cause in _causes(error) if (found := getattr(cause, "response", None)) is not None), None
    )
    status = getattr(response, "status_code", None)
    if isinstance(error, HFValidationError):
        return UserError(f"--repo-id {repo}: {first_line(error)}")
    if isinstance(error, LocalTokenNotFoundError) or (status is None and "token" in str(error).lower()):
        return UserError("no token of the Hub: run `hf auth login`, or set HF_TOKEN to one with write access")
    again = "the repository is what it was; the same command tries again"
    if status == 401:
        return UserError(
            f"the Hub does not accept the token ({repo}): run `hf auth login`, or set HF_TOKEN to a valid one"
        )
    if status == 403:
        return UserError(f"the token may not write to {repo}: take one with write access there, or --create-pr")
    if status == 404:
        return UserError(f"the Hub does not know {repo}, or the token may not see it; could not {what}")
    if status in (409, 412):
        return UserError(
            f"{repo} was changed by somebody else meanwhile: nothing was published; look, and publish again"
        )
    if status == 429:
        wait = response.headers.get("Retry-After")
        return UserError(f"too many requests for the Hub: try again{f' in {wait} s' if wait else ' later'}; {again}")
    if status is not None:
        return UserError(f"the Hub answered {status} to the attempt to {what} ({repo}): {again}")
    return UserError(f"could not {what} ({repo}): {type(error).__name__}: {first_line(error)}; {again}")
