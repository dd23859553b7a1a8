"""Embeddings equal HF's hidden states pooled by torch, whatever the padding contains; and a sweep over layers finds what a plain search finds."""

import json

import numpy as np
import pytest
import small
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PADDINGS, VARIANTS, batch, build, tensors, worst
from test_cli import assert_one_line
from test_score import lm, run

from opt_np import OPTForCausalLM, OPTModel, OPTTokenizer
from opt_np import embeddings as e

PAIRS = [("who sat on the mat?", "the cat sat on the mat"), ("and the log?", "the dog sat on the log"), ("when?", "it's 1999"),
         ("do they know?", "they'll never know why"), ("who?", "the cat sat on the mat")]  # fmt: skip


def torch_pooled(h, mask, pooling):
    """h: (B, T, D);  mask: (B, T)"""
    mask = torch.as_tensor(mask)[..., None]
    if pooling == "mean":
        return (h * mask).sum(1) / mask.sum(1)
    if pooling == "weighted":
        weight = mask.cumsum(1) * mask
        return (h * weight).sum(1) / weight.sum(1)
    if pooling == "max":
        return h.masked_fill(mask == 0, -torch.inf).amax(1)
    return h[torch.arange(len(h)), (mask[..., 0] * torch.arange(h.shape[1])).argmax(1)]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_equal_torch(variant, padding):
    hf, cfg, params = build(variant)
    model, (ids, mask) = OPTForCausalLM(params, cfg), batch(padding)
    with torch.no_grad():
        states = hf(*tensors(ids, mask), output_hidden_states=True).hidden_states
    real = np.ones_like(ids) if mask is None else mask
    for pooling in e.POOLINGS:
        wanted = [torch_pooled(h, real, pooling) for h in states]
        found = model.embed(ids, mask, "all", pooling, normalize=False)
        assert [a.shape[1] for a in found] == [cfg.hidden_size] * 3 + [cfg.word_embed_proj_dim]
        for ours, theirs in zip(found, wanted, strict=True):
            assert worst(ours, theirs) < 1e-12
        assert worst(model.embed(ids, mask, pooling=pooling), torch.nn.functional.normalize(wanted[-1])) < 1e-12


def test_layers_count_as_hidden_states_do():
    model, ids = lm(), [[5, 6, 7], [8, 9, 10]]
    every = model.embed(ids, layer="all")
    assert len(every) == 3
    for i, rows in enumerate(every):
        for layer in (i, i - 3, np.int64(i)):
            np.testing.assert_array_equal(model.embed(ids, layer=layer), rows)
    assert len(np.unique(np.stack(every).round(6), axis=0)) == 3
    pair = model.embed(ids, layer=[-1, 0])
    np.testing.assert_array_equal(pair[0], every[2])
    np.testing.assert_array_equal(pair[1], every[0])
    assert isinstance(model.embed(ids, layer=[-1]), list)


def test_every_class_embeds_and_keeps_its_dtype():
    cfg = small.config()
    for dtype in ("float32", "float64"):
        found = OPTModel(small.params(cfg, dtype=dtype), cfg).embed([[5, 6, 7]])
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, lm(dtype=dtype).embed([[5, 6, 7]]))


@given(st.integers(1, 8), st.integers(0, 4), st.integers(0, 4), st.sampled_from(e.POOLINGS), st.integers(-3, 2), st.booleans(), st.integers(4, 307))
def test_padding_changes_nothing(n, left, right, pooling, layer, skip_bos, garbage):
    model, ids = lm(), [2, *range(40, 40 + n)]
    alone = model.embed([ids], None, layer, pooling, skip_bos=skip_bos)
    padded = model.embed([[garbage] * left + ids + [2] * right], [[0] * left + [1] * (n + 1) + [0] * right], layer, pooling, skip_bos=skip_bos)
    np.testing.assert_allclose(padded, alone, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose((padded**2).sum(-1), 1, rtol=1e-12)


@pytest.mark.parametrize("pooling", e.POOLINGS)
def test_padding_changes_no_bit_on_the_cpu_backend(pooling):
    cfg = small.config()
    model, ids = OPTForCausalLM(small.params(cfg), cfg, "cpu"), small.ids(cfg, 1, 6)[0].tolist()
    alone = model.embed([ids], layer="all", pooling=pooling)
    for left, right in ((3, 0), (0, 3), (2, 2)):
        row, mask = [1] * left + ids + [1] * right, [0] * left + [1] * 6 + [0] * right
        both = model.embed([row, small.ids(cfg, 1, len(row), 1)[0].tolist()], [mask, [1] * len(row)], "all", pooling)
        for ours, theirs in zip(both, alone, strict=True):
            np.testing.assert_array_equal(ours[:1], theirs)


@pytest.mark.parametrize("pooling", e.POOLINGS)
def test_without_the_bos_the_rest_is_pooled(pooling):
    model, ids = lm(), [[2, 5, 6, 2, 7], [5, 2, 6, 2, 7]]
    h = torch.tensor(np.asarray(model(ids, output_hidden_states=True).hidden_states[1]))
    found = model.embed(ids, None, 1, pooling, normalize=False, skip_bos=True)
    np.testing.assert_allclose(found[:1], torch_pooled(h[:1, 1:], np.ones((1, 4)), pooling))  # only the first token, and only if it is </s>
    np.testing.assert_allclose(found[1:], torch_pooled(h[1:], np.ones((1, 5)), pooling))


def test_a_vector_of_zeros_stays_and_a_tiny_one_becomes_long():
    rows = e.unit(np.array([[0, 0], [3, 4], [3e-30, 4e-30], [3e30, -4e30]], np.float32))
    np.testing.assert_allclose(rows, [[0, 0], [0.6, 0.8], [0.6, 0.8], [0.6, -0.8]], rtol=1e-6)
    assert rows.dtype == np.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [({"pooling": "cls"}, "'cls' is none of mean, last, weighted, max"), ({"layer": 3}, "layer=3 .*to 2"), ({"layer": -4}, "layer=-4 .*-3"),
     ({"layer": [0, 9]}, r"layer=\[0, 9\]"), ({"layer": []}, r"layer=\[\]"), ({"layer": "last"}, "layer='last'"), ({"layer": 1.5}, "layer=1.5"),
     ({"attention_mask": [[1, 1], [0, 0]]}, "row 1 .*padding"), ({"skip_bos": True}, "row 1 .*nothing but </s>"),
     ({"attention_mask": [[1, 1]]}, r"attention_mask is \(1, 2\)")],
)  # fmt: skip
def test_what_cannot_be_embedded(options, words):
    mask = options.pop("attention_mask", [[1, 1], [1, 0]])
    with pytest.raises(ValueError, match=words):
        lm().embed([[2, 6], [2, 1]], mask, **options)


# ---- which layer finds the right document ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("skip_bos", [False, True])
def test_a_sweep_equals_a_plain_search(pooling, skip_bos):
    model, tok = lm(), small.tokenizer()
    documents = ["the cat sat on the mat", "the dog sat on the log", "it's 1999", "they'll never know why"]  # of two alike, one
    found = e.layer_sweep(model, tok, PAIRS, pooling, skip_bos)

    def vector(text, layer):
        h = model([tok.encode(text)], output_hidden_states=True).hidden_states[layer][0]
        h = h[1:] if skip_bos else h
        return h.mean(0) if pooling == "mean" else h[-1]

    assert [score.layer for score in found] == [0, 1, 2]
    for score in found:
        places = []
        for query, document in PAIRS:
            q, near = vector(query, score.layer), {}
            for d in documents:
                v = vector(d, score.layer)
                near[d] = q @ v / np.linalg.norm(q) / np.linalg.norm(v)
            places.append(1 + sorted(documents, key=near.get, reverse=True).index(document))
        assert score.recall_at_1 == pytest.approx(sum(at == 1 for at in places) / 5)
        assert score.mean_reciprocal_rank == pytest.approx(sum(1 / at for at in places) / 5)
    assert len({score.mean_reciprocal_rank for score in found}) > 1


def test_of_equally_near_documents_the_earlier_goes_first():
    similarity = np.array([[0.5, 0.5, 0.5], [0.5, 0.9, 0.9], [0.1, 0.2, 0.3]])
    assert e.place(similarity, np.array([1, 0, 2])).tolist() == [2, 3, 1]


def test_many_texts_are_read_a_few_at_a_time(monkeypatch):
    model, tok = lm(), small.tokenizer()
    texts = [small.TEXT[i : i + 5 + i % 20] for i in range(40)]
    wanted = np.concatenate([model.embed([tok.encode(text)]) for text in texts])
    sizes, plain = [], e.embed
    monkeypatch.setattr(e, "embed", lambda model, ids, *rest, **how: sizes.append(len(ids)) or plain(model, ids, *rest, **how))
    np.testing.assert_allclose(e.embed_texts(model, tok, texts), wanted, rtol=1e-9, atol=1e-12)
    assert sizes == [16, 16, 8]
    assert [a.shape for a in e.embed_texts(model, tok, texts, [0, 2])] == [(40, 16), (40, 16)]


def test_one_document_is_no_search():
    with pytest.raises(ValueError, match="1 different documents"):
        e.layer_sweep(lm(), small.tokenizer(), [("a", "b"), ("c", "b")])


# ---- the command line --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("model"))


def test_vectors_from_the_shell(folder, tmp_path, capsys, monkeypatch):
    texts = ["the cat", "naïve café", "they'll never know"]
    model, tok = OPTForCausalLM.from_pretrained(folder), OPTTokenizer.from_pretrained(folder)
    wanted = np.concatenate([model.embed([tok.encode(text)], None, 1, "weighted", False, True) for text in texts])
    words = ("--layer", 1, "--pooling", "weighted", "--no-normalize", "--skip-bos", "--model", folder, "--backend", "numpy")
    status, out, err = run(capsys, "embed", *texts, *words)
    found = [json.loads(line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert [record["text"] for record in found] == texts
    np.testing.assert_allclose([record["embedding"] for record in found], wanted, rtol=1e-5)
    (tmp_path / "texts.txt").write_bytes("\r\n".join(texts).encode() + b"\r\n")
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("\n".join(texts)))
    assert run(capsys, "embed", "--file", tmp_path / "texts.txt", *words)[1] == out == run(capsys, "embed", "--file", "-", *words)[1]
    status, out, _ = run(capsys, "embed", *texts, *words, "--out", tmp_path / "rows.npy")
    assert (status, out) == (0, f"{tmp_path / 'rows.npy'}: 3 vectors of 16 numbers\n")
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), wanted, rtol=1e-5)


def test_without_options_the_last_layer_is_averaged_and_normalised(folder, capsys):
    found = json.loads(run(capsys, "embed", "the cat", "--model", folder)[1])["embedding"]
    ids = OPTTokenizer.from_pretrained(folder).encode("the cat")
    np.testing.assert_allclose([found], OPTForCausalLM.from_pretrained(folder).embed([ids]), rtol=1e-4)
    assert np.linalg.norm(found) == pytest.approx(1, rel=1e-5)


def test_a_sweep_from_the_shell(folder, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"query": q, "document": d}) for q, d in PAIRS))
    words = ("--pooling", "last", "--skip-bos", "--dtype", "float64", "--model", folder)
    status, out, _ = run(capsys, "embed", "--sweep", tmp_path / "pairs.jsonl", *words)
    wanted = e.layer_sweep(OPTForCausalLM.from_pretrained(folder, dtype="float64"), OPTTokenizer.from_pretrained(folder), PAIRS, "last", True)
    rows = [line.split() for line in out.splitlines()[1:]]
    best = max(wanted, key=lambda score: (score.recall_at_1, score.mean_reciprocal_rank))
    assert status == 0
    where = [["embeddings"] if w.layer == 0 else ["after", "block", str(w.layer - 1)] for w in wanted]
    numbers = [[f"{w.recall_at_1:.4f}", f"{w.mean_reciprocal_rank:.4f}", *(["best"] if w is best else [])] for w in wanted]
    assert rows == [[str(w.layer), *place, *found] for w, place, found in zip(wanted, where, numbers, strict=True)]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), ("--file",)),
        (("x", "--file", "y"), ("--file",)),
        (("--file", "nowhere.txt"), ("nowhere.txt",)),
        (("--file", "EMPTY"), ("empty.txt", "empty")),
        (("--file", "GAP"), ("text 2 of 3", "empty")),
        (("--file", "LATIN"), ("latin.txt", "UTF-8")),
        (("x", ""), ("text 2 of 2", "empty")),
        (("x", "--layer", 3), ("layer=3",)),
        (("x", "--pooling", "sum"), ("'sum'",)),
        (("x", "--out", "no/where.npy"), ("no/where.npy",)),
        ((small.TEXT,), ("32",)),
        (("--sweep", "nowhere.jsonl"), ("nowhere.jsonl",)),
        (("--sweep", "GAP"), ("gap.txt:1", "JSON")),
        (("x", "--sweep", "GAP"), ("--sweep",)),
        (("--sweep", "GAP", "--layer", 0), ("--sweep", "--layer")),
    ],
    ids=lambda words: " ".join(map(str, words))[:40],
)
def test_a_mistake(folder, tmp_path, capsys, words, named):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    files = {"EMPTY": tmp_path / "empty.txt", "GAP": tmp_path / "gap.txt", "LATIN": tmp_path / "latin.txt"}
    assert_one_line(*run(capsys, "embed", *(files.get(word, word) for word in words), "--model", folder), *named)
