"""The tokenizer equals HF's on any text: OPT's real vocabulary where it is at hand, and a small one that is trained here."""

import json
import shutil

import numpy as np
import pytest
import small
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from opt_np import CheckpointError, OPTTokenizer

SPECIALS = ("</s>", "<pad>", "<s>", "<unk>", "<mask>", "<|endoftext|>")
# Any text; text with special tokens in it; text of the kind the merges know; and text whose characters are several tokens each.
TEXTS = (
    st.text()
    | st.lists(st.text(max_size=4) | st.sampled_from(SPECIALS)).map("".join)
    | st.text(alphabet=" '\n\tthecatsondlmre's19,.")
    | st.text(alphabet="é日本語🙂👩\u200d\u0301 ")
)
ORDINARY = TEXTS.filter(lambda text: not any(special in text for special in ("</s>", "<pad>")))


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """What train and save_pretrained leave, with config.json, by which HF's AutoTokenizer knows the class."""
    return small.folder(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def opt_folder(opt_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(opt_files / name, folder)
    shutil.copy(opt_files / "hub_configs" / "opt-125m.config.json", folder / "config.json")
    return folder


@pytest.fixture(scope="module", params=["small", "opt"])
def pair(request):
    """Our tokenizer and HF's, of the same folder."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, transformers.GPT2Tokenizer)
    return OPTTokenizer.from_pretrained(folder), theirs


@pytest.fixture(scope="module")
def tok(small_folder):
    return OPTTokenizer.from_pretrained(small_folder)


@pytest.fixture(scope="module")
def opt(opt_folder):
    return OPTTokenizer.from_pretrained(opt_folder)


def test_published_and_computed_ids(opt, opt_files):
    golden = json.loads((opt_files / "golden_encodings.json").read_text())
    assert len(golden) > 20
    assert {case["text"]: opt.encode(case["text"]) for case in golden} == {case["text"]: case["ids"] for case in golden}


@given(text=TEXTS)
def test_ids_equal_hfs(pair, text):
    ours, theirs = pair
    assert ours(text) == dict(theirs(text))
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


@given(first=TEXTS, second=TEXTS)
def test_pairs_equal_hfs(pair, first, second):
    ours, theirs = pair
    assert ours.encode(first, second) == theirs([first], [second])["input_ids"][0] == ours.encode(first) + ours.encode(second)


@pytest.mark.parametrize("skip", [False, True])
@given(data=st.data())
def test_text_of_any_ids_equals_hfs(pair, skip, data):
    ours, theirs = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1) | st.sampled_from([0, 1, 2, 3])))
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("skip", [False, True])
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_text_of_encoded_texts_equals_hfs(pair, skip, texts):
    ours, theirs = pair
    rows = ours(texts)["input_ids"]
    assert ours.batch_decode(rows, skip_special_tokens=skip) == theirs.batch_decode(rows, skip_special_tokens=skip)


@pytest.mark.parametrize("side", ["left", "right"])
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_padding_equals_hfs(pair, side, texts):
    ours, theirs = pair
    batch, wanted = ours(texts, padding=True, padding_side=side), theirs(texts, padding=True, padding_side=side, return_tensors="np")
    for name in ("input_ids", "attention_mask"):
        assert batch[name].dtype == np.int64
        np.testing.assert_array_equal(batch[name], wanted[name])


@given(text=TEXTS, length=st.integers(1, 12))
def test_truncation_equals_hfs(pair, text, length):
    ours, theirs = pair
    assert ours(text, truncation=True, max_length=length) == dict(theirs(text, truncation=True, max_length=length))


@given(text=ORDINARY)
def test_text_survives_a_round_trip(pair, text):
    ours = pair[0]
    assert ours.decode(ours.encode(text)[1:]) == ours.decode(ours.encode(text), skip_special_tokens=True) == text


@given(text=ORDINARY)
def test_the_start_token_stands_once_and_only_at_the_start(tok, text):
    ids = tok.encode(text)
    assert [i for i, token in enumerate(ids) if token == 2] == [0]
    assert tok.encode(text, add_special_tokens=False) == ids[1:]


@given(text=TEXTS | st.just(small.TRICKY))
def test_spans_point_at_the_text_of_each_id(tok, text):
    ids, spans = tok.encode_with_spans(text)
    assert ids == tok.encode(text, add_special_tokens=False)
    for i, (start, end) in zip(ids, spans, strict=True):
        assert tok.token_bytes(i) in text[start:end].encode()
        assert start < end


@pytest.mark.parametrize("skip", [False, True])
@given(data=st.data())
def test_pieces_sum_to_the_text(tok, skip, data):
    ids = data.draw(st.lists(st.integers(0, 310)) | TEXTS.map(tok.encode))
    detokenizer = tok.detokenizer(skip)
    assert "".join([detokenizer.put(i) for i in ids] + [detokenizer.end()]) == tok.decode(ids, skip)


@given(text=ORDINARY | st.just(small.TRICKY))
def test_no_piece_breaks_a_character(tok, text):
    pieces = list(tok.stream_decode(tok.encode(text), skip_special_tokens=True))
    assert "\ufffd" not in "".join(pieces).replace("\ufffd", "", text.count("\ufffd"))
    assert "".join(pieces) == text


def test_a_character_appears_with_its_last_byte(tok):
    ids = tok.encode("🙂", add_special_tokens=False)
    detokenizer = tok.detokenizer()
    assert len(ids) == 4  # one id a byte: the small vocabulary has no merges for it
    assert [detokenizer.put(i) for i in ids] == ["", "", "", "🙂"]


def test_a_character_cut_short_ends_as_a_replacement(tok):
    ids = tok.encode("a🙂", add_special_tokens=False)[:-1]
    assert tok.decode(ids) == "a\ufffd"


@pytest.mark.parametrize(("i", "text"), [(0, "<s>"), (1, "<pad>"), (2, "</s>"), (3, "<unk>"), (50264, "<mask>")])
@pytest.mark.parametrize("skip", [False, True])
def test_ids_with_a_name_of_their_own(opt, i, text, skip):
    assert opt.decode([i], skip_special_tokens=skip) == ("" if skip and i in (1, 2) else text)


@pytest.mark.parametrize("i", range(50265, 50272))
def test_rows_without_a_token_print_nothing(opt, i):
    assert opt.decode([250, i, 250]) == "AA"


def test_decode_takes_arrays_and_single_ids(tok):
    ids = tok.encode("the cat")
    assert tok.decode(np.array(ids)) == tok.decode(ids) == "</s>the cat"
    assert tok.decode(ids[1]) == tok.decode([ids[1]])


def test_special_ids(opt):
    assert (opt.bos_token_id, opt.eos_token_id, opt.pad_token_id, opt.vocab_size) == (2, 2, 1, 50265)


def test_a_folder_with_tokenizer_json_alone(pair, tmp_path):
    ours, theirs = pair
    theirs(["a b c", "a"], padding=True, truncation=True, max_length=2)  # HF writes these settings into tokenizer.json, and does not read them
    theirs.save_pretrained(tmp_path)
    assert '"max_length": 2' in (tmp_path / "tokenizer.json").read_text()
    alone = OPTTokenizer.from_pretrained(only(tmp_path, "tokenizer.json"))
    for text in (small.TEXT, small.TRICKY, "".join(SPECIALS), " ".join(SPECIALS), ""):
        assert alone.encode(text) == ours.encode(text)
        assert alone.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def only(folder, *names):
    """The folder, after all its other files are gone."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    return folder


def test_saved_and_read_again(pair, tmp_path):
    ours = pair[0]
    ours.save_pretrained(tmp_path)
    again = OPTTokenizer.from_pretrained(tmp_path)
    assert again.encode(small.TRICKY) == ours.encode(small.TRICKY)
    assert again.vocab_size == ours.vocab_size


def test_add_bos_token_false_is_obeyed(small_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(small_folder / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert OPTTokenizer.from_pretrained(tmp_path).encode("the cat")[:1] != [2]


@settings(max_examples=10)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=200), spare=st.integers(0, 40))
def test_training_stops_at_vocab_size(text, spare):
    tok = OPTTokenizer.train([text], 260 + spare)
    assert 260 <= tok.vocab_size <= 260 + spare
    assert [tok.token_bytes(i).decode() for i in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]


def test_training_learns_the_words_of_the_text():
    tok = OPTTokenizer.train([small.TEXT], 320)
    assert len(tok.encode(" the cat", add_special_tokens=False)) < len(" the cat") / 2


@pytest.mark.parametrize("size", [0, 259])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size):
    with pytest.raises(ValueError, match=f"vocab_size={size} .*260"):
        OPTTokenizer.train(["text"], size)


def test_a_side_that_is_none_is_refused(tok):
    with pytest.raises(ValueError, match="'middle'"):
        tok(["a"], padding=True, padding_side="middle")


def test_truncation_without_a_length_is_refused(tok):
    with pytest.raises(ValueError, match="max_length"):
        tok("a", truncation=True)
    assert tok("a b c", truncation="longest_first", max_length=2) == tok("a b c", truncation=True, max_length=2)
    assert tok("a", truncation=None) == tok("a")
    with pytest.raises(ValueError, match="max_length=3 cuts nothing without truncation=True"):
        tok("a", max_length=3)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"vocab\.json") as error:
        OPTTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


DAMAGED = [(name, text) for name in ("vocab.json", "tokenizer_config.json") for text in ("", "{", "[]", "{\n\xff")]


@pytest.mark.parametrize(("name", "content"), [*DAMAGED, ("merges.txt", "a b c\n"), ("merges.txt", "Q"), ("merges.txt", "zq qz\n")])
def test_a_damaged_file_is_refused_by_name(small_folder, tmp_path, name, content):
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(small_folder / file, tmp_path)
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError) as error:
        OPTTokenizer.from_pretrained(tmp_path)
    assert name in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("first", [True, False])
def test_a_tokenizer_json_says_itself_what_it_puts_first(tmp_path, first):
    """Galactica's puts nothing before a text, and has no other file."""
    from tokenizers import Tokenizer, processors

    fast = Tokenizer.from_str(small.tokenizer()._tokenizer.to_str())
    if first:
        fast.post_processor = processors.TemplateProcessing(single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>").save_pretrained(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = OPTTokenizer.from_pretrained(tmp_path)
    for text in ("the cat", "", "a\nb"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert (ours.encode(text)[:1] == [2]) == first


@pytest.mark.parametrize("token", [5, {"content": 5}, ["</s>"], {"x": 1}])
def test_a_special_token_that_is_no_text_is_refused_by_name(tmp_path, token):
    small.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": token}))
    with pytest.raises(CheckpointError, match="bos_token is"):
        OPTTokenizer.from_pretrained(tmp_path)


def test_a_damaged_tokenizer_json_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        OPTTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", ["tokenizer_config.json", "tokenizer.json", "added_tokens.json"])
def test_tokens_that_a_fine_tune_added_are_found_in_whichever_file_tells_them(tmp_path, kept):
    tokenizer = small.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    n = tokenizer.vocab_size
    words = {"<|user|>": n, "café": n + 1}
    if kept == "tokenizer_config.json":
        config = json.loads((tmp_path / kept).read_text())
        config["added_tokens_decoder"] = {str(i): {"content": w, "special": w.startswith("<"), "normalized": False} for w, i in words.items()}
        (tmp_path / kept).write_text(json.dumps(config))
    elif kept == "tokenizer.json":
        added = [{"id": i, "content": w, "special": w.startswith("<"), "normalized": False} for w, i in words.items()]
        (tmp_path / kept).write_text(json.dumps({"added_tokens": added}))
    else:
        (tmp_path / kept).write_text(json.dumps(words))
    read = OPTTokenizer.from_pretrained(tmp_path)
    ids = read.encode("<|user|>a café")
    assert ids[:2] == [2, n]
    assert ids[-1] == n + 1
    assert read.decode(ids[1:]) == "<|user|>a café"
    read.save_pretrained(tmp_path / "again")
    assert OPTTokenizer.from_pretrained(tmp_path / "again").encode("<|user|>a café") == ids


def test_an_added_tokens_blanks_and_a_former_pad_survive_saving(tmp_path):
    hf = transformers.AutoTokenizer.from_pretrained(small.folder(tmp_path / "plain"))
    hf.add_tokens([transformers.AddedToken("<img>", lstrip=True, rstrip=True, special=True, normalized=False)])
    hf.pad_token = hf.eos_token
    hf.save_pretrained(tmp_path / "hf")
    OPTTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "ours")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for folder in ("hf", "ours"):
        for side in (False, True):  # as transformers 4 left it: both kinds of files
            if side:
                for name in ("vocab.json", "merges.txt"):
                    shutil.copy(tmp_path / "plain" / name, tmp_path / folder)
            ours = OPTTokenizer.from_pretrained(tmp_path / folder)
            for text in ("a <img> b", "a<pad>b"):
                assert ours.encode(text) == hf(text)["input_ids"] == again(text)["input_ids"]
            assert ours.decode([2, 5, 1], skip_special_tokens=True) == hf.decode([2, 5, 1], skip_special_tokens=True)


def test_an_added_token_with_another_id_is_an_error(tmp_path):
    small.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|user|>": 9999}')
    with pytest.raises(CheckpointError, match="should have id 9999"):
        OPTTokenizer.from_pretrained(tmp_path)


def test_special_tokens_map_is_read_where_the_config_is_silent(tmp_path):
    small.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "</s>"}')
    assert OPTTokenizer.from_pretrained(tmp_path).pad_token_id == 2


def test_padding_is_a_yes_or_no():
    with pytest.raises(ValueError, match="'max_length'"):
        small.tokenizer()(["a"], padding="max_length", max_length=8)
    assert small.tokenizer()([], padding=True)["input_ids"].shape == (0, 0)


def test_a_tokenizer_that_cuts_text_in_its_own_way_is_saved_whole(tmp_path):
    """As Galactica's, whose digits are tokens of their own: vocab.json and merges.txt do not say so."""
    whole = small.tokenizer()._tokenizer
    cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    whole.pre_tokenizer = cut
    (tmp_path / "given").mkdir()
    whole.save(str(tmp_path / "given" / "tokenizer.json"))
    ours, out = OPTTokenizer.from_pretrained(tmp_path / "given"), tmp_path / "out"
    small.tokenizer().save_pretrained(out)  # whose files would be read first
    ours.save_pretrained(out)
    text = "in 1999 it's 19991999 "
    assert OPTTokenizer.from_pretrained(out).encode(text) == ours.encode(text) != small.tokenizer().encode(text)
    assert transformers.AutoTokenizer.from_pretrained(out).encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)


def test_a_saved_tokenizer_needs_no_model_beside_it(tmp_path):
    small.tokenizer().save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode("the cat") == small.tokenizer().encode("the cat")
