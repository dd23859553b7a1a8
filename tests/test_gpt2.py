"""GPT-2 under OPT's names: HF's logits from HF's files, GPT-2's own ids from merges.txt, and the side-by-side."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer

from opt_np import OPTForCausalLM, OPTTokenizer, gpt2, taps, trace
from opt_np.checkpoint import CheckpointError
from opt_np.tokenizer import BYTE_OF

SIZE = {"vocab_size": 320, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 40}
REAL = Path(os.environ.get("OPT_TOKENIZER", Path(__file__).resolve().parents[2] / "shared" / "opt_tokenizer"))
TEXTS = [small.TEXT[:90], small.TRICKY, " Hello  world", "", "\n\t x"]


def hf_model(**changes):
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SIZE, **changes}, attn_implementation="sdpa")).double().eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return hf


def learnt_merges(folder):
    """merges.txt as GPT-2's."""
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator([small.TEXT], vocab_size=256 + 63, show_progress=False)
    learnt.save_model(str(folder))
    (folder / "vocab.json").unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 as HF saves it, with merges.txt for a tokenizer."""
    path = tmp_path_factory.mktemp("gpt2")
    hf_model().save_pretrained(path)
    learnt_merges(path)
    return path


def ids_of(T=17, B=2):
    return np.random.default_rng(0).integers(0, SIZE["vocab_size"], (B, T))


def worst(ours, hf, ids, mask=None):
    with torch.no_grad():
        theirs = hf(torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask)).logits.numpy()
    real = slice(None) if mask is None else mask != 0
    return np.abs(ours[real] - theirs[real]).max() / np.abs(theirs).max()


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "gelu"])
def test_logits_equal_hugging_faces(tmp_path, activation):
    hf = hf_model(activation_function=activation, n_inner=40)
    hf.save_pretrained(tmp_path)
    learnt_merges(tmp_path)
    model, _ = gpt2.load(tmp_path, dtype="float64")
    assert worst(model(ids_of()).logits, hf, ids_of()) < 1e-12
    cut = model(ids_of()[:, :9], use_cache=True)
    rest = model(ids_of()[:, 9:], past_key_values=cut.past_key_values)
    assert worst(np.concatenate([cut.logits, rest.logits], axis=1), hf, ids_of()) < 1e-12


def test_every_layer_equals_hugging_faces(folder):
    model, _ = gpt2.load(folder, dtype="float64")
    with torch.no_grad():
        states = hf_model()(torch.tensor(ids_of()), output_hidden_states=True).hidden_states
    for ours, theirs in zip(model(ids_of(), output_hidden_states=True).hidden_states, states, strict=True):
        assert np.allclose(ours, theirs.numpy(), rtol=1e-11, atol=1e-12)


def test_left_padding_moves_nothing(folder):
    model, _ = gpt2.load(folder, dtype="float64")
    ids = ids_of(9, 1)
    padded, mask = np.concatenate([np.full((1, 4), 7), ids], axis=1), np.array([[0] * 4 + [1] * 9])
    assert np.allclose(model(padded, mask).logits[:, 4:], model(ids).logits, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", ["bin", "prefixed", "old"])
def test_other_layouts_read_to_the_same_numbers(tmp_path, folder, layout):
    hf = hf_model()
    state = {name.removeprefix("transformer."): t for name, t in hf.state_dict().items() if name != "lm_head.weight"}
    if layout == "prefixed":
        state = {f"transformer.{name}": t for name, t in state.items()} | {"lm_head.weight": hf.state_dict()["lm_head.weight"]}
    if layout == "old":  # as OpenAI's on the hub: with the causal mask among the tensors
        state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40) for i in range(3)} | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / "merges.txt", tmp_path)
    assert np.array_equal(gpt2.load(tmp_path)[0](ids_of()).logits, gpt2.load(folder)[0](ids_of()).logits)


def test_what_takes_an_opt_takes_a_gpt2(folder, tmp_path):
    """The CPU backend, taps, traces, decoding, and saving: HF's OPT then computes what HF's GPT-2 does."""
    hf, (model, tokenizer) = hf_model(), gpt2.load(folder)
    fast, _ = gpt2.load(folder, backend="cpu")
    assert worst(np.asarray(fast(ids_of()).logits), hf, ids_of()) < 1e-5
    assert trace.compare(trace.record(model, ids_of()), trace.record(fast, ids_of(), fused=True)).first is None
    _, cache = taps.run_with_cache(model, ids_of(), "blocks.2.attn.hook_pattern")
    assert np.allclose(cache["pattern", 2].sum(-1), 1)
    prompt = [tokenizer.encode("the cat")]
    with torch.no_grad():
        theirs = hf.generate(torch.tensor(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=319)
    assert model.generate(prompt, max_new_tokens=12).tolist() == theirs.tolist()
    model.save_pretrained(tmp_path)
    as_opt = transformers.OPTForCausalLM.from_pretrained(tmp_path).double().eval()
    with torch.no_grad():
        assert np.abs(as_opt(torch.tensor(ids_of())).logits.numpy() - hf(torch.tensor(ids_of())).logits.numpy()).max() < 1e-5


def test_ids_follow_from_merges(folder, tmp_path):
    """As the official library numbers them, from vocab.json."""
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator([small.TEXT], vocab_size=256 + 63, show_progress=False)
    vocabulary = {token: i for i, token in enumerate([*BYTE_OF, *(a + b for a, b in json.loads(learnt.to_str())["model"]["merges"])])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {gpt2.END: len(vocabulary)}))
    shutil.copy(folder / "merges.txt", tmp_path)
    theirs, ours = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path)), gpt2.tokenizer(folder)
    assert ours.vocab_size == len(theirs) > 280
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    last = ours.vocab_size - 1
    assert (ours.eos_token_id, ours.pad_token_id, ours.add_bos_token) == (last, last, False)


def test_a_vocabulary_in_another_order_is_believed(folder, tmp_path):
    """As a GPT-2 of one's own has it, with <|endoftext|> first."""
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator([small.TEXT], vocab_size=300, show_progress=False, special_tokens=[gpt2.END])
    learnt.save_model(str(tmp_path))
    ours = gpt2.tokenizer(tmp_path)
    assert ours.eos_token_id == 0
    for text in TEXTS:
        assert ours.encode(text) == learnt.encode(text).ids
        assert not text or ours.encode(text) != gpt2.tokenizer(folder).encode(text)


def test_a_tokenizer_json_does_as_well(folder, tmp_path):
    ours = gpt2.tokenizer(folder)
    ours._tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = gpt2.tokenizer(tmp_path)
    assert [again.encode(t) for t in TEXTS] == [ours.encode(t) for t in TEXTS]


@pytest.mark.skipif(not (REAL / "merges.txt").exists(), reason=f"OPT's merges.txt, which is GPT-2's, is not in {REAL}")
def test_the_real_merges_give_gpt2s_published_ids(tmp_path):
    shutil.copy(REAL / "merges.txt", tmp_path)
    tokenizer = gpt2.tokenizer(tmp_path)
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.eos_token_id == 50256
    assert OPTTokenizer.from_pretrained(REAL).encode("Hello world") == [2, 31414, 232]


@pytest.mark.parametrize("keys", [{"activation_function": "gelu_pytorch_tanh"}, {"resid_pdrop": None}, {"n_positions": None, "n_ctx": 40}])
def test_other_words_for_the_same(folder, tmp_path, keys):
    shutil.copytree(folder, tmp_path / "copy")
    config = tmp_path / "copy" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    assert np.array_equal(gpt2.load(tmp_path / "copy")[0](ids_of()).logits, gpt2.load(folder)[0](ids_of()).logits)


def test_the_folders_defaults_of_generation_are_heeded(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text('{"max_new_tokens": 3, "eos_token_id": []}')
    ids = ids_of()[:1, :4]
    assert gpt2.load(tmp_path / "copy")[0].generate(ids).shape == (1, 7)


def test_a_dtype_that_a_backend_has_not_is_refused(folder):
    with pytest.raises(ValueError, match="backend 'numpy' computes in float32 or float64, not 'float16'"):
        gpt2.load(folder, dtype="float16", backend="numpy")


@pytest.mark.parametrize(("keys", "said"), [
    ({"model_type": "opt"}, "model_type is 'opt'; a GPT-2 has 'gpt2'"), ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ({"scale_attn_by_inverse_layer_idx": True}, "opt_np computes only False"), ({"activation_function": "silu"}, "activation_function is 'silu'"),
    ({"n_head": 5}, "does not divide"), ({"n_layer": 2}, r"unknown \(layers.2"), ({"n_embd": 12}, "config.json wants"),
])  # fmt: skip
def test_what_is_no_gpt2_of_ours_is_refused(folder, tmp_path, keys, said):
    shutil.copytree(folder, tmp_path / "copy")
    config = tmp_path / "copy" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    with pytest.raises(CheckpointError, match=said):
        gpt2.load(tmp_path / "copy")


@pytest.mark.parametrize("merges", ["#version: 0.2\na b c\n", "#version: 0.2\nzz yy\n"])
def test_broken_merges_are_refused(tmp_path, merges):
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(CheckpointError, match="cannot be read as GPT-2's merges"):
        gpt2.tokenizer(tmp_path)


def test_side_by_side_says_what_differs(folder, tmp_path):
    opt = small.folder(tmp_path / "opt")
    model, tokenizer = OPTForCausalLM.from_pretrained(opt), OPTTokenizer.from_pretrained(opt)
    rows = [" ".join(line.split()) for line in gpt2.side_by_side(model, tokenizer, *gpt2.load(folder), "the cat").splitlines()]
    assert "before the text </s> nothing" in rows
    assert "row of position 0 2 0" in rows
    assert "activation relu gelu_new" in rows
    assert not any(row.startswith(("LayerNorm", "heads of", "biases")) for row in rows)  # these are the same
    assert any(row.startswith("layers.0.activation_fn u = relu(u)") and "u = gelu_new(u)" in row for row in rows)
    assert any(row.startswith("the other layers 14 steps") and " 28 steps " in row for row in rows)
    same = gpt2.side_by_side(model, tokenizer, model, tokenizer, "the cat").splitlines()
    assert same[1] == ""  # no difference, and every step as it is
    assert all(line.split()[-3:] == ["=", "=", "="] for line in same[3:-2])
