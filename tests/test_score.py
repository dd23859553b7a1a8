"""Scores equal torch's in float64 on HF's logits, wherever the padding is; windows, disagreement and calibration follow their definitions."""

import json
import math
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import small
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import PADDINGS, VARIANTS, batch, build, tensors
from test_cli import assert_one_line

from opt_np import OPTForCausalLM, OPTModel, OPTTokenizer, checkpoint, cli, grad, processors
from opt_np import score as s

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
TEXT = "the cat sat on the log"


def lm(seed=0, dtype="float64", **changes):
    cfg = small.config(**changes)
    return OPTForCausalLM(small.params(cfg, seed, dtype), cfg)


def run(capsys, *words):
    """opt-np in this process -> status, stdout, stderr."""
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as stop:  # argparse
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("model"))


# ---- tokens ------------------------------------------------------------------------------------------------------------------------------


def pairs(mask):
    """Each real token with the real token before it, row by row, in plain Python."""
    for b, row in enumerate(mask):
        before = None
        for t, real in enumerate(row):
            if real:
                if before is not None:
                    yield b, before, t
                before = t


def expected(logits, token):
    """What torch makes of one position's logits."""
    p = torch.distributions.Categorical(logits=logits)
    surprise = -p.logits
    order = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))
    return {
        "logprob": -surprise[token].item(), "rank": order.index(token), "entropy": p.entropy().item(),
        "varentropy": ((p.probs * surprise**2).sum() - (p.probs * surprise).sum() ** 2).item(),
        "margin": (p.probs[order[0]] - p.probs[order[1]]).item(), "top_ids": order[:4], "top_logprobs": (-surprise)[order[:4]].tolist(),
    }  # fmt: skip


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_equal_torch(variant, padding):
    hf, cfg, params = build(variant)
    ids, mask = batch(padding)
    with torch.no_grad():
        logits = hf(*tensors(ids, mask)).logits
    found = s.score(OPTForCausalLM(params, cfg), ids, mask, top=4)
    judged = np.zeros(ids.shape, bool)
    for b, before, t in pairs(np.ones_like(ids) if mask is None else mask):
        judged[b, t] = True
        for name, value in expected(logits[b, before], ids[b, t]).items():
            np.testing.assert_allclose(getattr(found, name)[b, t], value, err_msg=f"{name} of token {t} of row {b}", **CLOSE)
    np.testing.assert_array_equal(found.scored, judged)
    for name in ("logprob", "entropy", "entropy_bits", "varentropy", "margin", "top_logprobs"):
        assert np.isnan(getattr(found, name)[~judged]).all(), name
        assert not np.isnan(getattr(found, name)[judged]).any(), name
    assert (found.rank[~judged] == -1).all()
    assert (found.top_ids[~judged] == -1).all()


def test_bits_are_nats_over_ln_2():
    found = s.score(lm(), [[5, 6, 7]])
    np.testing.assert_allclose(found.entropy_bits, found.entropy / np.log(2))


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_float32_models_are_judged_in_float64(backend):
    cfg = small.config()
    model, exact = OPTForCausalLM(small.params(cfg), cfg, backend), OPTForCausalLM(small.params(cfg, dtype="float64"), cfg)
    ids = small.ids(cfg)
    found, wanted = s.score(model, ids), s.score(exact, ids)
    assert found.logprob.dtype == found.entropy.dtype == np.float64
    np.testing.assert_allclose(found.logprob, wanted.logprob, rtol=1e-4, atol=1e-4)
    rows = np.exp(s.score(model, ids, top=cfg.vocab_size).top_logprobs[:, 1:]).sum(-1)
    np.testing.assert_allclose(rows, 1, rtol=1e-13)  # float32 would leave 1e-7


def test_a_row_of_padding_and_a_row_of_one_token_have_no_scores():
    found = s.score(lm(), [[5, 6, 7], [1, 1, 1], [1, 5, 1]], [[1, 1, 1], [0, 0, 0], [0, 1, 0]])
    assert found.scored.tolist() == [[False, True, True], [False] * 3, [False] * 3]
    assert not s.score(lm(), [[5]]).scored.any()


def logits(V=9):
    return arrays(np.float64, (3, V), elements=st.sampled_from([-np.inf, -800.0, -1.0, 0.0, 0.5, 0.5000000001, 3.0, 40.0])).map(with_a_number)


def with_a_number(rows):
    rows[:, 4] = np.maximum(rows[:, 4], 0)
    return rows


@given(logits(), st.integers(1, 9))
def test_numbers_of_any_logits(rows, top):
    order = np.argsort(-rows, axis=-1, kind="stable")
    found = [s.judged(rows, np.full(3, i), top) for i in range(9)]  # each id in turn
    np.testing.assert_array_equal(np.argsort(np.stack([f["rank"] for f in found]), axis=0).T, order)
    np.testing.assert_allclose(sum(np.exp(f["logprob"]) for f in found), 1, rtol=1e-12)
    p = np.exp(np.stack([f["logprob"] for f in found], 1))
    f = found[0]
    np.testing.assert_array_equal(f["top_ids"], order[:, :top])
    assert ((f["entropy"] >= 0) & (f["entropy"] <= np.log(9) + 1e-12)).all()
    assert (f["varentropy"] >= 0).all()
    np.testing.assert_allclose(f["margin"], np.sort(p)[:, -1] - np.sort(p)[:, -2], atol=1e-15)
    seen = [[(q, -math.log(q)) for q in row if q > 0] for row in p.tolist()]
    entropy = [sum(q * nats for q, nats in row) for row in seen]
    np.testing.assert_allclose(f["entropy"], entropy, **CLOSE)
    variance = [sum(q * (nats - mean) ** 2 for q, nats in row) for row, mean in zip(seen, entropy, strict=True)]
    np.testing.assert_allclose(f["varentropy"], variance, **CLOSE)


def test_among_equally_likely_tokens_the_lower_id_goes_first():
    cfg = small.config()
    params = small.params(cfg, dtype="float64")
    params["embed_tokens"]["weight"][:] = 0  # tied: all logits are 0
    found = s.score(OPTForCausalLM(params, cfg), [[9, 4, 300, 7]], top=3)
    assert found.rank.tolist() == [[-1, 4, 300, 7]]
    assert found.top_ids[0, 1:].tolist() == [[0, 1, 2]] * 3
    np.testing.assert_allclose(found.entropy[0, 1:], np.log(308))
    np.testing.assert_allclose([found.varentropy[0, 1:], found.margin[0, 1:]], 0, atol=1e-25)


@given(st.integers(2, 8), st.integers(0, 4), st.integers(0, 4), st.integers(0, 99))
def test_padding_changes_nothing(n, left, right, seed):
    model = lm()
    ids = np.random.default_rng(seed).integers(4, 308, n)
    alone = s.score(model, ids[None])
    padded = s.score(model, [[7] * left + ids.tolist() + [8] * right], [[0] * left + [1] * n + [0] * right])
    for f in fields(alone):
        np.testing.assert_allclose(getattr(padded, f.name)[:, left : left + n], getattr(alone, f.name), **CLOSE)


def test_padding_changes_no_bit_on_the_cpu_backend():
    cfg = small.config()
    model, ids = OPTForCausalLM(small.params(cfg), cfg, "cpu"), small.ids(cfg, 1, 6)[0].tolist()
    alone = s.score(model, [ids])
    for left, right in ((3, 0), (0, 3), (2, 2)):
        row, mask = [1] * left + ids + [1] * right, [0] * left + [1] * 6 + [0] * right
        both = s.score(model, [row, small.ids(cfg, 1, len(row), 1)[0].tolist()], [mask, [1] * len(row)])
        for f in fields(alone):
            np.testing.assert_array_equal(getattr(both, f.name)[:1, left : left + 6], getattr(alone, f.name))


def test_few_logits_exist_at_one_time(monkeypatch):
    model, (ids, mask), sizes = lm(), batch("left", T=20, vocab=308), []
    whole, plain = s.score(model, ids, mask), s.lm_logits
    monkeypatch.setattr(s, "lm_logits", lambda params, h, ops: sizes.append(h.shape[1]) or plain(params, h, ops))
    monkeypatch.setattr(s, "NUMBERS", 7 * 308 + 5)
    parts = s.score(model, ids, mask)
    assert sum(sizes) == whole.scored.sum()
    assert max(sizes) == 7
    for f in fields(whole):
        np.testing.assert_allclose(getattr(parts, f.name), getattr(whole, f.name), **CLOSE)


@pytest.mark.parametrize("top", [0, -1, 309, 2.5, True, None])
def test_candidates_that_the_vocabulary_does_not_have(top):
    with pytest.raises(ValueError, match=rf"top={top!r} .*1 to vocab_size=308"):
        s.score(lm(), [[5, 6]], top=top)


@pytest.mark.parametrize("judge", [s.score, s.mc_dropout, lambda model, ids: s.ensemble([model, model], ids)])
def test_a_model_without_a_language_head(judge):
    cfg = small.config()
    with pytest.raises(ValueError, match="OPTForCausalLM, and this is OPTModel"):
        judge(OPTModel(small.params(cfg), cfg), [[5, 6]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad):
    model = lm()
    model.params["embed_tokens"]["weight"][300] = bad
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="logits are NaN or infinite"):
        s.score(model, [[5, 6]])


# ---- windows -----------------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_windows_score_each_token_once_with_context(n, window, data):
    stride = data.draw(st.integers(1, window))
    windows = list(s.stride_windows(n, window, stride))
    scored = [t for w in windows for t in range(w.first, w.stop)]
    skipped = {w.start for w in windows} if stride == window else {0}
    assert scored == [t for t in range(n) if t not in skipped]
    for i, w in enumerate(windows):
        assert w.start == i * stride
        assert w.stop - w.start <= window
        assert i == 0 or w.first - w.start >= max(1, window - stride)
    assert windows[-1].stop == n
    assert all(w.stop < n for w in windows[:-1])


@pytest.mark.parametrize("judge", [s.score, partial(s.mc_dropout, samples=2)])
@pytest.mark.parametrize(("n", "window", "stride"), [(20, 8, 3), (20, 8, 8), (7, 8, 2), (8, 8, 4), (9, 8, 7), (17, 8, 8)])
def test_a_long_text_is_scored_in_windows(n, window, stride, judge):
    model, ids, done = lm(), small.ids(small.config(), 1, n)[0], 0
    found = s.in_windows(partial(judge, model), ids, window, stride)
    for start in range(0, n, stride):
        stop = min(start + window, n)
        part = judge(model, ids[None, start:stop])
        for f in fields(found):
            assert getattr(found, f.name).shape[:2] == (1, n)
            np.testing.assert_array_equal(getattr(found, f.name)[:, max(done, start) : stop], getattr(part, f.name)[:, max(done - start, 0) :])
        done = max(done, stop)
    assert done == n


def test_texts_and_windows_that_do_not_fit():
    model, ids = lm(), list(range(5, 25))
    with pytest.raises(ValueError, match=r"20 tokens, and the window 8: .*stride"):
        s.in_windows(partial(s.score, model), ids, 8)
    with pytest.raises(ValueError, match="1 tokens"):
        s.in_windows(partial(s.score, model), [5], 8)
    for stride in (0, 9, 1.5):
        with pytest.raises(ValueError, match=rf"stride={stride} .*1 to window=8"):
            s.in_windows(partial(s.score, model), ids, 8, stride)
    for window in (0, 1, 33, 2.5):
        with pytest.raises(ValueError, match=rf"window={window} .*max_position_embeddings=32"):
            s.window_of(model.config, window)
    assert s.window_of(model.config, None) == 32
    assert s.window_of(small.config(max_position_embeddings=4096), None) == 2048
    assert s.window_of(model.config, 5) == 5


# ---- disagreement ------------------------------------------------------------------------------------------------------------------------


def assert_equals_definition(found, P, ids):
    """P: (M, B, T, V), each prediction of what follows each token."""
    before, wanted = P[:, :, :-1], ids[:, 1:]
    mean = before.mean(0)
    own = np.log(np.take_along_axis(before, np.broadcast_to(wanted[None, ..., None], (*before.shape[:3], 1)), -1)[..., 0])
    entropies = -(before * np.log(before)).sum(-1)
    np.testing.assert_allclose(found.total[:, 1:], -(mean * np.log(mean)).sum(-1), **CLOSE)
    np.testing.assert_allclose(found.expected[:, 1:], entropies.mean(0), **CLOSE)
    np.testing.assert_allclose(found.std[:, 1:], own.std(0), **CLOSE)
    np.testing.assert_allclose(found.logprob[:, 1:], np.log(np.exp(own).mean(0)), **CLOSE)
    divergence = (before * (np.log(before) - np.log(mean))).sum(-1).mean(0)  # the mutual information once more, as a mean of KL divergences
    np.testing.assert_allclose(found.information[:, 1:], divergence, rtol=1e-8, atol=1e-12)
    assert all(np.isnan(getattr(found, name)[:, 0]).all() for name in ("total", "expected", "std", "logprob", "information"))


@pytest.mark.parametrize("variant", ["pre_norm", "like_350m", "galactica_30b"])
def test_dropout_equals_its_definition(variant):
    _, cfg, params = build(variant, dropout=0.2, attention_dropout=0.1 if variant == "galactica_30b" else 0.0)
    ids, _ = batch("none")
    logits = []
    for sample in range(3):
        h, _ = grad.decoder_fwd(params, ids, cfg, None, np.random.default_rng([5, sample]))
        logits.append(h @ params.get("lm_head", params["embed_tokens"])["weight"].T)
    P = torch.softmax(torch.tensor(np.stack(logits)), -1).numpy()
    found = s.mc_dropout(OPTForCausalLM(params, cfg), ids, samples=3, seed=5)
    assert_equals_definition(found, P, ids)
    assert (found.information[:, 1:] > 1e-6).all()
    assert (found.std[:, 1:] > 0).all()


def test_without_dropout_nothing_is_in_doubt():
    model, (ids, mask) = lm(), batch("both", vocab=308)
    found, plain = s.mc_dropout(model, ids, 4, attention_mask=mask, dropout=1e-30), s.score(model, ids, mask)
    np.testing.assert_allclose(found.total, plain.entropy, **CLOSE)
    np.testing.assert_allclose(found.logprob, plain.logprob, **CLOSE)
    np.testing.assert_allclose(found.information[plain.scored], 0, atol=1e-12)
    np.testing.assert_allclose(found.std[plain.scored], 0, atol=1e-12)


def test_a_seed_and_a_rate_of_dropout():
    model = lm()  # config.json's dropout is 0.1
    first, again, tenth, other, more = (
        s.mc_dropout(model, [[5, 6, 7]], 3, **how).std for how in ({}, {"seed": 0}, {"dropout": 0.1}, {"seed": 1}, {"dropout": 0.4})
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, tenth)
    assert not np.array_equal(first[:, 1:], other[:, 1:])
    assert more[0, 1:].sum() > first[0, 1:].sum()


def test_dropout_of_quantised_and_of_streamed_models(folder):
    for options in ({"quantize": "int8"}, {"stream_layers": True}):
        model = OPTForCausalLM.from_pretrained(folder, **options)
        found = s.mc_dropout(model, [[5, 6, 7]], 2, dropout=1e-30)
        np.testing.assert_allclose(found.logprob, s.score(model, [[5, 6, 7]]).logprob, rtol=1e-5)


def test_dropout_that_cannot_be():
    cfg = small.config()
    with pytest.raises(ValueError, match=r"ops_cpu: load it with backend='numpy'"):
        s.mc_dropout(OPTForCausalLM(small.params(cfg), cfg, "cpu"), [[5, 6]])
    for samples in (1, 0, 2.5):
        with pytest.raises(ValueError, match=rf"samples={samples} "):
            s.mc_dropout(lm(), [[5, 6]], samples)
    for rate in (0, 1, -0.1):
        with pytest.raises(ValueError, match=rf"dropout={rate} "):
            s.mc_dropout(lm(), [[5, 6]], dropout=rate)
    with pytest.raises(ValueError, match=r"dropout=0.0 .*give dropout"):
        s.mc_dropout(lm(dropout=0.0), [[5, 6]])


def test_an_ensemble_equals_its_definition():
    models = [lm(seed, hidden_size=size) for seed, size in ((0, 16), (1, 16), (2, 24))]
    ids = small.ids(small.config())
    P = np.stack([np.exp(processors.log_softmax(model(ids).logits)) for model in models])
    found = s.ensemble(models, ids)
    assert_equals_definition(found, P, ids)
    assert (found.information[:, 1:] <= np.log(3)).all()
    alike = s.ensemble([models[0]] * 2, ids)
    np.testing.assert_allclose([alike.information[:, 1:], alike.std[:, 1:]], 0, atol=1e-14)


def test_where_all_are_sure_of_different_tokens_all_entropy_is_information():
    models = [lm(), lm()]
    for token, model in enumerate(models, 6):  # each sure of its own, and that the others cannot be
        model.params["embed_tokens"]["weight"][:] = 0
        model.params["embed_tokens"]["weight"][token, 0] = 1e6
        model.params["embed_positions"]["weight"][:] = 0
        model.params["final_layer_norm"].update(weight=np.zeros(16), bias=np.eye(16)[0])
    found = s.ensemble(models, [[9, 6, 7]])
    np.testing.assert_allclose(found.total[0, 1:], np.log(2))
    np.testing.assert_array_equal(found.expected[0, 1:], 0)
    np.testing.assert_allclose(found.logprob[0, 1:], -np.log(2))


@pytest.mark.parametrize("sizes", [(), (308,), (308, 309)])
def test_models_that_are_no_ensemble(sizes):
    with pytest.raises(ValueError, match=", ".join(map(str, sizes)) or "no model"):
        s.ensemble([lm(vocab_size=size) for size in sizes], [[5, 6]])


# ---- calibration -------------------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])), st.booleans()), min_size=1), st.integers(1, 20)
)
def test_calibration_equals_its_definition(predictions, bins):
    found = s.calibration(*zip(*predictions, strict=True), bins)
    edges, ece, gaps = np.linspace(0, 1, bins + 1), 0.0, [0.0]
    for b in range(bins):
        inside = [(c, r) for c, r in predictions if edges[b] < c <= edges[b + 1] or (b == 0 and c == 0)]
        assert found.count[b] == len(inside)
        assert np.isnan(found.accuracy[b]) == np.isnan(found.confidence[b]) == (not inside)
        if inside:
            c, r = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            assert (found.confidence[b], found.accuracy[b]) == (pytest.approx(c), pytest.approx(r))
            gaps.append(abs(c - r))
            ece += gaps[-1] * len(inside) / len(predictions)
    assert found.ece == pytest.approx(ece, abs=1e-12)
    assert found.mce == pytest.approx(max(gaps), abs=1e-12)


def test_calibration_of_scores():
    model = lm()
    ids = model.generate([[5, 6, 7]], max_new_tokens=12, eos_token_id=[])  # its own text: where it chose, it was right
    found = s.score(model, ids)
    confidence, correct = np.exp(found.top_logprobs[:, 1:, 0]), found.top_ids[:, 1:, 0] == ids[:, 1:]
    assert 12 <= correct.sum() < 14
    assert found.calibration().ece == s.calibration(confidence, correct).ece
    assert found.calibration(4).count.sum() == 14


@pytest.mark.parametrize(
    ("confidence", "correct", "bins", "word"),
    [([], [], 15, r"\(0,\)"), ([0.5], [1, 0], 15, r"\(1,\) and correct \(2,\)"), ([1.5], [1], 15, "1.5"), ([np.nan], [1], 15, "nan"),
     ([0.5], [1], 0, "bins=0")],
)  # fmt: skip
def test_predictions_that_cannot_be(confidence, correct, bins, word):
    with pytest.raises(ValueError, match=word):
        s.calibration(confidence, correct, bins)


def test_a_reliability_plot(tmp_path):
    pytest.importorskip("matplotlib")
    s.reliability_plot(s.calibration([0.1, 0.9, 0.8], [0, 1, 1]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_reliability_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "opt-np\[notebooks\]"'):
        s.reliability_plot(s.calibration([0.5], [1]), tmp_path / "plot.png")


# ---- the command line --------------------------------------------------------------------------------------------------------------------


def test_json_holds_what_the_api_scores(folder, capsys):
    status, out, err = run(capsys, "score", TEXT, "--model", folder, "--json", "--top", 2, "--dtype", "float64")
    found = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    model, tok = OPTForCausalLM.from_pretrained(folder, dtype="float64"), OPTTokenizer.from_pretrained(folder)
    ids = tok.encode(TEXT)
    wanted = s.score(model, [ids], top=2)
    assert (status, err) == (0, "")
    assert [r["id"] for r in found] == ids
    assert "".join(r["token"] for r in found) == "</s>" + TEXT
    numbers = {"logprob", "rank", "entropy_nats", "entropy_bits", "varentropy", "margin"}
    assert {name for name, value in found[0].items() if value is None} == numbers
    assert found[0]["top"] == []
    for t, record in enumerate(found[1:], 1):
        assert record.keys() == numbers | {"token", "id", "top"}
        assert (record["logprob"], record["rank"], record["entropy_nats"]) == (wanted.logprob[0, t], wanted.rank[0, t], wanted.entropy[0, t])
        assert (record["varentropy"], record["margin"]) == (wanted.varentropy[0, t], wanted.margin[0, t])
        assert [c["id"] for c in record["top"]] == wanted.top_ids[0, t].tolist()
        assert [c["logprob"] for c in record["top"]] == wanted.top_logprobs[0, t].tolist()
        assert [c["token"] for c in record["top"]] == [tok.decode([i]) for i in wanted.top_ids[0, t]]


def test_the_table_and_what_it_comes_to(folder, capsys):
    status, out, _ = run(capsys, "score", TEXT, "--model", folder)
    head, first, second, *rest = out.splitlines()
    found = s.score(OPTForCausalLM.from_pretrained(folder), [OPTTokenizer.from_pretrained(folder).encode(TEXT)])
    assert status == 0
    assert head.split()[:4] == ["token", "logprob", "rank", "entropy"]
    assert first.split() == ["'</s>'", *"------"]
    assert second.split()[1:4] == [f"{found.logprob[0, 1]:.3f}", str(found.rank[0, 1]), f"{found.entropy[0, 1]:.3f}"]
    assert second.endswith(f"{np.exp(found.top_logprobs[0, 1, 2]):.3f}")
    word, number, *_ = rest[-1].split()
    assert (word, float(number.rstrip(","))) == ("perplexity", pytest.approx(np.exp(-np.nanmean(found.logprob)), abs=1.1e-4))  # its last digit
    assert rest[-3] == f"tokens        {found.rank.shape[1]}, of which {found.rank.shape[1] - 1} are scored"


def test_a_certain_token_is_shown_as_certain():
    record = {"token": "a", **dict.fromkeys(("logprob", "rank", "entropy_nats", "entropy_bits", "varentropy", "margin"))}
    assert s.table([{**record, "top": [{"token": "b", "logprob": 0.0}, {"token": "c", "logprob": None}]}]).endswith("'b' 1.000  'c' 0.000")


def test_a_text_from_a_file_and_from_standard_input(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    words = ("--model", folder, "--json")
    plain = run(capsys, "score", TEXT, *words)
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO(TEXT))
    assert run(capsys, "score", "--file", tmp_path / "text.txt", *words) == plain == run(capsys, "score", "-", *words)


def test_a_text_longer_than_the_context(folder, capsys):
    long = small.TEXT[:200]
    assert_one_line(*run(capsys, "score", long, "--model", folder), "--stride", 32)
    status, out, _ = run(capsys, "score", long, "--model", folder, "--stride", 8, "--json")
    tok = OPTTokenizer.from_pretrained(folder)
    assert status == 0
    assert "".join(json.loads(line)["token"] for line in out.splitlines()) == "</s>" + long
    assert len(out.splitlines()) == len(tok.encode(long)) > 40
    assert [json.loads(line)["rank"] is None for line in out.splitlines()].count(True) == 1


def test_disagreement_from_the_shell(folder, tmp_path, capsys):
    cfg = small.config()
    checkpoint.save(tmp_path, small.params(cfg, 1), cfg)
    small.tokenizer().save_pretrained(tmp_path)
    own, other = (OPTForCausalLM.from_pretrained(path) for path in (folder, tmp_path))
    ids = [small.tokenizer().encode(TEXT)]
    for option, wanted in (("--with", s.ensemble([own, other], ids)), ("--mc-dropout", s.mc_dropout(own, ids, 3))):
        words = ("score", TEXT, "--model", folder, option, tmp_path if option == "--with" else 3)
        status, out, _ = run(capsys, *words, "--json")
        found = [json.loads(line) for line in out.splitlines()]
        assert status == 0
        assert (found[0]["mutual_information"], found[0]["logprob_std"]) == (None, None)
        np.testing.assert_allclose([r["mutual_information"] for r in found[1:]], wanted.information[0, 1:], rtol=1e-3)
        np.testing.assert_allclose([r["logprob_std"] for r in found[1:]], wanted.std[0, 1:], rtol=1e-3)
        assert "information" in run(capsys, *words)[1].splitlines()[0]


def test_models_with_other_tokens_are_no_ensemble(folder, tmp_path, capsys):
    small.folder(tmp_path, with_tokenizer=False)
    OPTTokenizer.train(["qq zz qq zz"], 270).save_pretrained(tmp_path)
    assert_one_line(*run(capsys, "score", TEXT, "--model", folder, "--with", tmp_path), "different tokens")


def test_reliability_from_the_shell(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    status, out, _ = run(capsys, "score", TEXT, "--model", folder, "--reliability", tmp_path / "plot.png")
    found = s.score(OPTForCausalLM.from_pretrained(folder), [OPTTokenizer.from_pretrained(folder).encode(TEXT)]).calibration()
    assert status == 0
    assert out.splitlines()[-1] == f"calibration   ECE {found.ece:.4f}, MCE {found.mce:.4f}"
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert_one_line(*run(capsys, "score", TEXT, "--model", folder, "--reliability", tmp_path / "plot.song"), "song")
    monkeypatch.setattr(s, "report", lambda *_, **__: pytest.fail("scored before it was known where the plot goes"))
    assert_one_line(*run(capsys, "score", TEXT, "--model", folder, "--reliability", tmp_path / "no" / "plot.png"), "no folder")
    assert_one_line(*run(capsys, "score", TEXT, "--model", folder, "--reliability", tmp_path), "is a folder")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), ("--file",)),
        (("",), ("empty",)),
        (("x", "--file", "y"), ("one text",)),
        (("--file", "nowhere.txt"), ("nowhere.txt",)),
        (("--file", "EMPTY"), ("empty.txt", "empty")),
        (("--file", "LATIN"), ("latin.txt", "UTF-8")),
        (("--file", "FOLDER"), ("directory",)),
        (("a\udcff",), ("Unicode",)),
        (("x", "--top", 309), ("top=309", "308")),
        (("x", "--top", 0), ("top=0",)),
        (("x", "--window", 33), ("window=33", "32")),
        (("x", "--stride", 40), ("stride=40", "32")),
        (("x", "--mc-dropout", 1), ("samples=1",)),
        (("x", "--mc-dropout", 2, "--backend", "cpu"), ("numpy",)),
        (("x", "--mc-dropout", 2, "--with", "y"), ("--mc-dropout", "--with")),
        (("x", "--with", "nowhere"), ("nowhere",)),
        (("x", "--perplexity", "--json"), ("--perplexity", "--json")),
        (("x", "--perplexity", "--mc-dropout", 0), ("--perplexity", "--mc-dropout")),
        (("x", "--perplexity", "--with", "y"), ("--perplexity", "--with")),
        (("x", "--perplexity", "--top", 2), ("--perplexity", "--top")),
        (("x", "--perplexity", "--reliability", "y.png"), ("--perplexity", "--reliability")),
    ],
    ids=lambda words: " ".join(map(str, words)).replace("\udcff", "?"),
)
def test_a_mistake(folder, tmp_path, capsys, words, named):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    files = {"EMPTY": tmp_path / "empty.txt", "LATIN": tmp_path / "latin.txt", "FOLDER": tmp_path}
    assert_one_line(*run(capsys, "score", *(files.get(word, word) for word in words), "--model", folder), *named)
