"""The engines that bench.py times: ours, and those people use today. Each is a function that loads the weights and returns its jobs.

A job is a function of a seed, from which the prompt is drawn, so that no engine can reuse a cached answer; its results must agree with the other
engines'. CTranslate2 and OpenVINO read formats of their own, converted here from the HF model, and quantized as their users do.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opt_np.config import OPTConfig

Jobs = dict[str, Callable[[int], Any]]
SAMPLE = 997  # every 997th element of a gradient is compared
INT4_GROUP = 64  # columns that share a scale, in every engine
UNTOLD = np.finfo(np.float32).min  # stands for a value that an engine does not report; NaN would hide mistakes


@dataclass(frozen=True)
class Shape:
    """How much work a model size stands for.

    The model, the tokens of a prefill and of a decode, rows and tokens of a training step, (S, Dh, H) of attention, the batches of a decode,
    prompts with a common prefix (how many, the tokens that they share, and the tokens that each has of its own), and the tokens of a short prefill.
    """

    cfg: OPTConfig
    prefill: int = 1024
    decode: int = 64  # after a prompt of one token, so that all are decoding steps, at a mean context of 32
    train: tuple[int, int] = (4, 256)
    attention: tuple[tuple[int, int, int], ...] = ((512, 64, 12), (1024, 64, 12), (2048, 64, 12), (2048, 80, 32))
    batches: tuple[int, ...] = (4, 8, 16)
    prefix: tuple[int, int, int] = (8, 512, 16)
    short: int = 128


def shape(size: str) -> Shape:
    if size != "tiny":
        return Shape(OPTConfig.from_size(size, dropout=0.0))
    cfg = OPTConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=256, dropout=0.0)
    return Shape(cfg, 64, 8, (2, 16), ((64, 16, 4), (48, 24, 2)), (2, 3), (3, 32, 4), 16)


@dataclass(frozen=True)
class Setup:
    """An engine's input; `folder` holds the float16 checkpoint and its conversions by `CONVERTERS`."""

    shape: Shape
    folder: str
    dtype: str
    threads: int

    def prompt(self, seed: int, T: int, B: int = 1) -> np.ndarray:
        return np.random.default_rng(seed).integers(4, self.shape.cfg.vocab_size, (B, T))

    def prompts_alike(self, seed: int) -> np.ndarray:
        B, P, T = self.shape.prefix
        ids = self.prompt(seed, P + T, B)
        ids[:, :P] = ids[0, :P]
        return ids

    @property
    def quantize(self) -> str | None:
        return self.dtype if self.dtype.startswith("int") else None


def centred(logits: Any) -> np.ndarray:
    """Logits (…, V) shifted so that the mean of their exponentials is 1: comparable with an engine that reports only log-probabilities."""
    logits = np.asarray(logits, np.float32)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.mean(np.exp(logits), -1, keepdims=True))


def folder_of(s: Setup, engine: str) -> str:
    """The folder with an engine's format; engines convert float32 to bfloat16 themselves."""
    return f"{s.folder}/{engine}-{s.quantize or 'float32'}"


# ---- attention alone ---------------------------------------------------------------------------------------------------------------------


def attention_jobs(s: Setup, forward: Callable, both: Callable, prepare: Callable = lambda x: x) -> Jobs:
    """Attention's jobs: q, k, v and dO are random, (1, S, H, Dh), then converted by `prepare`; results have the original order of axes."""

    def job(function: Callable, S: int, Dh: int, H: int) -> Callable[[int], Any]:
        inputs = [prepare(x) for x in np.random.default_rng(S + Dh).standard_normal((4, 1, S, H, Dh), np.float32)]
        return lambda seed: function(*inputs, Dh**-0.5)

    return {f"attention-{a[0]}-{a[1]}{end}": job(f, *a) for a in s.shape.attention for f, end in ((forward, ""), (both, "-backward"))}


def our_attention(s: Setup, ops: Any) -> Jobs:
    def both(q: Any, k: Any, v: Any, dO: Any, scale: float) -> tuple:
        O, L = ops.attention_lse(q, k, v, scale)
        return O, *ops.attention_bwd(dO, q, k, v, O, L, scale)

    return attention_jobs(s, lambda q, k, v, dO, scale: ops.attention(q, k, v, scale), both)


def opt_fast_attention(s: Setup) -> Jobs:
    from opt_fast import ops_cpu

    return our_attention(s, ops_cpu)


def numpy_attention(s: Setup) -> Jobs:
    from opt_np import ops

    return our_attention(s, ops)


def torch_attention(s: Setup) -> Jobs:
    """torch's fused attention, in the order of axes in which it is fastest: (1, H, S, Dh)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def forward(q: Any, k: Any, v: Any, dO: Any, scale: float) -> Any:
        with torch.no_grad():
            return sdpa(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    def both(q: Any, k: Any, v: Any, dO: Any, scale: float) -> list:
        O = sdpa(q, k, v, is_causal=True, scale=scale)
        return [x.detach().transpose(1, 2) for x in (O, *torch.autograd.grad(O, (q, k, v), dO))]

    return attention_jobs(s, forward, both, lambda x: torch.from_numpy(x).transpose(1, 2).contiguous().requires_grad_())


# ---- the model, running ------------------------------------------------------------------------------------------------------------------


def model_jobs(s: Setup, logits: Callable[[np.ndarray], Any], decode: Callable[[np.ndarray], Any], alike: Callable[[np.ndarray, int], Any]) -> Jobs:
    """The jobs of a whole model: `logits` returns the logits that follow each prompt (of one token: a decoding step), `decode` the tokens.

    `alike` returns the logits of prompts whose first tokens, of a given number, are the same; each engine shares that work by its own means.
    """

    def steps(B: int, function: Callable[[np.ndarray], Any]) -> Callable[[int], Any]:
        return lambda seed: function(s.prompt(seed, 1, B))

    return {
        "prefill": lambda seed: logits(s.prompt(seed, s.shape.prefill)),
        "short": lambda seed: logits(s.prompt(seed, s.shape.short)),
        "prefix": lambda seed: alike(s.prompts_alike(seed), s.shape.prefix[1]),
        "step": steps(1, logits),
        "decode": steps(1, decode),
        **{f"step-{B}": steps(B, logits) for B in s.shape.batches},
        **{f"batch-{B}": steps(B, decode) for B in s.shape.batches},
    }


def our_model(s: Setup, backend: str) -> Jobs:
    from opt_np.classes import OPTForCausalLM

    folder, dtype = (folder_of(s, "opt_fast"), "float32") if s.quantize else (s.folder, s.dtype)
    lm = OPTForCausalLM.from_pretrained(folder, dtype=dtype, backend=backend)

    def alike(ids: np.ndarray, P: int) -> np.ndarray:
        cache = lm(ids[:1, :P], use_cache=True, logits_to_keep=1).past_key_values
        cache.reorder(np.zeros(len(ids), np.int64))
        return centred(lm(ids[:, P:], past_key_values=cache, logits_to_keep=1).logits)

    def logits(ids: np.ndarray) -> np.ndarray:
        return centred(next(lm.stream(ids, max_new_tokens=1, eos_token_id=-1)).logits)

    return model_jobs(s, logits, lambda ids: lm.generate(ids, max_new_tokens=s.shape.decode, eos_token_id=-1)[:, 1:], alike)


def opt_fast_model(s: Setup) -> Jobs:
    return our_model(s, "cpu")


def numpy_model(s: Setup) -> Jobs:
    return our_model(s, "numpy")


def load_hf(folder: str, dtype: str) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers.OPTForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


def hf_model(s: Setup) -> Jobs:
    import torch

    hf = load_hf(s.folder, s.dtype)
    hf.generation_config.eos_token_id = None

    def logits(ids: np.ndarray, past: Any = None) -> np.ndarray:
        with torch.inference_mode():
            return centred(hf(torch.from_numpy(ids), past_key_values=past, logits_to_keep=1).logits.float())

    def decode(ids: np.ndarray) -> Any:
        prompt = torch.from_numpy(ids)
        return hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=s.shape.decode, do_sample=False)[:, 1:]

    def alike(ids: np.ndarray, P: int) -> np.ndarray:
        with torch.inference_mode():
            past = hf(torch.from_numpy(ids[:1, :P]), use_cache=True, logits_to_keep=1).past_key_values
            past.batch_repeat_interleave(len(ids))
        return logits(ids[:, P:], past)

    return model_jobs(s, logits, decode, alike)


def ctranslate2_model(s: Setup) -> Jobs:
    """CTranslate2, whose tokens are the ids as strings. A minimum length keeps it from stopping, but masks the end token: not for logits.

    In int8 it also rounds activations, and multiplies integers.
    """
    import ctranslate2

    generator = ctranslate2.Generator(folder_of(s, "ctranslate2"), device="cpu", compute_type=s.dtype, intra_threads=s.threads)

    def run(ids: np.ndarray, **options: Any) -> Any:
        return generator.generate_batch(written(ids), sampling_topk=1, include_prompt_in_result=False, **options)

    def logits(ids: np.ndarray, **options: Any) -> np.ndarray:
        results = run(ids, max_length=1, return_logits_vocab=True, **options)  # own the logits
        return centred([np.array(result.logits[0][0]) for result in results])

    def decode(ids: np.ndarray) -> np.ndarray:
        return np.array([result.sequences_ids[0] for result in run(ids, min_length=s.shape.decode, max_length=s.shape.decode)])

    def alike(ids: np.ndarray, P: int) -> np.ndarray:
        return logits(ids[:, P:], static_prompt=written(ids[:1, :P])[0], cache_static_prompt=True)

    return model_jobs(s, logits, decode, alike)


def written(ids: np.ndarray) -> list[list[str]]:
    return [[str(i) for i in row] for row in ids]


def openvino_model(s: Setup) -> Jobs:
    """OpenVINO GenAI's LLMPipeline, on ids, without a tokenizer. It returns no logits, only the chosen token and its log-probability.

    Its own default for keys and values is 8 bits; here they have as many bits as the weights, and 16 with int8 and int4 weights, which no longer
    costs it time. The pipeline's default, paged attention, prefills faster than its other backend, and caches all that it computed: of prompts
    with a common prefix, the first is run alone, since a single call would compute the prefix for each. If the CPU has no bfloat16 products,
    OpenVINO stores and computes in float32 whatever is requested; for int8 and int4 it chooses the dtype of computation itself.
    """
    import openvino
    import openvino_genai

    float_type = {"float32": "f32", "bfloat16": "bf16"}.get(s.dtype)
    cached = float_type or "f16"
    if cached == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        cached = "f16"  # where bfloat16 is emulated, a bfloat16 cache halves the speed of prefill
    precision = {"INFERENCE_PRECISION_HINT": float_type} if float_type else {}
    pipeline = openvino_genai.LLMPipeline(folder_of(s, "openvino"), "CPU", KV_CACHE_PRECISION=cached, PERFORMANCE_HINT="LATENCY",
                                          INFERENCE_NUM_THREADS=s.threads, **precision)  # fmt: skip

    def run(ids: np.ndarray, new: int, **options: Any) -> Any:
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return pipeline.generate(inputs, max_new_tokens=new, ignore_eos=True, **options)

    def logits(ids: np.ndarray) -> np.ndarray:
        result = run(ids, 1, logprobs=1)
        told = np.full((len(ids), s.shape.cfg.vocab_size), UNTOLD)
        told[np.arange(len(ids)), np.ravel(result.tokens)] = np.array(result.scores) + np.log(told.shape[1])
        return told

    def alike(ids: np.ndarray, P: int) -> np.ndarray:
        return np.concatenate([logits(ids[:1]), logits(ids[1:])])

    return model_jobs(s, logits, lambda ids: np.array(run(ids, s.shape.decode).tokens), alike)


# ---- training ----------------------------------------------------------------------------------------------------------------------------


def our_train(s: Setup, **backend: Any) -> Jobs:
    from opt_np import checkpoint, grad, optim
    from opt_np.tree import flatten

    params, cfg = checkpoint.load(s.folder)
    state, own = optim.adamw_init(params), backend.get("ops", optim)  # a backend's own optimizer steps

    def train(seed: int) -> list:
        ids = s.prompt(seed, s.shape.train[1], s.shape.train[0])
        loss, grads = grad.loss_and_grads(params, ids, ids, cfg, **backend)
        norm = own.clip_by_global_norm(grads, 1.0)
        own.adamw_step(params, grads, state, 0.0)  # learning rate 0: the same work, unchanged weights
        return [loss, norm, np.concatenate([g.ravel()[::SAMPLE] for _, g in sorted(flatten(grads).items())])]

    return {"train": train}


def opt_fast_train(s: Setup) -> Jobs:
    from opt_fast import ops_cpu

    return our_train(s, ops=ops_cpu)


def numpy_train(s: Setup) -> Jobs:
    return our_train(s)


def hf_train(s: Setup) -> Jobs:
    import torch

    hf = load_hf(s.folder, s.dtype)
    named = sorted((name.removeprefix("model.decoder."), p) for name, p in hf.named_parameters())
    optimizer = torch.optim.AdamW(hf.parameters(), lr=0.0)

    def train(seed: int) -> list:
        ids = torch.from_numpy(s.prompt(seed, s.shape.train[1], s.shape.train[0]))
        optimizer.zero_grad()
        loss = hf(ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        return [loss.detach(), norm, torch.cat([p.grad.ravel()[::SAMPLE] for _, p in named])]

    return {"train": train}


# ---- converting to the engines' own formats ----------------------------------------------------------------------------------------------


def to_integers(folder: str, dtypes: Sequence[str]) -> None:
    """Our own format, as `opt-np quantize` writes it."""
    from opt_np import cli

    for dtype in dtypes:
        with redirect_stdout(sys.stderr):  # it lists the error of each matrix
            cli.quantize(folder, f"{folder}/opt_fast-{dtype}", dtype, INT4_GROUP if dtype == "int4" else None, None)


def to_ctranslate2(folder: str, dtypes: Sequence[str]) -> None:
    """The steps of CTranslate2's TransformersConverter, without the tokenizer that it would require."""
    from ctranslate2.converters.transformers import OPTLoader

    hf, loader = load_hf(folder, "float32"), OPTLoader()
    for dtype in dtypes:
        spec = loader.get_model_spec(hf)
        loader.set_vocabulary(spec, [str(i) for i in range(hf.config.vocab_size)])
        spec.config.bos_token = spec.config.eos_token = "2"
        spec.config.unk_token = "3"
        spec.validate()
        spec.optimize(quantization=dtype)
        out = Path(folder, f"ctranslate2-{dtype}")
        out.mkdir()
        spec.save(str(out))


class Past:
    """The cache interface that HF's decoder uses, over plain tensors, which can be traced: k and v of each layer in order, (B, H, S, Dh)."""

    def __init__(self, tensors: list) -> None:
        self.tensors = tensors

    def get_seq_length(self, *_: Any) -> Any:
        return self.tensors[0].shape[2]

    def update(self, k: Any, v: Any, i: int, *_: Any, **__: Any) -> tuple:
        import torch

        self.tensors[2 * i : 2 * i + 2] = [torch.cat(pair, 2) for pair in zip(self.tensors[2 * i : 2 * i + 2], (k, v), strict=True)]
        return self.tensors[2 * i], self.tensors[2 * i + 1]


def to_openvino(folder: str, dtypes: Sequence[str]) -> None:
    """The stateful graph that OpenVINO's own exporter makes: keys and values are the model's state, and attention is one node per layer."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    model, past = traced(load_hf(folder, "float32"))
    apply_make_stateful_transformation(model, {name: name.replace("past", "present") for name in past})
    start_empty(model)
    kinds = [node.get_type_name() for node in model.get_ops()]
    if 2 * kinds.count("ScaledDotProductAttention") != len(past):
        raise RuntimeError("OpenVINO's graph has not one fused attention a layer: it would not run at its best")
    for dtype in dict.fromkeys("float32" if dtype == "bfloat16" else dtype for dtype in dtypes):
        out = Path(folder, f"openvino-{dtype}")
        stored = model if dtype == "float32" else compressed(model.clone(), dtype)
        openvino.save_model(stored, out / "openvino_model.xml", compress_to_fp16=False)
        (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))


def compressed(model: Any, dtype: str) -> Any:
    """The model with int8 or int4 weights, made by NNCF as OpenVINO's users do; of its settings that need no text, the fastest here.

    INT8_SYM decodes 1.1 to 1.2 times as fast as the default, INT8_ASYM; INT4_SYM in groups of 64 as fast as in 128, and 1.2 times as fast as
    INT4_ASYM. int4 leaves the token matrix, which is the head as well, in int8.
    """
    with redirect_stdout(sys.stderr):  # it prints progress bars
        import nncf

        nncf.set_log_level(logging.ERROR)
        if dtype == "int8":
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=INT4_GROUP)


def traced(hf: Any) -> tuple[Any, list[str]]:
    """HF's model as an OpenVINO graph from past to present keys and values; and the names of the past inputs."""
    import openvino
    import torch

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hf = hf

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, beam_idx: Any, past: Any) -> tuple:
            cache = Past([x.index_select(0, beam_idx) for x in past])
            T, S = input_ids.shape[1], attention_mask.shape[1]
            visible = torch.arange(S) <= torch.arange(S - T, S)[:, None]  # causal, aligned to the end of the keys
            visible = visible & (attention_mask[:, None, None] > 0)  # (B, 1, T, S)
            h = self.hf.model.decoder(input_ids, attention_mask=visible, position_ids=position_ids, past_key_values=cache, use_cache=True)
            return self.hf.lm_head(h.last_hidden_state), *cache.tensors

    cfg, (B, T, P) = hf.config, (2, 2, 3)  # any numbers but 0 and 1, which a tracer might take for constants
    H, names = cfg.num_attention_heads, [f"past.{i}" for i in range(2 * cfg.num_hidden_layers)]
    past = [torch.zeros(B, H, P, cfg.hidden_size // H) for _ in names]
    inputs = {"input_ids": torch.full((B, T), 5), "attention_mask": torch.ones(B, P + T, dtype=torch.int64),
              "position_ids": torch.tensor([[3, 4]] * B), "beam_idx": torch.arange(B, dtype=torch.int32)}  # fmt: skip
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about branches on shapes that always go one way here
        model = openvino.convert_model(Step(), example_input={**inputs, "past": past})
    for port, name in zip(model.inputs, [*inputs, *names], strict=True):
        port.get_tensor().set_names({name})
        if name in names:
            port.get_node().set_partial_shape(openvino.PartialShape([-1, H, -1, cfg.hidden_size // H]))
    for port, name in zip(model.outputs, ["logits", *(name.replace("past", "present") for name in names)], strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    return model, names


def start_empty(model: Any) -> None:
    """Sets the initial state, before the first token, to (rows of input_ids, H, 0, Dh)."""
    from openvino import opset13 as op

    rows = op.gather(op.shape_of(model.input("input_ids"), output_type="i64"), op.constant([0]), op.constant(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, H, _, Dh = node.get_output_partial_shape(0)
            empty = op.concat([rows, op.constant(np.array([H.get_length(), 0, Dh.get_length()]))], 0)
            node.set_arguments([op.broadcast(op.constant(0.0, dtype=np.float32), empty).output(0)])
    model.validate_nodes_and_infer_types()


# The engines for each kind of job, ours first and the reference last.
ENGINES: dict[str, dict[str, Callable[[Setup], Jobs]]] = {
    "attention": {"opt_fast": opt_fast_attention, "hf": torch_attention, "numpy": numpy_attention},
    "model": {"opt_fast": opt_fast_model, "openvino": openvino_model, "hf": hf_model, "ctranslate2": ctranslate2_model, "numpy": numpy_model},
    "train": {"opt_fast": opt_fast_train, "hf": hf_train, "numpy": numpy_train},
}
CONVERTERS: dict[str, tuple[Sequence[str], Callable[[str, Sequence[str]], None]]] = {  # for these dtypes
    "opt_fast": (("int8", "int4"), to_integers),
    "openvino": (("float32", "bfloat16", "int8", "int4"), to_openvino),
    "ctranslate2": (("float32", "int8"), to_ctranslate2),
}
CONVERTERS_IMPORT = {"openvino": ("torch", "transformers", "nncf"), "ctranslate2": ("torch", "transformers")}
IMPORTS = {  # modules that an engine imports before it loads a model
    "opt_fast": ("numba", "opt_np.classes", "opt_fast.ops_cpu"),
    "openvino": ("openvino_genai",),
    "hf": ("torch", "transformers", "transformers.models.opt.modeling_opt"),
    "ctranslate2": ("ctranslate2",),
    "numpy": ("opt_np.classes",),
}
