"""A Hugging Face Hub on loopback, for tests with the real ``huggingface_hub`` client (0.23 and later, without xet).

    with LocalHub() as hub:
        subprocess.run([...], env=hub.environment(tmp_path))  # or hub.use_in_process(monkeypatch, tmp_path)
        hub.fail("PUT", "/storage/", "drop")  # the next upload of a large file breaks in the middle
        assert hub.repo("me/name").files()["config.json"] == b"{}"

Models, and Spaces under `spaces/OWNER/NAME`. As on the Hub, large files live on a host of their own (here: another
port) behind signed URLs: the client must not send its token there.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import unquote

import hub_protocol
import hub_transfer  # noqa: F401  adds its routes
import pytest
from hub_repository import Answer, HubError, Repo

# Bearer token -> user and role of the token, as whoami-v2 names them.
USERS = {"hf_writer": ("me", "write"), "hf_reader": ("me", "read"), "hf_stranger": ("stranger", "write")}

MESSAGES = {
    401: "Invalid credentials in Authorization header",
    403: "Authorization error.",
    404: "Not found",
    409: "Another conflicting operation is in progress",
    412: "A commit has happened since. Please refresh and try again.",
    429: "Too many requests",
    500: "Internal Server Error",
}


class Request(NamedTuple):
    """One line of the log. ``status`` is the HTTP status, or "drop" or "lost" where the client got no answer."""

    method: str
    path: str
    status: int | str
    user: str | None
    headers: Message  # looked up in any case


@dataclass
class Failure:
    method: str
    pattern: str
    kind: int | str
    times: float
    after: int
    code: str | None
    retry_after: int


@dataclass
class LocalHub:
    """The server: ``url`` while the context is open, the tokens of three users, a log, and failures on demand.

    ``token`` writes to "me/...", ``reader_token`` belongs to the same user and may only read, ``stranger_token`` to
    somebody else who sees public repositories and may open pull requests there.
    """

    token: str = "hf_writer"
    reader_token: str = "hf_reader"
    stranger_token: str = "hf_stranger"
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # seconds that the client of use_in_process wanted to wait
    signature: str = field(default_factory=lambda: secrets.token_hex(8))

    def __enter__(self) -> LocalHub:
        self.lock = threading.RLock()
        self._failures: list[Failure] = []
        self._connections: set[socket.socket] = set()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            server.hub = self  # type: ignore[attr-defined]
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Goes away, also from clients that keep a connection open. Repositories and log stay readable."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        with self.lock:
            for connection in self._connections:
                _hang_up(connection)
        self._servers = []

    def repo(self, repo_id: str) -> Repo:
        """The repository as it is now: ``files(revision)``, ``commits(revision)``, ``refs``, ``private``.

        A Space is called ``spaces/OWNER/NAME``.

        Raises:
            KeyError: No such repository.
        """
        return self.repos[repo_id]

    def fail(
        self,
        method: str,
        pattern: str,
        kind: int | str,
        *,
        times: float = 1,
        after: int = 0,
        code: str | None = None,
        retry_after: int = 0,
    ) -> None:
        """Lets requests go wrong.

        Args:
            method: Regular expression for the whole method, such as ``"GET|HEAD"``.
            pattern: Regular expression searched in the decoded path with its query. Large files are at
                ``/storage/<repository>/<sha256>``, where they are uploaded (PUT) and downloaded (GET).
            kind: An HTTP status; "drop" (the connection breaks in the middle of the body, sent or received);
                "corrupt" (a bit flips in the middle of it); "truncate" (half of it is missing and its length says so);
                "lost" (the work is done, the answer never arrives).
            times: How often; ``float("inf")`` for always.
            after: Matching requests that pass before the first failure.
            code: X-Error-Code that comes with a status, such as "RepoNotFound".
            retry_after: Seconds named by a 429.
        """
        if not isinstance(kind, int) and kind not in ("drop", "corrupt", "truncate", "lost"):
            raise ValueError(f"unknown kind of failure {kind!r}")
        self._failures.append(Failure(method, pattern, kind, times, after, code, retry_after))

    def due(self, method: str, path: str) -> Failure | None:
        with self.lock:
            for failure in self._failures:
                if not re.fullmatch(failure.method, method) or not re.search(failure.pattern, unquote(path)):
                    continue
                if failure.after > 0:
                    failure.after -= 1
                elif failure.times > 0:
                    failure.times -= 1
                    return failure
        return None

    def environment(self, cache_dir: Path, token: str | None = "hf_writer", *, offline: bool = False) -> dict[str, str]:
        """Environment of a subprocess whose client talks to this Hub, logged in with ``token`` or not at all (None)."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache_dir),
            "HF_HUB_CACHE": str(cache_dir / "hub"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",  # the server speaks git-LFS
            "HF_HUB_OFFLINE": str(int(offline)),
            **({} if token is None else {"HF_TOKEN": token}),
        }

    def use_in_process(
        self,
        monkeypatch: pytest.MonkeyPatch,
        cache_dir: Path,
        token: str | None = "hf_writer",
        *,
        offline: bool = False,
    ) -> None:
        """Does for this process what `environment` does for another one, although the client is imported already.

        The client's waits before it tries again are noted in ``waits`` and skipped.
        """
        from huggingface_hub import file_download, hf_api
        from huggingface_hub.utils import _http

        settings = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache_dir / "hub"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": offline,
            "HF_TOKEN_PATH": str(cache_dir / "token"),
        }
        for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "huggingface_hub"]:
            for name in settings.keys() & vars(module).keys():  # modules of older clients have copies of the constants
                monkeypatch.setattr(module, name, settings[name])
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)  # of the module's functions, such as create_repo
        for name in [k for k in os.environ if k.startswith(("HF_TOKEN", "HUGGING")) or "proxy" in k.lower()]:
            monkeypatch.delenv(name)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": self.waits.append}))
        # The shared session of older clients reads the offline mode when it is made.
        getattr(_http, "close_session", getattr(_http, "reset_sessions", None))()


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the client was first
        connection.shutdown(socket.SHUT_RDWR)


def _damaged(data: bytes, kind: int | str | None) -> bytes:
    middle = len(data) // 2
    if kind == "corrupt" and data:
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    return data[:middle] if kind == "truncate" else data


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub: LocalHub = self.server.hub  # type: ignore[attr-defined]
        with self.hub.lock:
            self.hub._connections.add(self.connection)

    def finish(self) -> None:
        with self.hub.lock:
            self.hub._connections.discard(self.connection)
        super().finish()

    def log_message(self, *arguments: Any) -> None:
        pass  # hub.requests is the log

    def _body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        remaining = int(self.headers.get("Content-Length") or 0)
        while remaining and (piece := self.rfile.read(min(remaining, 1 << 16))):
            yield piece
            remaining -= len(piece)

    def _serve(self) -> None:
        failure = self.hub.due(self.command, self.path)
        kind = failure.kind if failure else None
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        user, role = USERS.get(token, (None, None))

        def note(status: int | str) -> None:  # before the client can know, or a test would race with the log
            self.hub.requests.append(Request(self.command, self.path, status, user, self.headers))

        if kind == "drop" and self.command in ("POST", "PUT"):
            note("drop")
            self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
            self.close_connection = True
            return _hang_up(self.connection)
        received = b"".join(self._body())
        if self.command != "GET":
            received = _damaged(received, kind)
        try:
            if failure and isinstance(kind, int):
                headers = {"Retry-After": str(failure.retry_after)} if kind == 429 else {}
                raise HubError(kind, MESSAGES.get(kind, "Injected failure"), failure.code, headers)
            if token and user is None:
                raise HubError(401, MESSAGES[401])
            answer = hub_protocol.answer(self.hub, self.command, self.path, self.headers, received, user, role)
        except HubError as error:
            answer = error.answer
        if kind == "lost" or (kind == "drop" and self.command == "HEAD"):
            note(kind)
            self.close_connection = True
            return _hang_up(self.connection)
        note("drop" if kind == "drop" else answer.status)
        self._send(answer, kind)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, answer: Answer, kind: int | str | None) -> None:
        body = _damaged(answer.body, kind) if self.command == "GET" else answer.body
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return _hang_up(self.connection)
        self.wfile.write(body)
