"""Finds a model's files: in a folder, or in a repository of the Hugging Face hub, by way of the cache that all tools share.

Cached files are used as they are, without a connection. Otherwise the weights are looked for at the requested revision (main) as safetensors,
then on the pull request in which the hub's own bot offers safetensors (most of Meta's OPT repositories have them only there), then as
pytorch_model.bin, TensorFlow's and Flax's files. The configuration and the tokenizer come from main if the revision lacks them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from opt_np.checkpoint import TOKENIZER_FILES, WEIGHTS, CheckpointError, model_folder, shards, write_text

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TOKENIZER = (("vocab.json", "merges.txt"), ("tokenizer.json",))  # either is enough; the other tokenizer files are fetched too, if there are any
BOT, BOT_TITLE = "SFconvertbot", "Adding `safetensors` variant of this model"
# The bot's pull requests on Meta's repositories, listed here to save a search.
BOT_REVISION = {"facebook/opt-125m": "refs/pr/35", "facebook/opt-350m": "refs/pr/33", "facebook/opt-1.3b": "refs/pr/25",
                "facebook/opt-6.7b": "refs/pr/31", "facebook/opt-13b": "refs/pr/28"}  # fmt: skip


class Source(NamedTuple):
    """The folders of a model's weights, of its config.json and generation_config.json, and of its tokenizer; often the same one."""

    name: str
    weights: Path
    config: Path
    tokenizer: Path


def is_hub_id(name: str | Path) -> bool:
    """Whether a name that is not a path here can be a repository's, such as "facebook/opt-125m"."""
    return isinstance(name, str) and not os.path.exists(name) and bool(HUB_ID.fullmatch(name)) and ".." not in name


def find(name: str | Path, revision: str | None = None, weights: bool = True, tokenizer: bool = True, refresh: bool = False) -> Source:
    """The folders of a model; downloads what is not cached, and with refresh always asks the hub. Raises CheckpointError.

    A folder is used as it is. weights=False or tokenizer=False: these are not looked for; the config's folder is returned for them.
    """
    if not is_hub_id(name):
        if revision is not None:
            raise CheckpointError(f"revision={revision!r} belongs to a hub id; {name} is read as a folder, which has one state")
        folder = model_folder(name)
        return Source(str(name), folder, folder, folder)
    repo, wanted = str(name), revision or "main"
    if not refresh:
        with contextlib.suppress(NotCached):
            return located(repo, wanted, weights, tokenizer, cached)
    with explained(repo, wanted):
        is_there(repo, wanted)
        return located(repo, wanted, weights, tokenizer, downloaded)


def is_there(repo: str, revision: str) -> None:
    """Asks the hub once, so that one which does not answer fails at once: hf_hub_download would retry again and again."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    with contextlib.suppress(EntryNotFoundError):
        get_hf_file_metadata(hf_hub_url(repo, "config.json", revision=revision))


def located(repo: str, revision: str, weights: bool, tokenizer: bool, get: Callable[[str, str, str], Path | None]) -> Source:
    """The search, the same in the cache and on the hub: get(repo, file, revision) returns the file's path, or None if the repository lacks it."""
    config, at = first_folder(get, repo, [("config.json",)], revision)
    if config is None:
        raise missing(get, repo, f"{repo} has no config.json at {revision}; is it a model's repository?")
    get(repo, "generation_config.json", at)
    words = config
    if tokenizer:
        found, at = first_folder(get, repo, TOKENIZER, revision)
        if found is None and get is cached and not all(known_absent(repo, file) for file in ("vocab.json", "tokenizer.json")):
            raise NotCached(repo)
        for file in TOKENIZER_FILES if found is not None else ():
            get(repo, file, at)
        words = found or config  # a model need not have a tokenizer: reading one raises the error
    return Source(repo, weight_folder(get, repo, revision) if weights else config, config, words)


def first_folder(get: Any, repo: str, alternatives: Any, revision: str) -> tuple[Path | None, str]:
    """The folder of the first alternative whose files all exist, and their revision: the one given, or else main."""
    for at in dict.fromkeys((revision, "main")):
        for files in alternatives:
            paths = [get(repo, file, at) for file in files]
            if all(paths):
                return paths[0].parent, at
    return None, ""


def weight_folder(get: Any, repo: str, revision: str) -> Path:
    """The cache's folder of the revision with the weights: safetensors, the bot's safetensors, then the older formats."""
    for at, files in places(get, repo, revision):
        for file in files:
            path = get(repo, file, at)
            if path is None:
                continue
            if file.endswith(".index.json") and not all(get(repo, shard, at) for shard in shards(path)):
                raise missing(get, repo, f"{repo} at {at}: {file} names shards that are not there")
            return path.parent
    raise missing(get, repo, f"{repo} has no weights at {revision}: none of {', '.join(WEIGHTS)}")


def places(get: Any, repo: str, revision: str) -> Iterator[tuple[str, list[str]]]:
    """Revisions, best first, and the files to look for in each. In the cache, formats that cannot be read here are skipped."""
    safetensors = [file for file in WEIGHTS if "safetensors" in file]
    yield revision, safetensors
    if revision == "main" and (bot := bot_revision(repo, get is downloaded)):
        yield bot, safetensors
    yield revision, [file for file in WEIGHTS if file not in safetensors and (get is downloaded or readable(file))]


def readable(file: str) -> bool:
    """Whether this weights file can be read here: TensorFlow's needs h5py."""
    return ".h5" not in file or importlib.util.find_spec("h5py") is not None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any(all((folder / file).exists() for file in files) for files in TOKENIZER)


def bot_revision(repo: str, ask: bool) -> str | None:
    """The revision of the bot's open pull request that adds safetensors: known for Meta's repositories, searched for others."""
    import huggingface_hub

    note = repository_folder(repo) / "bot_revision"  # records what was found, for when the hub is not asked
    if repo in BOT_REVISION or not ask:
        return BOT_REVISION.get(repo) or (note.read_text().strip() if note.exists() else None)
    try:
        for discussion in huggingface_hub.HfApi().get_repo_discussions(repo, author=BOT, discussion_type="pull_request", discussion_status="open"):
            if discussion.author == BOT and discussion.title == BOT_TITLE:
                note.parent.mkdir(parents=True, exist_ok=True)
                write_text(note, str(discussion.git_reference))
                return discussion.git_reference
    except Exception:  # only a better format is lost: the search continues with the others, and fails if the hub cannot be reached at all
        return None
    return None


class NotCached(Exception):
    """The cache alone does not have the answer."""


def missing(get: Any, repo: str, message: str) -> Exception:
    """The error for a missing file: final if the hub was asked, else NotCached, which makes the caller ask it."""
    return CheckpointError(message) if get is downloaded else NotCached(repo)


def cached(repo: str, file: str, revision: str) -> Path | None:
    """The path of a file in the cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def known_absent(repo: str, file: str) -> bool:
    """Whether the cache remembers that main has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return try_to_load_from_cache(repo, file) is _CACHED_NO_EXIST


def downloaded(repo: str, file: str, revision: str) -> Path | None:
    """The path of the file in the cache, downloaded if it is missing or has changed; None if the repository lacks it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    try:
        if not file.endswith((".json", ".txt")):  # a weights file
            fetch_blob(repo, file, revision)
        return Path(hf_hub_download(repo, file, revision=revision))
    except LocalEntryNotFoundError:  # the hub could not be asked
        raise
    except RevisionNotFoundError:
        if revision == BOT_REVISION.get(repo):  # a mirror without pull requests: only a better format is lost
            return None
        raise
    except EntryNotFoundError:
        return None


def fetch_blob(repo: str, file: str, revision: str) -> None:
    """Puts a large file where hf_hub_download looks for it; resumes a killed download, and checks the hub's SHA-256.

    (huggingface_hub by itself restarts a killed download.)
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    meta = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
    if meta.etag is None or meta.size is None:
        return  # hf_hub_download raises the error
    folder = repository_folder(repo)
    blob, part = folder / "blobs" / meta.etag, folder / "blobs" / f"{meta.etag}.part"
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder.name / f"{meta.etag}.part.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with open(part, "ab") as stream:
            if stream.tell() > meta.size:
                stream.truncate(0)
            same_host = meta.location.startswith(f"{constants.ENDPOINT}/")  # an access token is for the hub, not for a host that it redirects to
            headers = build_hf_headers() if same_host else {}
            http_get(meta.location, stream, resume_size=stream.tell(), headers=headers, expected_size=meta.size, displayed_filename=f"{repo}/{file}")
        if len(meta.etag) == 64 and (found := sha256(part)) != meta.etag:
            part.unlink()
            raise CheckpointError(f"{repo}/{file} arrived with SHA-256 {found}, the hub says {meta.etag}; it was removed: download it again")
        os.replace(part, blob)


def repository_folder(repo: str) -> Path:
    """The cache's folder of a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def sha256(path: Path) -> str:
    """A file's digest, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def explained(repo: str, revision: str) -> Iterator[None]:
    """Turns errors in reaching the hub into a CheckpointError of one sentence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except CheckpointError:
        raise
    except GatedRepoError:
        raise CheckpointError(f"{repo} asks for its licence to be accepted: do that on {constants.ENDPOINT}/{repo}, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo} is no folder here and no public model on {constants.ENDPOINT}; check the name, or `hf auth login` for a private one"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision!r}; leave it out for main, or name a branch, a tag, a commit or refs/pr/N") from None
    except Exception as error:
        cause = error.__cause__ or error
        offline = isinstance(cause, OfflineModeIsEnabled)
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ConnectionError | TimeoutError | HfHubHTTPError):
            raise CheckpointError(
                f"{repo} cannot be put into the cache {constants.HF_HUB_CACHE}: {cause}. Make room, or set HF_HOME to another folder"
            ) from None
        if not offline and not isinstance(cause, OSError | HfHubHTTPError) and not type(cause).__module__.startswith("http"):
            raise
        reason = "HF_HUB_OFFLINE is set" if offline else f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no answer'}"
        raise CheckpointError(
            f"{repo} is no folder here and not whole in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached ({reason}). "
            f"Go online once (opt-np download {repo}), or name a folder"
        ) from None
