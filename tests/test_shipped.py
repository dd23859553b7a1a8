"""The shipped model: it has OPT's own format, HF computes the same from it, and it has learnt what weights/README.md claims."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import SHARED

from opt_np import OPTForCausalLM, OPTTokenizer, checkpoint
from opt_np.tasks import bits_per_byte, mean_scores, read_texts

FOLDER = Path(__file__).resolve().parents[1] / "weights" / "opt-tiny"
TEXT = "It was a dark and stormy night, and the old man sat by the fire."


@pytest.fixture(scope="module")
def shipped():
    return OPTForCausalLM.from_pretrained(FOLDER), OPTTokenizer.from_pretrained(FOLDER)


def test_it_is_small_and_in_opts_own_format():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16e6
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"], config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        "opt",
        "float16",
        2,
        2,
        1,
    )
    assert {array.dtype for _, array in checkpoint.read_safetensors(FOLDER / "model.safetensors")} == {np.dtype(np.float16)}


def test_its_special_tokens_are_opts(shipped):
    assert [shipped[1]._tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]


def test_hf_computes_the_same_from_it(shipped):
    model, tokenizer = shipped
    hf = transformers.OPTForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="sdpa").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer.encode(TEXT)
    assert theirs(TEXT)["input_ids"] == ids
    with torch.no_grad():
        expected = hf(torch.tensor([ids])).logits.numpy()
        greedy = hf.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=40, do_sample=False
        ).numpy()
    logits = model([ids]).logits
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.array_equal(model.generate([ids], max_new_tokens=40), greedy)


def test_its_batches_equal_its_single_runs(shipped):
    model, tokenizer = shipped
    prompts = ["The", "In the morning she went to the window and", "Yes!"]
    batch = tokenizer(prompts, padding=True, padding_side="left")
    together = model.generate(**batch, max_new_tokens=20)[:, batch["input_ids"].shape[1] :]
    for row, prompt in zip(together, prompts, strict=True):
        assert np.array_equal(row, model.generate([tokenizer.encode(prompt)], max_new_tokens=20)[0, -20:])


def test_it_writes_words(shipped):
    model, tokenizer = shipped
    ids = model.generate([tokenizer.encode("She looked at")], max_new_tokens=60, do_sample=True, temperature=0.7, seed=0)
    words = tokenizer.decode(ids[0], skip_special_tokens=True).split()
    assert len(words) > 25
    assert sum(word.strip(".,;:!?'\"-_").isalpha() for word in words) > 0.8 * len(words)


def test_it_scores_an_unseen_book_as_its_readme_says(shipped):
    if not (SHARED / "corpus").is_dir():
        pytest.skip("the book kept aside from training is not part of the repository")
    text = read_texts([SHARED / "corpus" / "valid"])[0]
    score = mean_scores([bits_per_byte(shipped[0].params, shipped[0].config, shipped[1], text, 512)])["bits_per_byte"]
    said = float((FOLDER.parent / "README.md").read_text().split("| The Time Machine |")[1].split("|")[0])
    assert score == pytest.approx(said, abs=0.001)


def test_loading_it_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OPTForCausalLM.from_pretrained(FOLDER).num_parameters() < 8e6
