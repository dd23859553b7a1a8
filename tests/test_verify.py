"""opt-np verify passes correct implementations, finds planted mistakes and names their place, and never passes what it did not compare."""

import inspect
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small
import torch
import transformers

from opt_np import OPTForCausalLM, OPTTokenizer, checkpoint, cli, hub, kv_cache, model, ops, verify
from opt_np.config import OPTConfig
from opt_np.verify import FAIL, LAYERS, LOADING, NOT_RUN, PASS, PUBLISHED, ROUNDING, WHOLE

VARIANTS = {
    "pre_norm": {},
    "post_norm": {"do_layer_norm_before": False},
    "like_350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    "pre_norm_projected": {"word_embed_proj_dim": 8},
    "projected_no_affine": {"word_embed_proj_dim": 8, "layer_norm_elementwise_affine": False},
    "no_final_norm": {"_remove_final_layer_norm": True},
    "gelu": {"activation_function": "gelu"},
    "no_bias": {"enable_bias": False},
    "no_affine": {"layer_norm_elementwise_affine": False},
    "untied": {"tie_word_embeddings": False},
}
DECODER, FIRST = "model.decoder", "model.decoder.layers.0"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny checkpoint of each variant."""
    root = tmp_path_factory.mktemp("verify")
    return {name: small.folder(root / name, small.config(**changes), name == "pre_norm") for name, changes in VARIANTS.items()}


def of(found, group):
    return [check for check in found if check.group == group]


def failures(found):
    return [check.name for check in found if check.verdict == FAIL]


def plant(monkeypatch, module, function, *edits):
    """The function with a mistake: its own source, edited."""
    source = inspect.getsource(getattr(module, function))
    for right, wrong in edits:
        assert source.count(right) == 1, f"{function} has changed; {right!r} is there {source.count(right)} times: edit this test"
        source = source.replace(right, wrong)
    made = {}
    exec(compile(source, f"planted {function}", "exec"), module.__dict__, made)
    monkeypatch.setattr(module, function, made[function])


# What is right passes


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_right_model_passes(folders, variant):
    found = verify.verify(folders[variant])
    assert failures(found) == []
    assert [check.verdict for check in of(found, PUBLISHED)] == [NOT_RUN]
    assert all(check.measured < 1e-13 for check in of(found, LAYERS) + of(found, WHOLE))
    assert 0 < of(found, ROUNDING)[0].measured < 2
    assert of(found, LOADING)[0].measured == 0
    assert verify.verdict(found)[0] == 0


@pytest.mark.parametrize("variant", ["pre_norm", "like_350m", "no_final_norm"])
def test_every_point_of_pytorch_is_compared_in_its_order(folders, variant):
    names = [check.name for check in of(verify.verify(folders[variant]), LAYERS)]
    hf = transformers.OPTForCausalLM(transformers.OPTConfig.from_pretrained(folders[variant])).eval()
    ran = []
    for path, module in hf.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    hf(torch.tensor([[2, 5]]))
    compared = [name.replace("attn_output", "out_proj") for name in names if name != verify.EMBEDDED]
    order = [path for path in ran if path not in ("", "model", "model.decoder")]
    assert sorted(compared) == sorted(order)
    assert compared == order
    assert names.index(verify.EMBEDDED) > names.index(f"{DECODER}.embed_positions")


def test_the_oracle_holds_our_arrays_and_no_copies(folders):
    ours = OPTForCausalLM.from_pretrained(folders["pre_norm"], dtype="float64")
    oracle = verify.pytorch_model(torch, transformers, folders["pre_norm"], ours.params)
    assert oracle.dtype == torch.float64
    assert oracle.config._attn_implementation == "sdpa"
    for name, array in verify.hf_names(ours.params).items():
        assert oracle.get_parameter(name).data_ptr() == array.ctypes.data


def test_a_context_of_one_token_is_enough(tmp_path):
    assert failures(verify.verify(small.folder(tmp_path, small.config(max_position_embeddings=1), False))) == []


def test_pads_are_not_compared_and_cases_reach_both_sides_a_hole_a_cache_and_the_last_position():
    cfg = small.config()
    inputs = verify.cases(cfg)
    masks = [case.mask for case in inputs if case.mask is not None]
    assert any((mask[:, 0] == 0).any() for mask in masks)
    assert any((mask[:, -1] == 0).any() for mask in masks)
    assert any(((np.diff(mask) == -1).any(1) & (mask[:, -1] == 1)).any() for mask in masks)
    assert all(mask.any(1).all() for mask in masks)
    assert {len(case.chunks) for case in inputs} == {1, 3}
    assert max(case.ids.shape[1] for case in inputs) == cfg.max_position_embeddings
    theirs, real = np.arange(6.0).reshape(2, 3, 1), np.array([[True, False, True], [True, True, True]])
    ours = theirs.copy()
    ours[0, 1] = np.nan
    assert verify.relative_error(ours, theirs, real) == 0
    ours[1, 2] = np.nan
    assert verify.relative_error(ours, theirs, real) == math.inf


# Planted mistakes: where they are, and what they are called

NORM = (
    '    if cfg.has_final_layer_norm:\n        x = tap("model.decoder.final_layer_norm", ops.layer_norm(x, **params.get("final_layer_norm", {})))\n'
)
END = "    return x"
SWAPPED = [(NORM, ""), (END, NORM + END)]
ADDED = 'tap("model.decoder.embed_positions", ops.embed(layout.positions + POSITION_OFFSET, **params["embed_positions"]))'
IN = '    if "project_in" in params:\n'
SCALE = "ops.attention_scores(q, k, cfg.head_dim**-0.5"
MISTAKES = {
    "final LayerNorm skipped": ("pre_norm", model, "final", [("if cfg.has_final_layer_norm", "if False")],
                                f"{DECODER}.final_layer_norm", "PyTorch has model.decoder.final_layer_norm, this port did not run it"),
    "final LayerNorm added": ("like_350m", model, "final", [("if cfg.has_final_layer_norm", "if True")],
                              f"{DECODER}.final_layer_norm", "this port ran model.decoder.final_layer_norm, PyTorch has none"),
    "final LayerNorm added where it was removed": ("no_final_norm", model, "final", [("if cfg.has_final_layer_norm", "if True")],
                                                   f"{DECODER}.final_layer_norm", "PyTorch has none"),
    "LayerNorm after instead of before": ("pre_norm", model, "decoder_layer", [("pre = cfg", "pre = not cfg")],
                                          f"{FIRST}.self_attn_layer_norm", "this port ran"),
    "LayerNorm before instead of after": ("post_norm", model, "decoder_layer", [("pre = cfg", "pre = not cfg")],
                                          f"{FIRST}.self_attn.q_proj", "this port ran model.decoder.layers.0.self_attn_layer_norm before it"),
    "project_out before LayerNorm": ("projected_no_affine", model, "final", SWAPPED, f"{DECODER}.final_layer_norm", "the shape is"),
    "project_out before LayerNorm, which then stops": ("pre_norm_projected", model, "final", SWAPPED,
                                                       f"{DECODER}.final_layer_norm", "it stopped with ValueError"),
    "positions before project_in": (
        "like_350m", model, "embeddings",
        [(IN, f'    x = x + {ADDED}[..., : x.shape[-1]]\n' + IN), (f"return x + {ADDED}", "return x")],
        f"{DECODER}.project_in", "off by"),
    "positions not added": ("pre_norm", model, "embeddings", [("return x + tap(", "return x + 0 * tap(")], verify.EMBEDDED, "off by"),
    "one position too far": ("pre_norm", model, "make_layout", [("(past, past + T)[None], None", "(past, past + T)[None] + 1, None")],
                             f"{DECODER}.embed_positions", "off by"),
    "positions start anew at each cached step": ("pre_norm", model, "make_layout", [("np.arange(past, past + T)", "np.arange(0, T)")],
                                                 f"{DECODER}.embed_positions", "(cached steps)"),
    "positions count the pads": ("pre_norm", model, "make_layout", [("positions = (np.cumsum(mask, axis=1) * mask - 1)[:, past:]", "pass")],
                                 f"{DECODER}.embed_positions", "padding"),
    "gelu for relu": ("pre_norm", ops, "activation", [('function == "relu"', 'function == "gelu"')], f"{FIRST}.activation_fn", "off by"),
    "relu for gelu": ("gelu", ops, "activation", [('function == "relu"', 'function == "gelu"')], f"{FIRST}.activation_fn", "off by"),
    "gelu by tanh": ("gelu", ops, "activation", [("x * normal_cdf(x)", "x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))) / 2")],
                     f"{FIRST}.activation_fn", "off by"),
    "q scaled twice": ("pre_norm", ops, "_score_blocks", [("(q[:, rows] * scale)", "(q[:, rows] * scale * scale)")],
                       f"{FIRST}.self_attn.attn_output", "off by"),
    "q scaled twice in the second layer": ("pre_norm", model, "self_attention",
                                           [(SCALE, "ops.attention_scores(q, k, cfg.head_dim**(-0.5 - i / 2)")],
                                           f"{DECODER}.layers.1.self_attn.attn_output", "off by"),
    "q's bias not scaled": ("pre_norm", model, "self_attention",
                            [("    if cache", "    q = q + p['q_proj']['bias'].reshape(heads[-2:]) * (cfg.head_dim**0.5 - 1)\n    if cache")],
                            f"{FIRST}.self_attn.attn_output", "off by"),
    "a mask off by one": ("pre_norm", ops, "_score_blocks", [("np.full((n, n), -np.inf, q.dtype), 1)", "np.full((n, n), -np.inf, q.dtype), 2)")],
                          f"{FIRST}.self_attn.attn_output", "off by"),
    "pads seen": ("pre_norm", ops, "_score_blocks", [("if visible is not None", "if False")], f"{FIRST}.self_attn.attn_output", "padding"),
    "no residual": ("pre_norm", model, "decoder_layer", [('x + tap("fc2"', 'tap("fc2"')], FIRST, "off by"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_and_its_place_is_named(folders, monkeypatch, mistake):
    variant, module, function, edits, place, words = MISTAKES[mistake]
    plant(monkeypatch, module, function, *edits)
    found = verify.verify(folders[variant])
    first = verify.first_failure(found)
    assert (first.group, first.name) == (LAYERS, place)
    assert words in first.note
    status, line = verify.verdict(found)
    assert status == 1
    assert place in line


@pytest.mark.parametrize(("module", "name", "value", "place"), [
    (model, "POSITION_OFFSET", 3, f"{DECODER}.embed_positions"),
    (model, "POSITION_OFFSET", 0, f"{DECODER}.embed_positions"),
    (ops, "LAYER_NORM_EPS", 1e-12, f"{FIRST}.self_attn_layer_norm"),
    (ops, "LAYER_NORM_EPS", 1.1e-5, f"{FIRST}.self_attn_layer_norm"),
])  # fmt: skip
def test_a_wrong_constant_is_found(folders, monkeypatch, module, name, value, place):
    monkeypatch.setattr(module, name, value)
    first = verify.first_failure(verify.verify(folders["pre_norm"]))
    assert (first.group, first.name) == (LAYERS, place)


@pytest.mark.parametrize(("function", "place"), [("attention", FIRST), ("mlp", FIRST)])
def test_a_mistake_in_a_fused_op_alone_is_found_in_the_model_as_it_runs(folders, monkeypatch, function, place):
    right = getattr(ops, function)
    monkeypatch.setattr(ops, function, lambda *args: right(*args) * 1.000001)
    found = verify.verify(folders["pre_norm"])
    assert not failures(of(found, LAYERS))
    first = verify.first_failure(found)
    assert (first.group, first.name) == (WHOLE, place)


def test_a_mistake_in_the_cache_is_found_in_the_cached_steps(folders, monkeypatch):
    right = kv_cache.KVCache.extend

    def forgetful(self, i, k, v):
        keys, values = right(self, i, k, v)
        return keys, values[:, ::-1] if i == 1 and self.length else values

    monkeypatch.setattr(kv_cache.KVCache, "extend", forgetful)
    first = verify.first_failure(verify.verify(folders["pre_norm"]))
    assert first.name == f"{DECODER}.layers.1.self_attn.attn_output"
    assert "(cached steps)" in first.note


def test_needless_rounding_is_found(folders, monkeypatch):
    """Right in float64, a few times too coarse in float32."""
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *p, **kw: right(x, *p, **kw) * (1 + 10 * np.finfo(x.dtype).eps * np.sign(x.sum(-1, keepdims=True))))
    found = verify.verify(folders["pre_norm"])
    assert [check.group for check in found if check.verdict == FAIL] == [ROUNDING]
    assert 2 < of(found, ROUNDING)[0].measured < 200


@pytest.mark.parametrize("mistake", ["final LayerNorm skipped", "q scaled twice", "gelu for relu"])
def test_mistakes_are_found_in_float32_backends_too(folders, monkeypatch, mistake):
    """A stand-in for a backend that computes in float32 alone."""
    variant, module, function, edits, place, _ = MISTAKES[mistake]
    monkeypatch.setattr(verify, "choose_backend", lambda backend: backend)
    load = verify.load
    monkeypatch.setattr(verify, "load", lambda name, revision, dtype, backend: load(name, revision, dtype, "numpy"))
    found = verify.verify(folders[variant], backend="cpu")
    assert failures(found) == []
    assert {check.allowed for check in of(found, LAYERS)} == {verify.ALLOWED["float32"]}
    assert max(check.measured for check in of(found, LAYERS)) > 1e-9
    plant(monkeypatch, module, function, *edits)
    assert verify.first_failure(verify.verify(folders[variant], backend="cpu")).name == place


# Loading


@pytest.mark.parametrize("broken", ["transposed", "swapped", "rounded"])
def test_a_mistake_in_loading_is_found_by_reading_as_hugging_face_does(folders, monkeypatch, broken):
    right = OPTForCausalLM.from_pretrained.__func__

    def wrong(cls, *args, **options):
        loaded = right(cls, *args, **options)
        attention = loaded.params["layers"][1]["self_attn"]
        if broken == "transposed":
            attention["k_proj"]["weight"] = np.ascontiguousarray(attention["k_proj"]["weight"].T)
        if broken == "swapped":
            attention["k_proj"], attention["v_proj"] = attention["v_proj"], attention["k_proj"]
        if broken == "rounded":
            attention["k_proj"]["weight"] = attention["k_proj"]["weight"].astype(np.float16).astype(attention["k_proj"]["weight"].dtype)
        return loaded

    monkeypatch.setattr(OPTForCausalLM, "from_pretrained", classmethod(wrong))
    found = verify.verify(folders["pre_norm"])
    check = verify.first_failure(found)
    assert check.group == LOADING
    assert f"{DECODER}.layers.1.self_attn.k_proj.weight" in check.note
    assert not failures(of(found, LAYERS))  # the formula is right, and PyTorch was given our tensors


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_all_stored_dtypes_are_read_alike(tmp_path, dtype):
    cfg = small.config()
    found = verify.verify(small.write(tmp_path, small.stored_as(small.named(cfg), dtype), cfg))
    assert failures(found) == []
    assert of(found, LOADING)[0].verdict == PASS


def test_what_hugging_face_makes_up_is_said_and_not_blamed_on_us(tmp_path):
    cfg = small.config()
    found = verify.verify(small.write(tmp_path, small.named(cfg, "language_model.model.decoder."), cfg))
    check = of(found, LOADING)[0]
    assert check.verdict == NOT_RUN
    assert "did not find model.decoder.embed_tokens.weight" in check.note
    assert failures(found) == []


def test_a_file_that_hugging_face_does_not_read_is_not_compared(folders, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((folders["pre_norm"] / "config.json").read_text())
    (tmp_path / "tf_model.h5").write_bytes(b"")
    monkeypatch.setattr(verify, "load", lambda name, *args, right=verify.load: right(folders["pre_norm"], *args))
    found = verify.verify(tmp_path)
    assert of(found, LOADING)[0].verdict == NOT_RUN
    assert "reads none of the files" in of(found, LOADING)[0].note
    assert failures(found) == []


def test_a_config_that_means_another_model_to_hugging_face_fails(folders, monkeypatch):
    right = OPTConfig.from_dict.__func__
    monkeypatch.setattr(OPTConfig, "from_dict", classmethod(lambda cls, keys: right(cls, {**keys, "enable_bias": True})))
    with pytest.raises(checkpoint.CheckpointError):  # our own reader does not let it through
        verify.verify(folders["no_bias"])
    monkeypatch.undo()
    load = verify.load

    def fewer(*args):
        loaded = load(*args)
        loaded.params["layers"].pop()
        return loaded

    monkeypatch.setattr(verify, "load", fewer)
    (check,) = [c for c in verify.verify(folders["pre_norm"]) if c.group == LAYERS]
    assert check.verdict == FAIL
    assert "cannot run config.json with our tensors" in check.note


def test_a_checkpoint_of_torchs_own_format_is_compared_too(tmp_path):
    cfg = small.config()
    tensors = {name: torch.from_numpy(a).half() for name, a in small.named(cfg, "decoder.").items()}
    small.write(tmp_path, {}, cfg)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = verify.verify(tmp_path)
    assert (of(found, LOADING)[0].verdict, failures(found)) == (PASS, [])


# Without PyTorch, or with one that is wrong


@pytest.mark.parametrize("absent", ["torch", "transformers"])
def test_without_pytorch_the_comparison_is_not_run_and_nothing_is_called_verified(folders, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    found = verify.verify(folders["pre_norm"])
    (check,) = of(found, LAYERS)
    assert check.verdict == NOT_RUN
    assert "pip install" in check.note
    status, line = verify.verdict(found)
    assert status == 1
    assert line.startswith("NOT VERIFIED")


def test_importing_verify_imports_neither():
    words = "import opt_np.verify, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", words], check=False).returncode == 0


@pytest.mark.parametrize(("version", "refused"), [("4.51.3", False), ("4.52.0", True), ("4.52.1", True), ("4.52.2", True), ("4.52.3", False),
                                                  ("4.52.0.dev0", True), ("5.23.0", False)])  # fmt: skip
def test_versions_that_scale_q_twice_are_refused(folders, monkeypatch, version, refused):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # not always the object imported above: it replaces itself
    if not refused:
        assert [library.__name__ for library in verify.oracle_libraries()] == ["torch", "transformers"]
        return
    (check,) = of(verify.verify(folders["pre_norm"]), LAYERS)
    assert check.verdict == NOT_RUN
    assert "38277" in check.note
    assert version in check.note


# Published numbers


@pytest.fixture
def planted(folders, tmp_path, monkeypatch):
    """golden.json for a tiny model, its numbers computed by Hugging Face in float32; without PyTorch from there on."""
    folder = folders["pre_norm"]
    hf = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = OPTTokenizer.from_pretrained(folder)
    texts = ["the cat sat", "it's 1999"]
    rows = [list(map(int, tokenizer.encode(text))) for text in texts]
    T = max(map(len, rows)) + 1
    right = {"ids": [row + [1] * (T - len(row)) for row in rows], "attention_mask": [[1] * len(row) + [0] * (T - len(row)) for row in rows]}
    left = {key: [row[::-1] for row in right[key]] for key in right}
    left["ids"] = [[1] * (T - len(row)) + row for row in rows]
    with torch.no_grad():
        alone = [hf(torch.tensor([row]), labels=torch.tensor([row]), output_hidden_states=True) for row in rows]
        batch = hf(**{"input_ids": torch.tensor(right["ids"]), "attention_mask": torch.tensor(right["attention_mask"])})
        made = hf.generate(torch.tensor(left["ids"]), attention_mask=torch.tensor(left["attention_mask"]), max_new_tokens=5, do_sample=False,
                           eos_token_id=None, pad_token_id=1)  # fmt: skip
    log_p = [out.logits[0].log_softmax(-1) for out in alone]
    best = [p.max(-1) for p in log_p]
    scores = [[p[t, i].item() for t, i in enumerate(row[1:])] for p, row in zip(log_p, rows, strict=True)]
    corner = alone[0].hidden_states[-1][:, 1:3, 2:5].tolist()
    other = OPTForCausalLM.from_pretrained(folder).generate(rows[:1], max_new_tokens=8, penalty_alpha=0.6, top_k=5).tolist()
    full = [row[mask.index(1) :] for row, mask in zip(made.tolist(), left["attention_mask"], strict=True)]
    greedy = {"texts": [tokenizer.decode(row, skip_special_tokens=True) for row in full], "ids_of_texts": full}
    expected = {
        "argmax_probs": ({"ids": rows}, {"argmax_ids": [b.indices.tolist() for b in best], "probs": [b.values.exp().tolist() for b in best]}),
        "last_hidden_slice": ({"ids": rows[:1]}, {"shape": [1, len(rows[0]), 16], "start": [0, 1, 2], "values": corner}),
        "mean_logits": (right, {"mean": batch.logits.mean(-1).tolist()}),
        "token_logprobs": ({"ids": rows}, {"logprobs": scores}),
        "loss": ({"ids": rows[:1]}, {"loss": alone[0].loss.item(), "perplexity": alone[0].loss.exp().item()}),
        "no_nan": (left, {"not_finite": 0}),
        "greedy_text": ({**left, "max_new_tokens": [5, 5]}, greedy),
        "contrastive_text": ({"ids": rows[:1], "max_new_tokens": [8], "penalty_alpha": 0.6, "top_k": 5}, {"texts": ["?"], "ids_of_texts": other}),
        "perplexity": ({"dataset": "WikiText-2"}, {"perplexity": 27.65}),
    }  # fmt: skip
    exact = ("no_nan", "greedy_text", "contrastive_text")
    entries = [{"id": kind, "model": "facebook/opt-tiny", "kind": kind, "inputs": inputs, "expected": wanted, "conditions": "float32",
                "tolerance": 0 if kind in exact else 1e-4, "needs": "WikiText-2" if kind == "perplexity" else None,
                "sources": [{"what": "a test", "url": None}]} for kind, (inputs, wanted) in expected.items()]  # fmt: skip
    file = tmp_path / "golden.json"
    monkeypatch.setattr(verify, "GOLDEN", file)
    monkeypatch.setitem(sys.modules, "torch", None)

    def run(edit=lambda entries: None, where=folder):
        changed = json.loads(json.dumps(entries))
        edit({entry["kind"]: entry for entry in changed})
        file.write_text(json.dumps({"entries": changed}))
        found = verify.verify(where, golden="facebook/opt-tiny")
        return {check.name: check for check in of(found, PUBLISHED)}, found

    return run


def test_golden_numbers_pass(planted):
    checks, found = planted()
    assert [check.name for check in checks.values() if check.verdict != PASS] == ["perplexity"]
    assert checks["perplexity"].verdict == NOT_RUN
    assert "WikiText-2" in checks["perplexity"].note
    assert verify.verdict(found) == (0, f"pass: {len(checks) - 1} checks, 2 not run")  # and the comparison with PyTorch


def test_what_needs_more_than_the_weights_is_not_run_even_where_it_could_be_computed(planted):
    def needy(by_kind):
        by_kind["loss"]["needs"] = "float16 on a GPU"

    check = planted(needy)[0]["loss"]
    assert (check.verdict, check.measured, check.note) == (NOT_RUN, None, "needs float16 on a GPU")


def off(*path):
    """An edit that moves one expected number by ten times what is allowed."""

    def edit(by_kind):
        kind, *rest, last = path
        node = by_kind[kind]["expected"]
        for key in rest:
            node = node[key]
        node[last] += 1e-3

    return edit


def to(kind, key, value):
    def edit(by_kind):
        by_kind[kind]["expected"][key] = value

    return edit


@pytest.mark.parametrize(("edit", "kind"), [
    (off("argmax_probs", "probs", 1, 0), "argmax_probs"),
    (to("argmax_probs", "argmax_ids", [[5, 5, 5], [5, 5]]), "argmax_probs"),
    (off("last_hidden_slice", "values", 0, 1, 2), "last_hidden_slice"),
    (to("last_hidden_slice", "shape", [1, 2, 16]), "last_hidden_slice"),
    (to("last_hidden_slice", "start", [0, 1, 3]), "last_hidden_slice"),
    (off("mean_logits", "mean", 1, -1), "mean_logits"),  # a pad
    (off("mean_logits", "mean", 0, 0), "mean_logits"),
    (off("token_logprobs", "logprobs", 1, 0), "token_logprobs"),
    (off("loss", "loss"), "loss"),
    (to("no_nan", "not_finite", 1), "no_nan"),
])  # fmt: skip
def test_a_golden_number_that_differs_fails_and_its_source_is_named(planted, edit, kind):
    checks, found = planted(edit)
    assert [check.name for check in checks.values() if check.verdict == FAIL] == [kind]
    assert "a test" in checks[kind].note
    assert verify.verdict(found)[0] == 1


def test_greedy_text_passes_by_equal_ids_or_by_equal_text_and_fails_otherwise(planted, folders, tmp_path):
    def other_ids(by_kind):
        by_kind["greedy_text"]["expected"]["ids_of_texts"][0][-1] += 1

    def other_text(by_kind):
        other_ids(by_kind)
        by_kind["greedy_text"]["expected"]["texts"][0] += "!"

    assert planted(other_ids)[0]["greedy_text"].verdict == PASS
    checks, _ = planted(other_text)
    assert checks["greedy_text"].verdict == FAIL
    assert checks["greedy_text"].measured == 1
    assert "got 'the cat sat" in checks["greedy_text"].note
    bare = tmp_path / "bare"
    shutil.copytree(folders["pre_norm"], bare)
    for file in bare.glob("*"):
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    assert planted(where=bare)[0]["greedy_text"].verdict == PASS  # equal ids need no tokenizer
    assert "no tokenizer" in planted(other_ids, bare)[0]["greedy_text"].note


def test_an_entry_that_cannot_be_computed_fails_alone(planted):
    def too_long(by_kind):
        by_kind["loss"]["inputs"]["ids"] = [[400, 401]]

    checks, _ = planted(too_long)
    assert [check.name for check in checks.values() if check.verdict == FAIL] == ["loss"]
    assert "vocab_size" in checks["loss"].note


def test_a_mistake_in_the_model_fails_the_golden_numbers(planted, monkeypatch):
    monkeypatch.setattr(model, "POSITION_OFFSET", 1)
    numbers = {"argmax_probs", "last_hidden_slice", "mean_logits", "token_logprobs", "loss"}
    assert {name for name, check in planted()[0].items() if check.verdict == FAIL} >= numbers


def test_the_name_in_config_json_is_a_hint_and_no_reason_to_compare(tmp_path):
    known = small.folder(tmp_path / "fine-tune", small.config(extra={"_name_or_path": "facebook/opt-125m"}), False)
    (check,) = of(verify.verify(known), PUBLISHED)
    assert check.verdict == NOT_RUN
    assert "--golden facebook/opt-125m" in check.note


def test_a_hub_id_in_the_file_is_known_without_asking(folders, monkeypatch):
    right = hub.find
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(hub, "find", lambda name, *args, **options: right(folders["pre_norm"], *args, **options))
    found = of(verify.verify("facebook/opt-125m"), PUBLISHED)
    assert [check.name for check in found][:2] == ["125m-first-token", "125m-token-logprobs"]
    assert all(check.verdict == FAIL for check in found if check.name in ("125m-first-token", "125m-loss", "125m-greedy"))


def test_where_pytorch_agrees_and_published_numbers_do_not_the_weights_are_in_doubt(folders):
    found = verify.verify(folders["pre_norm"], golden="facebook/opt-350m")
    assert {check.group for check in found if check.verdict == FAIL} == {PUBLISHED}
    assert "are they that model's?" in verify.verdict(found)[1]


def test_a_folder_that_is_called_like_a_published_model_is_not_taken_for_it(tmp_path, monkeypatch):
    small.folder(tmp_path / "facebook" / "opt-125m", with_tokenizer=False)
    monkeypatch.chdir(tmp_path)
    assert [check.verdict for check in of(verify.verify("facebook/opt-125m"), PUBLISHED)] == [NOT_RUN]


# The file itself


def test_golden_json_is_whole(opt_files):
    golden = verify.read_golden()
    tokenizer = OPTTokenizer.from_pretrained(opt_files)
    for entry in golden["entries"]:
        for b, text in enumerate(entry["inputs"].get("texts", [])):
            row = np.array(entry["inputs"]["ids"][b])
            real = row[np.array(entry["inputs"].get("attention_mask", [[1] * len(row)] * (b + 1))[b]) != 0]
            encoded = list(map(int, tokenizer.encode(text)))
            assert real.tolist() == (encoded[1:] if entry["id"] == "350m-mean-logits" else encoded)
        for b, text in enumerate(entry["expected"].get("texts", [])):
            ids, new = entry["expected"]["ids_of_texts"][b], entry["inputs"]["max_new_tokens"][b]
            assert ids == list(map(int, tokenizer.encode(text)))
            assert len(ids) == len(tokenizer.encode(entry["inputs"]["texts"][b])) + new


def test_golden_json_says_what_a_port_needs():
    golden = verify.read_golden()
    entries = golden["entries"]
    assert len({entry["id"] for entry in entries}) == len(entries) > 20
    for entry in entries:
        assert entry["kind"] in golden["kinds"]
        assert (entry["kind"] in verify.MEASURES) != (entry["kind"] in ("perplexity", "accuracy"))
        assert entry["needs"] or "ids" in entry["inputs"]
        assert entry["inputs"].get("protocol", "lm_eval_0shot") in golden["protocols"]
        assert entry["tolerance_from"] in ("published", "ours")
        assert entry["sources"][0]["what"]
        assert entry["sources"][0]["url"].startswith("https://")
        assert set(entry) == {"id", "model", "kind", "inputs", "expected", "tolerance", "tolerance_from", "conditions", "needs", "sources", "note"}
        assert all(0 <= i < 50272 for row in entry["inputs"].get("ids", []) for i in row)


def test_golden_json_is_in_the_package():
    from configparser import ConfigParser

    setup = ConfigParser()
    setup.read(os.path.join(os.path.dirname(__file__), "..", "setup.cfg"))
    assert "golden.json" in setup["options.package_data"]["opt_np"]


# The command


@pytest.fixture
def run(capsys):
    def call(*words):
        try:
            status = cli.main(["verify", *map(str, words)])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def test_the_command_prints_a_table_and_a_verdict(folders, run):
    status, out, err = run(folders["pre_norm"])
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[-1].startswith("pass: ")
    assert any(line.split()[:1] == [f"{FIRST}.activation_fn"] for line in lines)
    assert any(f"{DECODER}.layers.1 (11 points)" in line for line in lines)
    assert max(map(len, (line for line in lines if line.endswith(PASS)))) < 100
    assert f"{DECODER}.layers.1.fc1" not in out
    assert f"{DECODER}.layers.1.fc1" in run(folders["pre_norm"], "--every-point")[1]


def test_the_command_fails_with_the_place(folders, run, monkeypatch):
    variant, module, function, edits, place, _ = MISTAKES["q scaled twice in the second layer"]
    plant(monkeypatch, module, function, *edits)
    status, out, err = run(folders[variant])
    assert (status, err) == (1, "")
    assert [line.split()[0] for line in out.splitlines() if "<- first to differ" in line] == [place]
    assert out.splitlines()[-1].startswith("FAIL")
    assert place in out.splitlines()[-1]


@pytest.mark.parametrize(("words", "said"), [
    (["/not/there"], "not there"),
    (["FOLDER", "--golden", "facebook/opt-9b"], "facebook/opt-9b"),
    (["FOLDER", "--revision", "main"], "revision"),
    (["FOLDER", "--backend", "tpu"], "tpu"),
])  # fmt: skip
def test_bad_input_is_one_line(folders, run, words, said):
    status, out, err = run(*(folders["pre_norm"] if word == "FOLDER" else word for word in words))
    assert status not in (0, None)
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
