"""Routes of the local Hub, and those that tell and change what it knows: users, repositories, references, listings.

What huggingface_hub asks about repositories of models and Spaces, answered from tests/hub_repository.py. Content goes
in and out in tests/hub_transfer.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repository import SDKS, Answer, Commit, File, HubError, Repo, read_card

if TYPE_CHECKING:
    from local_hub import LocalHub


def key(repo_id: str, kind: str) -> str:
    """Under which the Hub keeps a repository: a Space may be called as a model is."""
    return f"spaces/{repo_id}" if kind in ("space", "spaces") else repo_id


@dataclass
class Call:
    """One request, with the parts of its path that the route names."""

    hub: LocalHub
    method: str
    headers: Mapping[str, str]
    body: bytes
    query: dict[str, list[str]]
    user: str | None
    role: str | None  # of the token: read or write
    parts: dict[str, str]

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError:
            raise HubError(400, "Invalid JSON") from None

    def repo(self) -> Repo:
        """The repository named in the path, if this user may see it; a private one looks absent to all others."""
        repo = self.hub.repos.get(key(self.parts["repo"], self.parts.get("kind", "models")))
        if repo is not None and (not repo.private or self.user == repo.owner):
            return repo
        if self.user is None:
            # The client takes a bare 401 for RepoNotFound only from an https address: here it is told so.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")

    def commit(self) -> Commit:
        return self.repo().resolve(self.parts.get("revision", "main"))

    def writable(self, *, pull_request: bool = False) -> Repo:
        """The repository, if this user may change it; a pull request is open to whoever sees it."""
        repo = self.repo()
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.role != "write" or not (pull_request or self.user == repo.owner):
            raise HubError(403, "Authorization error.")
        return repo


Route = Callable[[Call], Answer]
_ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
_PARTS = {
    "kind": "models|spaces",
    "repo": "[^/]+/[^/]+?",
    "revision": "[^/]+",
    "name": "[^/]+",
    "path": ".+",
    "sha": "[0-9a-f]{64}",
}


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    def add(function: Route) -> Route:
        regex = re.sub(r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{_PARTS[part[1]]})", pattern)
        _ROUTES.append((method, re.compile(regex), function))
        return function

    return add


def answer(
    hub: LocalHub,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: bytes,
    user: str | None,
    role: str | None,
) -> Answer:
    """Answers one request; one at a time, so that commits are atomic.

    Raises:
        HubError: The answer is an error.
    """
    url = urlsplit(target)
    for allowed, pattern, function in _ROUTES:
        if method in allowed.split("|") and (match := pattern.fullmatch(url.path)):
            parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            with hub.lock:
                return function(Call(hub, method, headers, body, parse_qs(url.query), user, role, parts))
    raise HubError(501, f"the local Hub does not know {method} {url.path}")


@route("GET", "/api/whoami-v2")
def _whoami(call: Call) -> Answer:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "local", "role": call.role}}
    return Answer.json({"type": "user", "id": call.user, "name": call.user, "orgs": [], "auth": token})


@route("POST", "/api/repos/create")
def _create(call: Call) -> Answer:
    asked = call.json()
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    owner = asked.get("organization") or call.user
    kind = asked.get("type") or "model"
    if kind not in ("model", "space"):
        raise HubError(501, "the local Hub keeps models and Spaces only")
    if kind == "space" and asked.get("sdk") not in SDKS:
        raise HubError(400, f'"sdk" must be one of {", ".join(SDKS)}')
    if call.role != "write" or owner != call.user:
        raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
    repo_id = f"{owner}/{asked['name']}"
    place = key(repo_id, kind)
    answer = {"url": f"{call.hub.url}/{place}", "name": repo_id}
    if place in call.hub.repos:
        message = f"You already created this {kind} repo"
        taken = Answer.json({"error": message, **answer}, 409)
        taken.headers["X-Error-Message"] = message
        return taken
    private = asked.get("private") or asked.get("visibility") == "private"  # clients before and since 1.10
    call.hub.repos[place] = Repo(repo_id, bool(private), asked.get("sdk"))
    return Answer.json({**answer, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def _delete(call: Call) -> Answer:
    asked = call.json()
    call.parts |= {"repo": f"{asked.get('organization') or call.user}/{asked['name']}"}
    call.parts |= {"kind": f"{asked.get('type') or 'model'}s"}
    del call.hub.repos[call.writable().key]
    return Answer()


@route("PUT", "/api/{kind}/{repo}/settings")
def _settings(call: Call) -> Answer:
    asked = call.json()
    call.writable().private = bool(asked.get("private") or asked.get("visibility") == "private")
    return Answer.json({"private": call.repo().private})


@route("GET", "/api/{kind}/{repo}/auth-check(?P<name>/write)?")
def _auth_check(call: Call) -> Answer:
    _ = call.writable() if "name" in call.parts else call.repo()
    return Answer()


@route("GET", "/api/{kind}/{repo}/refs")
def _refs(call: Call) -> Answer:
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/", "converts": "refs/convert/"}
    refs = call.repo().refs
    return Answer.json(
        {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
            if kind != "pullRequests" or "include_prs" in call.query
        }
    )


@route("POST|DELETE", "/api/{kind}/{repo}/branch/{name}")
def _branch(call: Call) -> Answer:
    repo, ref = call.writable(), f"refs/heads/{call.parts['name']}"
    if call.method == "DELETE":
        if ref == "refs/heads/main" or repo.refs.pop(ref, None) is None:
            raise HubError(403 if ref == "refs/heads/main" else 404, "Reference cannot be deleted")
        return Answer()
    if call.parts["name"].startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {call.parts['name']}")
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.resolve(call.json().get("startingPoint") or "main").oid
    return Answer()


@route("POST", "/api/{kind}/{repo}/tag/{revision}")
def _tag(call: Call) -> Answer:
    repo, ref = call.writable(), f"refs/tags/{call.json()['tag']}"
    if ref in repo.refs:
        raise HubError(409, f"Tag reference exists already: {ref}")
    repo.refs[ref] = call.commit().oid
    return Answer()


@route("DELETE", "/api/{kind}/{repo}/tag/{name}")
def _untag(call: Call) -> Answer:
    if call.writable().refs.pop(f"refs/tags/{call.parts['name']}", None) is None:
        raise HubError(404, "Tag not found", "RevisionNotFound")
    return Answer()


@route("POST", "/api/validate-yaml")
def _validate(call: Call) -> Answer:
    _, errors, warnings = read_card(call.json()["content"])
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer.json(found, 400 if errors else 200)


def _stored(path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.git_oid, "size": len(file.data)}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return entry


@route("GET", "/api/{kind}/{repo}(?:/revision/{revision})?")
def _info(call: Call) -> Answer:
    repo, commit = call.repo(), call.commit()
    siblings = []
    for path, file in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if "blobs" in call.query:
            sibling |= {"size": len(file.data), "blobId": file.git_oid}
            if file.lfs:
                sibling["lfs"] = {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
        siblings.append(sibling)
    readme = commit.files.get("README.md")
    card = read_card(readme.data.decode())[0] if readme else {}
    tags = [card["library_name"]] if "library_name" in card else []
    tags += [*card.get("tags", []), *(f"dataset:{name}" for name in card.get("datasets", []))]
    tags += [f"license:{card['license']}"] if "license" in card else []
    info = {
        "id": repo.id,
        **({"sdk": card.get("sdk", repo.sdk), "models": card.get("models", [])} if repo.sdk else {"modelId": repo.id}),
        "author": repo.owner,
        "sha": commit.oid,
        "createdAt": repo.created,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": list(dict.fromkeys(tags)),
        **{name: card[name] for name in ("library_name", "pipeline_tag", "model-index") if name in card},
        **({"cardData": card} if card else {}),
        "siblings": siblings,
    }
    if wanted := call.query.get("expand"):
        info = {name: value for name, value in info.items() if name in ("id", *wanted)}
    return Answer.json(json.loads(json.dumps(info, default=str)))  # a date in a card is text to the Hub


def _listing(files: Mapping[str, File], folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        steps = path.removeprefix(prefix).split("/")
        for depth in range(1, len(steps) if recursive else min(len(steps), 2)):
            parent = prefix + "/".join(steps[:depth])
            tree = hashlib.sha1(json.dumps(sorted(p for p in files if p.startswith(f"{parent}/"))).encode())
            entries[parent] = {"type": "directory", "path": parent, "oid": tree.hexdigest(), "size": 0}
        if recursive or len(steps) == 1:
            entries[path] = _stored(path, file)
    return list(entries.values())


@route("GET", "/api/{kind}/{repo}/tree/{revision}(?:/{path})?")
def _tree(call: Call) -> Answer:
    folder = call.parts.get("path", "").strip("/")
    recursive = call.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries = _listing(call.commit().files, folder, recursive)
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist on {call.parts['revision']}", "EntryNotFound")
    return Answer.json(entries)


@route("POST", "/api/{kind}/{repo}/paths-info/{revision}")
def _paths_info(call: Call) -> Answer:
    paths = parse_qs(call.body.decode()).get("paths", [])
    entries = {entry["path"]: entry for entry in _listing(call.commit().files, "", True)}
    return Answer.json([entries[path.strip("/")] for path in paths if path.strip("/") in entries])


@route("GET", "/api/{kind}/{repo}/commits/{revision}")
def _commits(call: Call) -> Answer:
    return Answer.json(
        [
            {"id": c.oid, "title": c.title, "message": c.description, "date": c.date, "authors": [{"user": c.author}]}
            for c in call.repo().commits(call.parts["revision"])
        ]
    )
