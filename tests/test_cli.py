"""The command line: what it prints agrees with the API, and a user's mistake is one line on stderr, a status that is not 0, and no traceback."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import small

from opt_np import OPTForCausalLM, OPTTokenizer, checkpoint, cli, verify

COMMANDS = ("generate", "logits", "info", "verify", "download", "convert", "quantize", "train", "bench", "trace", "score", "embed", "explore", "plan")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Trained on little, so that it says letters and not broken bytes."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(small.TEXT)
    shape = (
        "--vocab-size 300 --hidden-size 16 --num-layers 1 --num-heads 2 --context 32 --steps 25 --warmup-steps 2 --learning-rate 2e-2 --batch-size 4"
    )
    assert cli.main(["train", "--text", str(folder / "text.txt"), "--out", str(folder / "model"), *shape.split()]) == 0
    return folder / "model"


@pytest.fixture
def run(capsys, monkeypatch):
    """opt-np in this process -> status, stdout, stderr."""

    def call(*words, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = cli.main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return call


def program(*words, **options):
    """opt-np as people start it."""
    done = subprocess.run([sys.executable, "-m", "opt_np", *map(str, words)], capture_output=True, text=True, encoding="utf-8", **options)
    return done.returncode, done.stdout, done.stderr


def assert_one_line(status, out, err, *words):
    assert status not in (0, None)
    assert err.count("\n") == 1, err
    assert err.startswith("opt-np")
    assert "Traceback" not in err
    assert all(str(word) in err for word in words), err
    assert out == ""


# As people start it


def test_generate_from_the_shell(model):
    status, out, err = program("generate", "the cat", "--model", model, "--max-new-tokens", "8", "--backend", "numpy")
    assert (status, err) == (0, "")
    assert out.startswith("the cat")
    assert len(out) > len("the cat\n")


def test_the_first_run_on_the_cpu_backend_says_what_it_waits_for(model, tmp_path):
    words, environment = ("generate", "the cat", "--model", model, "--max-new-tokens", "8"), {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    cold, warm = (program(*words, "--backend", "cpu", env=environment) for _ in range(2))
    assert cold[2] == "opt_fast: compiling kernels for this processor; it takes some seconds, once for each kind of weights\n"
    assert warm == (0, cold[1], "")
    assert cold[1] == program(*words, "--backend", "numpy")[1]


def test_logits_from_the_shell(model):
    status, out, err = program("logits", "the cat", "--model", model, "--backend", "numpy")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 1 + len(OPTTokenizer.from_pretrained(model).encode("the cat"))


def test_info_from_the_shell(model):
    status, out, err = program("info", "--model", model)
    assert (status, err) == (0, "")
    assert "1 pre-norm layers, hidden 16" in out


def test_train_from_the_shell(model, tmp_path):
    words = ("--text", model.parent / "text.txt", "--model", model, "--context", "16", "--steps", "3", "--batch-size", "2")
    status, out, err = program("train", *words, "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'run'}: step 3, loss ")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("words", [("generate", "x"), ("logits", "x"), ("info",)], ids=lambda words: words[0])
def test_a_missing_model_from_the_shell(words, tmp_path):
    assert_one_line(*program(*words, "--model", tmp_path / "nowhere"), tmp_path / "nowhere", "not there")


def test_a_missing_text_from_the_shell(tmp_path):
    assert_one_line(*program("train", "--text", tmp_path / "no.txt", "--out", tmp_path / "out"), tmp_path / "no.txt")


def test_bytes_that_are_no_text_from_the_shell(model):
    assert_one_line(*program("generate", os.fsdecode(b"a\xff"), "--model", model), "Unicode")


def test_a_warning_is_one_line_too(model):
    how = "--backend", "numpy", "--temperature", "0.5", "--max-new-tokens", "2"  # the first start of the kernels has a line of its own
    status, out, err = program("generate", "the", "--model", model, *how)
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith("opt-np: warning: temperature")
    assert out.startswith("the")


# What it prints


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_what_it_does(run, command):
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: opt-np {command}")
    described = [line for line in out.splitlines() if line.startswith("  --")]
    assert described
    assert "None)" not in out.replace("(default: None)", "")


def test_help_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(command in out for command in COMMANDS)


def test_generate_prints_what_the_api_generates(run, model):
    api, tok = OPTForCausalLM.from_pretrained(model), OPTTokenizer.from_pretrained(model)
    ids = api.generate([tok.encode("the dog")], max_new_tokens=12)
    assert run("generate", "the dog", "--model", model, "--max-new-tokens", 12) == (0, tok.decode(ids[0], skip_special_tokens=True) + "\n", "")


def test_generate_reads_a_prompt_from_standard_input(run, model):
    words = ("--model", model, "--max-new-tokens", 5)
    assert run("generate", "-", *words, stdin="the dog") == run("generate", "the dog", *words)


def test_a_seed_draws_the_same_text(run, model):
    words = ("generate", "the", "--model", model, "--max-new-tokens", 20, "--do-sample", "--temperature", 1.5, "--top-k", 0)
    first, again, other = (run(*words, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_logits_saves_what_the_api_computes(run, model, tmp_path):
    status, out, _ = run("logits", "the cat sat", "--model", model, "--top", 3, "--out", tmp_path / "rows.npy", "--backend", "numpy")
    api, tok = OPTForCausalLM.from_pretrained(model), OPTTokenizer.from_pretrained(model)
    ids = tok.encode("the cat sat")
    rows = np.load(tmp_path / "rows.npy")
    np.testing.assert_array_equal(rows, api([ids]).logits[0])
    likeliest = repr(tok.decode([int(rows[-1].argmax())]))
    assert status == 0
    assert likeliest in out.splitlines()[-1]
    assert f"{np.exp(rows[-1]).max() / np.exp(rows[-1]).sum():.3f}" in out.splitlines()[-1]


def test_logits_takes_as_many_candidates_as_there_are(run, model):
    status, out, _ = run("logits", "the", "--model", model, "--top", 9999)
    assert status == 0
    assert out.splitlines()[-1].count("' 0.") + out.splitlines()[-1].count('" 0.') == 300


def test_info_counts_the_parameters(run, model):
    status, out, _ = run("info", "--model", model)
    count = OPTForCausalLM.from_pretrained(model).num_parameters()
    assert status == 0
    assert f"{count:,}" in out
    assert "300 rows, 300 tokens" in out
    assert "tied to embed_tokens" in out
    assert "context      32 tokens" in out


@pytest.mark.parametrize(("changes", "words"), [({"tie_word_embeddings": False}, "lm_head"), ({"do_layer_norm_before": False}, "post-norm")], ids=str)
def test_info_tells_the_variant(run, tmp_path, changes, words):
    assert words in run("info", "--model", small.folder(tmp_path, small.config(**changes)))[1]


def test_info_names_a_head(run, tmp_path):
    cfg = small.config()
    small.folder(tmp_path)
    checkpoint.save(tmp_path, {**small.params(cfg), "score": {"weight": np.ones((2, 16), np.float32)}}, cfg)
    assert "score" in run("info", "--model", tmp_path)[1]


def test_training_resumes_from_the_command_line(run, model, tmp_path):
    words = ("train", "--text", model.parent / "text.txt", "--model", model, "--context", 16, "--batch-size", 2, "--out", tmp_path)
    assert run(*words, "--steps", 2)[0] == 0
    assert_one_line(*run(*words, "--steps", 4), tmp_path, "--resume")
    assert run(*words, "--steps", 4, "--resume")[0] == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


# Mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-new-tokens", 0), ("max_new_tokens=0",)),
        (("--max-new-tokens", -3), ("max_new_tokens=-3",)),
        (("--max-new-tokens", 99), ("99", "max_position_embeddings=32")),
        (("--do-sample", "--temperature", 0), ("temperature=0",)),
        (("--do-sample", "--temperature", -1), ("temperature=-1",)),
        (("--do-sample", "--temperature", "nan"), ("temperature=nan",)),
        (("--do-sample", "--top-p", 0), ("top_p=0",)),
        (("--do-sample", "--top-p", 1.5), ("top_p=1.5",)),
        (("--do-sample", "--top-k", -1), ("top_k=-1",)),
        (("--repetition-penalty", 0), ("repetition_penalty=0",)),
        (("--backend", "cuda"), ("cuda",)),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_a_bad_option_of_generate(run, model, options, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "opt_fast.ops_cuda", None)  # as where torch is absent
    assert_one_line(*run("generate", "the", "--model", model, "--max-new-tokens", 5, *options), *words)


@pytest.mark.parametrize("command", ["generate", "logits"])
def test_text_too_long(run, model, command):
    assert_one_line(*run(command, small.TEXT, "--model", model), "32")


@pytest.mark.parametrize("command", ["generate", "logits"])
def test_text_that_is_not_unicode(run, model, command):
    assert_one_line(*run(command, "a\udcff", "--model", model), "Unicode")


def test_logits_into_a_folder_that_is_not_there(run, model, tmp_path):
    assert_one_line(*run("logits", "the", "--model", model, "--out", tmp_path / "no" / "x.npy"), tmp_path / "no" / "x.npy")


@pytest.mark.parametrize("words", [("generate", "x"), ("logits", "x"), ("info",)], ids=lambda words: words[0])
def test_no_model_at_all(run, words, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "SHIPPED", tmp_path / "weights")
    assert_one_line(*run(*words), "--model", tmp_path / "weights")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
@pytest.mark.parametrize("words", [("generate", "x"), ("logits", "x")], ids=lambda words: words[0])
def test_a_model_that_lacks_a_file(run, tmp_path, words, name):
    (small.folder(tmp_path) / name).unlink()
    assert_one_line(*run(*words, "--model", tmp_path), tmp_path, name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_model_with_a_damaged_file(run, tmp_path, name):
    (small.folder(tmp_path) / name).write_bytes(b"{ \xff")
    assert_one_line(*run("generate", "x", "--model", tmp_path), tmp_path / ("vocab.json" if name == "merges.txt" else name), name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ("--text",)),
        (("--text", "EMPTY"), ("empty.txt", "empty")),
        (("--text", "EMPTY", "TEXT"), ("empty.txt", "empty")),
        (("--text", "TEXT", "--steps", 0), ("--steps", "0")),
        (("--text", "TEXT", "--save-every", 0), ("--save-every", "0")),
        (("--text", "TEXT", "--accumulate", 0), ("--accumulate", "0")),
        (("--text", "TEXT", "--eval-every", 5), ("--eval-every", "--eval-text")),
        (("--text", "TEXT", "--schedule", "square"), ("--schedule", "square")),
        (("--text", "TEXT", "--save-dtype", "int8"), ("--save-dtype", "int8")),
        (("--text", "TEXT", "--vocab-size", 9), ("vocab_size=9",)),
        (("--text", "TEXT", "--vocab-size", 300, "--hidden-size", 10, "--num-heads", 4), ("10", "4")),
        (("--text", "TEXT", "--vocab-size", 300, "--context", 4096), ("4096",)),
        (("--text", "TEXT", "--model", "nowhere"), ("nowhere",)),
        (("--task", "classify"), ("--data",)),
        (("--task", "qa", "--data", "nowhere"), ("nowhere",)),
        (("--task", "classify", "--data", "TEXT"), ("text.txt:1",)),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_a_mistake_in_training(run, model, tmp_path, options, words):
    (tmp_path / "empty.txt").touch()
    files = {"TEXT": model.parent / "text.txt", "EMPTY": tmp_path / "empty.txt"}
    assert_one_line(*run("train", "--out", tmp_path / "run", *(files.get(word, word) for word in options)), *words)
    assert not (tmp_path / "run").exists()


def test_an_out_that_is_a_file(run, model):
    path = model.parent / "text.txt"
    assert_one_line(*run("train", "--text", path, "--out", path, "--vocab-size", 300, "--context", 16), path)


def test_ctrl_c_is_one_line(run, model, monkeypatch):
    monkeypatch.setattr(OPTForCausalLM, "stream", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    status, _, err = run("generate", "x", "--model", model)
    assert (status, err) == (130, "opt-np: stopped\n")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "COMMAND"),
        (("fly",), "'fly'"),
        (("generate",), "prompt"),
        (("generate", "x", "--temperature", "warm"), "'warm'"),
        (("generate", "x", "--backend", "tpu"), "'tpu'"),
        (("logits", "x", "--top", "few"), "'few'"),
        (("train",), "--out"),
        (("train", "--out", "x", "--task", "sing"), "'sing'"),
        (("info", "--loud"), "--loud"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else words,
)
def test_a_word_that_the_program_does_not_know(run, words, named):
    assert_one_line(*run(*words), named)


@pytest.mark.parametrize("top", [0, -1])
def test_fewer_candidates_than_one(run, model, top):
    assert_one_line(*run("logits", "the", "--model", model, "--top", top), top)


def test_a_negative_seed(run, model):
    assert_one_line(*run("generate", "the", "--model", model, "--max-new-tokens", 3, "--do-sample", "--seed", -1), "seed", -1)


def test_verify_tells_what_failed_to_a_reader_that_has_seen_enough(monkeypatch):
    failed = verify.Check(verify.LAYERS, "logits", 1.0, 0.1, verify.FAIL)
    monkeypatch.setattr(verify, "checks", lambda *_: iter([failed]))
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(["verify"]) == 1


def test_closed_streams(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["logits", "-", "--model", str(model)]) == 1
    assert "standard input, and that is closed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["info"]) == 0


def test_what_pytorch_does_not_know_is_not_compared_with_it(run, model, tmp_path):
    assert run("quantize", model, tmp_path / "int8", "--kind", "int8")[0] == 0
    for words in (("verify", tmp_path / "int8"), ("trace", "the", "--model", tmp_path / "int8", "--against", "torch")):
        assert_one_line(*run(*words), tmp_path / "int8", "is int8", "made from")


@pytest.mark.parametrize("words", [("logits",), ("trace", "--backend", "numpy"), ("embed",)], ids=lambda words: words[0])
def test_a_file_of_numpy_is_written_whole_or_not_at_all(words, run, model, tmp_path, monkeypatch):
    out = tmp_path / "rows.bin"
    command = (words[0], "the cat", "--model", model, *words[1:], "--out")
    status, said, _ = run(*command, out)
    assert (status, list(tmp_path.iterdir())) == (0, [out])
    assert words[0] == "logits" or f"{out}: " in said  # the former prints a table and no more
    before = out.read_bytes()

    def full(file, *_, **__):
        file.write(b"some")
        raise OSError("No space left on device")

    for name in ("save", "savez"):
        monkeypatch.setattr(np, name, full)
    assert run(*command, out)[0] == 1
    assert (out.read_bytes(), list(tmp_path.iterdir())) == (before, [out])
    assert_one_line(*run(*command, tmp_path), tmp_path, "is a folder")
    assert_one_line(*run(*command, os.devnull), os.devnull)


def test_a_reader_that_has_seen_enough_is_no_mistake(model):
    import subprocess

    command = f"{sys.executable} -m opt_np generate 'the cat' --model {model} --backend numpy --max-new-tokens 20 | head -c 3"
    run = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "the", "")


@pytest.mark.parametrize("words", ["logits hi --out", "generate hi --model", "convert MODEL", "train --text t.txt --out", "score --file"])
def test_an_empty_name_is_not_the_current_folder(words, run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said, error = run(*(str(model) if word == "MODEL" else word for word in words.split()), "")
    assert (status, said) == (2, "")
    assert "it is empty; give a name" in error
    assert not [*tmp_path.iterdir()]


def test_standard_input_is_read_as_a_file_is(run, model, tmp_path, monkeypatch, capsys):
    for number, text in enumerate((b"\xef\xbb\xbfthe dog\r\nthe cat", b"the dog\rthe cat")):
        (tmp_path / "text.txt").write_bytes(text)
        found = run("score", "--model", model, "--file", tmp_path / "text.txt")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), newline=""))
        assert found[0] == 0, number
        assert cli.main(["score", "--model", str(model), "-"]) == 0
        assert capsys.readouterr().out == found[1]


def test_nobody_has_to_listen_to_stderr(model, tmp_path):
    command = [sys.executable, "-m", "opt_np", "generate", "the", "--model", str(model), "--max-new-tokens", "3", "--temperature", "2"]
    reading, writing = os.pipe()
    os.close(reading)
    found = [subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, check=False) for stderr in (subprocess.DEVNULL, writing)]
    os.close(writing)
    closed = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, check=False)
    assert found[0].stdout.startswith(b"the")
    assert [(ran.returncode, ran.stdout) for ran in (*found, closed)] == [(0, found[0].stdout)] * 3


def test_a_link_leads_to_what_is_written(run, model, tmp_path):
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    assert run("explore", "the cat", "--model", model, "--out", tmp_path / "link.html")[0] == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
