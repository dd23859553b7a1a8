"""The first run on a hub id, against a hub on loopback that serves the layouts of the real repositories; each run is its own process."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import fake_hub
import numpy as np
import pytest
import small
from test_checkpoint import same

from opt_np import CheckpointError, OPTForCausalLM, OPTTokenizer, checkpoint, hub
from opt_np.tree import flatten

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def served():
    server = fake_hub.FakeHub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The real repositories, made once."""
    server = fake_hub.FakeHub()
    server.configs = fake_hub.real_layouts(server, tmp_path_factory.mktemp("repositories"))
    yield server
    server.close()


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Makes this process use a server and a cache of its own."""
    from huggingface_hub import constants

    def use(server=None, cache=tmp_path / "cache"):
        url = server.url if server else "http://127.0.0.1:9"
        for name, value in (("ENDPOINT", url), ("HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"),
                            ("HF_HUB_CACHE", str(cache)), ("HF_HUB_OFFLINE", server is None)):  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        return Path(cache)

    return use


def opt_np(*arguments, server=None, cache, **environment):
    """One command in its own process, with its own cache."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0" if server else "1", "HF_ENDPOINT": server.url if server else "http://127.0.0.1:9",
                   "PYTHONPATH": str(ROOT), "NO_PROXY": "*", **environment}  # fmt: skip
    return subprocess.run([sys.executable, "-m", "opt_np", *arguments], capture_output=True, text=True, env=environment, timeout=120)


# The first run


@pytest.mark.parametrize("repo", ["facebook/opt-125m", "facebook/opt-350m", "facebook/opt-6.7b", "facebook/opt-2.7b", "facebook/opt-30b"])
def test_the_first_run_and_then_offline(layouts, tmp_path, repo):
    command = ("generate", "--model", repo, "the cat", "--max-new-tokens", "5")
    first = opt_np(*command, server=layouts, cache=tmp_path, TQDM_POSITION="-1")  # progress bars although this is no terminal
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the cat")
    assert "%|" in first.stderr  # a progress bar
    layouts.requests.clear()
    again = opt_np(*command, server=layouts, cache=tmp_path)
    assert again.stdout == first.stdout
    assert again.stderr == ""
    assert layouts.requests == []  # what is in the cache is used as it is
    assert opt_np(*command, cache=tmp_path).stdout == first.stdout  # HF_HUB_OFFLINE=1


@pytest.mark.parametrize("repo", ["facebook/opt-125m", "facebook/opt-350m", "facebook/opt-6.7b", "facebook/opt-2.7b", "facebook/opt-30b"])
def test_every_repository_reads_to_its_weights(layouts, here, repo):
    here(layouts)
    cfg = layouts.configs[repo]
    params, read = checkpoint.load(repo)
    wanted = small.stored_as(small.named(cfg, ""), "float16")
    assert {name: a.tolist() for name, a in flatten(params).items()} == {name: a.astype("float32").tolist() for name, a in wanted.items()}
    assert read.num_hidden_layers == cfg.num_hidden_layers


@pytest.mark.parametrize("repo", ["facebook/opt-125m", "facebook/opt-350m", "facebook/opt-6.7b"])
def test_layers_are_read_from_the_cache_as_they_are_needed(layouts, here, repo):
    here(layouts)
    whole, streamed = (OPTForCausalLM.from_pretrained(repo, stream_layers=stream) for stream in (False, True))
    ids = small.ids(layouts.configs[repo])
    np.testing.assert_array_equal(streamed(ids).logits, whole(ids).logits)
    assert not isinstance(streamed.params["layers"], list)


def test_safetensors_come_from_the_bots_revision_and_the_rest_from_main(layouts, here):
    here(layouts)
    source = hub.find("facebook/opt-125m")
    assert [path.name for path in source.weights.iterdir()] == ["model.safetensors"]
    assert {"config.json", "generation_config.json"} <= {path.name for path in source.config.iterdir()}
    assert {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"} <= {path.name for path in source.tokenizer.iterdir()}
    assert not list(source.weights.parents[2].rglob("pytorch_model.bin"))


def test_an_explicit_revision_lacking_config_and_tokenizer(layouts, here):
    here(layouts)
    at_pr, at_main = (checkpoint.load("facebook/opt-125m", revision=r)[0] for r in ("refs/pr/35", "main"))
    assert same(at_pr, at_main)
    tok = OPTTokenizer.from_pretrained("facebook/opt-125m", revision="refs/pr/35")
    assert tok.encode("the cat") == small.tokenizer().encode("the cat")
    assert OPTForCausalLM.from_pretrained("facebook/opt-125m", revision="refs/pr/35").generation_config["eos_token_id"] == 2


def test_a_bot_of_another_repository_is_found_among_its_discussions(served, here, tmp_path):
    cfg = small.config()
    tensors = small.named(cfg)
    served.add("someone/tuned", fake_hub.repository(tmp_path / "main", cfg, tensors, "model.decoder.", 1, True))
    served.add("someone/tuned", fake_hub.bot_folder(tmp_path / "pr", cfg, tensors, "model.decoder.", 1, True), "refs/pr/7")
    stranger = {"num": 6, "author": {"name": "stranger"}, "title": fake_hub.TITLE, "status": "open", "isPullRequest": True,
                "createdAt": "2024-01-01T00:00:00.000Z", "repo": {"name": "someone/tuned", "type": "model"}}  # fmt: skip
    served.discussions["someone/tuned"] = [stranger, stranger | {"num": 7, "author": {"name": "SFconvertbot"}}]
    here(served)
    assert same(checkpoint.load("someone/tuned")[0], small.params(cfg))
    assert any("refs/pr/7/model.safetensors" in request for request in served.requests)
    assert not any("refs/pr/6" in request or "pytorch_model.bin" in request for request in served.requests)
    here(None)
    assert same(checkpoint.load("someone/tuned")[0], small.params(cfg))  # offline it is known which pull request was the bot's


def test_a_mirror_without_pull_requests_still_has_its_bin(served, here, tmp_path):
    cfg = small.config()
    served.add("facebook/opt-125m", fake_hub.repository(tmp_path / "main", cfg, small.named(cfg), "model.decoder.", 1, True))
    here(served)
    assert same(checkpoint.load("facebook/opt-125m")[0], small.params(cfg))


def test_a_repository_without_a_tokenizer(served, here, tmp_path, capsys):
    """Its weights can be used, online and offline; only what needs the tokenizer says that there is none."""
    from opt_np import cli

    served.add("someone/bare", small.folder(tmp_path / "bare", with_tokenizer=False))
    for server in (served, None):
        here(server)
        assert OPTForCausalLM.from_pretrained("someone/bare", backend="numpy").generate([[2, 9]], max_new_tokens=2).shape == (1, 4)
        assert cli.main(["info", "--model", "someone/bare"]) == 0
        assert "no tokenizer" in capsys.readouterr().out
        assert cli.main(["generate", "x", "--model", "someone/bare"]) == 1
        assert "has neither vocab.json" in capsys.readouterr().err


def test_safetensors_on_main_are_taken_first(served, here, tmp_path):
    served.add("someone/new", small.folder(tmp_path / "new"))
    here(served)
    assert same(checkpoint.load("someone/new")[0], small.params(small.config()))
    assert not any("discussions" in request or ".bin" in request for request in served.requests)


def test_a_bin_in_the_cache_is_used_without_asking(layouts, here, tmp_path):
    """As transformers 4 left it there."""
    cache = here(layouts)
    from huggingface_hub import hf_hub_download

    for file in ("config.json", "vocab.json", "merges.txt", "pytorch_model.bin"):
        hf_hub_download("facebook/opt-125m", file)
    here(None, cache)
    params, cfg = checkpoint.load("facebook/opt-125m")
    assert cfg.vocab_size == flatten(params)["embed_tokens.weight"].shape[0]


def test_download_brings_up_to_date(served, tmp_path):
    served.add("someone/new", small.folder(tmp_path / "old"))
    first = opt_np("download", "someone/new", server=served, cache=tmp_path / "cache")
    assert first.returncode == 0, first.stderr
    assert set(served.repositories["someone/new"]["main"]) <= {path.name for path in Path(first.stdout.split()[1]).iterdir()}
    served.requests.clear()
    again = opt_np("download", "someone/new", server=served, cache=tmp_path / "cache")
    assert again.stdout == first.stdout
    assert served.requests  # it asked
    assert not any("GET" in request and "cdn" in request for request in served.requests)  # and fetched nothing twice


# Downloads that break off


def test_a_killed_download_goes_on(served, tmp_path):
    served.add("someone/new", small.folder(tmp_path / "new", small.config(hidden_size=64)))
    data = served.repositories["someone/new"]["main"]["model.safetensors"]
    program = f"""
import os, threading, time
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1000
from opt_np import hub
import huggingface_hub.file_download as f
original = f.http_get
class Dying:
    def __init__(self, stream): self.stream, self.n = stream, 0
    def __getattr__(self, name): return getattr(self.stream, name)
    def write(self, data):
        self.stream.write(data); self.stream.flush(); self.n += len(data)
        if self.n > {len(data) // 2}: os._exit(9)
f.http_get = lambda url, stream, **k: original(url, Dying(stream), **k)
hub.find("someone/new")
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": served.url, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert killed.returncode == 9, killed.stderr
    (part,) = (tmp_path / "cache").rglob("*.part")
    assert 0 < part.stat().st_size < len(data)
    have = part.stat().st_size
    served.requests.clear()
    on = opt_np("generate", "--model", "someone/new", "the", "--max-new-tokens", "2", server=served, cache=tmp_path / "cache")
    assert on.returncode == 0, on.stderr
    assert [request for request in served.requests if request.startswith("GET /cdn/")] == [
        next(r for r in served.requests if r.endswith(f"bytes={have}-"))
    ]
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_damaged_download_is_refused_and_not_kept(served, here, tmp_path):
    served.add("someone/new", small.folder(tmp_path / "new"))
    here(served)
    data = served.repositories["someone/new"]["main"]["model.safetensors"]
    import hashlib

    etag = hashlib.sha256(data).hexdigest()
    served.blobs[etag] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(CheckpointError, match=f"someone/new/model.safetensors arrived with SHA-256 .*{etag}"):
        checkpoint.load("someone/new")
    served.blobs[etag] = data
    assert same(checkpoint.load("someone/new")[0], small.params(small.config()))


def test_a_token_stays_with_the_hub(served, tmp_path):
    served.add("someone/new", small.folder(tmp_path / "new"))
    run = opt_np("download", "someone/new", server=served, cache=tmp_path / "cache", HF_TOKEN="hf_secret")
    assert run.returncode == 0, run.stderr
    assert any("cdn" in request for request in served.requests)
    assert served.tokens_at_the_cdn == []


# What is wrong is said


def test_what_is_wrong_is_said(layouts, served, tmp_path):
    def told(*arguments, server=layouts):
        run = opt_np("generate", "x", "--model", *arguments, server=server, cache=tmp_path / "nothing")
        assert run.returncode == 1
        assert run.stdout == ""
        line = run.stderr.splitlines()[-1]
        assert line.startswith("opt-np: ")
        assert "Traceback" not in run.stderr
        return line

    assert "facebook/opt-9b is no folder here and no public model" in told("facebook/opt-9b")
    assert "no revision 'nowhere'" in told("facebook/opt-125m", "--revision", "nowhere")
    assert "HF_HUB_OFFLINE is set" in told("facebook/opt-125m", server=None)
    assert "HF_HUB_OFFLINE is set" in told("no-such-folder", server=None)
    assert "is not there" in told("./no-such-folder")
    served.add("someone/empty", small.folder(tmp_path / "empty"))
    del served.repositories["someone/empty"]["main"]["model.safetensors"]
    assert "someone/empty has no weights at main: none of model.safetensors" in told("someone/empty", server=served)
    served.gated.add("someone/empty")
    assert "licence" in told("someone/empty", server=served)


def test_a_cache_that_cannot_be_written_is_no_network_failure(served, here, tmp_path):
    served.add("someone/new", small.folder(tmp_path / "new"))
    (tmp_path / "file").write_text("")
    here(served, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"someone/new cannot be put into the cache .*set HF_HOME"):
        checkpoint.load("someone/new")


def test_a_hub_that_does_not_answer(here, served):
    url = served.url
    here(served)
    served.close()
    with pytest.raises(CheckpointError, match=rf"facebook/opt-125m is no folder here.*{url} cannot be reached \(Connect"):
        checkpoint.load("facebook/opt-125m")


@pytest.mark.parametrize("name", ["./facebook/opt-125m", "/facebook/opt-125m", "a/b/c", "../opt", "~/opt", "facebook/", "facebook/..", ""])
def test_a_path_is_never_asked_of_the_hub(name, here):
    here(None)
    assert not hub.is_hub_id(name)
    with pytest.raises(CheckpointError, match=r"is not there|is a file"):
        checkpoint.load(name or "./nothing")


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match="belongs to a hub id"):
        OPTForCausalLM.from_pretrained(small.folder(tmp_path), revision="main")


# download, convert and info


def test_convert(layouts, here, tmp_path, capsys):
    from opt_np import cli

    here(layouts)
    out = tmp_path / "out"
    assert cli.main(["convert", "facebook/opt-125m", str(out)]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert same(checkpoint.load(out)[0], checkpoint.load("facebook/opt-125m")[0])
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    assert (out / "vocab.json").read_bytes() == layouts.repositories["facebook/opt-125m"]["main"]["vocab.json"]
    assert (out / "generation_config.json").exists()
    assert cli.main(["convert", "facebook/opt-125m", str(out)]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert cli.main(["convert", str(out), str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    assert same(checkpoint.load(tmp_path / "wide")[0], checkpoint.load(out)[0])
    assert (tmp_path / "wide/model.safetensors").stat().st_size > 1.8 * (out / "model.safetensors").stat().st_size


def test_a_conversion_that_fails_leaves_room_for_the_next(tmp_path, capsys):
    from opt_np import cli

    cfg = small.config()
    params = small.params(cfg)
    params["layers"][0]["fc1"]["weight"][0, 0] = 1e6
    checkpoint.save(tmp_path / "model", params, cfg)
    small.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    for out in ("new", "empty"):
        assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / out), "--dtype", "float16"]) == 1
        assert "too large for float16" in capsys.readouterr().err
        assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / out), "--dtype", "float32"]) == 0


def test_info_of_a_hub_id(layouts, here, capsys):
    from opt_np import cli

    here(layouts)
    assert cli.main(["info", "--model", "facebook/opt-350m"]) == 0
    shown = capsys.readouterr().out
    assert "post-norm" in shown
    assert "stored as float16" in shown
    assert "facebook/opt-350m" in shown


@pytest.mark.parametrize("most", [1, 5000, 20000, 10**9])
def test_shards(tmp_path, most):
    """Saved in parts, over whatever stood there: HF's index, every tensor once, and nothing stale left."""
    cfg = small.config()
    small.folder(tmp_path)
    for seed in (1, 2, 3):
        checkpoint.save(tmp_path, small.params(cfg, seed), cfg, max_shard_bytes=most)
        assert same(checkpoint.load(tmp_path)[0], small.params(cfg, seed))
    files = sorted(path.name for path in tmp_path.glob("*model*"))
    if most == 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(files) == {"model.safetensors.index.json", *index["weight_map"].values()}
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in flatten(small.params(cfg)).values())
    checkpoint.save(tmp_path, small.params(cfg, 4), cfg)
    assert sorted(path.name for path in tmp_path.glob("*model*")) == ["model.safetensors"]


@pytest.mark.parametrize("dies_at", range(1, 9))
def test_a_save_that_dies_leaves_the_old_checkpoint_or_the_new(tmp_path, monkeypatch, dies_at):
    cfg = small.config()
    old, new = small.params(cfg, 1), small.params(cfg, 2)
    checkpoint.save(tmp_path, old, cfg, max_shard_bytes=20000)
    renames = 0
    replace = os.replace

    def dying(*args):
        nonlocal renames
        renames += 1
        if renames == dies_at:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", dying)
    with contextlib.suppress(KeyboardInterrupt):
        checkpoint.save(tmp_path, new, cfg, max_shard_bytes=20000)
    monkeypatch.undo()
    read = checkpoint.load(tmp_path)[0]
    assert same(read, old) or same(read, new)
    assert same(read, new) == (renames < dies_at or dies_at > len(list(tmp_path.glob("model-*"))) + 1)


def test_too_large_for_float16_leaves_nothing_behind(tmp_path):
    cfg = small.config()
    params = small.params(cfg)
    params["layers"][1]["fc2"]["weight"][0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"layers.1.fc2.weight: values too large for float16; save as float32"):
        checkpoint.save(tmp_path, params, cfg, "float16", max_shard_bytes=5000)
    assert list(tmp_path.iterdir()) == []
    checkpoint.save(tmp_path, params, cfg, "bfloat16")
    assert np.isfinite(flatten(checkpoint.load(tmp_path)[0])["layers.1.fc2.weight"]).all()
