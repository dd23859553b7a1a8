"""Every public feature with backend="cuda" gives NumPy's results, and never mixes the two: on a GPU, or an emulated one."""

import copy
import json
import re

import numpy as np
import pytest
import small
import torch

from opt_fast import train_cuda
from opt_np import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, OPTModel, cli, embeddings, explore, grad, perplexity, trace
from opt_np import score as scoring
from opt_np import verify as verifying
from opt_np.arrays import host
from opt_np.lens import attribution, logit_lens
from opt_np.tasks import bits_per_byte
from opt_np.train import Options, train
from opt_np.tree import flatten

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
TEXT = "the cat sat on the mat, and the dog"
TOKENIZER = small.tokenizer()
IDS = small.ids(small.config(), 2, 9)
MASK = np.ones_like(IDS)
MASK[0, :3] = 0
POSITIONS = np.maximum(np.cumsum(MASK, 1) - 1, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("cuda") / "lm", small.config(max_position_embeddings=48))


@pytest.fixture
def both(folder):
    """The same checkpoint on NumPy and on the GPU."""
    return [OPTForCausalLM.from_pretrained(folder, backend=backend) for backend in ("numpy", "cuda")]


def same(ours, theirs, where="here", tolerance=1e-4):
    """Equal, but for float32's rounding, and for whether arrays are on the GPU."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        return all(same(ours[name], theirs[name], f"{where}, {name}", tolerance) for name in theirs)
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        return all(same(a, b, f"{where}, {i}", tolerance) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))
    if isinstance(theirs, str) or theirs is None:
        assert ours == theirs, where
    else:
        ours, theirs = host(ours), host(theirs)
        exact = theirs.dtype.kind in "iub"
        np.testing.assert_allclose(ours, theirs, rtol=0 if exact else tolerance, atol=0 if exact else tolerance, err_msg=where)
    return True


def same_words(ours, theirs, tolerance=2e-3):
    """Compares two printed texts, whose numbers may differ by rounding."""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    words = [re.sub(r"\s+", " ", re.sub(number, "#", text)) for text in (ours, theirs)]
    assert words[0] == words[1]
    return same(*([float(x) for x in re.findall(number, text)] for text in (ours, theirs)), tolerance=tolerance)


# ---- the device itself -------------------------------------------------------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses():
    x, y = torch.ones(2, 3, device=GPU), torch.ones(2, 3)
    for mixture in (lambda: x + y, lambda: x @ y.T, lambda: torch.cat([x, y]), lambda: x.masked_fill(y > 0, 1.0), lambda: x.add_(y),
                    lambda: torch.nn.functional.embedding(torch.tensor([1]), x)):  # fmt: skip
        with pytest.raises(RuntimeError, match="same device"):
            mixture()
    for reading in (lambda: np.asarray(x), lambda: np.stack([x, x]), lambda: x.numpy(), lambda: np.add(x, 1), lambda: np.isfinite(x)):
        with pytest.raises(TypeError, match="to numpy"):
            reading()
    with pytest.raises(TypeError, match=r"numpy\.ndarray"):
        x[0] = np.ones(3)


def test_it_computes_as_a_gpu_does():
    a = np.arange(6.0).reshape(2, 3)
    x = torch.tensor(a, device=GPU)
    assert (x.is_cuda, x.cpu().is_cuda, torch.ones(1).to(GPU).is_cuda) == (True, False, True)
    same([x[:, np.array([2, 0])], x[np.array([1])], x[[1]], x * torch.tensor(2.0)], [a[:, [2, 0]], a[[1]], a[[1]], a * 2])
    assert (x.new_tensor([1, 2]).dtype, x.new_tensor([1, 2]).device) == (torch.float64, GPU)
    x[0, [0, 1]] = 7
    x[1:] *= 2
    same([x, float(x[0, 1]), x.tolist()], [[[7, 7, 2], [6, 8, 10]], 7, [[7, 7, 2], [6, 8, 10]]])
    assert x.add_(1) is x
    w = torch.ones(3, 3, dtype=torch.float64, device=GPU).requires_grad_()
    (x @ w).sum().backward()
    assert w.grad.is_cuda
    same(w.grad, np.repeat(host(x).sum(0)[:, None], 3, 1))


# ---- passes ------------------------------------------------------------------------------------------------------------------------------

PASSES = {
    "everything": lambda lm: vars(lm(IDS, MASK, labels=IDS, output_hidden_states=True, output_attentions=True)),
    "lists": lambda lm: lm(IDS.tolist(), MASK.tolist(), position_ids=POSITIONS.tolist()).logits,
    "CPU tensors": lambda lm: lm(*map(torch.tensor, (IDS, MASK)), position_ids=torch.tensor(POSITIONS), labels=torch.tensor(IDS)).loss,
    "its own tensors": lambda lm: lm(*map(on_gpu, (IDS, MASK)), position_ids=on_gpu(POSITIONS), labels=on_gpu(IDS)).loss,
    "the last logits": lambda lm: [lm(IDS, logits_to_keep=2).logits, lm(IDS, logits_to_keep=np.array([0, 4])).logits],
    "a mask with holes": lambda lm: lm(IDS, np.where(np.arange(9) == 5, 0, MASK)).logits[:, 4:],
    "a cache": lambda lm: cached(lm)[1],
    "a cache that is copied": lambda lm: lm(IDS[:, 4:], past_key_values=copy.deepcopy(cached(lm, 4)[0])).logits,
    "a cache that is cropped, forked, reordered": lambda lm: edited_cache(lm),
    "run_with_cache": lambda lm: dict(lm.run_with_cache(IDS)[1].items()),
    "names of TransformerLens": lambda lm: [*map(lm.run_with_cache(IDS)[1].__getitem__, (("z", 0), ("result", 1), ("scale", 0, "ln1")))],
    "hooks": lambda lm: lm.run_with_hooks(IDS, [("blocks.0.attn.hook_z", lambda v, hook: v * 0), ("blocks.1.mlp.hook_post", first_to_zero)]),
    "logit lens": lambda lm: dict(logit_lens(lm, IDS, attention_mask=MASK)),
    "attribution": lambda lm: attribution(lm, IDS, [5, 6], attention_mask=MASK),
    "attribution of heads": lambda lm: attribution(lm, IDS, [5, 6], heads=True, attention_mask=MASK),
    "embed": lambda lm: [lm.embed(IDS, MASK, pooling=pooling) for pooling in embeddings.POOLINGS] + lm.embed(IDS, MASK, layer="all"),
    "score": lambda lm: vars(scoring.score(lm, IDS, MASK)),
    "bits per byte": lambda lm: bits_per_byte(lm.params, lm.config, TOKENIZER, small.TEXT[:90], 16, lm.ops),
    "explore": lambda lm: {k: v for k, v in explore.gather(lm, TOKENIZER, TEXT).items() if k not in ("costs", "shape")},
    "num_parameters": lambda lm: lm.num_parameters(),
}


def on_gpu(a):
    return torch.tensor(a, device=GPU)


def first_to_zero(value, hook):
    value[:, 0] = 0
    return value


def cached(lm, length=5):
    """A cache of some tokens, and the logits of all, read through it."""
    out = lm(IDS[:, :length], use_cache=True)
    cache = out.past_key_values.fork()
    return cache, [out.logits, lm(IDS[:, length:], past_key_values=out.past_key_values).logits]


def edited_cache(lm):
    cache = cached(lm)[0]
    fork = cache.fork()
    fork.crop(3)
    fork.reorder(np.array([1, 1, 0]))
    return [lm(IDS[[1, 1, 0], 3:], past_key_values=fork).logits, lm(IDS[:, 5:], past_key_values=cache).logits, fork.nbytes]


@pytest.mark.parametrize("what", PASSES)
def test_a_pass(what, both):
    theirs, ours = (PASSES[what](lm) for lm in both)
    assert same(ours, theirs)


HEADS = {
    OPTModel: {},
    OPTForSequenceClassification: {"labels": [1, 0]},
    OPTForQuestionAnswering: {"start_positions": [4, 2], "end_positions": [5, 4]},
}


@pytest.mark.parametrize("cls", HEADS)
def test_the_other_heads(cls, folder):
    new = {"new_head": True} if HEADS[cls] else {}
    theirs, ours = (vars(cls.from_pretrained(folder, backend=backend, **new)(IDS, MASK, output_hidden_states=True, **HEADS[cls]))
                    for backend in ("numpy", "cuda"))  # fmt: skip
    assert same(ours, theirs)
    there = {name: on_gpu(np.array(labels)) for name, labels in HEADS[cls].items()}
    assert same(vars(cls.from_pretrained(folder, backend="cuda", **new)(on_gpu(IDS), on_gpu(MASK), **there)).get("loss"), theirs.get("loss"))


@pytest.mark.parametrize(("problem", "labels"), [("regression", [0.5, 1.0]), ("multi_label_classification", [[1.0, 0.0], [0.0, 1.0]])])
def test_the_other_losses_of_a_classifier(problem, labels, folder):
    found = []
    for backend in ("numpy", "cuda"):
        lm = OPTForSequenceClassification.from_pretrained(folder, backend=backend, new_head=True, num_labels=1 if problem == "regression" else 2)
        lm.config.extra["problem_type"] = problem
        found.append(lm(IDS, MASK, labels=labels).loss)
    assert same(found[1], found[0])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_whole_numbers(kind, tmp_path):
    wide = small.folder(tmp_path / "wide", small.config(hidden_size=32))
    theirs, ours = (OPTForCausalLM.from_pretrained(wide, backend=backend, quantize=kind)(IDS, MASK).logits for backend in ("numpy", "cuda"))
    assert same(ours, theirs)


# ---- generation --------------------------------------------------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8, "seed": 3, "num_return_sequences": 2},
    "sampling, typical": {"do_sample": True, "min_p": 0.01, "typical_p": 0.9, "seed": 1},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [6, 7]], "min_new_tokens": 4},
    "beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0, "early_stopping": True},
    "beam sampling": {"num_beams": 3, "do_sample": True, "seed": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "stop strings": {"stop_strings": ["e", "the"], "tokenizer": TOKENIZER},
    "sliding": {"overflow": "slide", "max_new_tokens": 44, "eos_token_id": -1},
    "sliding, contrastive": {"overflow": "slide", "max_new_tokens": 42, "eos_token_id": -1, "penalty_alpha": 0.6, "top_k": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate(way, both):
    theirs, ours = (lm.generate(IDS, MASK, **{"max_new_tokens": 8, **WAYS[way]}) for lm in both)
    assert theirs.shape[1] > 9
    assert same(ours, theirs)


def test_generate_reads_tensors(both):
    plain, lm = both
    assert same(lm.generate(on_gpu(IDS), on_gpu(MASK), max_new_tokens=4), plain.generate(IDS, MASK, max_new_tokens=4))


def test_stream_and_explain(both):
    ids = [TOKENIZER.encode(TEXT)]
    theirs, ours = (list(lm.stream(ids, tokenizer=TOKENIZER, max_new_tokens=6)) for lm in both)
    assert same(*([(s.ids, s.logprobs, s.entropies, s.finished, s.text) for s in steps] for steps in (ours, theirs)))
    theirs, ours = ("\n".join(map(str, lm.explain(ids, 3, TOKENIZER, max_new_tokens=3, repetition_penalty=1.2))) for lm in both)
    assert same_words(ours, theirs)


# ---- tools -------------------------------------------------------------------------------------------------------------------------------


def reported(lm, **options):
    asked = {"window": None, "stride": None, "top": 3, "json": False, "reliability": None, "samples": None, "others": [], **options}
    return scoring.report(lm, TOKENIZER, TEXT, **asked)


REPORTS = {
    "score": reported,
    "score in windows, as JSON": lambda lm: reported(lm, window=8, stride=4, json=True),
    "score beside another model": lambda lm: reported(lm, others=[(lm, TOKENIZER)]),
    "perplexity": lambda lm: perplexity.table(perplexity.every_convention(lm, TOKENIZER, TEXT, 16, 8)),
    "layers swept": lambda lm: embeddings.table(embeddings.layer_sweep(lm, TOKENIZER, [("the cat", "the mat"), ("dog", "the log sat")])),
    "vectors of texts": lambda lm: json.dumps(embeddings.embed_texts(lm, TOKENIZER, ["the cat", "mat"]).astype(float).round(5).tolist()),
}


@pytest.mark.parametrize("what", REPORTS)
def test_a_report(what, both):
    theirs, ours = (REPORTS[what](lm) for lm in both)
    assert same_words(ours, theirs)


def test_dropout_at_inference_is_numpys_alone(both):
    with pytest.raises(ValueError, match="load it with backend='numpy'"):
        reported(both[1], samples=3)


def counted(steps):
    """What a trace says but for the values."""
    return [step[: trace.Step._fields.index("checksum")] for step in steps]


@pytest.mark.parametrize("fused", [False, True])
def test_trace(fused, both):
    plain, lm = both
    theirs, ours = (trace.record(m, IDS, MASK, fused=fused) for m in (plain, lm))
    assert counted(ours) == counted(theirs)
    found = trace.compare(theirs, ours)
    assert found.first is None, str(found)
    assert len(found.rows) == len(theirs)
    assert all(isinstance(step.value, np.ndarray) for step in ours)


@pytest.mark.parametrize("swapped", [False, True])
def test_each_block_reads_what_another_model_does(swapped, both):
    """And what a block itself adds is found: only the block that is broken differs."""
    lm, exact = both if swapped else both[::-1]
    lm.params["layers"][0]["fc2"]["bias"] += 1.0
    found = trace.compare(trace.record(exact, IDS), trace.record_each(lm, exact, IDS))
    assert {row.name.split(".")[-1] for row in found.rows if row.error > found.allowed} == {"fc2", "resid_post"}
    assert "layers.0.fc2" in found.first.name


def test_explores_page(both):
    theirs, ours = (explore.gather(lm, TOKENIZER, TEXT) for lm in both)
    assert (ours["costs"], ours["shape"]) == (theirs["costs"], theirs["shape"])
    assert "the cat" in explore.page(both[1], TOKENIZER, TEXT)


def test_save_pretrained(both, tmp_path):
    plain, lm = both
    lm.save_pretrained(tmp_path / "again")
    assert same(flatten(OPTForCausalLM.from_pretrained(tmp_path / "again").params), flatten(plain.params), tolerance=0)


def test_verify(folder):
    found = verifying.verify(folder, backend="cuda")
    assert verifying.first_failure(found) is None
    assert verifying.passed_by_pytorch(found)


# ---- training ----------------------------------------------------------------------------------------------------------------------------


def test_gradients(both):
    plain, lm = both
    labels = np.where(MASK, IDS, -100)
    theirs, ours = (learn(m.params, IDS, labels, m.config, MASK) for learn, m in ((grad.loss_and_grads, plain), (train_cuda.loss_and_grads, lm)))
    assert same([ours[0], flatten(ours[1])], [theirs[0], flatten(theirs[1])])
    weight = lm.params["layers"][0]["fc1"]["weight"].requires_grad_()
    lm(IDS, MASK, labels=labels).loss.backward()
    assert same(weight.grad, theirs[1]["layers"][0]["fc1"]["weight"])


TINY = {"context": 24, "batch_size": 2, "accumulate": 2, "steps": 4, "save_every": 2, "warmup_steps": 1, "learning_rate": 1e-2, "eval_every": 2,
        "dropout": 0.0}  # fmt: skip
SHAPE = {"vocab_size": 300, "hidden_size": 16, "num_layers": 2, "num_heads": 2}


def data_of(task, folder):
    """The options that name a task's data."""
    words = [{"text": text, "label": label} for text, label in (("the cat sat", "a"), ("on the mat", "b")) * 4]
    spans = [{"question": "who?", "context": "the dog sat", "answer": word, "answer_start": at} for word, at in (("dog", 4), ("sat", 8))]
    lines = {"lm": [small.TEXT[:180]], "classify": map(json.dumps, words), "qa": map(json.dumps, spans)}[task]
    (folder / "data").write_text("\n".join(lines))
    data = str(folder / "data")
    return {"text": (data,), "eval_text": (data,), **SHAPE} if task == "lm" else {"data": data, "eval_data": data, **SHAPE}


def logged(out):
    return [{k: v for k, v in json.loads(line).items() if k in ("step", "loss", "eval_loss", "bits_per_byte", "accuracy", "f1", "exact_match")}
            for line in (out / "log.jsonl").read_text().splitlines()]  # fmt: skip


@pytest.mark.parametrize("task", ["lm", "classify", "qa"])
def test_training_with_evaluation(task, tmp_path):
    asked = {**TINY, **data_of(task, tmp_path), "task": task}
    last = [train(Options(out=str(tmp_path / backend), backend=backend, **asked)) for backend in ("numpy", "cuda")]
    assert any(name.startswith("eval") for name in last[0])
    assert same(logged(tmp_path / "cuda"), logged(tmp_path / "numpy"), tolerance=2e-3)


def test_training_goes_on_where_it_stopped(tmp_path):
    asked = {**TINY, **data_of("lm", tmp_path), "schedule": "constant", "dropout": 0.1, "backend": "cuda"}
    train(Options(out=str(tmp_path / "whole"), **asked))
    train(Options(out=str(tmp_path / "parts"), **{**asked, "steps": 2}))
    train(Options(out=str(tmp_path / "parts"), resume=True, **asked))
    assert same(logged(tmp_path / "parts"), logged(tmp_path / "whole"))


def test_dropout_is_drawn_on_the_device(tmp_path):
    train(Options(out=str(tmp_path / "out"), backend="cuda", **{**TINY, **data_of("lm", tmp_path), "dropout": 0.2}))
    losses = [entry["loss"] for entry in logged(tmp_path / "out")]
    assert losses[-1] < losses[0]


# ---- the command line --------------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "logits": ("logits", TEXT),
    "generate": ("generate", TEXT, "--max-new-tokens", "4"),
    "generate with beams": ("generate", TEXT, "--max-new-tokens", "4", "--num-beams", "2"),
    "generate and explain": ("generate", TEXT, "--max-new-tokens", "2", "--explain", "2"),
    "generate, layers from disk": ("generate", TEXT, "--max-new-tokens", "3", "--stream-layers"),
    "score": ("score", TEXT),
    "perplexity": ("score", TEXT, "--perplexity", "--window", "8"),
    "embed": ("embed", "the cat", "the dog", "--out", "{out}"),
    "info": ("info",),
    "trace": ("trace", TEXT),
    "fused trace": ("trace", TEXT, "--fused"),
    "saved trace": ("trace", TEXT, "--out", "{out}"),
    "trace against NumPy": ("trace", TEXT, "--against", "numpy"),
    "each block against NumPy": ("trace", TEXT, "--against", "numpy", "--each"),
    "explore": ("explore", TEXT, "--out", "{out}"),
}
LOOSE = r" [0-9a-f]{8}$|\d+\.\d+e[-+]\d+|^backend.*$|^the worst is .*$"  # checksums, tiny differences and the backend's name are its own


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command, folder, tmp_path, capsys):
    said = {}
    for backend in ("numpy", "cuda"):
        words = (word.format(out=tmp_path / "out.html") for word in COMMANDS[command])
        assert cli.main([*words, "--model", str(folder), "--backend", backend]) == 0
        said[backend] = re.sub(LOOSE, "#", capsys.readouterr().out, flags=re.M)
    assert said["cuda"]
    assert same_words(said["cuda"], said["numpy"])
    assert "{out}" not in COMMANDS[command] or (tmp_path / "out.html").stat().st_size > 100
    assert "--against" not in COMMANDS[command] or "none differs" in said["cuda"]


def test_train_from_the_command_line(tmp_path):
    asked = "train --backend cuda --vocab-size 300 --hidden-size 16 --num-layers 1 --num-heads 2 --context 16 --steps 2 --batch-size 2"
    (tmp_path / "text.txt").write_text(small.TEXT)
    assert cli.main([*asked.split(), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]) == 0
    assert OPTForCausalLM.from_pretrained(tmp_path / "out")(IDS % 300).logits.shape == (2, 9, 300)
