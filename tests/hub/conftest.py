"""Tiny checkpoints, processes without the package, and a stand-in for the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_efficient.conversion.architecture import load
from hf_efficient.hub.export import CodeExport, export, render_code
from hf_efficient.registry import ARCHITECTURES, ArchitectureSpec, architecture_of

WORDS = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(94))]
SMALL = {
    **{"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
# Fields without which an architecture's patch would be absent or incomplete.
PATCHED: dict[str, dict[str, Any]] = {
    "hfe_decoder": {"stem_layers": [1], "bhyt_final": "bhyt"},
    "hfe_bhyt": {"bhyt_seq_len": 16},
    "hfe_monarch_bert": {"monarch": {"block_size": 4}},
    "hfe_monarch_roberta": {"monarch": {"block_size": 4}},
    "hfe_monarch_vit": {"monarch": {"block_size": 4, "pad": "pre"}, "image_size": 16, "patch_size": 4},
    "hfe_monarch_wan": {
        **{"text_dim": 24, "text_len": 6, "freq_dim": 8, "in_channels": 4, "out_channels": 4},
        "monarch": {"h_reduce": 2},
    },
}
IMAGE_PROCESSOR = {"do_resize": True, "image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
MODEL_TYPES = [architecture.model_type for architecture in ARCHITECTURES]


def _small(architecture: ArchitectureSpec) -> dict[str, Any]:
    """Fields of `SMALL` that the configuration class has."""
    names = {field.name for field in fields(architecture.config_class)}
    return {name: value for name, value in SMALL.items() if name in names}


def write_checkpoint(folder: Path, model_type: str, seed: int = 0, **changed: Any) -> Path:
    """A tiny random model with code and tokenizer or image processor, as a conversion writes it."""
    architecture = next(a for a in ARCHITECTURES if a.model_type == model_type)
    torch.manual_seed(seed)
    config = architecture.config_class(**{**_small(architecture), **PATCHED.get(model_type, {}), **changed})
    model = architecture.auto_classes[architecture.main_auto_class](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # initial weights are so small that every output looks alike
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_()  # a head that begins at zero
    model.save_pretrained(folder)
    family = load(architecture.family)
    if family.reads_text:
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder)
    elif family.image_processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2))
    export(folder)
    return folder


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    return write_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One exported checkpoint for each architecture; read only."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {model_type: write_checkpoint(root / model_type, model_type) for model_type in MODEL_TYPES}


@pytest.fixture
def checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint of STEM that a test may change."""
    return Path(shutil.copytree(checkpoints["hfe_stem"], tmp_path / "model"))


@cache
def _rendered(model_type: str) -> CodeExport:
    architecture = architecture_of(model_type)
    assert architecture is not None
    return render_code(architecture)


@pytest.fixture
def rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render the code that `verify` compares with once per architecture and not in each test: it takes a second."""
    monkeypatch.setattr("hf_efficient.hub.verify.render_code", lambda found: _rendered(found.model_type))


Runner = Callable[..., dict[str, Any]]


@pytest.fixture
def run_python(tmp_path: Path) -> Runner:
    """Run a script in a fresh process, away from the checkout; returns the JSON that it prints last.

    With `package=False` hf_efficient can be neither imported nor found. Names in `absent` cannot be imported either.
    Imports are looked for in the folder `first` before any other, by default in that of the running transformers.
    """

    def run(
        script: str,
        *args: Any,
        package: bool = False,
        absent: tuple[str, ...] = (),
        python: str = sys.executable,
        first: str | None = None,
        **env: str,
    ) -> dict[str, Any]:
        blocked = [*([] if package else ["hf_efficient"]), *absent]
        path = [str(Path(__file__).parents[2])] if package else []
        running = str(Path(transformers.__file__).parents[1]) if python == sys.executable else None
        # Only where Python would not find it, as in a folder that PYTHONPATH names.
        prelude = (
            f"import sys; sys.path[:0] = [p for p in [{first or running!r}] if p and p not in sys.path]; "
            f"sys.path += {path}; sys.modules.update(dict.fromkeys({blocked}))\n"
        )
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HFE_", "PYTHON", "TRITON"))}
        caches = {"HF_HOME": str(tmp_path / "hf_home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
        done = subprocess.run(
            [python, "-I", "-X", "faulthandler", "-c", prelude + script, *map(str, args)],
            cwd=tmp_path,
            env={**inherited, **caches, "HF_HUB_OFFLINE": "1", **env},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    return run


@dataclass
class StandInHub:
    """What the stand-in stores: commits of each repository, newest last, and large files by their SHA-256."""

    url: str = ""
    token: str = "right-token"
    private: dict[str, bool] = field(default_factory=dict)
    commits: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    refuses_large_files: set[str] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": self.token, "HF_HUB_OFFLINE": "0"}

    def create(self, repo: str, private: bool) -> None:
        self.private[repo] = private
        self.branches[repo] = {}
        self.commits[repo] = []
        self.commit(repo, "main", {".gitattributes": b""})

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((repo, len(self.commits[repo]), sorted(files))).encode()).hexdigest()
        self.commits[repo].append((sha, files))
        self.branches[repo][branch] = sha
        return sha

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        """Files of a revision, or None when there is no such revision."""
        sha = self.branches[repo].get(revision, revision)
        return next((files for known, files in self.commits[repo] if known == sha), None)


class _Handler(BaseHTTPRequestHandler):
    """The endpoints that huggingface_hub calls to create, upload to, list and read a model repository."""

    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, *args: Any) -> None:
        """Log no requests."""

    def _reply(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self._reply(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _dispatch(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, handler in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                groups = match.groupdict()
                if "repo" in groups and groups["repo"] not in self.hub.commits:
                    return self._error(404, "RepoNotFound")
                # The address of a large upload is signed, so it takes no token.
                if "oid" not in groups and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
                    return self._error(401, "Unauthorized")
                return handler(self, body=body, **groups)
        return self._error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if repo in self.hub.commits:
            return self._reply(409, {"url": f"{self.hub.url}/{repo}"})
        # The real Hub takes a newer and an older name for the visibility.
        private = wanted["visibility"] == "private" if "visibility" in wanted else bool(wanted.get("private"))
        self.hub.create(repo, private)
        return self._reply(200, {"url": f"{self.hub.url}/{repo}"})

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        files = self.hub.files(repo, revision)
        if files is None:
            return self._error(404, "RevisionNotFound")
        sha = self.hub.branches[repo].get(revision, revision)
        siblings = [{"rfilename": name} for name in sorted(files)]
        info = {"_id": repo, "id": repo, "sha": sha, "siblings": siblings, "gated": False, "tags": [], "downloads": 0}
        return self._reply(200, {**info, "private": self.hub.private[repo]})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self.hub.files(repo, revision) or {}
        self._reply(200, [self._entry(name, data) for name, data in sorted(files.items())])

    def _paths_info(self, body: bytes, repo: str, revision: str) -> None:
        files = self.hub.files(repo, revision) or {}
        asked = re.findall(r"[\w./-]+", unquote(body.decode()))
        self._reply(200, [self._entry(name, data) for name, data in sorted(files.items()) if name in asked])

    @staticmethod
    def _entry(name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._reply(200, {"files": files})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{repo}/{wanted['oid']}", "header": {}}}
            stored = wanted["oid"] in self.hub.large
            objects.append({**wanted, **({} if stored else {"actions": upload})})
        self._reply(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, repo: str, oid: str) -> None:
        if repo in self.hub.refuses_large_files:
            return self._error(403, "Expired")
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        return self._reply(200)

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        files = dict(self.hub.files(repo, revision) or {})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(repo, revision, files)
        self._reply(200, {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "success": True})

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        start = json.loads(body or b"{}").get("startingPoint", "main")
        self.hub.branches[repo][branch] = self.hub.branches[repo].get(start, start)
        self._reply(200, {})

    def _resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        files = self.hub.files(repo, revision)
        if files is None:
            return self._error(404, "RevisionNotFound")
        commit = {"X-Repo-Commit": self.hub.branches[repo].get(revision, revision)}
        if file not in files:
            return self._reply(404, b"", {**commit, "X-Error-Code": "EntryNotFound"})
        data = files[file]
        headers = {**commit, "ETag": f'"{_git_hash(data)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self._reply(200, data, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._reply(206, data[start:stop], headers)

    def _yaml(self, body: bytes) -> None:
        self._reply(200, {"errors": [], "warnings": []})

    def _whoami(self, body: bytes) -> None:
        self._reply(200, {"name": "tester", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    _API = r"/api/models/(?P<repo>[^/]+/[^/]+)"
    ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
        ("POST", r"/api/repos/create", _create),
        ("POST", r"/api/validate-yaml", _yaml),
        ("GET", r"/api/whoami-v2", _whoami),
        ("GET", _API, _info),
        ("GET", _API + r"/revision/(?P<revision>[^/]+)", _info),
        ("GET", _API + r"/tree/(?P<revision>[^/]+)", _tree),
        ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", _paths_info),
        ("POST", _API + r"/preupload/(?P<revision>[^/]+)", _preupload),
        ("POST", _API + r"/commit/(?P<revision>[^/]+)", _commit),
        ("POST", _API + r"/branch/(?P<branch>[^/]+)", _branch),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _lfs_batch),
        ("PUT", r"/lfs/(?P<repo>[^/]+/[^/]+)/(?P<oid>\w+)", _lfs_put),
        ("GET HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _resolve),
    )


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    """A stand-in for the Hub on the loopback interface, empty at first."""
    store = StandInHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": store}))
    store.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield store
    server.shutdown()
    server.server_close()
