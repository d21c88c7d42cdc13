"""What the local Hub keeps: repositories whose commits are immutable snapshots. And the errors that the Hub names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from types import MappingProxyType
from typing import Any

import yaml

# What the Hub writes into a new model repository, shortened.
GIT_ATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n"
    for suffix in ("bin", "ckpt", "h5", "npy", "npz", "onnx", "pkl", "pt", "pth", "safetensors", "zip")
)


@dataclass
class Answer:
    """One HTTP answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Answer:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"})


class HubError(Exception):
    """An answer that is an error: status, message and, where the client reads one, X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.answer = Answer.json({"error": message}, status)
        self.answer.headers |= {"X-Error-Message": message, **(headers or {})}
        if code is not None:
            self.answer.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class File:
    """Content of a file; ``lfs`` where git holds a pointer to it."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    title: str
    description: str
    author: str
    date: str  # ISO 8601
    parent: str | None
    files: Mapping[str, File]

    @cached_property
    def oid(self) -> str:
        tree = [(path, file.git_oid) for path, file in sorted(self.files.items())]
        named = [self.title, self.description, self.author, self.date, self.parent, tree]
        return hashlib.sha1(json.dumps(named).encode()).hexdigest()


SDKS = ("gradio", "docker", "static")  # of Spaces
_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")

# What the Hub writes into a new Space.
_SPACE_CARD = (
    "---\ntitle: {name}\nemoji: \U0001f433\ncolorFrom: red\ncolorTo: gray\nsdk: {sdk}\napp_file: app.py\n---\n"
)


class Repo:
    """A repository, born as on the Hub with one commit that holds .gitattributes and, of a Space, a card.

    Attributes:
        sdk: of a Space; None of a model.
        private: Whether only its owner's tokens see it.
        refs: Commit of "refs/heads/main", of other branches, of "refs/tags/..." and of pull requests "refs/pr/...".
        objects: sha256 -> content of the large files that arrived, committed or not.
    """

    def __init__(self, repo_id: str, private: bool = False, sdk: str | None = None):
        self.id, self.private, self.sdk = repo_id, private, sdk
        self.owner = repo_id.split("/")[0]
        self.refs: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self._commits: dict[str, Commit] = {}
        self.created = now()
        files = {".gitattributes": File(GIT_ATTRIBUTES.encode())}
        if sdk is not None:
            files["README.md"] = File(_SPACE_CARD.format(name=repo_id.split("/")[1], sdk=sdk).encode())
        self.commit("refs/heads/main", files, "initial commit", "system")

    @property
    def key(self) -> str:
        """Under which the Hub keeps it, and where it is in addresses."""
        return f"spaces/{self.id}" if self.sdk is not None else self.id

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full reference name or a hash of seven digits or more.

        Raises:
            HubError: 404 RevisionNotFound.
        """
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self._commits[self.refs[name]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = [commit for oid, commit in self._commits.items() if oid.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def branch(self, revision: str) -> str:
        """Full name of the reference that a commit to ``revision`` moves: a branch or a pull request."""
        for name in (f"refs/heads/{revision}", revision):
            if name in self.refs and not name.startswith("refs/tags/"):
                return name
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        return {path: file.data for path, file in self.resolve(revision).files.items()}

    def commits(self, revision: str = "main") -> list[Commit]:
        """History of a revision, newest first."""
        history = [self.resolve(revision)]
        while history[-1].parent is not None:
            history.append(self._commits[history[-1].parent])
        return history

    def commit(
        self,
        ref: str,
        files: Mapping[str, File],
        title: str,
        author: str,
        description: str = "",
        parent: str | None = None,
    ) -> Commit:
        """Adds a snapshot and moves ``ref`` to it."""
        commit = Commit(title, description, author, now(), parent, MappingProxyType(dict(files)))
        self._commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def read_card(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Metadata of a model card, with errors and warnings.

    Of the Hub's schema this knows that metadata is a YAML mapping, the types of the usual fields, what a result of a
    model-index must name, and what a Space's fields may be.
    """
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    try:
        card = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return {}, [f"YAML metadata is not valid: {error}"], []
    if card is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return {}, ["YAML metadata must be a mapping"], []
    errors = []
    if card.get("sdk", SDKS[0]) not in SDKS:
        errors.append(f'"sdk" must be one of {", ".join(SDKS)}')
    for name in ("colorFrom", "colorTo"):
        if card.get(name, _COLORS[0]) not in _COLORS:
            errors.append(f'"{name}" must be one of {", ".join(_COLORS)}')
    if len(card.get("short_description", "")) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
    for name in ("tags", "datasets", "metrics", "models"):
        if not isinstance(card.get(name, []), list) or not all(isinstance(item, str) for item in card.get(name, [])):
            errors.append(f'"{name}" must be an array of strings')
    for name in ("library_name", "pipeline_tag"):
        if not isinstance(card.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for i, model in enumerate(card.get("model-index") or []):
        for j, result in enumerate(model.get("results") or []):
            where = f"model-index[{i}].results[{j}]"
            needed = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            errors += [f'"{where}.{a}.{b}" is required' for a, b in needed if not (result.get(a) or {}).get(b)]
            for k, metric in enumerate(result.get("metrics") or [{}]):
                errors += [f'"{where}.metrics[{k}].{n}" is required' for n in ("type", "value") if n not in metric]
        if "name" not in model:
            errors.append(f'"model-index[{i}].name" is required')
    return card, errors, []
