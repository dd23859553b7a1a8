"""Training: the loss falls, a run killed anywhere resumes to the same bits, and data that cannot be used is named by file and line."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from opt_np import CheckpointError, OPTForQuestionAnswering, OPTForSequenceClassification, checkpoint
from opt_np import train as train_module
from opt_np.tasks import DataError, LanguageModelling, QuestionAnswering, bits_per_byte, indices, read_examples, read_texts, span_f1
from opt_np.train import SHAPE, STATE, Options, train
from opt_np.tree import flatten

TINY = {"vocab_size": 300, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "context": 16, "batch_size": 2, "accumulate": 2, "steps": 40,
        "save_every": 5, "warmup_steps": 4, "dropout": 0.1, "learning_rate": 1e-2, "seed": 3}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(small.TEXT)
    return str(path)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("run") / "whole"
    train(options(out, text))
    return out


def options(out, text=None, **changes):
    from_text = text and "data" not in changes and changes.get("task", "lm") == "lm"
    tiny = {name: value for name, value in TINY.items() if "model" not in changes or name not in SHAPE}
    return Options(**{**tiny, "out": str(out), "text": (text,) if from_text else (), **changes})


def command(out, text, *more):
    flags = [word for name, value in TINY.items() for word in ("--" + name.replace("_", "-"), str(value))]
    return [sys.executable, "-m", "opt_np", "train", "--text", text, "--out", str(out), *flags, *more]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def wait_for_lines(out, n, process):
    """Returns once the run has logged n steps, or ended."""
    give_up = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < give_up:
        if (out / "log.jsonl").exists() and (out / "log.jsonl").read_bytes().count(b"\n") >= n:
            return
        time.sleep(0.001)


def assert_same_run(out, whole):
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    for name in ("model.safetensors", "config.json", "vocab.json", "merges.txt"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    mine, theirs = load_file(out / STATE), load_file(whole / STATE)
    assert {name: a.tobytes() for name, a in mine.items()} == {name: a.tobytes() for name, a in theirs.items()}


# Resuming


def test_killed_at_random_moments_and_resumed(text, whole, tmp_path):
    out, rng, killed = tmp_path / "run", random.Random(5), 0
    for least in (2, 9, 23):  # before anything is saved, then after the first and the fourth checkpoint
        process = subprocess.Popen(command(out, text, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for_lines(out, least, process)
        time.sleep(rng.random() * 0.02)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert killed >= 1
    subprocess.run(command(out, text, "--resume"), check=True, capture_output=True)
    assert_same_run(out, whole)


class Killed(BaseException):
    """Not an Exception: nothing in the package may catch it."""


@pytest.mark.filterwarnings("ignore:.*holds no training run yet")  # where the kill came before the first save
@pytest.mark.parametrize("n", [1, 4, 5, 6, 7, 8, 9, 23, 27, 28, 29])
def test_killed_at_the_nth_rename_and_resumed(text, whole, tmp_path, monkeypatch, n):
    """Files are replaced by renaming: four of the tokenizer, the log, then state, model and config at every save."""
    replace, calls = os.replace, 0

    def maybe(*args):
        nonlocal calls
        calls += 1
        if calls == n:
            raise Killed
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", maybe)
        with pytest.raises(Killed):
            train(options(tmp_path / "run", text))
    train(options(tmp_path / "run", text, resume=True))
    assert_same_run(tmp_path / "run", whole)


def signalled_at(step, patch, times=1):
    """Ctrl-C, pressed during a step."""
    real = train_module.train_step

    def train_step(run, options, now):
        if now == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return real(run, options, now)

    patch.setattr(train_module, "train_step", train_step)


def test_interrupted_and_resumed(text, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signalled_at(11, patch)
        assert train(options(tmp_path, text))["step"] == len(log(tmp_path)) == 12
    train(options(tmp_path, text, resume=True))
    assert_same_run(tmp_path, whole)


def test_a_second_ctrl_c_stops_at_once(text, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signalled_at(11, patch, times=2)
        with pytest.raises(KeyboardInterrupt):
            train(options(tmp_path, text))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(options(tmp_path, text, resume=True))
    assert_same_run(tmp_path, whole)


def test_ctrl_c_saves_and_ends_well(text, tmp_path):
    process = subprocess.Popen(command(tmp_path, text, "--steps", "100000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path, 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "the same command with --resume goes on" in err
    assert out.startswith(f"{tmp_path}: step {len(log(tmp_path))}, loss ")
    assert checkpoint.load(tmp_path)[1].vocab_size == 300


def test_more_steps_may_be_asked_for(text, tmp_path):
    train(options(tmp_path, text, steps=6, schedule="constant"))
    train(options(tmp_path, text, steps=9, schedule="constant", resume=True))
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 10))


def test_resuming_a_finished_run_changes_nothing(text, whole):
    before = (whole / "log.jsonl").read_bytes(), (whole / "model.safetensors").read_bytes()
    assert train(options(whole, text, resume=True))["step"] == 40
    assert ((whole / "log.jsonl").read_bytes(), (whole / "model.safetensors").read_bytes()) == before


def test_a_run_from_a_model_goes_on_without_it_but_not_from_another(text, tmp_path):
    model, out = str(small.folder(tmp_path / "model")), tmp_path / "run"
    train(options(out, text, model=model, steps=1))
    with pytest.raises(ValueError, match=f"was trained with --model {model}; resume it with the same"):
        train(options(out, text, model="another", steps=2, resume=True))
    assert train(options(out, text, model=model, steps=2, resume=True))["step"] == 2
    assert train(options(out, text, model=None, steps=3, resume=True))["step"] == 3


def test_a_shape_for_a_model_that_has_one_is_said_to_do_nothing(text, tmp_path):
    with pytest.warns(UserWarning, match="--hidden-size, --num-heads: no effect beside --model"):
        train(options(tmp_path / "run", text, model=str(small.folder(tmp_path / "model")), steps=1, hidden_size=64, num_heads=8))


def test_resume_without_a_run_starts_one_and_says_so(text, tmp_path):
    with pytest.warns(UserWarning, match="holds no training run yet"):
        train(options(tmp_path, text, steps=2, resume=True))
    assert len(log(tmp_path)) == 2


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 3}, {"accumulate": 1}, {"seed": 4}, {"dropout": 0.0}, {"learning_rate": 1e-3}, {"schedule": "linear"}, {"hidden_size": 32}],
    ids=str,
)
def test_resuming_with_another_option_is_refused_by_name(text, whole, change):
    (name,) = change
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=f"was trained with {flag} {TINY.get(name, 'cosine')}; resume it with the same"):
        train(options(whole, text, resume=True, **change))


@pytest.mark.parametrize("place", [0, len(small.TEXT) // 2, len(small.TEXT) - 4])
def test_resuming_with_other_text_is_refused(tmp_path, place):
    path = tmp_path / "text.txt"
    path.write_text(small.TEXT)
    train(options(tmp_path / "run", str(path), steps=1, batch_size=1))
    path.write_text(small.TEXT[:place] + "!" + small.TEXT[place + 1 :])
    with pytest.raises(ValueError, match="other data"):
        train(options(tmp_path / "run", str(path), steps=2, batch_size=1, resume=True))


def test_a_state_cut_short_is_named(text, tmp_path):
    train(options(tmp_path, text, steps=1))
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"train_state\.safetensors cannot be read"):
        train(options(tmp_path, text, steps=2, resume=True))


def test_a_full_disk_leaves_the_state_that_was_there(text, tmp_path, monkeypatch):
    train(options(tmp_path, text, steps=1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".safetensors"}

    def full(*_):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=r"train_state\.safetensors.* cannot be written: No space left"):
        train(options(tmp_path, text, steps=2, resume=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".safetensors"} == before


def test_a_run_is_not_overwritten_without_resume(text, whole):
    before = (whole / STATE).read_bytes()
    with pytest.raises(ValueError, match="--resume") as error:
        train(options(whole, text))
    assert str(whole) in str(error.value)
    assert (whole / STATE).read_bytes() == before


# Learning


def test_the_same_seed_draws_the_same_curve(text, whole, tmp_path):
    train(options(tmp_path, text, save_every=100))
    assert_same_run(tmp_path, whole)


def test_another_seed_draws_another_curve(text, whole, tmp_path):
    train(options(tmp_path, text, seed=4, steps=3))
    assert all(a["loss"] != b["loss"] for a, b in zip(log(tmp_path), log(whole), strict=False))


def test_the_loss_starts_at_chance_and_falls(whole):
    loss = [line["loss"] for line in log(whole)]
    assert loss[0] == pytest.approx(np.log(300), rel=0.02)
    assert np.mean(loss[-5:]) < 0.6 * loss[0]


def test_the_log_tells_each_step(whole):
    lines = log(whole)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert all(line["tokens"] == 2 * 2 * 16 for line in lines)
    assert all(line.keys() == {"step", "loss", "learning_rate", "grad_norm", "tokens"} for line in lines)
    assert max(line["learning_rate"] for line in lines) == lines[3]["learning_rate"] == 1e-2


def test_the_checkpoint_holds_what_was_trained(whole):
    params, cfg = checkpoint.load(whole)
    state = load_file(whole / STATE)
    assert (cfg.vocab_size, cfg.max_position_embeddings, cfg.dropout) == (300, 16, 0.1)
    assert all(np.array_equal(array, state[f"params.{name}"]) for name, array in flatten(params).items())


def test_accumulated_batches_are_one_large_batch(text, tmp_path):
    for name, shape in (("large", {"batch_size": 4, "accumulate": 1}), ("split", {"batch_size": 1, "accumulate": 4})):
        train(options(tmp_path / name, text, steps=1, dropout=0.0, **shape))
    tasks = [LanguageModelling(small.tokenizer(), [small.TEXT], [], 16, size, 3) for size in (4, 1)]
    large, split = tasks[0].batch(0)[0], np.concatenate([tasks[1].batch(i)[0] for i in range(4)])
    np.testing.assert_array_equal(large[:, 1:], split[:, 1:])  # the first token of a row is </s> or its own, drawn per batch
    assert log(tmp_path / "large")[0]["loss"] == pytest.approx(log(tmp_path / "split")[0]["loss"], rel=1e-2)


def test_evaluation_is_logged_at_its_steps_and_at_the_end(text, tmp_path):
    train(options(tmp_path, text, steps=7, eval_every=3, eval_text=(text,)))
    assert [line["step"] for line in log(tmp_path) if "eval_loss" in line] == [3, 6, 7]
    train(options(tmp_path / "once", text, steps=2, eval_text=(text,)))
    assert [line["step"] for line in log(tmp_path / "once") if "eval_loss" in line] == [2]
    last = log(tmp_path)[-1]
    params, cfg = checkpoint.load(tmp_path)
    nats, tokens, size = bits_per_byte(params, cfg, small.OPTTokenizer.from_pretrained(tmp_path), small.TEXT, 16)
    assert size == len(small.TEXT)
    assert last["eval_loss"] == pytest.approx(nats / tokens)
    assert last["bits_per_byte"] == pytest.approx(nats / np.log(2) / size)


def test_fine_tuning_starts_from_the_model(text, whole, tmp_path):
    train(options(tmp_path, text, model=str(whole), steps=10, dropout=0.0))
    assert log(tmp_path)[0]["loss"] < 0.7 * log(whole)[0]["loss"]
    assert (tmp_path / "vocab.json").read_bytes() == (whole / "vocab.json").read_bytes()
    assert checkpoint.load_config(tmp_path).dropout == 0.0


def test_a_checkpoint_in_half_precision(text, tmp_path):
    train(options(tmp_path, text, steps=2, save_dtype="float16"))
    assert {a.dtype for a in load_file(tmp_path / "model.safetensors").values()} == {np.dtype("float16")}
    assert {a.dtype for a in load_file(tmp_path / STATE).values()} == {np.dtype("float32")}


# Classification and questions


def lines(path, examples):
    path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in examples), encoding="utf-8")
    return str(path)


def moods(n, seed=0):
    rng = random.Random(seed)
    return [
        {"text": f"the {rng.choice(['cat', 'dog'])} is {word}", "label": label} for word, label in rng.choices([("glad", "+"), ("sad", "-")], k=n)
    ]


def questions(n, seed=0):
    """The answer is the animal."""
    rng, out = random.Random(seed), []
    for _ in range(n):
        before, animal = rng.choice(["", "on the mat ", "why, "]), rng.choice(["cat", "dog", "cow"])
        context = f"{before}the {animal} sat"
        out.append({"question": "who sat?", "context": context, "answer": animal, "answer_start": context.index(animal)})
    return out


SHORT = {"context": 32, "steps": 60, "accumulate": 1, "batch_size": 8, "save_every": 60, "eval_every": 60, "dropout": 0.0}


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    data = {"data": lines(folder / "train.jsonl", moods(40)), "eval_data": lines(folder / "eval.jsonl", moods(20, seed=1))}
    train(options(folder / "run", task="classify", **{**SHORT, **data}))
    return folder


def test_a_classifier_learns_which_word_decides(classified):
    last = log(classified / "run")[-1]
    assert (last["accuracy"], last["f1"]) == (1.0, 1.0)
    assert last["eval_loss"] < 0.1


def test_a_trained_classifier_knows_its_labels(classified):
    model, tok = OPTForSequenceClassification.from_pretrained(classified / "run"), small.OPTTokenizer.from_pretrained(classified / "run")
    assert model.config.extra["id2label"] == {"0": "+", "1": "-"}
    batch = tok(["the cat is glad", "the dog is sad", "the cat is sad"], padding=True)
    assert model(**batch).logits.argmax(-1).tolist() == [0, 1, 1]


def test_a_classifier_interrupted_and_resumed(classified, tmp_path, monkeypatch):
    made = {"task": "classify", **SHORT, "data": str(classified / "train.jsonl"), "eval_every": 0, "steps": 20, "dropout": 0.1}
    train(options(tmp_path / "whole", **made))
    with monkeypatch.context() as patch:
        signalled_at(11, patch)
        train(options(tmp_path / "run", **made))
    train(options(tmp_path / "run", **made, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_head_for_the_same_labels_is_trained_further(classified, tmp_path):
    data = {"data": str(classified / "train.jsonl"), "eval_data": str(classified / "eval.jsonl")}
    train(options(tmp_path, task="classify", model=str(classified / "run"), **{**SHORT, **data, "steps": 1, "learning_rate": 0.0}))
    assert log(tmp_path)[-1]["accuracy"] == 1.0


def test_a_head_for_other_labels_is_a_fresh_one(classified, tmp_path):
    data = lines(tmp_path / "train.jsonl", [{"text": "a", "label": i} for i in range(3)])
    train(options(tmp_path / "run", task="classify", model=str(classified / "run"), **{**SHORT, "data": data, "steps": 1, "eval_every": 0}))
    assert load_file(tmp_path / "run" / "model.safetensors")["score.weight"].shape == (3, 16)


def test_a_labels_number_may_be_written_in_two_ways(tmp_path):
    data = lines(tmp_path / "train.jsonl", [{"text": "a", "label": label} for label in (1, 1.0, 2, 0.5)])
    train(options(tmp_path / "run", task="classify", **{**SHORT, "data": data, "steps": 1, "eval_every": 0}))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["id2label"] == {"0": "0.5", "1": "1", "2": "2"}


def test_a_classifier_whose_rows_have_no_end_is_refused(classified, tmp_path):
    small.folder(tmp_path / "model", small.config(pad_token_id=3))
    data = {"data": str(classified / "train.jsonl"), "eval_every": 0}
    with pytest.raises(ValueError, match=r"the tokenizer pads with id 1, and config\.json's pad_token_id is 3"):
        train(options(tmp_path / "run", task="classify", model=str(tmp_path / "model"), **{**SHORT, **data}))


@pytest.mark.parametrize("name", ["vocab.json", "log.jsonl", "tokenizer.json"])
def test_files_of_something_else_are_not_overwritten(name, text, tmp_path):
    (tmp_path / name).write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match=f"holds {name}, not of a training run"):
        train(options(tmp_path, text, steps=1))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: '{"mine": 1}\n'}


def test_a_models_defaults_of_generation_stay_with_it(text, tmp_path):
    model = small.folder(tmp_path / "model")
    (model / "generation_config.json").write_text('{"top_k": 7}')
    train(options(tmp_path / "run", text, model=str(model), steps=1))
    assert (tmp_path / "run" / "generation_config.json").read_text() == '{"top_k": 7}'


def test_another_tasks_head_is_dropped_with_a_word(classified, text, tmp_path):
    with pytest.warns(UserWarning, match="score is not used by --task lm"):
        train(options(tmp_path, text, model=str(classified / "run"), steps=1))
    assert "score.weight" not in load_file(tmp_path / "model.safetensors")


def test_questions_are_answered(tmp_path):
    data = {"data": lines(tmp_path / "train.jsonl", questions(60)), "eval_data": lines(tmp_path / "eval.jsonl", questions(20, seed=1))}
    train(options(tmp_path / "run", task="qa", **{**SHORT, **data, "steps": 120, "eval_every": 120}))
    last = log(tmp_path / "run")[-1]
    assert last["accuracy"] >= 0.9
    assert last["f1"] >= 0.9
    assert last["eval_loss"] < 0.5
    assert OPTForQuestionAnswering.from_pretrained(tmp_path / "run").params["qa_outputs"]["weight"].shape == (2, 16)


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_span_f1_is_symmetric_and_1_only_for_equals(a, b):
    assert 0 <= span_f1(a, b) == span_f1(b, a) <= 1
    assert (span_f1(a, b) == 1) == (sorted(a) == sorted(b))


def test_an_answer_points_at_its_tokens(tmp_path):
    tok = small.tokenizer()
    task = QuestionAnswering(tok, lines(tmp_path / "qa.jsonl", questions(20)), None, 64, 4, 0)
    for (ids, (start, end)), example in zip(task.rows, questions(20), strict=True):
        assert tok.decode(ids[start : end + 1]).strip() == example["answer"]


# Batches


@given(n=st.integers(1, 40), batch_size=st.integers(1, 9), seed=st.integers(0, 3), epochs=st.integers(1, 3))
def test_every_example_comes_once_per_epoch(n, batch_size, seed, epochs):
    seen = [row for i in range(-(-n * epochs // batch_size)) for row in indices(n, batch_size, i, seed)][: n * epochs]
    assert sorted(seen) == [(epoch, i) for epoch in range(epochs) for i in range(n)]


@settings(max_examples=15)
@given(context=st.integers(2, 40), batch_size=st.integers(1, 5), seed=st.integers(0, 3))
def test_every_window_comes_once_per_epoch(context, batch_size, seed):
    tok = small.tokenizer()
    task = LanguageModelling(tok, [small.TEXT], [], context, batch_size, seed)
    tokens = np.array(tok.encode(small.TEXT))
    n = len(tokens) // context - 1
    rows = np.concatenate([task.batch(i)[0] for i in range(-(-n // batch_size))])[:n]
    fits = [
        offset for offset in range(context)
        if sorted(map(tuple, rows[:, 1:])) == sorted(tuple(tokens[offset + i * context + 1 : offset + (i + 1) * context]) for i in range(n))
    ]  # fmt: skip
    assert fits


def test_half_of_the_windows_open_with_the_start_token():
    task = LanguageModelling(small.tokenizer(), [small.TEXT], [], 8, 4, 0)
    first = np.concatenate([task.batch(i)[0][:, 0] for i in range(100)])
    assert 0.4 < (first == 2).mean() < 0.65


def test_batches_depend_on_their_number_alone():
    forth, back = (LanguageModelling(small.tokenizer(), [small.TEXT], [], 8, 4, 0) for _ in range(2))
    for i in range(20):
        forth.batch(i)
    assert all(np.array_equal(forth.batch(i)[0], back.batch(i)[0]) for i in reversed(range(20)))


# Mistakes


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"context": 1}, {"batch_size": 0}, {"accumulate": 0}, {"save_every": 0}, {"eval_every": -1}, {"warmup_steps": -1},
     {"seed": -1}, {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": float("nan")}, {"learning_rate": float("nan")}, {"learning_rate": -1.0},
     {"schedule": "square"}, {"save_dtype": "float8"}, {"eval_every": 2}],
    ids=str,
)  # fmt: skip
def test_an_option_that_cannot_be_is_refused_by_name(tmp_path, change):
    with pytest.raises(ValueError, match="--" + next(iter(change)).replace("_", "-")):
        options(tmp_path, "text.txt", **change)


@pytest.mark.parametrize("change", [{"vocab_size": 100}, {"num_heads": 3}, {"hidden_size": 0}, {"num_layers": 0}], ids=str)
def test_a_shape_that_cannot_be_is_refused(text, tmp_path, change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        train(options(tmp_path / "run", text, **change))


def test_a_context_that_outgrows_the_model_is_refused(text, whole, tmp_path):
    with pytest.raises(ValueError, match=r"--context 17 .*max_position_embeddings=16"):
        train(options(tmp_path, text, model=str(whole), context=17))


def test_text_too_short_for_its_windows_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(DataError, match="context=16"):
        train(options(tmp_path / "run", str(tmp_path / "short.txt")))


@pytest.mark.parametrize(("content", "word"), [(b"", "empty"), (b" \n", "empty"), (b"\xff\xfe", "UTF-8"), (None, "No such file")])
def test_a_text_file_that_cannot_be_used_is_named(tmp_path, content, word):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=word) as error:
        train(options(tmp_path / "run", str(path)))
    assert str(path) in str(error.value)


def test_a_folder_of_texts_is_read_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert read_texts([tmp_path]) == ["a.txt", "b.txt"]


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no \.txt file"):
        train(options(tmp_path / "run", str(tmp_path)))


def test_nothing_to_learn_from_is_refused(tmp_path):
    with pytest.raises(DataError, match="--text"):
        train(options(tmp_path))


GOOD = {"text": "a", "label": 0}, {"text": "b", "label": 1}
FINE = questions(1)[0]


@pytest.mark.parametrize(
    ("task", "bad", "word"),
    [
        ("classify", "{", "not JSON"),
        ("classify", '["text", "label"]', "list"),
        ("classify", '"text label"', "str"),
        ("classify", "7", "int"),
        ("classify", '{"text": "a"}', "label"),
        ("classify", '{"text": 5, "label": "a"}', "text is 5"),
        ("classify", '{"text": "a", "label": null}', "label is None"),
        ("classify", '{"text": "a", "label": true}', "label is True"),
        ("classify", '{"text": "a \\ud800", "label": 1}', "Unicode"),
        ("qa", json.dumps(FINE | {"answer_start": 1}), "character 1"),
        ("qa", json.dumps(FINE | {"answer_start": "0"}), "answer_start is '0'"),
        ("qa", json.dumps(FINE | {"answer": ""}), "answer ''"),
        ("qa", json.dumps({"question": "who?"}), "context"),
        ("lm", '{"txt": "a"}', "text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, task, bad, word):
    good = {"classify": GOOD, "qa": (FINE, FINE), "lm": ({"text": small.TEXT},) * 2}[task]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps(good[0]), "", bad, json.dumps(good[1])]))
    with pytest.raises(ValueError, match=r"data\.jsonl") as error:
        train(options(tmp_path / "run", task=task, data=str(path), model=str(small.folder(tmp_path / "model"))))
    assert f"{path}:3" in str(error.value)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("examples", "word"), [([], "no example"), ([GOOD[0]] * 3, "at least two")])
def test_examples_that_teach_nothing_are_refused(tmp_path, examples, word):
    with pytest.raises(DataError, match=word):
        train(options(tmp_path / "run", task="classify", data=lines(tmp_path / "data.jsonl", examples)))


def test_a_label_that_was_never_taught_is_named(tmp_path):
    data, unseen = lines(tmp_path / "a.jsonl", GOOD), lines(tmp_path / "b.jsonl", [GOOD[0], {"text": "c", "label": 2}])
    with pytest.raises(DataError, match=r"b\.jsonl:2: .*label 2"):
        train(options(tmp_path / "run", task="classify", data=data, eval_data=unseen))


@pytest.mark.parametrize("task", ["classify", "qa"])
def test_a_task_without_data_is_refused(text, tmp_path, task):
    with pytest.raises(DataError, match="--data"):
        train(options(tmp_path / "run", text, task=task))


def test_lines_end_at_newlines_alone(tmp_path):
    """U+2028 and its like may stand in JSON strings."""
    example = {"text": "a\u2028b\u0085c\x0bd"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(example, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_examples(path, ("text",)) == {1: example}


def test_answers_beyond_the_context_are_left_out_with_a_word(tmp_path):
    near = {"question": "who?", "context": "anna went home.", "answer": "anna", "answer_start": 0}
    far = {"question": "who?", "context": "x " * 60 + "anna", "answer": "anna", "answer_start": 120}
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in (near, far)))
    with pytest.warns(UserWarning, match="1 of 2 answers lie beyond --context 24"):
        task = QuestionAnswering(small.tokenizer(), str(path), None, 24, 2, 0)
    assert len(task.rows) == 1
    path.write_text(json.dumps(far) + "\n")
    with pytest.raises(DataError, match="every answer lies beyond"):
        QuestionAnswering(small.tokenizer(), str(path), None, 24, 2, 0)


def test_a_folder_that_holds_another_model_is_not_written_over(text, whole, tmp_path):
    params, cfg = checkpoint.load(whole)
    checkpoint.save(tmp_path, params, cfg)
    before = (tmp_path / "model.safetensors").read_bytes()
    for model in (None, str(whole), str(tmp_path)):
        with pytest.raises(ValueError, match="choose another --out"):
            train(options(tmp_path, text, **({"model": model} if model else {})))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_run_that_diverges_stops_and_its_last_checkpoint_stands(text, tmp_path):
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="Lower --learning-rate"):
        train(options(tmp_path, text, steps=30, learning_rate=1e30, warmup_steps=0, save_every=1))
    assert all(np.isfinite(array).all() for array in load_file(tmp_path / "model.safetensors").values())
    assert all(np.isfinite(line["loss"]) for line in log(tmp_path))


def test_a_clipping_norm_of_zero_clips_nothing(text, tmp_path):
    for norm in (0.0, 1e9):
        train(options(tmp_path / str(norm), text, steps=2, max_grad_norm=norm))
    assert log(tmp_path / "0.0") == log(tmp_path / "1000000000.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"data": "x"}, "--text and --data"), ({"task": "classify"}, "learns from --data")],
)  # fmt: skip
def test_an_option_without_effect_is_refused(text, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Options(out=str(tmp_path), text=(text,), **change)


def test_training_runs_in_another_thread(text, tmp_path):
    import threading

    thread = threading.Thread(target=train, args=(options(tmp_path, text, steps=2),))
    thread.start()
    thread.join()
    assert len(log(tmp_path)) == 2


@pytest.mark.parametrize("changes", [{"eval_data": "no-such-file"}, {"task": "classify", "data": "x", "eval_text": ("no-such-file",)}], ids=str)
def test_what_would_not_be_evaluated_on_is_refused(changes):
    with pytest.raises(ValueError, match=r"is evaluated on --eval-(text|data), not on --eval-(data|text)"):
        Options(out="x", **changes)


def test_sizes_beyond_reason_are_refused():
    with pytest.raises(ValueError, match=r"--vocab-size is 9{26}; it must be below 2147483648"):
        Options(out="x", vocab_size=int("9" * 26))


def test_a_finished_run_without_its_log_says_what_it_knows(text, tmp_path):
    last = train(options(tmp_path, text, steps=2))
    (tmp_path / "log.jsonl").unlink()
    assert train(options(tmp_path, text, steps=2, resume=True)) == {"step": last["step"]}


def test_a_state_that_is_another_file_is_refused_by_name(text, tmp_path):
    train(options(tmp_path, text, steps=2))
    (tmp_path / STATE).write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=f"{STATE} is not the state of a training run"):
        train(options(tmp_path, text, steps=3, resume=True))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "9" * 5000 + "}"], ids=["deep", "long number"])
def test_json_that_python_gives_up_on_is_told_by_line(line, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(DataError, match=r"data\.jsonl:2 is not JSON"):
        read_examples(tmp_path / "data.jsonl", ["text"])


def test_an_answer_before_its_context_is_refused(tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"question": "q", "context": "abc def", "answer": "e", "answer_start": -2}')
    with pytest.raises(DataError, match="does not stand at character -2"):
        QuestionAnswering(small.tokenizer(), str(tmp_path / "qa.jsonl"), None, 16, 1, 0)


def test_two_runs_in_one_folder(text, tmp_path):
    with train_module.alone_in(tmp_path / "run"), pytest.raises(ValueError, match=r"another process trains into .*run; wait"):
        train(options(tmp_path / "run", text, steps=1))
    assert not (tmp_path / "run").exists()
    assert train(options(tmp_path / "run", text, steps=1))["step"] == 1


def test_a_log_that_was_damaged_goes_on_with_what_can_be_read(text, tmp_path):
    train(options(tmp_path, text, steps=4))
    lines = (tmp_path / "log.jsonl").read_bytes().split(b"\n")
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([lines[0], lines[1][:20], b"nonsense}", b"\xff\xfe", lines[3], b'{"step": "5"}', lines[3][:9]]))
    train(options(tmp_path, text, steps=6, resume=True))
    assert [line["step"] for line in log(tmp_path)] == [1, 4, 5, 6]


def test_a_finished_run_is_evaluated_when_that_is_asked_for(text, tmp_path):
    last = train(options(tmp_path, text, steps=2))
    found = train(options(tmp_path, text, steps=2, resume=True, eval_text=(text,)))
    assert found.pop("bits_per_byte") > 0
    assert found.pop("eval_loss") > 0
    assert found == last


@pytest.mark.parametrize(("changes", "message"), [({"out": ""}, "--out is empty"), ({"learning_rate": math.inf}, "--learning-rate is inf")])
def test_what_no_run_can_have(text, changes, message):
    with pytest.raises(ValueError, match=message):
        train(options(changes.pop("out", "x"), text, **changes))
