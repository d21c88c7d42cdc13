"""The part of the Hub's HTTP interface that huggingface_hub uses with model repositories, on tests/hub_repository.py."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml
from hub_repository import Answer, Commit, File, HubError, Repo

if TYPE_CHECKING:
    from local_hub import LocalHub

REGULAR_LIMIT = 10 << 20  # bytes; larger files are always stored with LFS


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
        repo = self.hub.repos.get(self.parts["repo"])
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
_PARTS = {"repo": "[^/]+/[^/]+?", "revision": "[^/]+", "name": "[^/]+", "path": ".+", "sha": "[0-9a-f]{64}"}


def _route(method: str, pattern: str) -> Callable[[Route], Route]:
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


@_route("GET", "/api/whoami-v2")
def _whoami(call: Call) -> Answer:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "local", "role": call.role}}
    return Answer.json({"type": "user", "id": call.user, "name": call.user, "orgs": [], "auth": token})


@_route("POST", "/api/repos/create")
def _create(call: Call) -> Answer:
    asked = call.json()
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    owner = asked.get("organization") or call.user
    if asked.get("type") not in (None, "model"):
        raise HubError(501, "the local Hub keeps models only")
    if call.role != "write" or owner != call.user:
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    repo_id = f"{owner}/{asked['name']}"
    answer = {"url": f"{call.hub.url}/{repo_id}", "name": repo_id}
    if repo_id in call.hub.repos:
        message = "You already created this model repo"
        taken = Answer.json({"error": message, **answer}, 409)
        taken.headers["X-Error-Message"] = message
        return taken
    private = asked.get("private") or asked.get("visibility") == "private"  # clients before and since 1.10
    call.hub.repos[repo_id] = Repo(repo_id, bool(private))
    return Answer.json({**answer, "id": repo_id})


@_route("DELETE", "/api/repos/delete")
def _delete(call: Call) -> Answer:
    asked = call.json()
    call.parts["repo"] = f"{asked.get('organization') or call.user}/{asked['name']}"
    del call.hub.repos[call.writable().id]
    return Answer()


@_route("PUT", "/api/models/{repo}/settings")
def _settings(call: Call) -> Answer:
    asked = call.json()
    call.writable().private = bool(asked.get("private") or asked.get("visibility") == "private")
    return Answer.json({"private": call.repo().private})


@_route("GET", "/api/models/{repo}/auth-check(?P<name>/write)?")
def _auth_check(call: Call) -> Answer:
    _ = call.writable() if "name" in call.parts else call.repo()
    return Answer()


@_route("GET", "/api/models/{repo}/refs")
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


@_route("POST|DELETE", "/api/models/{repo}/branch/{name}")
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


@_route("POST", "/api/models/{repo}/tag/{revision}")
def _tag(call: Call) -> Answer:
    repo, ref = call.writable(), f"refs/tags/{call.json()['tag']}"
    if ref in repo.refs:
        raise HubError(409, f"Tag reference exists already: {ref}")
    repo.refs[ref] = call.commit().oid
    return Answer()


@_route("DELETE", "/api/models/{repo}/tag/{name}")
def _untag(call: Call) -> Answer:
    if call.writable().refs.pop(f"refs/tags/{call.parts['name']}", None) is None:
        raise HubError(404, "Tag not found", "RevisionNotFound")
    return Answer()


def read_card(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Metadata of a model card, with errors and warnings.

    Of the Hub's schema this knows that metadata is a YAML mapping, the types of the usual fields, and what a result
    of a model-index must name.
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
    for name in ("tags", "datasets", "metrics"):
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


@_route("POST", "/api/validate-yaml")
def _validate(call: Call) -> Answer:
    _, errors, warnings = read_card(call.json()["content"])
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer.json(found, 400 if errors else 200)


def _stored(path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.git_oid, "size": len(file.data)}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return entry


@_route("GET", "/api/models/{repo}(?:/revision/{revision})?")
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
        "modelId": repo.id,
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


@_route("GET", "/api/models/{repo}/tree/{revision}(?:/{path})?")
def _tree(call: Call) -> Answer:
    folder = call.parts.get("path", "").strip("/")
    recursive = call.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries = _listing(call.commit().files, folder, recursive)
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist on {call.parts['revision']}", "EntryNotFound")
    return Answer.json(entries)


@_route("POST", "/api/models/{repo}/paths-info/{revision}")
def _paths_info(call: Call) -> Answer:
    paths = parse_qs(call.body.decode()).get("paths", [])
    entries = {entry["path"]: entry for entry in _listing(call.commit().files, "", True)}
    return Answer.json([entries[path.strip("/")] for path in paths if path.strip("/") in entries])


@_route("GET", "/api/models/{repo}/commits/{revision}")
def _commits(call: Call) -> Answer:
    return Answer.json(
        [
            {"id": c.oid, "title": c.title, "message": c.description, "date": c.date, "authors": [{"user": c.author}]}
            for c in call.repo().commits(call.parts["revision"])
        ]
    )


@_route("POST", "/api/models/{repo}/preupload/{revision}")
def _preupload(call: Call) -> Answer:
    call.writable(pull_request="create_pr" in call.query)
    present = call.commit().files
    attributes = present.get(".gitattributes", File(b"")).data.decode()
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    ignored = [line.strip() for line in call.json().get("gitIgnore", "").splitlines() if line.strip()]
    files = []
    for asked in call.json()["files"]:
        path, name = asked["path"], asked["path"].split("/")[-1]
        large = asked["size"] > REGULAR_LIMIT or b"\0" in base64.b64decode(asked["sample"])
        large = large or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        entry = {"path": path, "uploadMode": "lfs" if large else "regular"}
        entry["shouldIgnore"] = any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
        if path in present:
            entry["oid"] = present[path].etag  # the client leaves out what did not change
        files.append(entry)
    return Answer.json({"files": files, "commitOid": call.commit().oid})


@_route("POST", "/{repo}.git/info/lfs/objects/batch")
def _lfs_batch(call: Call) -> Answer:
    repo = call.writable(pull_request=True)
    objects = []
    for asked in call.json()["objects"]:
        entry = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in repo.objects:
            verify = {"href": f"{call.hub.url}/{repo.id}.git/info/lfs/objects/verify"}
            entry["actions"] = {"upload": {"href": _signed(call.hub, repo, asked["oid"])}, "verify": verify}
        objects.append(entry)
    return Answer.json({"transfer": "basic", "objects": objects})


@_route("POST", "/{repo}.git/info/lfs/objects/verify")
def _lfs_verify(call: Call) -> Answer:
    asked, repo = call.json(), call.writable(pull_request=True)
    if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
        raise HubError(404, f"object {asked['oid']} did not arrive")
    return Answer.json({})


def _signed(hub: LocalHub, repo: Repo, sha256: str) -> str:
    return f"{hub.storage_url}/storage/{repo.id}/{sha256}?signature={hub.signature}"


@_route("PUT|GET|HEAD", "/storage/{repo}/{sha}")
def _storage(call: Call) -> Answer:
    if call.query.get("signature") != [call.hub.signature]:
        raise HubError(403, "Access denied")
    if "Authorization" in call.headers:
        raise HubError(400, "Only one auth mechanism allowed: the token must not be sent to the storage")
    objects, sha256 = call.hub.repos[call.parts["repo"]].objects, call.parts["sha"]
    if call.method == "PUT":
        if hashlib.sha256(call.body).hexdigest() != sha256:
            raise HubError(400, "XAmzContentSHA256Mismatch: the content does not match its sha256")
        objects[sha256] = call.body
        return Answer(headers={"ETag": f'"{sha256}"'})
    if sha256 not in objects:
        raise HubError(404, "NoSuchKey")
    return _part(call, objects[sha256], {"ETag": f'"{sha256}"'})


def _part(call: Call, data: bytes, headers: dict[str, str]) -> Answer:
    """A file, or the range of its bytes that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range") or "")
    if asked is None or asked[0] == "bytes=-":
        return Answer(200, data, headers)
    first = int(asked[1]) if asked[1] else max(len(data) - int(asked[2]), 0)
    last = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
    if first > last:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


@_route("GET|HEAD", "/{repo}/resolve/{revision}/{path}")
def _resolve(call: Call) -> Answer:
    repo, commit, path = call.repo(), call.commit(), call.parts["path"]
    headers = {"X-Repo-Commit": commit.oid}
    file = commit.files.get(path)
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    headers["ETag"] = f'"{file.git_oid}"'
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        return Answer(302, b"Found", {**headers, "Location": _signed(call.hub, repo, file.sha256)})
    return _part(call, file.data, headers)


@_route("POST", "/api/models/{repo}/commit/{revision}")
def _commit(call: Call) -> Answer:
    """All of a commit or nothing of it: the files are put together first, then one reference moves."""
    as_pull_request = "create_pr" in call.query
    repo = call.writable(pull_request=as_pull_request)
    try:
        lines = [json.loads(line) for line in call.body.splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
    except (ValueError, StopIteration):
        raise HubError(400, "Invalid commit: not newline-delimited JSON with a header") from None
    ref = "refs/pr/new" if as_pull_request else repo.branch(call.parts["revision"])
    base = repo.resolve(call.parts["revision"])
    if expected := header.get("parentCommit"):
        if as_pull_request:
            base = repo.resolve(expected)
        elif not base.oid.startswith(expected):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(base.files)
    for line in lines:
        if line is not lines[0]:
            _apply(repo, files, line["key"], line["value"])
    readme = files.get("README.md")
    if readme is not None and (errors := read_card(readme.data.decode())[1]):
        raise HubError(400, f"Invalid metadata in README.md: {errors[0]}")
    if as_pull_request:
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        ref = f"refs/pr/{number}"
    commit = repo.commit(ref, files, header["summary"], call.user or "", header.get("description", ""), base.oid)
    answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{call.hub.url}/{repo.id}/commit/{commit.oid}"}
    if as_pull_request:
        answer["pullRequestUrl"] = f"{call.hub.url}/{repo.id}/discussions/{number}"
    return Answer.json(answer)


def _apply(repo: Repo, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    path = value["path"].rstrip("/")
    if key == "file":
        try:
            files[path] = File(base64.b64decode(value["content"], validate=True))
        except ValueError:
            raise HubError(400, f"Invalid base64 content of {path}") from None
    elif key == "lfsFile":
        if value["oid"] not in repo.objects:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = File(repo.objects[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(f"{path}/"))]
        if not gone:
            raise HubError(404, f"A file with this name doesn't exist: {quote(path)}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(501, f"the local Hub does not know the operation {key}")
