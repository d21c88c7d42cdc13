"""The local Hub answers the real client as the Hub does: what other tests stand on when they publish and download."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import huggingface_hub
import pytest
import timm
import torch
from hub_repository import Commit, Repo
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    file_download,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.utils import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from local_hub import LocalHub
from packaging.version import Version
from timm.models import push_to_hf_hub

REPO = "me/model"
WEIGHTS = bytes(range(256)) * 400
CARD = "---\nlicense: apache-2.0\nlibrary_name: timm\ntags:\n- image-classification\n---\n# A model\n"


def _connection_errors() -> tuple[type[Exception], ...]:
    """Clients before 1.0 stand on requests, whose errors are OSErrors; later ones on httpx or its successor."""
    found: list[type[Exception]] = [OSError]
    for name in ("httpx", "httpx2"):
        try:
            found.append(__import__(name).TransportError)
        except ImportError:
            continue
    return tuple(found)


CONNECTION_ERRORS = _connection_errors()
# Of the client versions that pyproject.toml admits, old ones try less often and ask huggingface.co about cards.
NEW_CLIENT = Version(huggingface_hub.__version__) >= Version("2")
needs_new_client = pytest.mark.skipif(not NEW_CLIENT, reason="an older client gives up here")


@pytest.fixture
def hub(local_hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    local_hub.use_in_process(monkeypatch, tmp_path)
    return local_hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "README.md": CARD.encode(), "sub/notes.txt": b"hi"}
    for name, content in files.items():
        path = tmp_path / "staged" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "staged"


@pytest.fixture
def api(hub: LocalHub, folder: Path) -> HfApi:
    """The writer, with one repository published."""
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    return api


def _add(**files: str) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(f"{name}.txt", text.encode()) for name, text in files.items()]


def _status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def _post(hub: LocalHub, path: str, body: bytes) -> dict:
    """A request that today's client would not send."""
    request = urllib.request.Request(hub.url + path, body, {"Authorization": f"Bearer {hub.token}"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def _seen(hub: LocalHub, method: str, part: str) -> list[int | str]:
    return [request.status for request in hub.requests if request.method == method and part in request.path]


# --- Who may do what ---


def test_tokens(hub: LocalHub) -> None:
    assert HfApi().whoami()["name"] == "me"
    who = HfApi(token=hub.reader_token).whoami()
    assert who["name"] == "me" and who["auth"]["accessToken"]["role"] == "read"
    HfApi().create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
        HfApi(token="hf_wrong").model_info(REPO)
    assert _status(error) == 401


def test_repositories_are_created_once_and_in_ones_own_namespace(hub: LocalHub) -> None:
    api = HfApi()
    assert api.create_repo(REPO).repo_id == REPO
    assert api.create_repo("other", private=True).repo_id == "me/other"
    assert not hub.repo(REPO).private and hub.repo("me/other").private
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(REPO)
    assert _status(error) == 409
    for token, repo_id in ((hub.token, "stranger/model"), (hub.reader_token, "me/new")):
        with pytest.raises(HfHubHTTPError) as error:
            HfApi(token=token).create_repo(repo_id)
        assert _status(error) == 403
    assert set(hub.repos) == {REPO, "me/other"}
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_a_private_repository_looks_absent_to_others(
    api: HfApi, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.repo(REPO).private = True
    for token, status in ((hub.stranger_token, 404), (None, 401)):
        hub.use_in_process(monkeypatch, tmp_path / "other", token)
        hub.requests.clear()
        for ask in (lambda: HfApi().model_info(REPO), lambda: hf_hub_download(REPO, "model.safetensors")):
            with pytest.raises(RepositoryNotFoundError):
                ask()
        assert [request.status for request in hub.requests] == [status, status]
    hub.use_in_process(monkeypatch, tmp_path / "other", hub.reader_token)
    assert HfApi().model_info(REPO).private
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS


@pytest.mark.parametrize("who", ["reader_token", "stranger_token"])
def test_only_the_owner_writes(api: HfApi, hub: LocalHub, who: str) -> None:
    before = hub.repo(REPO).refs
    for operations in (_add(new="1"), [CommitOperationDelete("config.json")]):
        with pytest.raises(HfHubHTTPError) as error:
            HfApi(token=getattr(hub, who)).create_commit(REPO, operations, commit_message="no")
        assert _status(error) == 403
    with pytest.raises(HfHubHTTPError):
        HfApi(token=getattr(hub, who)).create_branch(REPO, branch="mine")
    assert hub.repo(REPO).refs == before


# --- What a repository holds ---


def test_a_folder_arrives_as_it_was(api: HfApi, hub: LocalHub, folder: Path) -> None:
    files = hub.repo(REPO).files()
    assert files.pop(".gitattributes")
    assert files == {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert [p for p, file in hub.repo(REPO).resolve("main").files.items() if file.lfs] == ["model.safetensors"]
    assert [commit.title for commit in hub.repo(REPO).commits()] == [
        "Upload folder using huggingface_hub",
        "initial commit",
    ]
    assert _seen(hub, "PUT", "/storage/") == [200]
    assert {"/storage/" in r.path for r in hub.requests if "Authorization" in r.headers} == {False}

    assert sorted(api.list_repo_files(REPO)) == sorted([*files, ".gitattributes"])
    info = api.model_info(REPO, files_metadata=True)
    weights = next(sibling for sibling in info.siblings if sibling.rfilename == "model.safetensors")
    assert weights.size == len(WEIGHTS) and weights.lfs["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert info.sha == hub.repo(REPO).commits()[0].oid and info.library_name == "timm"
    assert "license:apache-2.0" in info.tags
    assert [item.path for item in api.list_repo_tree(REPO)] == [
        ".gitattributes", "README.md", "config.json", "model.safetensors", "sub"
    ]  # fmt: skip
    assert [item.path for item in api.list_repo_tree(REPO, "sub")] == ["sub/notes.txt"]
    assert [item.path for item in api.get_paths_info(REPO, ["config.json", "absent"])] == ["config.json"]
    assert [c.title for c in api.list_repo_commits(REPO)] == [c.title for c in hub.repo(REPO).commits()]


def test_files_have_the_names_that_git_gives_them(api: HfApi, hub: LocalHub) -> None:
    file = hub.repo(REPO).resolve("main").files["sub/notes.txt"]
    named = subprocess.run(["git", "hash-object", "--stdin"], input=b"hi", capture_output=True, check=True).stdout
    assert file.git_oid == named.decode().strip()


def test_revisions_are_snapshots(api: HfApi, hub: LocalHub) -> None:
    first = api.model_info(REPO).sha
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="next/try", revision=first)
    second = api.create_commit(REPO, _add(new="2"), commit_message="second", revision="next/try").oid
    third = api.create_commit(REPO, [CommitOperationAdd("config.json", b"[]")], commit_message="third").oid

    def config(revision: str) -> bytes:
        return Path(hf_hub_download(REPO, "config.json", revision=revision)).read_bytes()

    assert {r: config(r) for r in ("main", third, "v1", first, first[:8], "next/try")} == {
        "main": b"[]", third: b"[]", "v1": b"{}", first: b"{}", first[:8]: b"{}", "next/try": b"{}"
    }  # fmt: skip
    assert api.model_info(REPO, revision="next/try").sha == second
    assert hub.repo(REPO).files("next/try")["new.txt"] == b"2" and "new.txt" not in hub.repo(REPO).files()
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": third, "next/try": second}
    assert [ref.name for ref in refs.tags] == ["v1"]
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(REPO, branch="next/try")
    assert _status(error) == 409
    api.create_branch(REPO, branch="next/try", exist_ok=True)
    api.delete_branch(REPO, branch="next/try")
    for call in (lambda: config("next/try"), lambda: api.model_info(REPO, revision="0" * 40)):
        with pytest.raises(RevisionNotFoundError):
            call()
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(REPO, _add(a="1"), commit_message="nowhere", revision="next/try")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "absent.json")
    assert not api.file_exists(REPO, "absent.json") and api.file_exists(REPO, "config.json")


def test_a_pull_request_leaves_main_alone(api: HfApi, hub: LocalHub) -> None:
    before = api.model_info(REPO).sha
    commit = HfApi(token=hub.stranger_token).create_commit(REPO, _add(new="1"), commit_message="offer", create_pr=True)
    assert commit.pr_url.endswith("/me/model/discussions/1") and commit.pr_revision == "refs/pr/1"
    assert api.model_info(REPO).sha == before
    assert Path(hf_hub_download(REPO, "new.txt", revision=commit.pr_revision)).read_bytes() == b"1"
    listed = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [ref.ref for ref in listed.pull_requests] == ["refs/pr/1"]
    api.create_commit(REPO, _add(more="2"), commit_message="addition", revision="refs/pr/1")
    assert {"new.txt", "more.txt"} <= set(hub.repo(REPO).files("refs/pr/1"))
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(token=hub.reader_token).create_commit(REPO, _add(new="1"), commit_message="offer", create_pr=True)
    assert _status(error) == 403


def test_a_stale_parent_is_refused(api: HfApi, hub: LocalHub) -> None:
    parent = api.model_info(REPO).sha
    api.create_commit(REPO, _add(a="1"), commit_message="one", parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit(REPO, _add(b="1"), commit_message="two", parent_commit=parent)
    assert _status(error) == 412
    assert "a.txt" in hub.repo(REPO).files() and "b.txt" not in hub.repo(REPO).files()


def test_of_commits_at_the_same_time_one_wins(api: HfApi, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: object) -> Commit:
        time.sleep(0.02)
        return commit_to(*arguments)

    commit_to = Repo.commit
    monkeypatch.setattr(Repo, "commit", slow)
    parent = api.model_info(REPO).sha
    start, won = threading.Barrier(6), []

    def commit(number: int) -> None:
        start.wait()
        try:
            won.append(api.create_commit(REPO, _add(a=str(number)), commit_message="race", parent_commit=parent).oid)
        except HfHubHTTPError as error:
            assert error.response.status_code == 412

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [c.oid for c in hub.repo(REPO).commits()[:2]] == [*won, parent]


def test_files_and_folders_are_deleted(api: HfApi, hub: LocalHub) -> None:
    before = hub.repo(REPO).refs["refs/heads/main"]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, [*_add(a="1"), CommitOperationDelete("absent")], commit_message="no")
    assert hub.repo(REPO).refs["refs/heads/main"] == before, "half a commit"
    api.delete_file("config.json", REPO)
    api.delete_folder("sub", REPO)
    assert set(hub.repo(REPO).files()) == {".gitattributes", "README.md", "model.safetensors"}
    assert "config.json" in hub.repo(REPO).files(before)


def test_the_same_upload_again_changes_nothing(api: HfApi, hub: LocalHub, folder: Path) -> None:
    before = api.model_info(REPO).sha
    hub.requests.clear()
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert _seen(hub, "PUT", "/storage/") == [], "large files that are there are not sent again"
    after = hub.repo(REPO).commits()
    if NEW_CLIENT or after[0].oid == before:
        assert after[0].oid == before and not _seen(hub, "POST", "/commit/")
    else:  # it commits what it was told has not changed
        assert after[0].files == after[1].files and after[1].oid == before


def test_an_empty_commit_is_a_commit(api: HfApi, hub: LocalHub) -> None:
    """As on the Hub: sending nothing when nothing changed is the work of the client, and the server does not help."""
    before = hub.repo(REPO).commits()[0]
    answer = _post(hub, f"/api/models/{REPO}/commit/main", b'{"key": "header", "value": {"summary": "empty"}}\n')
    assert answer["commitOid"] != before.oid and hub.repo(REPO).files() == hub.repo(REPO).files(before.oid)


@pytest.mark.parametrize(
    "operation",
    [
        {"key": "lfsFile", "value": {"path": "b.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}},
        {"key": "file", "value": {"path": "b.txt", "encoding": "base64", "content": "%%%"}},
        {"key": "file", "value": {"path": "README.md", "encoding": "base64", "content": "LS0tCmE6IFsKLS0tCg=="}},
    ],
    ids=["large file that never came", "broken content", "card with broken metadata"],
)
def test_a_commit_is_all_or_nothing(api: HfApi, hub: LocalHub, operation: dict) -> None:
    good = {"key": "file", "value": {"path": "a.txt", "encoding": "base64", "content": "MQ=="}}
    lines = [{"key": "header", "value": {"summary": "half"}}, good, operation]
    before = hub.repo(REPO).refs["refs/heads/main"]
    with pytest.raises(HTTPError) as error:
        _post(hub, f"/api/models/{REPO}/commit/main", "\n".join(map(json.dumps, lines)).encode())
    assert error.value.code == 400 and hub.repo(REPO).refs["refs/heads/main"] == before


def test_cards(api: HfApi, hub: LocalHub) -> None:
    card = ModelCard.load(REPO)
    assert card.data.license == "apache-2.0"
    card.data.tags = ["timm", "decorrelation"]
    if NEW_CLIENT:
        card.push_to_hub(REPO)
        assert ModelCard.load(REPO).data.tags == ["timm", "decorrelation"]
    before = hub.repo(REPO).refs["refs/heads/main"]
    result = {"task": {"type": "image-classification"}, "dataset": {"name": "CIFAR-10"}, "metrics": []}
    incomplete = {"model-index": [{"name": "model", "results": [result]}]}
    for metadata in ("a: [", "- a list", "tags: one", json.dumps(incomplete)):
        text = f"---\n{metadata}\n---\n# A model\n"
        with pytest.raises(ValueError):
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=REPO)
    assert hub.repo(REPO).refs["refs/heads/main"] == before
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.upload_file(path_or_fileobj=b"# A model\n", path_in_repo="README.md", repo_id=REPO)


def test_spaces_live_beside_models(api: HfApi, hub: LocalHub) -> None:
    with pytest.raises((HfHubHTTPError, ValueError)):
        api.create_repo(REPO, repo_type="space", space_sdk="tkinter")
    api.create_repo(REPO, repo_type="space", space_sdk="gradio")
    files = {"app.py": b"import gradio\n", "weights.safetensors": WEIGHTS}
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api.create_commit(REPO, operations, commit_message="one", repo_type="space")
    space = hub.repo(f"spaces/{REPO}")
    assert set(space.files()) == {".gitattributes", "README.md", *files} and "app.py" not in hub.repo(REPO).files()
    found = api.space_info(REPO)
    assert (found.sdk, found.sha, found.private) == ("gradio", space.commits()[0].oid, False)
    for name, content in files.items():
        assert Path(hf_hub_download(REPO, name, repo_type="space")).read_bytes() == content
    assert [entry.path for entry in api.list_repo_tree(REPO, repo_type="space")] == sorted(space.files())
    for metadata in ("sdk: tkinter", "colorFrom: mauve", f"short_description: {'a' * 61}"):
        card = CommitOperationAdd("README.md", f"---\n{metadata}\n---\n".encode())
        with pytest.raises((HfHubHTTPError, ValueError)):
            api.create_commit(REPO, [card], commit_message="bad", repo_type="space")
    api.delete_repo(REPO, repo_type="space")
    assert set(hub.repos) == {REPO}


# --- Downloads, cache, offline ---


def test_timm_publishes_and_loads(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def outputs(name: str) -> torch.Tensor:
        with torch.no_grad():
            return timm.create_model(name, pretrained=True).eval()(torch.ones(1, 3, 160, 160))

    model = timm.create_model("test_vit", pretrained=False, num_classes=7).eval()
    push_to_hf_hub(model, "me/tiny", model_config={"label_names": list("abcdefg")})
    sha = hub.repo("me/tiny").commits()[0].oid
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 160, 160))
    assert torch.equal(outputs("hf-hub:me/tiny"), expected)
    hub.requests.clear()
    assert torch.equal(outputs(f"hf-hub:me/tiny@{sha}"), expected)
    assert [r.method for r in hub.requests if "/resolve/" in r.path or "/storage/" in r.path] in ([], ["HEAD", "HEAD"])

    hub.close()
    hub.use_in_process(monkeypatch, tmp_path, offline=True)
    assert torch.equal(outputs("hf-hub:me/tiny"), expected)
    hub.use_in_process(monkeypatch, tmp_path / "empty", offline=True)
    with pytest.raises(LocalEntryNotFoundError):
        outputs("hf-hub:me/tiny")


def test_other_processes(api: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    """`environment` turns a process to the Hub, logged in or not, and to its cache alone."""
    code = "import sys, huggingface_hub as h; print(h.snapshot_download('me/model'))"
    code += "; print(h.whoami()['name'] if h.get_token() else None)"

    def run(**how: object) -> subprocess.CompletedProcess[str]:
        environment = hub.environment(tmp_path / "elsewhere", **how)
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    online = run()
    assert online.returncode == 0, online.stderr
    path, user = online.stdout.split()
    assert Path(path, "model.safetensors").read_bytes() == WEIGHTS and path.startswith(str(tmp_path / "elsewhere"))
    assert user == "me"
    hub.close()
    offline = run(token=None, offline=True)
    assert offline.stdout.split() == [path, "None"], offline.stderr


def test_a_snapshot_is_complete_and_then_comes_from_the_cache(api: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    path = Path(snapshot_download(REPO))
    assert tmp_path in path.parents
    assert {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} == set(hub.repo(REPO).files())
    hub.requests.clear()
    assert snapshot_download(REPO) == str(path)
    assert not [r for r in hub.requests if r.method == "GET" and ("/resolve/" in r.path or "/storage/" in r.path)]


def test_a_hub_that_is_gone_is_gone_for_kept_connections_too(api: HfApi, hub: LocalHub) -> None:
    before = len(hub.requests)
    hub.close()
    with pytest.raises(CONNECTION_ERRORS):
        api.model_info(REPO)
    assert len(hub.requests) == before


# --- Failures ---


@needs_new_client
def test_a_broken_download_goes_on_where_it_broke(api: HfApi, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (constants, file_download):  # the client forgets an unfinished chunk, by default of 10 MiB
        monkeypatch.setattr(module, "DOWNLOAD_CHUNK_SIZE", 1024, raising=False)
    hub.fail("GET", "/storage/", "drop")
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS
    assert _seen(hub, "GET", "/storage/") == ["drop", 206]
    assert hub.requests[-1].headers["Range"] == f"bytes={len(WEIGHTS) // 2}-"


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [("bytes=3-9", 206, WEIGHTS[3:10]), ("bytes=-5", 206, WEIGHTS[-5:]), ("bytes=9999999-", 416, None)],
)
def test_ranges(api: HfApi, hub: LocalHub, asked: str, status: int, expected: bytes | None) -> None:
    request = urllib.request.Request(f"{hub.url}/{REPO}/resolve/main/model.safetensors", headers={"Range": asked})
    try:
        with urllib.request.urlopen(request) as answer:
            assert (answer.status, answer.read()) == (status, expected)
    except HTTPError as error:
        assert (error.code, error.headers["Content-Range"]) == (status, f"bytes */{len(WEIGHTS)}")


def test_large_files_need_a_signed_address(api: HfApi, hub: LocalHub) -> None:
    address = f"{hub.storage_url}/storage/{REPO}/{hashlib.sha256(WEIGHTS).hexdigest()}?signature="
    with urllib.request.urlopen(address + hub.signature) as answer:
        assert answer.read() == WEIGHTS
    with pytest.raises(HTTPError) as error:
        urllib.request.urlopen(address + "mine")
    assert error.value.code == 403


def test_a_short_download_is_noticed(api: HfApi, hub: LocalHub) -> None:
    hub.fail("GET", "/storage/", "truncate")
    with pytest.raises(OSError, match="[Cc]onsistency"):
        hf_hub_download(REPO, "model.safetensors")
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == WEIGHTS


def test_a_corrupt_download_passes_the_client(api: HfApi, hub: LocalHub) -> None:
    """The client compares sizes only: whoever publishes has to compare hashes, which the listing names."""
    hub.fail("GET", "/storage/", "corrupt")
    got = Path(hf_hub_download(REPO, "model.safetensors")).read_bytes()
    assert len(got) == len(WEIGHTS) and sum(a != b for a, b in zip(got, WEIGHTS, strict=True)) == 1
    (listed,) = api.get_paths_info(REPO, "model.safetensors")
    assert hashlib.sha256(got).hexdigest() != listed.lfs["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()


@pytest.mark.parametrize("kind", ["corrupt", "truncate"])
def test_a_corrupt_upload_is_refused(api: HfApi, hub: LocalHub, folder: Path, kind: str) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    before = dict(hub.repo(REPO).refs)
    hub.fail("PUT", "/storage/", kind)
    with pytest.raises(RuntimeError, match="model.safetensors"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.repo(REPO).refs == before and hub.repo(REPO).files()["model.safetensors"] == WEIGHTS
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.repo(REPO).files()["model.safetensors"] == WEIGHTS[::-1]


@needs_new_client
@pytest.mark.parametrize("kind", ["drop", "lost", 500, 429])
def test_an_interrupted_upload_is_tried_again(api: HfApi, hub: LocalHub, folder: Path, kind: int | str) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    hub.requests.clear()
    hub.fail("PUT", "/storage/", kind, times=2, retry_after=7)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert _seen(hub, "PUT", "/storage/") == [kind, kind, 200]
    assert hub.repo(REPO).files()["model.safetensors"] == WEIGHTS[::-1]
    assert len(hub.waits) == 2


@pytest.mark.parametrize("kind", [401, 403, 404, 409, 429, 500, "drop"])
@pytest.mark.parametrize("step", ["/preupload/", "/objects/batch", "/storage/", "/objects/verify", "/commit/"])
def test_a_failed_step_leaves_the_repository_as_it_was(
    api: HfApi, hub: LocalHub, folder: Path, step: str, kind: int | str
) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[::-1])
    before = dict(hub.repo(REPO).refs)
    hub.requests.clear()
    hub.fail("POST|PUT", step, kind, times=float("inf"))
    with pytest.raises((HfHubHTTPError, RuntimeError, *CONNECTION_ERRORS)) as error:
        api.upload_folder(repo_id=REPO, folder_path=folder)
    cause = error.value.__cause__ if isinstance(error.value, RuntimeError) else error.value
    if isinstance(kind, int):
        assert cause.response.status_code == kind
    else:
        assert isinstance(cause, CONNECTION_ERRORS)
    asked = [r.status for r in hub.requests if step in r.path]
    assert set(asked) == {kind} and hub.repo(REPO).refs == before


def test_a_commit_whose_answer_is_lost_is_complete(api: HfApi, hub: LocalHub) -> None:
    hub.fail("POST", "/commit/", "lost")
    with pytest.raises(CONNECTION_ERRORS):
        api.create_commit(REPO, _add(a="1", b="2"), commit_message="heard?")
    assert {"a.txt", "b.txt"} <= set(hub.repo(REPO).files())


@pytest.mark.parametrize("kind", [401, 403, 404, 429, 500, "drop"])
def test_a_failed_download(api: HfApi, hub: LocalHub, kind: int | str) -> None:
    hub.fail("HEAD", "/resolve/", kind, times=float("inf"))
    with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError, *CONNECTION_ERRORS)):
        hf_hub_download(REPO, "config.json")
    assert set(_seen(hub, "HEAD", "/resolve/")) == {kind} and not _seen(hub, "GET", "/resolve/")


def test_failures_count_and_carry_what_the_client_reads(api: HfApi, hub: LocalHub) -> None:
    hub.fail("GET", f"/api/models/{REPO}$", 404, code="RepoNotFound", after=1)
    assert api.repo_exists(REPO)
    assert not api.repo_exists(REPO)
    assert api.repo_exists(REPO)
    hub.fail("GET", f"/api/models/{REPO}$", 429, retry_after=30)
    with pytest.raises(HfHubHTTPError) as error:
        api.model_info(REPO)
    assert _status(error) == 429 and error.value.response.headers["Retry-After"] == "30"
    with pytest.raises(ValueError, match="explode"):
        hub.fail("GET", "/", "explode")


def test_what_the_server_does_not_speak_is_said(hub: LocalHub) -> None:
    with pytest.raises(HfHubHTTPError, match="does not know GET /api/datasets") as error:
        HfApi().dataset_info("me/data")
    assert _status(error) == 501
