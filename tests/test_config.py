"""config.json: HF's keys and defaults, the published sizes, and errors that name the key and the value."""

import dataclasses
import json
import math

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from opt_np import OPTConfig
from opt_np.config import POSITION_OFFSET, SIZES, parameter_shapes

# Parameters (the tied matrix once) and tensors of the nine published sizes; the first agree with the hub's file sizes.
PUBLISHED = {
    "125m": (125_239_296, 196),
    "350m": (331_196_416, 388),
    "1.3b": (1_315_758_080, 388),
    "2.7b": (2_651_596_800, 516),
    "6.7b": (6_658_473_984, 516),
    "13b": (12_853_473_280, 644),
    "30b": (29_974_540_288, 772),
    "66b": (65_719_701_504, 1028),
    "175b": (174_604_468_224, 1540),
}
HUB = [size for size in PUBLISHED if size != "175b"]  # 175b was never on the hub


def counts(cfg):
    shapes = parameter_shapes(cfg).values()
    return sum(map(math.prod, shapes)), len(shapes)


def test_every_published_size_is_known():
    assert list(SIZES) == list(PUBLISHED)


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_and_tensors_of_a_published_size(size):
    assert counts(OPTConfig.from_size(size)) == PUBLISHED[size]


@pytest.mark.parametrize("size", HUB)
def test_the_hubs_config_is_the_published_size(size, opt_files):
    cfg = OPTConfig.from_json(opt_files / "hub_configs" / f"opt-{size}.config.json")
    assert dataclasses.replace(cfg, extra={}) == OPTConfig.from_size(size)


@pytest.mark.parametrize("size", HUB)
def test_the_hubs_config_is_read_as_hf_reads_it(size, opt_files):
    keys = json.loads((opt_files / "hub_configs" / f"opt-{size}.config.json").read_text())
    theirs = transformers.OPTConfig(**keys)
    assert {name: getattr(theirs, name) for name in fields()} == {name: getattr(OPTConfig.from_dict(keys), name) for name in fields()}


def fields():
    return [f.name for f in dataclasses.fields(OPTConfig) if f.name != "extra"]


@pytest.mark.parametrize("name", fields())
def test_default_equals_hfs(name):
    assert getattr(OPTConfig.from_dict({}), name) == getattr(transformers.OPTConfig(), name)


def test_no_key_that_hf_gives_opt_is_forgotten():
    theirs = set(transformers.OPTConfig().to_dict()) - set(transformers.PretrainedConfig().to_dict())
    assert theirs <= {*fields(), "model_type"}


def test_word_embed_proj_dim_follows_hidden_size():
    assert OPTConfig(hidden_size=48).word_embed_proj_dim == 48
    assert not OPTConfig(hidden_size=48).has_projections


def test_from_size_takes_the_hubs_name_and_changes():
    assert OPTConfig.from_size("opt-350m", vocab_size=99) == dataclasses.replace(OPTConfig.from_size("350m"), vocab_size=99)


KNOWN = {*fields(), "model_type", "extra", "scale_embeddings", "learned_embeddings", "quantization_config"}


@given(st.dictionaries(st.text().filter(lambda key: key not in KNOWN), st.none() | st.integers() | st.text()))
def test_unknown_keys_survive(keys):
    assert OPTConfig.from_dict(keys).to_dict() == {**keys, **OPTConfig().to_dict()}


def test_a_config_survives_being_written_and_read(tmp_path):
    cfg = OPTConfig.from_size("350m", dropout=0.25, extra={"output_projection": True, "torch_dtype": "float16"})
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_dict()))
    read = OPTConfig.from_json(tmp_path / "config.json")
    assert read.to_dict() == cfg.to_dict()
    assert read.extra["output_projection"] is True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 100, "num_attention_heads": 12}, ("hidden_size=100", "num_attention_heads=12")),
        ({"activation_function": "swish"}, ("activation_function", "'swish'", "relu", "gelu")),
        ({"model_type": "gpt2"}, ("model_type", "'gpt2'", "'opt'")),
        ({"vocab_size": 0}, ("vocab_size", "0")),
        ({"hidden_size": "768"}, ("hidden_size", "'768'")),
        ({"num_hidden_layers": -1}, ("num_hidden_layers", "-1")),
        ({"ffn_dim": None}, ("ffn_dim", "None")),
        ({"ffn_dim": 3.5}, ("ffn_dim", "3.5")),
        ({"num_attention_heads": True}, ("num_attention_heads", "True")),
        ({"scale_embeddings": True}, ("scale_embeddings", "True")),
        ({"learned_embeddings": False}, ("learned_embeddings", "False")),
        ({"quantization_config": {"bits": 4}}, ("quantization_config", "bits")),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name(tmp_path, changes, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changes))
    with pytest.raises(ValueError, match=r"config\.json") as error:
        OPTConfig.from_json(path)
    assert all(word in str(error.value) for word in (*words, str(path)))


@pytest.mark.parametrize(("text", "word"), [("{", "not JSON"), ("", "not JSON"), ("[1, 2]", "list"), ('"opt"', "str"), ("\ufffe", "not JSON")])
def test_what_is_no_config_is_refused(tmp_path, text, word):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-16" if text == "\ufffe" else "utf-8")
    with pytest.raises(ValueError, match=word) as error:
        OPTConfig.from_json(path)
    assert str(path) in str(error.value)


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'7b'.*125m.*175b"):
        OPTConfig.from_size("7b")


@pytest.mark.parametrize(("before", "removed", "has"), [(True, False, True), (True, True, False), (False, False, False), (False, True, False)])
def test_the_final_layer_norm_belongs_to_pre_norm_models(before, removed, has):
    cfg = OPTConfig(do_layer_norm_before=before, _remove_final_layer_norm=removed)
    assert cfg.has_final_layer_norm is has
    assert ("final_layer_norm.weight" in parameter_shapes(cfg)) is has


TINY = {"vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2, "ffn_dim": 20, "max_position_embeddings": 10, "num_attention_heads": 2}


@given(
    st.fixed_dictionaries({
        "do_layer_norm_before": st.booleans(), "_remove_final_layer_norm": st.booleans(), "enable_bias": st.booleans(),
        "layer_norm_elementwise_affine": st.booleans(), "tie_word_embeddings": st.booleans(), "word_embed_proj_dim": st.sampled_from([12, 8, 16]),
    })
)  # fmt: skip
def test_names_and_shapes_equal_hfs(changes):
    theirs = transformers.OPTForCausalLM(transformers.OPTConfig(**TINY, **changes)).named_parameters()
    wanted = {name.removeprefix("model.decoder."): tuple(p.shape) for name, p in theirs}
    assert parameter_shapes(OPTConfig(**TINY, **changes)) == wanted
    assert wanted["embed_positions.weight"][0] - TINY["max_position_embeddings"] == POSITION_OFFSET
