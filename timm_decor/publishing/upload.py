"""The way to the Hub: one commit that holds everything, or none."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import ModelInfo, RepoFile, SpaceInfo
from huggingface_hub.utils import (
    GatedRepoError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_decor.errors import UserError, first_line

# From the names of a repository's files, and what reads one, to what it holds that is not ours; "" for nothing.
Other = Callable[[Collection[str], Callable[[str], str]], str]


@dataclass(frozen=True)
class Contents:
    """What is published.

    Attributes:
        folder: its files.
        files: the names that files of a publication may have.
        title: of the commit.
        other: refuses to publish over something else.
        repo_type: model or space.
    """

    folder: Path
    files: Sequence[str]
    title: str
    other: Other
    repo_type: str = "model"


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


def log_in(repo_id: str, api: HfApi | None = None) -> None:
    """See that the Hub knows who is calling.

    Raises:
        UserError: no token, one that the Hub does not accept, or no Hub.
    """
    with _explained(repo_id, "ask who you are"):
        (api or HfApi()).whoami()


def upload(contents: Contents, target: Target, api: HfApi | None = None) -> str:
    """Bring a folder's files to the Hub in one commit.

    Files of an earlier publication that the folder lacks are removed in the same commit; other files stay. Where
    nothing differs nothing is done. The commit builds on what was looked at: a change by somebody else meanwhile is
    refused by the Hub.

    Args:
        contents: what.
        target: where to.
        api: the Hub's client.

    Returns:
        A sentence on what was done, with the address.

    Raises:
        UserError: no right to write, a repository of something else, a public one where a private one was asked for, or
            a failure of the Hub or the network: the repository is then what it was or, where the answer to the commit
            was lost, complete.
    """
    api = api or HfApi()
    repo_id, kind = target.repo_id, contents.repo_type
    with _explained(repo_id, "look at the repository"):
        found = _found(api, target, kind)
    if found is None:
        if target.create_pr:
            raise UserError(f"{repo_id} does not exist, so there is nothing to open a pull request on")
        with _explained(repo_id, "create the repository"):
            sdk = "gradio" if kind == "space" else None
            api.create_repo(repo_id, private=target.private, repo_type=kind, space_sdk=sdk)
            found = _found(api, target, kind)
    if found is None:
        raise UserError(f"{repo_id} was created, and the Hub does not show it: try again")
    if target.private and found.private is False:
        raise UserError(f"{repo_id} is public already: make it private in its settings, or publish without --private")
    with _explained(repo_id, "list the repository"):
        entries = api.list_repo_tree(repo_id, revision=found.sha, repo_type=kind)
        remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        _refuse_other(api, repo_id, contents, remote, str(found.sha))
    if target.revision and not target.create_pr:
        with _explained(repo_id, f"make the branch {target.revision}"):
            api.create_branch(repo_id, branch=target.revision, revision=found.sha, exist_ok=True, repo_type=kind)
    local = {file.name: file for file in sorted(contents.folder.iterdir())}
    changed = [name for name, file in local.items() if not _same(file, remote.get(name))]
    stale = [name for name in contents.files if name in remote and name not in local]
    address = f"{api.endpoint}/{'spaces/' if kind == 'space' else ''}{repo_id}"
    if not changed and not stale:
        return f"{address} holds exactly this already: nothing was done"
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(name, str(local[name])) for name in changed),
        *(CommitOperationDelete(name) for name in stale),
    ]
    with _explained(repo_id, "upload"):
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=contents.title,
            repo_type=kind,
            revision=target.revision if not target.create_pr else None,
            create_pr=target.create_pr,
            parent_commit=found.sha,
        )
    words = [f"{what} {', '.join(names)}" for what, names in (("published", changed), ("removed", stale)) if names]
    return f"{' and '.join(words)}: {done.pr_url or address}"


def _found(api: HfApi, target: Target, kind: str) -> ModelInfo | SpaceInfo | None:
    """The repository as it is now: its branch's commit or, where there is no such branch yet, that of main."""
    look = api.space_info if kind == "space" else api.model_info
    revision = None if target.create_pr else target.revision
    try:
        return look(target.repo_id, revision=revision)
    except GatedRepoError:
        raise
    except RevisionNotFoundError:
        return look(target.repo_id)
    except RepositoryNotFoundError:
        return None


def _refuse_other(api: HfApi, repo_id: str, contents: Contents, remote: Collection[str], sha: str) -> None:
    def read(name: str) -> str:
        with tempfile.TemporaryDirectory() as place:
            file = api.hf_hub_download(
                repo_id, name, revision=sha, local_dir=place, force_download=True, repo_type=contents.repo_type
            )
            return Path(file).read_text(encoding="utf-8")

    other = contents.other(remote, read)
    if other:
        raise UserError(f"{repo_id} holds {other}: publish to another repository")


def _same(file: Path, remote: RepoFile | None) -> bool:
    if remote is None:
        return False
    data = file.read_bytes()
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == hashlib.sha256(data).hexdigest())
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


@contextmanager
def _explained(repo_id: str, what: str) -> Iterator[None]:
    """What goes wrong in here, in one line with what would work. The client's errors have no base that stayed one."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explanation(error, repo_id, what)) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those below it: the client wraps what goes wrong in an upload."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explanation(error: Exception, repo_id: str, what: str) -> str:
    response: Any = next((r for cause in _causes(error) if (r := getattr(cause, "response", None)) is not None), None)
    status = getattr(response, "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        return "no token of the Hub: run `hf auth login`, or set HF_TOKEN to one with write access"
    again = f"{repo_id} is what it was, or complete; the same command tries again"
    if status == 401:
        return f"the Hub does not accept the token ({repo_id}): run `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        return f"the token may not write to {repo_id}: take one with write access there, or --create-pr"
    if status == 404:
        return f"the Hub does not know {repo_id}, or the token may not see it; could not {what}"
    if status in (409, 412):
        return f"{repo_id} was changed by somebody else meanwhile: nothing was published; look, and publish again"
    if status == 429:
        wait = response.headers.get("Retry-After")
        return f"too many requests for the Hub: try again{f' in {wait} s' if wait else ' later'}; {again}"
    if status is not None and status < 500:
        texts = [
            str(cause) for cause in _causes(error) if cause is error or getattr(cause, "response", None) is response
        ]
        lines = [line.strip("- ") for text in dict.fromkeys(texts) for line in text.splitlines()]
        return f"the Hub refuses to {what} ({repo_id}, {status}): {' '.join(filter(None, lines))[:400]}"
    if status is not None:
        return f"the Hub answered {status} to the attempt to {what}: {again}"
    return f"could not {what}: {type(error).__name__}: {first_line(error)}; {again}"
