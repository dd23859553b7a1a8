"""A Hugging Face hub on loopback: the routes that huggingface_hub requests, and the layouts of the real OPT repositories with tiny random weights."""

import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import small
import torch

from opt_np import OPTConfig

SMALL_FILES = (".json", ".txt")
TITLE = "Adding `safetensors` variant of this model"


class FakeHub:
    """repositories[repo][revision][file] = bytes. Keeps the requests; can be gated, and lie about contents (blobs)."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.discussions: dict[str, list[dict]] = {}
        self.requests: list[str] = []  # "GET /facebook/…", with the range asked for
        self.blobs: dict[str, bytes] = {}
        self.tokens_at_the_cdn: list[str] = []
        self.gated: set[str] = set()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, folder: Path, revision: str = "main") -> None:
        """Serves a folder's files as a revision of a repository."""
        self.repositories.setdefault(repo, {})[revision] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if path.startswith("/cdn/"):
            return self.send_blob(self.hub.blobs[path.removeprefix("/cdn/")], body)
        if path.startswith("/api/models/") and path.endswith("/discussions"):
            repo = path.removeprefix("/api/models/").removesuffix("/discussions")
            found = self.hub.discussions.get(repo, [])
            return self.send(200, json.dumps({"discussions": found, "count": len(found), "start": 0}).encode(), body)
        repo, _, rest = path.removeprefix("/").partition("/resolve/")
        if repo not in self.hub.repositories:
            return self.send(404, b"", body, {"X-Error-Code": "RepoNotFound"})
        if repo in self.hub.gated:
            return self.send(403, b"", body, {"X-Error-Code": "GatedRepo"})
        revisions = self.hub.repositories[repo]
        revision, file = next(((r, rest.removeprefix(r + "/")) for r in revisions if rest.startswith(r + "/")), ("", ""))
        commit = hashlib.sha1(f"{repo}{revision}".encode()).hexdigest()
        if not revision and rest[:40] in (known := {hashlib.sha1(f"{repo}{r}".encode()).hexdigest(): r for r in revisions}):
            revision, commit, file = known[rest[:40]], rest[:40], rest[41:]
        if not revision:
            return self.send(404, b"", body, {"X-Error-Code": "RevisionNotFound"})
        if file not in revisions[revision]:
            return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = revisions[revision][file]
        headers = {"X-Repo-Commit": commit}
        if file.endswith(SMALL_FILES):
            return self.send(200, data, body, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        etag = hashlib.sha256(data).hexdigest()  # LFS: the hub names the content and sends us to another host
        self.hub.blobs.setdefault(etag, data)
        away = self.hub.url.replace("127.0.0.1", "localhost") + f"/cdn/{etag}"
        return self.send(302, b"", body, headers | {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data)), "Location": away})

    def send_blob(self, data: bytes, body: bool) -> None:
        """A file of weights, from where the Range header says."""
        if self.headers.get("Authorization"):
            self.hub.tokens_at_the_cdn.append(self.headers["Authorization"])
        start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if "Range" in self.headers else 0
        ranged = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.send(206 if start else 200, data[start:], body, ranged)

    def send(self, status: int, data: bytes, body: bool, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def real_layouts(hub: FakeHub, folder: Path) -> dict[str, OPTConfig]:
    """Meta's repositories as they are on the hub: which names, which formats, which revisions."""
    pre, post = small.config(), small.config(do_layer_norm_before=False, word_embed_proj_dim=12)
    for repo, cfg, prefix, pr, shards, twins in (
        ("facebook/opt-125m", pre, "model.decoder.", "refs/pr/35", 1, True),
        ("facebook/opt-350m", post, "decoder.", "refs/pr/33", 1, False),
        ("facebook/opt-6.7b", pre, "decoder.", "refs/pr/31", 2, False),
        ("facebook/opt-2.7b", pre, "model.decoder.", None, 1, True),
        ("facebook/opt-30b", pre, "decoder.", None, 3, False),
    ):
        tensors = small.stored_as(small.named(cfg, prefix), "float16")
        main = repository(folder / repo / "main", cfg, tensors, prefix, shards, twins)
        hub.add(repo, main)
        if pr:
            hub.add(repo, bot_folder(folder / repo / "pr", cfg, tensors, prefix, shards, twins), pr)
    return {"facebook/opt-125m": pre, "facebook/opt-350m": post, "facebook/opt-6.7b": pre, "facebook/opt-2.7b": pre, "facebook/opt-30b": pre}


def repository(folder: Path, cfg: OPTConfig, tensors: dict, prefix: str, shards: int, twins: bool) -> Path:
    """main: config.json, generation_config.json, the tokenizer's four files, and pytorch_model.bin, whole or in shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cfg.to_dict() | {"torch_dtype": "float16"}))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}))
    small.tokenizer().save_pretrained(folder)
    state = {name: torch.from_numpy(a) for name, a in tensors.items()}
    if twins:
        state["lm_head.weight"] = state[f"{prefix}embed_tokens.weight"]  # one storage, two names
    names, parts = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)], split(state, shards)
    if shards == 1:
        torch.save(parts[0], folder / "pytorch_model.bin")
    else:
        for name, part in zip(names, parts, strict=True):
            torch.save(part, folder / name)
        index = {"metadata": {"total_size": 0}, "weight_map": {t: name for name, part in zip(names, parts, strict=True) for t in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def bot_folder(folder: Path, cfg: OPTConfig, tensors: dict, prefix: str, shards: int, twins: bool) -> Path:
    """The bot's pull request: safetensors alone, of two shared tensors the first name in the alphabet (lm_head.weight), the index unchanged."""
    metadata = {}
    if twins:
        tensors = {("lm_head.weight" if name == f"{prefix}embed_tokens.weight" else name): a for name, a in tensors.items()}
        metadata = {f"{prefix}embed_tokens.weight": "lm_head.weight"}
    names = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    parts = split(tensors, shards)
    for name, part in zip(names, parts, strict=True):
        small.write(folder, part, cfg, name, **metadata)
    (folder / "config.json").unlink()
    if shards > 1:
        index = {"metadata": {}, "weight_map": {t: name for name, part in zip(names, parts, strict=True) for t in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
    return folder


def split(tensors: dict, n: int) -> list[dict]:
    names = list(tensors)
    return [{name: tensors[name] for name in names[i::n]} for i in range(n)]
