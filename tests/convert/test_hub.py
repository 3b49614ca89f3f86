"""Checkpoints by Hugging Face repo id, downloaded from a fake hub on loopback."""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants

import moss_jax
from moss_jax import CheckpointError
from moss_jax.convert import configs, hub, load_config, open_model
from moss_jax.text import Tokenizer

ROOT = Path(__file__).parents[2]
REPO = "some-team/some-model"


@dataclasses.dataclass
class Hub:
    """State of a fake hub.

    Attributes:
      url: of the server.
      revisions: repo id → revision → path → content; a commit hash is the hash of its revision's name.
      errors: repo id → status and X-Error-Code of every response about it.
      lost: paths that are listed but cannot be downloaded.
      requests: method and path of each request.
      tokens: bearer tokens received.
    """

    url: str = ""
    revisions: dict[str, dict[str, dict[str, bytes]]] = dataclasses.field(default_factory=dict)
    errors: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    lost: set[str] = dataclasses.field(default_factory=set)
    requests: list[str] = dataclasses.field(default_factory=list)
    tokens: set[str] = dataclasses.field(default_factory=set)

    def downloads(self) -> list[str]:
        """Names of the files that were sent."""
        return [
            line.rpartition("/")[2]
            for line in self.requests
            if line.startswith("GET") and "/resolve/" in line
        ]


def commit_of(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The endpoints that `snapshot_download` uses: info, tree and files of a revision of a model."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, format: str, *args) -> None:
        pass

    def answer(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if authorization := self.headers.get("authorization"):
            self.hub.tokens.add(authorization.removeprefix("Bearer "))
        parts = [urllib.parse.unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            _, _, team, name, verb, *rest = parts
        else:
            team, name, verb, *rest = parts
        repo = f"{team}/{name}"
        if repo in self.hub.errors:
            return self.fail(*self.hub.errors[repo])
        if repo not in self.hub.revisions:
            return self.fail(404, "RepoNotFound")
        by_commit = {commit_of(name): name for name in self.hub.revisions[repo]}
        revision = by_commit.get(rest[0], rest[0])
        if revision not in self.hub.revisions[repo]:
            return self.fail(404, "RevisionNotFound")
        files = self.hub.revisions[repo][revision]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self.send({"id": repo, "sha": commit_of(revision), "siblings": siblings})
        if verb == "tree":
            return self.send(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                ]
            )
        assert verb == "resolve", self.path
        path = "/".join(rest[1:])
        if path not in files or path in self.hub.lost:
            return self.fail(404, "EntryNotFound")
        return self.send(files[path], {"X-Repo-Commit": commit_of(revision)})

    def send(self, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def server() -> Iterator[Hub]:
    """An empty hub on loopback."""
    served = Hub()
    handler = type("HandlerOfOneHub", (Handler,), {"hub": served})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served.url = f"http://127.0.0.1:{http.server_port}"
        yield served
        http.shutdown()
        thread.join()


def use_endpoint(monkeypatch, url: str) -> None:
    """Sets the endpoint, as HF_ENDPOINT does before `huggingface_hub` is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def closed_port() -> str:
    """A URL that refuses connections."""
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


@pytest.fixture
def hub_here(server, tmp_path, monkeypatch) -> Hub:
    """The hub, set as the endpoint of `huggingface_hub` in this process, with an empty cache."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    use_endpoint(monkeypatch, server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return server


@pytest.fixture
def files(golden) -> dict[str, bytes]:
    """A repository with the golden checkpoint, a tokenizer, and files that are not needed."""
    names = ("config.json", "model.safetensors")
    return {name: (golden.folder / name).read_bytes() for name in names} | {
        "tokenizer.json": Tokenizer.moss_tiny().content,
        "README.md": b"A model.",
        "modeling.py": b"raise RuntimeError",
        "pytorch_model.bin": b"0",
        "original/params.json": b"{}",
    }


def small(pool_stride: int) -> dict[str, bytes]:
    """A repository with only a config, identified by its pool stride."""
    config, _ = configs.to_hugging_face(moss_jax.PRESETS["moss_tiny"]())
    return {"config.json": json.dumps(config | {"mllama_pool_stride": pool_stride}).encode()}


def same_parameters(a, b) -> bool:
    pairs = zip(nnx.to_flat_state(nnx.state(a)), nnx.to_flat_state(nnx.state(b)), strict=True)
    return all(
        p == q and np.asarray(x[...]).tobytes() == np.asarray(y[...]).tobytes() for (p, x), (q, y) in pairs
    )


def error_of(checkpoint, **how) -> str:
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(checkpoint, **how)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------ resolves


def test_loads_by_repo_id(hub_here, files, golden):
    hub_here.revisions[REPO] = {"main": files}
    opened = open_model(REPO, dtype="float32")
    assert same_parameters(opened.model, golden.model)
    assert opened.tokenizer.content == files["tokenizer.json"]
    assert opened.name == REPO
    assert sorted(hub_here.downloads()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert same_parameters(moss_jax.load(REPO), golden.model)
    assert load_config(REPO) == golden.model.config
    assert len(hub_here.downloads()) == 3


def test_a_revision_is_an_argument_or_follows_an_at_sign(hub_here):
    hub_here.revisions[REPO] = {"main": small(1), "v2": small(2), "refs/pr/4": small(4)}
    assert load_config(REPO).compressor.stride == 1
    assert load_config(REPO, revision="v2").compressor.stride == 2
    assert load_config(f"{REPO}@v2").compressor.stride == 2
    assert load_config(f"{REPO}@refs/pr/4").compressor.stride == 4
    assert load_config(f"{REPO}@{commit_of('v2')}").compressor.stride == 2
    with pytest.raises(CheckpointError, match="not a Hugging Face repo id"):
        hub.resolve(f"{REPO}@v2", revision="v2")


def test_a_folder_of_that_name_takes_precedence(hub_here, tmp_path, monkeypatch):
    hub_here.revisions[REPO] = {"main": small(1)}
    monkeypatch.chdir(tmp_path)
    for name in (REPO, f"{REPO}@v2"):
        Path(name).mkdir(parents=True)
        assert hub.resolve(name) == hub.resolve(Path(name)) == Path(name)
    assert "local folder, which has no revision; leave out 'v1'" in error_of(f"{REPO}@v1")
    assert "local folder, which has no revision; leave out 'v1'" in error_of(REPO, revision="v1")
    assert not hub_here.requests


def test_the_token_is_sent(hub_here, monkeypatch):
    hub_here.revisions[REPO] = {"main": small(1)}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.resolve(REPO)
    assert hub_here.tokens == {"hf_secret"}


def test_the_cache_is_used_offline_and_without_network(hub_here, monkeypatch):
    hub_here.revisions[REPO] = {"main": small(1)}
    folder = hub.resolve(REPO)
    before = len(hub_here.requests)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert hub.resolve(REPO) == folder
        assert len(hub_here.requests) == before
        message = error_of("some-team/another@v3")
        assert "does not hold all of some-team/another@v3" in message
        assert "unset HF_HUB_OFFLINE" in message
    use_endpoint(monkeypatch, closed_port())
    assert hub.resolve(REPO) == folder


READ_CONFIG = """
import sys
from moss_jax.convert import load_config
print(load_config(sys.argv[1]).compressor.stride)
"""


def test_environment_variables_are_honoured(server, tmp_path):
    server.revisions[REPO] = {"main": small(3)}
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    for more in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": closed_port()}):
        done = subprocess.run(
            [sys.executable, "-c", READ_CONFIG, REPO],
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "3\n"
    assert list((tmp_path / "home" / "hub").glob("models--some-team--some-model"))
    assert server.downloads() == ["config.json"]


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["", "tiny", "./tiny", "/a/b", "a/b/c", "a b/c", "a/b--c", "@v1", "tiny@v1"])
def test_neither_a_folder_nor_a_repo_id(hub_here, name):
    message = error_of(name)
    assert message.startswith(f"{name} is not a checkpoint: there is no such folder")
    assert "such as OpenMOSS-Team/moss-video-preview-realtime-sft" in message
    assert not hub_here.requests


def test_a_file_is_no_checkpoint(hub_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some-team").mkdir()
    Path(REPO).touch()
    assert "there is no such folder" in error_of(REPO)
    assert not hub_here.requests


def test_a_missing_repository(hub_here):
    message = error_of(REPO)
    assert message.startswith(f"there is no folder {REPO}, and {hub_here.url} has no such repository")
    assert "HF_TOKEN" in message


def test_a_missing_revision(hub_here):
    hub_here.revisions[REPO] = {"main": small(1)}
    assert f"{REPO} has no revision 'v9'" in error_of(f"{REPO}@v9")


def test_a_gated_repository(hub_here):
    hub_here.errors[REPO] = 403, "GatedRepo"
    assert f"request access at {hub_here.url}/{REPO}" in error_of(REPO)


def test_a_missing_file(hub_here, files):
    hub_here.revisions[REPO] = {"main": files}
    hub_here.lost = {"tokenizer.json"}
    message = error_of(REPO)
    assert message.startswith(f"{REPO} cannot be downloaded from {hub_here.url}: ")
    assert "tokenizer.json" in message


def test_a_repository_without_a_checkpoint(hub_here):
    hub_here.revisions[REPO] = {"main": {"README.md": b"", "other.json": b"{}"}}
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        moss_jax.load(REPO)


def test_a_hub_that_fails_or_does_not_answer(hub_here, monkeypatch):
    hub_here.errors[REPO] = 500, "Oops"
    message = error_of(REPO)
    assert f"{REPO} cannot be downloaded from {hub_here.url}; check the network connection" in message
    assert "500" in message
    use_endpoint(monkeypatch, closed_port())
    message = error_of(REPO)
    assert "check the network connection and HF_ENDPOINT" in message
    assert "Connection refused" in message
