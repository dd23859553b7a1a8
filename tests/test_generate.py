"""Decoding: token for token as HF where nothing is random, the same distribution where it is, and rows that do not affect each other."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from reference import batch, build, tensors
from transformers.generation.stopping_criteria import StopStringCriteria

from opt_np import OPTTokenizer, cli, generate, model
from opt_np.classes import OPTForCausalLM
from opt_np.kv_cache import KVCache
from opt_np.stopping import stop_check

NO_EOS = {"eos_token_id": -1}


def language_model(variant="pre_norm", **changes):
    """Weights at a scale where the model neither says one token for ever nor all of them alike."""
    hf, cfg, params = build(variant, scale=0.1 if variant == "like_350m" else 0.5, **changes)
    return hf, OPTForCausalLM(params, cfg)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m", "gelu", "untied"])
@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.7}, {"max_new_tokens": 20}, {"max_length": 25}], ids=str
)
def test_greedy_is_hfs_token_for_token(variant, padding, options):
    hf, ours = language_model(variant)
    ids, mask = batch(padding, seed=3)
    options = {**NO_EOS, **({"max_new_tokens": 12} if "max_length" not in options else {}), **options}
    mask_ = np.ones_like(ids) if mask is None else mask
    expected = hf.generate(*tensors(ids), attention_mask=torch.tensor(mask_), do_sample=False, **options).numpy()
    assert np.array_equal(ours.generate(ids, attention_mask=mask, **options), expected)


def interesting(ours, ids, mask):
    """Options that bite: made of what the model says when it is left alone."""
    said = ours.generate(ids, attention_mask=mask, max_new_tokens=12, **NO_EOS)[:, ids.shape[1] :].tolist()
    end = next(i for i in said[0][2:] if i not in said[0][:2])
    return {
        "no token twice": {"no_repeat_ngram_size": 1},
        "no pair twice": {"no_repeat_ngram_size": 2},
        "no triple twice": {"no_repeat_ngram_size": 3, "repetition_penalty": 0.8},
        "bad words": {"bad_words_ids": [[said[0][0]], [said[1][0], said[1][1]], [said[2][1], said[2][2], said[2][3]]]},
        "an end is no bad word": {"bad_words_ids": [[end], [said[0][0]]], "eos_token_id": end},
        "min_length": {"min_length": ids.shape[1] + 6, "eos_token_id": end},
        "min_length too short": {"min_length": ids.shape[1] + 2, "eos_token_id": end},
        "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": [end, said[1][1]]},
        "min_new_tokens wins": {"min_new_tokens": 1, "min_length": 99, "eos_token_id": end},
        "all at once": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[said[0][0]]], "min_length": 20, "eos_token_id": end},
        "many ends": {"eos_token_id": [said[0][4], said[1][7], said[2][2]]},
        "another pad": {"eos_token_id": said[0][4], "pad_token_id": 9},
    }


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
@pytest.mark.parametrize("number", range(12))
def test_processors_and_ends_are_hfs_token_for_token(variant, padding, number):
    hf, ours = language_model(variant)
    ids, mask = batch(padding, seed=3)
    mask = np.ones_like(ids) if mask is None else mask
    options = {**NO_EOS, "max_new_tokens": 20, **list(interesting(ours, ids, mask).values())[number]}
    expected = hf.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, **options).numpy()
    assert np.array_equal(ours.generate(ids, attention_mask=mask, **options), expected)
    plain = {"max_new_tokens": 20, **{k: v for k, v in options.items() if k in ("eos_token_id", "pad_token_id", "repetition_penalty")}}
    if options != plain and "min_length" not in options and "min_new_tokens" not in options:
        assert not np.array_equal(ours.generate(ids, attention_mask=mask, **plain)[:, : expected.shape[1]], expected), "this option does nothing here"


def test_the_default_length_is_hfs():
    hf, ours = language_model()
    ids, _ = batch("none")
    with pytest.warns(UserWarning, match="max_length"):
        expected = hf.generate(torch.tensor(ids), attention_mask=torch.ones_like(torch.tensor(ids)), do_sample=False, **NO_EOS).numpy()
    assert np.array_equal(ours.generate(ids, **NO_EOS), expected)
    assert expected.shape[1] == ids.shape[1] + 20


def test_rows_end_at_eos_and_are_filled_with_pads():
    hf, ours = language_model()
    ids, mask = batch("left", seed=3)
    free = ours.generate(ids, attention_mask=mask, max_new_tokens=15, **NO_EOS)
    eos = [int(free[0, ids.shape[1] + 4]), int(free[1, ids.shape[1] + 9])]
    for end in (eos[0], eos):
        expected = hf.generate(
            *tensors(ids, mask)[:1], attention_mask=torch.tensor(mask), max_new_tokens=15, do_sample=False, eos_token_id=end
        ).numpy()
        assert np.array_equal(ours.generate(ids, attention_mask=mask, max_new_tokens=15, eos_token_id=end), expected)


def test_a_mask_is_inferred_from_pads_as_in_hf():
    _, ours = language_model()
    ids, mask = batch("left", seed=3)
    assert np.array_equal(ours.generate(ids, max_new_tokens=5), ours.generate(ids, attention_mask=mask, max_new_tokens=5))


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_batch_rows_equal_single_runs_whatever_side_is_padded(side):
    _, ours = language_model()
    ids, mask = batch(side, seed=5)
    together = ours.generate(ids, attention_mask=mask, max_new_tokens=10, **NO_EOS)
    for b in range(len(ids)):
        row = ids[b][mask[b] != 0][None]
        alone = ours.generate(row, max_new_tokens=10, **NO_EOS)
        assert np.array_equal(together[b, ids.shape[1] :], alone[0, row.shape[1] :])
    assert np.array_equal(together[:, : ids.shape[1]], ids)


@given(seed=st.integers(0, 2**31), rows=st.permutations(range(3)))
def test_a_rows_draws_depend_on_seed_row_and_step_alone(seed, rows):
    _, ours = language_model()
    ids, mask = batch("left", seed=5)
    options = {"do_sample": True, "seed": seed, "max_new_tokens": 6, **NO_EOS}
    together = ours.generate(ids, attention_mask=mask, **options)
    first = ids[0][mask[0] != 0][None]
    assert np.array_equal(ours.generate(first, **options)[0, -6:], together[0, -6:])
    assert np.array_equal(ours.generate(ids[:2], attention_mask=mask[:2], **options), together[:2])
    assert np.array_equal(ours.generate(ids, attention_mask=mask, **options), together)


def test_without_a_seed_runs_differ():
    _, ours = language_model()
    ids, _ = batch("none")
    runs = {ours.generate(ids, do_sample=True, max_new_tokens=8, **NO_EOS).tobytes() for _ in range(4)}
    assert len(runs) > 1


def test_draws_follow_the_distribution():
    scores = np.log(np.array([[0.5, 0.3, 0.2, 1e-30]], np.float32))
    request = SimpleNamespace(seed=1)
    numbers = [generate.Request.random_numbers(request, 0, step).random() for step in range(4000)]
    draws = np.array([generate.choose(scores, [number])[0] for number in numbers])
    assert np.allclose(np.bincount(draws, minlength=4) / 4000, [0.5, 0.3, 0.2, 0], atol=0.03)


# ---- several sequences -------------------------------------------------------------------------------------------------------------------


def test_a_rows_first_sequence_is_its_only_one_and_rows_come_in_hfs_order():
    _, ours = language_model()
    ids, mask = batch("left", seed=5)
    options = {"do_sample": True, "seed": 7, "max_new_tokens": 6, "attention_mask": mask, **NO_EOS}
    one, three = ours.generate(ids, **options), ours.generate(ids, num_return_sequences=3, **options)
    assert three.shape == (9, one.shape[1])
    assert np.array_equal(three[::3], one)
    assert np.array_equal(three[:, : ids.shape[1]], np.repeat(ids, 3, 0))
    assert len({row.tobytes() for row in three[:3]}) == 3
    assert np.array_equal(ours.generate(ids[:2], num_return_sequences=2, **(options | {"attention_mask": mask[:2]}))[[0, 1]], three[:2])
    steps = list(ours.stream(ids, num_return_sequences=3, **options))
    assert np.array_equal(np.stack([step.ids for step in steps], 1), three[:, ids.shape[1] :])


def test_greedy_search_has_one_answer_as_in_hf():
    hf, ours = language_model()
    with pytest.raises(ValueError, match="num_return_sequences"):
        hf.generate(torch.tensor([[5]]), num_return_sequences=2, do_sample=False, max_new_tokens=2)
    with pytest.raises(ValueError, match="num_return_sequences=2 must be 1 without do_sample=True or beams"):
        ours.generate([[5]], num_return_sequences=2, max_new_tokens=2)


# ---- generation_config.json --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "options"),
    [
        ({"repetition_penalty": 1.5, "eos_token_id": -1, "pad_token_id": 1, "max_new_tokens": 9}, {}),
        ({"repetition_penalty": 1.5, "eos_token_id": -1, "pad_token_id": 1, "max_new_tokens": 9}, {"repetition_penalty": 1.0, "max_new_tokens": 4}),
        ({"no_repeat_ngram_size": 2, "eos_token_id": -1, "pad_token_id": 1, "max_length": 25}, {}),
        ({"eos_token_id": -1, "pad_token_id": 1, "max_length": 25}, {"max_new_tokens": 3}),
        ({"num_beams": 3, "length_penalty": 0.5, "eos_token_id": [5, 6], "pad_token_id": 1, "max_new_tokens": 6}, {}),
        ({"num_beams": 3, "eos_token_id": -1, "pad_token_id": 1, "max_new_tokens": 6, "temperature": 0.5}, {"num_beams": 1}),
    ],
    ids=str,
)
def test_generation_config_is_heeded_as_in_hf(stored, options):
    hf, ours = language_model()
    ids, mask = batch("left", seed=3)
    before, hf.generation_config = hf.generation_config, transformers.GenerationConfig(**stored)
    try:
        expected = hf.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options).numpy()
    finally:
        hf.generation_config = before
    ours = OPTForCausalLM(ours.params, ours.config, generation_config=stored)
    assert np.array_equal(ours.generate(ids, attention_mask=mask, **options), expected)


def test_a_prompt_as_long_as_the_stored_max_length_is_refused():
    _, ours = language_model()
    with pytest.raises(ValueError, match="nothing to generate: max_length=3, and the prompt has 3 tokens"):
        OPTForCausalLM(ours.params, ours.config, generation_config={"max_length": 3}).generate([[5, 6, 7]])


# ---- stop strings ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Ours and HF's, from the same files."""
    folder = small.folder(tmp_path_factory.mktemp("tokenizer"))
    return OPTTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@given(seed=st.integers(0, 2**20), count=st.integers(1, 3), where=st.integers(-9, 9))
def test_a_row_stops_where_hf_stops_it(tokenizers, seed, count, where):
    ours, theirs = tokenizers
    rng = np.random.default_rng(seed)
    text = small.TEXT[int(rng.integers(0, 90)) :][:30]
    ids = np.array([rng.permutation(ours.encode(text, add_special_tokens=False))[:8] for _ in range(12)])
    ids[:3] = rng.integers(0, 308, ids[:3].shape)  # specials, halves of characters, and ids without a token
    ids[3, -2:] = ids[4, -2:] = 2
    pieces = ["".join(ours.decode(row[-3:]))[max(0, where) :][: int(rng.integers(1, 9))] for row in ids] + ["</s>", "s></", "the cat", "é"]
    strings = [pieces[i] for i in rng.integers(0, len(pieces), count) if pieces[i]] or ["a"]
    expected = StopStringCriteria(theirs, strings)(torch.tensor(ids), None).numpy()
    assert np.array_equal(stop_check((), strings, ours)(ids), expected)


def test_stop_strings_cross_tokens_begin_in_the_prompt_and_end_inside_a_token(tokenizers):
    tok, theirs = tokenizers
    the, cat = (tok.encode(text, add_special_tokens=False) for text in ("the", " cat"))
    row = np.array([[*the, *cat]])
    assert len(row[0]) >= 2
    last = tok.decode(row[0, -1:])
    before = tok.decode(row[0, :-1])
    for stop, expected in ((before[-1] + last[0], True), (last[:1], True), (before, False), ("the cat", True), ("x", False), (last + "!", False)):
        assert stop_check((), (stop,), tok)(row)[0] == expected, stop
    assert stop_check((int(row[0, -1]),), (), None)(row)[0]
    for apart in ([*the, 305, *cat], [*the, *cat, 305]):  # an id without a token
        assert not stop_check((), ("the cat",), tok)(np.array([apart]))[0]
        assert not StopStringCriteria(theirs, ["the cat"])(torch.tensor([apart]), None)[0]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_stop_strings_end_rows_token_for_token_as_in_hf(tokenizers, seed, num_beams):
    tok, theirs = tokenizers
    hf, ours = language_model(vocab_size=308)
    ids, mask = batch("left", vocab=308, seed=seed)
    free = ours.generate(ids, attention_mask=mask, max_new_tokens=10, num_beams=num_beams, **NO_EOS)[:, ids.shape[1] :]
    texts = [tok.decode(row) for row in free]
    strings = [s for s in (texts[0][3:6], texts[1][4:5], texts[2][5:9]) if s and "\ufffd" not in s] or ["a"]
    options = {"max_new_tokens": 10, "stop_strings": strings, "num_beams": num_beams, **NO_EOS}
    expected = hf.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, tokenizer=theirs, **options).numpy()
    assert np.array_equal(ours.generate(ids, attention_mask=mask, tokenizer=tok, **options), expected)


def test_stop_strings_need_a_tokenizer():
    _, ours = language_model()
    with pytest.raises(ValueError, match=r"stop_strings=\['a'\] needs tokenizer="):
        ours.stream([[5]], stop_strings="a")


# ---- past the context --------------------------------------------------------------------------------------------------------------------


def slowly(ours, row, new, seen):
    """Greedy, one full reading a token; `seen` says which of the row's tokens the model gets."""
    row, prompt = [int(i) for i in row], len(row)
    for _ in range(new):
        row.append(int(model.forward(ours.params, [seen(row, prompt)], ours.config)[0, -1].argmax()))
    return row[prompt:]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
@pytest.mark.parametrize(("T", "new"), [(17, 40), (39, 6), (40, 5), (60, 9)])
@pytest.mark.parametrize("overflow", ["slide", "truncate_left"])
def test_past_the_context_each_row_is_what_slow_readings_give(overflow, T, new, variant, side):
    _, ours = language_model(variant)
    ids, mask = batch(side, T=T, seed=2)
    together = ours.generate(ids, attention_mask=mask, max_new_tokens=new, overflow=overflow, **NO_EOS)
    assert np.array_equal(together[:, :T], ids)

    def seen(row, prompt):
        return row[-40:] if overflow == "slide" else row[max(0, prompt - (41 - new)) :]

    for b in range(len(ids)):
        assert together[b, T:].tolist() == slowly(ours, ids[b][mask[b] != 0], new, seen)


def test_past_the_context_the_processors_see_the_whole_text():
    _, ours = language_model()
    ids, _ = batch("none", B=1, T=60, vocab=12, seed=2)
    said = ours.generate(ids, max_new_tokens=4, overflow="truncate_left", no_repeat_ngram_size=1, **NO_EOS)[0, 60:]
    assert not set(said) & set(ids[0])


def test_sliding_and_dropping_change_nothing_where_all_fits():
    _, ours = language_model()
    ids, mask = batch("left", seed=3)
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": True, "seed": 1, **NO_EOS}
    plain = ours.generate(ids, **options)
    assert all(np.array_equal(ours.generate(ids, overflow=way, **options), plain) for way in ("slide", "truncate_left"))


@pytest.mark.parametrize(
    ("T", "options", "message"),
    [
        (30, {"max_new_tokens": 12}, r"a prompt of 30 tokens and 12 new .* at most 11, or keep the end of the prompt: overflow="),
        (50, {"max_new_tokens": 1}, r"max_position_embeddings=40: keep the end of the prompt: overflow="),
        (30, {"max_new_tokens": 41, "overflow": "truncate_left"}, r'at most 40, or overflow="slide"'),
    ],
)
def test_what_cannot_fit_is_refused(T, options, message):
    _, ours = language_model()
    with pytest.raises(ValueError, match=message):
        ours.stream(np.full((1, T), 5), **options)


# ---- why -----------------------------------------------------------------------------------------------------------------------------------


def test_explain_tells_what_each_processor_did(tokenizers):
    _, ours = language_model(vocab_size=308)
    ids, mask = batch("left", vocab=308, seed=3)
    free = ours.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True, seed=5, **NO_EOS)[:, ids.shape[1] :]
    options = {"do_sample": True, "seed": 5, "temperature": 0.7, "top_k": 6, "top_p": 0.9, "repetition_penalty": 1.4, "max_new_tokens": 8,
               "bad_words_ids": [[int(free[0, 0])]], "eos_token_id": int(free[1, 2])}  # fmt: skip
    steps = list(ours.stream(ids, attention_mask=mask, **options))
    choices = ours.explain(ids, 9, tokenizers[0], attention_mask=mask, **options)
    assert [(c.step, c.row, c.id) for c in choices] == [(t, b, s.ids[b]) for t, s in enumerate(steps) for b in range(3) if s.active[b]]
    for choice in choices:
        logits, names = steps[choice.step].logits[choice.row], ["repetition_penalty", "bad_words_ids", "temperature", "top_k", "top_p"]
        leading = np.argsort(-logits, kind="stable")[:9].tolist()
        assert [c.id for c in choice.candidates] == leading + [choice.id] * (choice.id not in leading)
        for c in choice.candidates:
            assert c.logit == logits[c.id]
            assert c.text == tokenizers[0].decode([c.id])
            assert list(c.scores) == names
            gone = [name for name, score in c.scores.items() if score == -np.inf]
            assert c.removed_by == (gone[0] if gone else None)
            assert (c.probability == 0) == bool(gone)
            assert gone or c.scores["temperature"] == pytest.approx(c.scores["bad_words_ids"] / 0.7, rel=1e-6)
        assert {c.removed_by for c in choice.candidates} >= {"top_k"}
    assert any(c.removed_by == "bad_words_ids" for c in choices[0].candidates)
    assert all(sum(c.probability for c in choice.candidates) == pytest.approx(1, abs=1e-6) for choice in choices)


def test_explain_of_greedy_search_shows_no_processor_that_is_off():
    _, ours = language_model()
    ids, _ = batch("none", seed=3)
    choices = ours.explain(ids, 2, max_new_tokens=3, **NO_EOS)
    assert all(not c.scores and c.removed_by is None and c.text is None for choice in choices for c in choice.candidates)
    assert [c.id for c in choices[0:9:3]] == ours.generate(ids, max_new_tokens=3, **NO_EOS)[0, -3:].tolist()


def test_a_table_is_aligned_and_marks_the_choice(tokenizers):
    _, ours = language_model(vocab_size=308)
    (choice,) = ours.explain([[5, 6]], 3, tokenizers[0], max_new_tokens=1, bad_words_ids=[[int(ours.generate([[5, 6]], max_new_tokens=1)[0, 2])]])
    title, head, *rows = str(choice).splitlines()
    assert title == "step 0, row 0"
    assert head.split() == ["token", "id", "logit", "bad_words_ids", "probability"]
    assert [row.startswith(">") for row in rows] == [False, True, False]
    assert "removed" in rows[0]
    assert {len(line) for line in (head, *rows)} == {len(head)}
    assert choice.table() == str(choice)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_beams": 2}, "num_beams=2 chooses otherwise"), ({"penalty_alpha": 0.5}, "penalty_alpha=0.5 chooses"), ({"top": 0}, "top=0 must be")],
)
def test_what_explain_cannot_show(options, message):
    _, ours = language_model()
    with pytest.raises(ValueError, match=message):
        ours.explain([[5]], max_new_tokens=2, **options)


# ---- the command line --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def shell(folder, capsys, monkeypatch):
    """opt-np generate on a small model: its status, what it prints, its errors."""

    monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)  # main sets it; this puts it back

    def run(prompt, *words):
        status = cli.main(["generate", prompt, "--model", str(folder), "--backend", "numpy", *map(str, words)])
        return status, *capsys.readouterr()

    return run


WORDS = [
    ("--repetition-penalty", 1.3, "--no-repeat-ngram-size", 2, "--min-new-tokens", 4, "--bad-words-ids", "5,6", "9", "--eos-token-id", 7, 8),
    ("--do-sample", "--seed", 3, "--temperature", 0.8, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--typical-p", 0.95),
    ("--penalty-alpha", 0.6, "--top-k", 4),
    ("--overflow", "slide", "--max-new-tokens", 40),
    ("--overflow", "truncate_left", "--max-length", 30),
    ("--no-do-sample", "--min-length", 9, "--stop-strings", "e", "zz"),
    ("--num-beams", 3, "--length-penalty", 0.5, "--early-stopping", "true", "--num-return-sequences", 2),
    ("--num-beams", 2, "--early-stopping", "never"),
    ("--do-sample", "--num-return-sequences", 3, "--seed", 1),
]


def as_options(words):
    """The same as keywords of generate."""
    options, name = {}, ""
    for word in words:
        if str(word).startswith("--"):
            name = word[2:].replace("-", "_")
            options |= {"do_sample": name == "do_sample"} if name.endswith("do_sample") else {name: []}
        else:
            options[name].append({"true": True}.get(word, word))
    lists = ("eos_token_id", "stop_strings")
    options = {name: value[0] if isinstance(value, list) and name not in lists else value for name, value in options.items()}
    return options | ({"bad_words_ids": [[5, 6], [9]]} if "bad_words_ids" in options else {})


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words[0])
def test_the_command_line_prints_what_the_api_generates(shell, folder, words):
    api, tok = OPTForCausalLM.from_pretrained(folder), OPTTokenizer.from_pretrained(folder)
    ids, options = [tok.encode("the dog")], as_options(words)
    if not {"max_new_tokens", "max_length"} & options.keys():
        words, options = (*words, "--max-new-tokens", 8), options | {"max_new_tokens": 8}
    rows = api.generate(ids, tokenizer=tok, **options)[:, len(ids[0]) :]
    text = "\n---\n".join("the dog" + continuation for continuation in tok.batch_decode(rows, skip_special_tokens=True))
    assert shell("the dog", *words) == (0, text + "\n", "")


def test_the_command_line_takes_the_models_own_options(shell, folder):
    stored = {"repetition_penalty": 1.6, "max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    plain = shell("the", "--max-new-tokens", 5, "--eos-token-id", -1)
    told = shell("the", "--max-new-tokens", 5, "--eos-token-id", -1, "--repetition-penalty", 1.6)
    path = folder / "generation_config.json"
    try:
        path.write_text(json.dumps(stored))
        assert shell("the") == told != plain
        assert shell("the", "--repetition-penalty", 1.0) == plain
        path.write_text(json.dumps(stored | {"do_sample": True, "num_return_sequences": 2, "seed": 1}))
        assert shell("the")[1].count("\n---\n") == 1
        assert shell("the", "--no-do-sample", "--num-return-sequences", 1)[1] == told[1]
    finally:
        path.unlink()


def test_the_command_line_explains(shell, folder):
    api, tok = OPTForCausalLM.from_pretrained(folder), OPTTokenizer.from_pretrained(folder)
    options = {"max_new_tokens": 3, "do_sample": True, "seed": 2, "top_k": 4}
    tables = "\n\n".join(map(str, api.explain([tok.encode("the dog")], 6, tok, **options)))
    words = ("--explain", 6, "--max-new-tokens", 3, "--do-sample", "--seed", 2, "--top-k", 4)
    assert shell("the dog", *words) == (0, tables + "\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-return-sequences", 2), "num_return_sequences=2"),
        (("--num-beams", 0), "num_beams=0"),
        (("--explain", 3, "--num-beams", 2), "num_beams=2"),
        (("--explain", 0), "top=0"),
        (("--typical-p", 3), "typical_p=3.0"),
        (("--bad-words-ids", "999"), "vocab_size=308"),
        (("--max-new-tokens", 90, "--overflow", "truncate_left"), "slide"),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_is_one_line(shell, words, message):
    status, out, err = shell("the", *words)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err


@pytest.mark.parametrize("words", [("--bad-words-ids", "5,x"), ("--early-stopping", "maybe"), ("--overflow", "wrap")], ids=str)
def test_a_word_that_generate_does_not_know(shell, capsys, words):
    with pytest.raises(SystemExit):
        shell("the", *words)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert words[1] in err


# ---- streams -----------------------------------------------------------------------------------------------------------------------------


def test_a_stream_carries_what_generate_returns_and_the_models_own_numbers():
    _, ours = language_model()
    ids, mask = batch("left", seed=3)
    free = ours.generate(ids, attention_mask=mask, max_new_tokens=8, **NO_EOS)
    eos = int(free[1, ids.shape[1] + 2])
    whole = ours.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=eos)
    steps = list(ours.stream(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=eos))
    assert np.array_equal(np.stack([s.ids for s in steps], 1), whole[:, ids.shape[1] :])
    logits = model.forward(ours.params, whole, ours.config, attention_mask=np.concatenate([mask, np.ones((3, len(steps)), int)], 1))
    log_p = torch.log_softmax(torch.tensor(logits), -1).numpy()
    done = np.zeros(3, bool)
    for t, step in enumerate(steps, ids.shape[1]):
        for b in range(3):
            expected = (0, 0) if done[b] else (log_p[b, t - 1, whole[b, t]], -(np.exp(log_p[b, t - 1]) * log_p[b, t - 1]).sum())
            assert (step.logprobs[b], step.entropies[b]) == pytest.approx(expected, abs=1e-5)
        done |= step.ids == eos
        assert np.array_equal(step.finished, done)


def test_a_stream_comes_one_token_at_a_time():
    _, ours = language_model()
    stream = ours.stream([[5, 6]], max_new_tokens=30, **NO_EOS)
    assert next(stream).ids.shape == (1,)
    stream.close()
    assert next(stream, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5"),
        ({"do_sample": True, "top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "nothing to generate"),
        ({"max_length": 2}, "nothing to generate"),
        ({"max_new_tokens": 60}, "max_position_embeddings=40"),
        ({"attention_mask": [[0, 0, 0]]}, "all padding"),
        ({"attention_mask": [[1]]}, r"attention_mask is \(1, 1\)"),
        ({"num_beams": 3}, "num_beams=3: beam search knows no token before its end; use generate"),
        ({"bad_words_ids": [[4, 99]]}, r"bad_words_ids has \[4, 99\]; vocab_size=99 allows 0 to 98"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_computed(options, message):
    _, ours = language_model()
    with pytest.raises(ValueError, match=message):
        ours.stream([[5, 6, 7]], **options)


def test_unknown_options_are_named_and_none_means_the_default():
    _, ours = language_model()
    with pytest.raises(TypeError, match="no option beams; it has attention_mask"):
        ours.generate([[5]], beams=4)
    assert ours.generate([[5]], top_k=None, temperature=None, max_new_tokens=1).shape == (1, 2)


def test_without_a_pad_id_finished_rows_are_filled_with_eos_as_in_hf():
    hf, ours = language_model(pad_token_id=None)
    ids, _ = batch("none", seed=3)
    eos = int(ours.generate(ids, max_new_tokens=6, **NO_EOS)[0, ids.shape[1] + 1])
    expected = hf.generate(
        torch.tensor(ids), attention_mask=torch.ones_like(torch.tensor(ids)), max_new_tokens=6, do_sample=False, eos_token_id=eos
    ).numpy()
    assert np.array_equal(ours.generate(ids, max_new_tokens=6, eos_token_id=eos), expected)


def test_settings_that_do_nothing_are_said():
    _, ours = language_model()
    with pytest.warns(UserWarning, match="temperature has no effect without do_sample"):
        ours.generate([[5]], temperature=0.5, max_new_tokens=1)


@pytest.mark.parametrize("least", [{"min_new_tokens": 3}, {"min_length": 4}])
def test_more_tokens_at_least_than_at_most_is_said(least):
    _, ours = language_model()
    with pytest.warns(UserWarning, match="at least 3 new tokens are asked for, and at most 2: there will be 2"):
        assert ours.generate([[5]], max_new_tokens=2, **least).shape == (1, 3)


def test_the_last_token_may_stand_at_the_limit():
    _, ours = language_model()
    ids = np.random.default_rng(0).integers(4, 99, (1, 40))
    assert ours.generate(ids, max_new_tokens=1).shape == (1, 41)
    with pytest.raises(ValueError, match="at most 1"):
        ours.generate(ids, max_new_tokens=2)


# ---- the cache ---------------------------------------------------------------------------------------------------------------------------


def test_cache_holds_unscaled_keys_and_values_as_hf_does():
    hf, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    theirs, ours = hf(torch.tensor(ids), use_cache=True).past_key_values, KVCache()
    model.forward(params, ids, cfg, ours)
    for i in range(cfg.num_hidden_layers):
        k, v = ours._layers[i]
        assert np.allclose(k[:, : ours.length].swapaxes(1, 2), theirs.layers[i].keys.detach().numpy(), rtol=1e-9, atol=1e-12)
        assert np.allclose(v[:, : ours.length].swapaxes(1, 2), theirs.layers[i].values.detach().numpy(), rtol=1e-9, atol=1e-12)


def test_cropped_reordered_and_forked_caches_continue_as_if_fresh():
    _, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    cache = KVCache()
    model.forward(params, ids[:, :10], cfg, cache)
    other = cache.fork()
    cache.crop(6)
    again = model.forward(params, ids[:, 6:], cfg, cache)
    assert np.allclose(again, model.forward(params, ids, cfg)[:, 6:], rtol=1e-9, atol=1e-11)
    rows = np.array([2, 2, 0])
    other.reorder(rows)
    assert np.allclose(model.forward(params, ids[rows, 10:], cfg, other), model.forward(params, ids[rows], cfg)[:, 10:], rtol=1e-9, atol=1e-11)
    assert cache.nbytes == 2 * cfg.num_hidden_layers * ids.size * cfg.hidden_size * 8
    with pytest.raises(ValueError, match="cannot crop a cache of 17"):
        cache.crop(18)


# Nothing to choose, and what the command line makes of it


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}, {"penalty_alpha": 0.5, "top_k": 4}])
def test_scores_that_are_no_numbers_and_rows_without_any_token_are_refused(options):
    cfg = small.config()
    model = OPTForCausalLM(small.params(cfg), cfg)
    with pytest.raises(ValueError, match="row 0 has no token to choose"):
        model.generate([[2, 9]], bad_words_ids=[[i] for i in range(cfg.vocab_size)], eos_token_id=[], max_new_tokens=1, **options)
    model.params["embed_tokens"]["weight"][7] = np.nan
    with pytest.raises(ValueError, match="row 0 has no token to choose"):
        model.generate([[2, 9]], max_new_tokens=1, **options)


def test_generation_config_survives_saving(tmp_path):
    cfg = small.config()
    kept = {"num_beams": 3, "eos_token_id": [2, 7], "repetition_penalty": 1.5}
    OPTForCausalLM(small.params(cfg), cfg, generation_config=kept).save_pretrained(tmp_path)
    assert OPTForCausalLM.from_pretrained(tmp_path, backend="numpy").generation_config == kept
