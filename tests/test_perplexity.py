"""Each convention's perplexity equals one computed from its public description with HF's model in float64, at every length round a window's ends."""

import math
import re

import numpy as np
import pytest
import small
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import VARIANTS, build
from test_cli import assert_one_line
from test_score import lm, run
from torch.nn.functional import cross_entropy

from opt_np import OPTForCausalLM, OPTModel, OPTTokenizer
from opt_np import perplexity as p
from opt_np import score as s

W = 12
CLOSE = 1e-10  # relative
TEXTS = [(small.TRICKY + small.TEXT)[start : start + n] for start, n in enumerate([1, 2, W - 2, W - 1, W, W + 1, 2 * W - 1, 2 * W, 2 * W + 3, 71])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("model"))


class Letters:
    """A token for each character, after </s>."""

    bos_token_id = 2

    def encode(self, text, add_special_tokens=True):
        return [2] * add_special_tokens + [4 + ord(c) % 90 for c in text]


def hf_loss(hf, ids, labels):
    """As HF's loss, labels shifted inside and -100 ignored, without its cast to float32."""
    with torch.no_grad():
        logits = hf(torch.tensor([ids])).logits[0]
    return cross_entropy(logits[:-1], torch.tensor(labels)[1:])


def gptq(hf, tokens, window):
    """The seqlen-long samples of GPTQ's opt_eval: the mean of each, times seqlen, over all of them and seqlen."""
    samples = [tokens[i * window : (i + 1) * window] for i in range(len(tokens) // window)]
    return math.exp(sum(hf_loss(hf, ids, ids).item() * window for ids in samples) / (len(samples) * window))


def lm_eval(hf, tokens, window):
    """-log p of all of tokens[1:], window at a time; the model reads the last `window` tokens before the last of them."""
    nats = 0.0
    for i in range(1, len(tokens), window):
        wanted = tokens[i : i + window]
        read = tokens[: i + len(wanted) - 1][-window:]
        with torch.no_grad():
            logits = hf(torch.tensor([read])).logits[0, -len(wanted) :]
        nats += cross_entropy(logits, torch.tensor(wanted), reduction="sum").item()
    return nats


def strided(hf, tokens, window, stride):
    """HF's page: its windows and labels -> nats and count by its own weights, and by the labels that the loss really saw."""
    docs, real, done = np.zeros(2), np.zeros(2), 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        new = end - done
        labels = [*tokens[begin:end]]
        labels[:-new] = [-100] * (end - begin - new)
        seen = sum(label != -100 for label in labels[1:])
        if seen:
            loss = hf_loss(hf, tokens[begin:end], labels).item()
            docs += loss * (new - 1), new - 1
            real += loss * seen, seen
        done = end
        if end == len(tokens):
            break
    return math.exp(docs[0] / docs[1]), math.exp(real[0] / real[1]), int(real[1])


@pytest.fixture(scope="module", params=["pre_norm", "like_350m"])
def both(request):
    hf, cfg, params = build(request.param)
    return hf, OPTForCausalLM(params, cfg)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{len(text)} letters")
def test_gptq(both, text):
    hf, model = both
    tokens = Letters().encode(text)
    if len(tokens) < W:
        with pytest.raises(p.TooShort, match=f"gptq: the text is {len(tokens)} tokens, and it takes one window of {W}"):
            p.perplexity(model, Letters(), text, "gptq", W)
        return
    found = p.perplexity(model, Letters(), text, "gptq", W)
    assert found.perplexity == pytest.approx(gptq(hf, tokens, W), rel=CLOSE)
    assert found.scored == len(tokens) // W * (W - 1)
    assert found.dropped == len(tokens) - 1 - found.scored  # </s> is no token of the text
    whole = (found.words, found.bytes, found.word_perplexity, found.byte_perplexity, found.bits_per_byte)
    assert whole == (None,) * 5 if found.dropped else None not in whole
    assert found.hf_docs is None


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{len(text)} letters")
@pytest.mark.parametrize("convention", ["lm-eval", "lm-eval<0.4.10"])
def test_lm_eval(both, text, convention):
    hf, model = both
    tokens = [2, *Letters().encode(text, add_special_tokens=convention == "lm-eval")]
    found, nats = p.perplexity(model, Letters(), text, convention, W), lm_eval(hf, tokens, W)
    words, size = len(re.split(r"\s+", text)), len(text.encode("utf-8"))
    assert (found.scored, found.dropped, found.words, found.bytes) == (len(tokens) - 1, 0, words, size)
    assert found.perplexity == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=CLOSE)
    assert found.nats == pytest.approx(nats, rel=CLOSE)
    assert found.word_perplexity == pytest.approx(math.exp(nats / words) if nats / words < 709 else math.inf, rel=1e-8)
    assert found.byte_perplexity == pytest.approx(math.exp(nats / size), rel=CLOSE)
    assert found.bits_per_byte == pytest.approx(nats / size / math.log(2), rel=CLOSE)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{len(text)} letters")
@pytest.mark.parametrize("stride", [1, 5, W // 2, W - 1, W])
def test_stride(both, text, stride):
    hf, model = both
    tokens = Letters().encode(text)
    docs, real, count = strided(hf, tokens, W, stride)
    found = p.perplexity(model, Letters(), text, "stride", W, stride)
    assert found.perplexity == pytest.approx(real, rel=CLOSE)
    assert found.hf_docs == pytest.approx(docs, rel=CLOSE)
    assert (found.scored, found.dropped) == (count, len(tokens) - 1 - count)
    assert (found.words, found.bytes) == ((len(re.split(r"\s+", text)), len(text.encode())) if not found.dropped else (None, None))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model(variant):
    hf, cfg, params = build(variant)
    model, text = OPTForCausalLM(params, cfg), small.TEXT[:57]
    tokens = Letters().encode(text)
    found = {result.convention: result for result in p.every_convention(model, Letters(), text, W, 5)}
    assert list(found) == list(p.CONVENTIONS)
    assert found["gptq"].perplexity == pytest.approx(gptq(hf, tokens, W), rel=CLOSE)
    assert found["lm-eval"].nats == pytest.approx(lm_eval(hf, [2, *tokens], W), rel=CLOSE)
    assert found["lm-eval<0.4.10"].nats == pytest.approx(lm_eval(hf, tokens, W), rel=CLOSE)
    assert found["stride"].perplexity == pytest.approx(strided(hf, tokens, W, 5)[1], rel=CLOSE)


def test_rolling_windows_are_lm_evals():
    """What lm-evaluation-harness's own tests of get_rolling_token_windows hold: 34 tokens after a prefix, 10 at a time."""
    text = [-100, *range(34)]
    windows = [(text[w.start : w.stop - 1], text[w.first : w.stop]) for w in p.rolling_windows(35, 10)]
    assert windows == [
        ([-100, *range(9)], [*range(10)]), ([*range(9, 19)], [*range(10, 20)]), ([*range(19, 29)], [*range(20, 30)]),
        ([*range(23, 33)], [*range(30, 34)]),
    ]  # fmt: skip


@given(st.integers(0, 80), st.integers(2, 20))
def test_windows_score_each_token_once(n, window):
    rolling = list(p.rolling_windows(n, window))
    assert [t for w in rolling for t in range(w.first, w.stop)] == list(range(1, n))
    for w in rolling:
        assert 0 <= w.start < w.first
        assert w.stop - 1 - w.start <= window
        assert w.stop - 1 - w.start == window or w.start == 0
    disjoint = list(p.disjoint_windows(n, window))
    assert [t for w in disjoint for t in range(w.start, w.stop)] == list(range(n // window * window))
    assert all(w.first == w.start + 1 and w.stop - w.start == window for w in disjoint)


def test_a_text_in_one_window_costs_what_its_tokens_do():
    model, tok, text = lm(), small.tokenizer(), small.TEXT[:30]
    nats = -np.nansum(s.score(model, [tok.encode(text)]).logprob)
    for convention in ("lm-eval<0.4.10", "stride"):
        assert p.perplexity(model, tok, text, convention).nats == pytest.approx(nats, rel=1e-12)


def test_the_window_is_the_context_and_the_stride_half_of_it():
    model, tok = lm(), small.tokenizer()
    for convention in p.CONVENTIONS:
        found = p.perplexity(model, tok, small.TEXT, convention)
        assert found == p.perplexity(model, tok, small.TEXT, convention, 32, 16)
        assert found != p.perplexity(model, tok, small.TEXT, convention, 31, 16)
        assert "windows of 32" in found.meaning or "32 tokens at a time" in found.meaning
    assert "every 16 tokens" in p.perplexity(model, tok, small.TEXT, "stride").meaning
    assert p.perplexity(model, tok, small.TEXT) == p.perplexity(model, tok, small.TEXT, "gptq")


def test_few_logits_exist_at_one_time(monkeypatch):
    model, tok, sizes, plain = lm(), small.tokenizer(), [], s.lm_logits
    whole = p.perplexity(model, tok, small.TEXT[:90], "stride")
    monkeypatch.setattr(s, "lm_logits", lambda params, h, ops: sizes.append(h.shape[1]) or plain(params, h, ops))
    monkeypatch.setattr(s, "NUMBERS", 7 * 308)
    assert p.perplexity(model, tok, small.TEXT[:90], "stride").nats == pytest.approx(whole.nats, rel=1e-12)
    assert (max(sizes), sum(sizes)) == (7, whole.scored)


def test_a_number_too_large_is_infinite():
    assert p.exp(1e6) == math.inf
    assert p.exp(1.0) == math.e


@pytest.mark.parametrize(
    ("options", "words"),
    [(("", "gptq"), "empty"), (("a b", "best"), "'best' is none of gptq, lm-eval"), (("a b", "gptq", 33), "window=33 .*max_position_embeddings=32"),
     (("a b", "gptq", 1), "window=1 "), (("a b", "gptq", 8, 9), "stride=9 .*window=8"), (("a b", "stride", 8, 0), "stride=0 "),
     (("a b", "gptq"), "takes one window of 32")],
)  # fmt: skip
def test_what_cannot_be_measured(options, words):
    with pytest.raises(ValueError, match=words):
        p.perplexity(lm(), small.tokenizer(), *options)


def test_a_model_without_a_language_head():
    cfg = small.config()
    with pytest.raises(ValueError, match="this is OPTModel"):
        p.perplexity(OPTModel(small.params(cfg), cfg), small.tokenizer(), small.TEXT)


def test_one_token_is_too_short_for_a_stride():
    class NoBos(Letters):
        def encode(self, text, add_special_tokens=True):
            return super().encode(text, False)

    with pytest.raises(p.TooShort, match="stride: the text is 1 tokens"):
        p.perplexity(lm(), NoBos(), "a", "stride")


# ---- the command line --------------------------------------------------------------------------------------------------------------------


def test_every_convention_from_the_shell(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(small.TEXT, encoding="utf-8")
    status, out, err = run(capsys, "score", "--file", tmp_path / "text.txt", "--perplexity", "--window", 24, "--stride", 10, "--model", folder)
    model, tok = OPTForCausalLM.from_pretrained(folder), OPTTokenizer.from_pretrained(folder)
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:5]}
    assert (status, err) == (0, "")
    assert list(rows) == list(p.CONVENTIONS)
    for convention, row in rows.items():
        found = p.perplexity(model, tok, small.TEXT, convention, 24, 10)
        assert float(row[1]) == pytest.approx(found.perplexity, rel=1e-3)
        assert row[5:] == ["-" if n is None else str(n) for n in (found.scored, found.dropped, found.words, found.bytes)]
        assert f"{convention}: {found.meaning}" in out.splitlines()
    assert out.splitlines()[-3].endswith(f"{p.perplexity(model, tok, small.TEXT, 'stride', 24, 10).hf_docs:.4f}")


def test_a_short_text_from_the_shell(folder, capsys):
    status, out, err = run(capsys, "score", "the cat", "--perplexity", "--model", folder)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["lm-eval", "lm-eval<0.4.10", "stride"]
    assert out.splitlines()[-3].startswith("gptq: the text is")


def test_mistakes_from_the_shell(folder, capsys):
    assert_one_line(*run(capsys, "score", "the", "--perplexity", "--stride", 0, "--model", folder), "stride=0")
    assert_one_line(*run(capsys, "score", "the", "--perplexity", "--window", 99, "--model", folder), "window=99", 32)
    assert_one_line(*run(capsys, "score", "", "--perplexity", "--model", folder), "empty")
