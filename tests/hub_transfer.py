"""Routes of the local Hub through which content goes in and out: LFS, commits, downloads."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hub_protocol import Call, key, route
from hub_repository import Answer, File, HubError, Repo, read_card

if TYPE_CHECKING:
    from local_hub import LocalHub

REGULAR_LIMIT = 10 << 20  # bytes; larger files are always stored with LFS


@route("POST", "/api/{kind}/{repo}/preupload/{revision}")
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


@route("POST", "(?:/{kind})?/{repo}.git/info/lfs/objects/batch")
def _lfs_batch(call: Call) -> Answer:
    repo = call.writable(pull_request=True)
    objects = []
    for asked in call.json()["objects"]:
        entry = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in repo.objects:
            verify = {"href": f"{call.hub.url}/{repo.key}.git/info/lfs/objects/verify"}
            entry["actions"] = {"upload": {"href": _signed(call.hub, repo, asked["oid"])}, "verify": verify}
        objects.append(entry)
    return Answer.json({"transfer": "basic", "objects": objects})


@route("POST", "(?:/{kind})?/{repo}.git/info/lfs/objects/verify")
def _lfs_verify(call: Call) -> Answer:
    asked, repo = call.json(), call.writable(pull_request=True)
    if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
        raise HubError(404, f"object {asked['oid']} did not arrive")
    return Answer.json({})


def _signed(hub: LocalHub, repo: Repo, sha256: str) -> str:
    return f"{hub.storage_url}/storage/{repo.key}/{sha256}?signature={hub.signature}"


@route("PUT|GET|HEAD", "/storage(?:/{kind})?/{repo}/{sha}")
def _storage(call: Call) -> Answer:
    if call.query.get("signature") != [call.hub.signature]:
        raise HubError(403, "Access denied")
    if "Authorization" in call.headers:
        raise HubError(400, "Only one auth mechanism allowed: the token must not be sent to the storage")
    objects, sha256 = (
        call.hub.repos[key(call.parts["repo"], call.parts.get("kind", "models"))].objects,
        call.parts["sha"],
    )
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


@route("GET|HEAD", "(?:/{kind})?/{repo}/resolve/{revision}/{path}")
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


@route("POST", "/api/{kind}/{repo}/commit/{revision}")
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
    answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{call.hub.url}/{repo.key}/commit/{commit.oid}"}
    if as_pull_request:
        answer["pullRequestUrl"] = f"{call.hub.url}/{repo.key}/discussions/{number}"
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
