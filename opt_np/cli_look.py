"""The commands that look inside: trace, score, embed, explore, plan."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from opt_np.cli import HOW_TO_LOAD, add_command, add_model, add_stream_layers, find_model, given, load, named


def add(commands: Any) -> None:
    for add_one in (add_trace, add_score, add_embed, add_explore, add_plan):
        add_one(commands)


AGAINST = ("numpy", "cpu", "cuda", "float64", "float32", "float16", "bfloat16", "int8", "int4", "torch")


def add_trace(commands: Any) -> None:
    p = add_command(commands, "trace", trace, "Show every step that a text takes through the model: equation, shape, FLOPs, bytes and checksum.")
    p.add_argument("text", help="the text; - reads it from standard input")
    add_model(p)
    add_stream_layers(p)
    p.add_argument("--fused", action="store_true", help="the steps as the backend runs them, attention and mlp each in one")
    p.add_argument("--against", choices=AGAINST, help="compare with the same model on another backend, in another dtype, quantised, or in PyTorch")
    p.add_argument("--each", action="store_true", help="with --against: give each block the reference's input, to see what error it adds")
    p.add_argument("--beside", type=named, metavar="MODEL", help="show the steps of another model beside these, of a GPT-2 or an OPT")
    p.add_argument("--out", type=named, metavar="FILE.npz", help="also save every step's values, by name, as a NumPy file")


def trace(text: str, fused: bool, against: str | None, each: bool, beside: str | None, out: str | None, **how: Any) -> None:
    from opt_np import explore
    from opt_np import trace as t
    from opt_np.checkpoint import write_numpy

    if sum(map(bool, (against, beside, out))) > 1:
        raise ValueError("--against, --beside and --out do different things; give one of them")
    if each and (against in (None, "torch") or fused):
        raise ValueError("--each goes with --against another backend, dtype or quantisation, and without --fused")
    if fused and beside:
        raise ValueError("--beside compares the unfused steps; leave out --fused")
    target = out and explore.check_out(out)
    language_model, tokenizer = load(**how)
    text = given(text)
    ids = [tokenizer.encode(text)]
    if not ids[0]:
        raise ValueError("the text has no tokens; there is nothing to trace")
    if beside:
        from opt_np.gpt2 import side_by_side

        print(side_by_side(language_model, tokenizer, *load(beside, None, False, "numpy", "float32", None, False), text))
        return
    steps = t.record(language_model, ids, fused=fused, values=bool(against or out))
    if against:
        found = t.compare(steps, record_against(against, ids, fused, each and language_model, how))
        print(found)
        print(f"the worst is {t.short(found.worst.name)}, off by {found.worst.error:.1e}")
        return
    print(t.table(steps))
    if target:
        write_numpy(target, {step.name: step.value for step in steps})
        print(f"{out}: the values of {len(steps)} steps")


def record_against(what: str, ids: list[list[int]], fused: bool, exact: Any, how: dict[str, Any]) -> Any:
    """The trace of the same checkpoint by another implementation, backend or dtype; with `exact`, each block gets the input of that model's block."""
    from opt_np import trace as t
    from opt_np import verify

    if what == "torch":
        try:
            torch, transformers = verify.oracle_libraries()
        except ImportError as error:
            raise ValueError(str(error)) from None
        from opt_np import hub

        plain, _ = load(**{**how, "backend": "numpy", "dtype": "float32", "quantize": None})
        verify.check_known_to_pytorch(how["model"], plain.config)
        source = hub.find(find_model(how["model"]), how["revision"], tokenizer=False)
        with verify.quiet(transformers):
            return t.record_torch(verify.pytorch_model(torch, transformers, source.config, plain.params), ids)
    other: dict[str, Any]
    if what in ("int8", "int4"):
        other = {"quantize": what}
    else:
        other = (
            {"backend": what}
            if what in ("numpy", "cpu", "cuda")
            else {"dtype": what, "backend": "numpy" if what == "float64" else "auto", "quantize": None}
        )
    model = load(**{**how, **other})[0]
    if model.config.quantized and "dtype" in other:
        raise ValueError(f"the model is stored in {model.config.quantized[0]}, and has no {what} weights to compare with")
    return t.record_each(model, exact, ids) if exact else t.record(model, ids, fused=fused)


def add_score(commands: Any) -> None:
    p = add_command(commands, "score", score, "Tell how likely each token of a text was, how sure the model was, and the text's perplexity.")
    add_text(p)
    add_model(p)
    add_stream_layers(p)
    p.add_argument("--top", type=int, metavar="K", help="how many of the likeliest tokens to show in each place (default: 3)")
    p.add_argument("--json", action="store_true", help="one JSON object for each token instead of the table")
    p.add_argument("--window", type=int, default=None, metavar="N", help="tokens read at one time; without it the model's context, 2048 at most")
    p.add_argument("--stride", type=int, default=None, metavar="N", help="for a text longer than the window: each next one begins N tokens later")
    p.add_argument("--perplexity", action="store_true", help="instead of tokens, the text's perplexity by each convention that people publish")
    p.add_argument("--reliability", type=named, default=None, metavar="FILE.png", help="also print and plot how far confidence is from being right")
    p.add_argument("--mc-dropout", dest="samples", type=int, default=None, metavar="N", help="also tell what N passes with dropout disagree about")
    p.add_argument("--with", nargs="+", default=None, metavar="MODEL", help="more models, after the text: report how much all disagree")


def score(text: str | None, file: str | None, perplexity: bool, window: int | None, stride: int | None, **options: Any) -> None:
    from opt_np import explore
    from opt_np import perplexity as p
    from opt_np import score as s

    how_to_load = {name: options.pop(name) for name in HOW_TO_LOAD}
    if options["samples"] is not None and how_to_load["backend"] == "auto":
        how_to_load["backend"] = "numpy"  # the only backend with dropout
    for name, option in (("json", "--json"), ("reliability", "--reliability"), ("samples", "--mc-dropout"), ("with", "--with"), ("top", "--top")):
        if perplexity and options[name] is not None and options[name] is not False:
            raise ValueError(f"--perplexity is about a whole text, and {option} about its tokens: give one of the two")
    if options["samples"] is not None and options["with"]:
        raise ValueError("--mc-dropout and --with both tell what predictions disagree about: give one of the two")
    if options["reliability"]:
        explore.check_out(options["reliability"])
    content = text_of(text, file)
    language_model, tokenizer = load(**how_to_load)
    if perplexity:
        print(p.table(p.every_convention(language_model, tokenizer, content, window, stride)))
        return
    others = [load(**{**how_to_load, "model": name, "revision": None}) for name in options.pop("with") or ()]
    if options["top"] is None:
        del options["top"]  # report's own
    print(s.report(language_model, tokenizer, content, window, stride, others=others, **options))


def add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", default=None, help="the text; - reads it from standard input")
    parser.add_argument("--file", type=named, default=None, metavar="FILE", help="read the text from this file instead")


def text_of(text: str | None, file: str | None) -> str:
    if (text is None) == (file is None):
        raise ValueError("give one text: in quotes, or - for standard input, or --file FILE")
    if file is None:
        content = given(str(text))
    else:
        try:
            content = Path(file).read_text(encoding="utf-8-sig")  # utf-8-sig drops the byte-order mark of some editors
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from None
    if not content:
        raise ValueError(f"{file or 'the text'} is empty; there is nothing to read")
    return content


def add_embed(commands: Any) -> None:
    p = add_command(commands, "embed", embed, "Make a vector of each text, or find out which layer's vectors find the right document.")
    p.add_argument("texts", nargs="*", default=None, metavar="TEXT", help="the texts")
    p.add_argument("--file", type=named, default=None, metavar="FILE", help="a text on each line; - for standard input")
    add_model(p)
    add_stream_layers(p)
    p.add_argument("--layer", type=int, default=None, metavar="N", help="0 for the embeddings, -1, which is the default, for what the head reads")
    p.add_argument("--pooling", default="mean", choices=("mean", "last", "weighted", "max"), help="of its tokens; weighted: later ones count more")
    p.add_argument("--skip-bos", action="store_true", help="leave out the </s> in front")
    p.add_argument("--no-normalize", action="store_true", help="leave the vectors as long as they are")
    p.add_argument("--out", type=named, default=None, metavar="FILE.npy", help="save the vectors, (texts, width), as a NumPy file, not printed")
    p.add_argument("--sweep", type=named, default=None, metavar="FILE.jsonl", help="lines of {query, document}: how often layers find the document")


def embed(texts: list[str], file: str | None, layer: int | None, pooling: str, skip_bos: bool, no_normalize: bool, out: str | None,
          sweep: str | None, **how_to_load: Any) -> None:  # fmt: skip
    from opt_np import embeddings as e
    from opt_np import explore
    from opt_np.checkpoint import write_numpy
    from opt_np.tasks import read_examples

    if sweep is not None:
        if texts or file or out or layer is not None or no_normalize:
            raise ValueError("--sweep tries all layers on the texts of its file: leave out TEXT, --file, --layer, --no-normalize and --out")
        pairs = [(pair["query"], pair["document"]) for pair in read_examples(sweep, ("query", "document")).values()]
        print(e.table(e.layer_sweep(*load(**how_to_load), pairs, pooling, skip_bos)))
        return
    if bool(texts) == (file is not None):
        raise ValueError("give texts, or --file FILE with one on each line")
    texts = texts or lines_of(file)
    target = out and explore.check_out(out)
    found = e.embed_texts(*load(**how_to_load), texts, -1 if layer is None else layer, pooling=pooling, normalize=not no_normalize, skip_bos=skip_bos)
    if target:
        write_numpy(target, found)
        print(f"{out}: {len(found)} vectors of {found.shape[1]} numbers")
    else:
        print("\n".join(json.dumps({"text": text, "embedding": row.tolist()}) for text, row in zip(texts, found, strict=True)))


def lines_of(file: str | None) -> list[str]:
    lines = text_of(*(("-", None) if file == "-" else (None, file))).removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines]


def add_explore(commands: Any) -> None:
    p = add_command(commands, "explore", explore, "Write a page that shows in any browser, offline, what a model makes of a text, layer by layer.")
    p.add_argument("text", help="the text; - reads it from standard input")
    add_model(p)
    add_stream_layers(p)
    p.add_argument("--out", type=named, required=True, metavar="FILE.html", help="the page to write; one that is there is replaced")


def explore(text: str, out: str, **how_to_load: Any) -> None:
    from opt_np.explore import check_out, page, write

    check_out(out)  # before the model is loaded
    language_model, tokenizer = load(**how_to_load)
    folder = Path(find_model(how_to_load["model"]))
    name = folder.resolve().name if folder.exists() else str(folder)  # a hub id is shown in full
    size = write(out, page(language_model, tokenizer, given(text), name))
    print(f"{out}: {size / 1e6:.1f} MB, to be opened in any browser")


def add_plan(commands: Any) -> None:
    from opt_np.config import SIZES
    from opt_np.plan import DEVICES

    p = add_command(commands, "plan", plan, "Estimate the memory and the least time of a generation, without loading the model.")
    sizes = ", ".join(f"opt-{size}" for size in SIZES)
    p.add_argument("--model", type=named, required=True, help=f"one of {sizes}; or a folder or hub id, of which config.json is read")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="rows at once")
    p.add_argument("--prompt", type=int, default=None, metavar="N", help="tokens of each prompt; without it 512, or what the context holds")
    p.add_argument("--gen", type=int, default=128, metavar="N", help="new tokens of each row")
    kinds = ("float64", "float32", "float16", "bfloat16", "int8", "int4")
    p.add_argument("--dtype", default="float32", choices=kinds, help="of the weights in memory")
    p.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "numpy", "cpu"),
        help="whose memory is planned; a --device is planned as if the cpu backend ran there",
    )
    p.add_argument("--device", default=None, choices=tuple(DEVICES), help="memory and speeds of another machine, as its maker publishes them")
    p.add_argument("--memory", type=float, metavar="GB", help="to fit into, in 10^9 bytes; without it, what is free on this machine")
    p.add_argument("--bandwidth", type=float, metavar="GB/s", help="of memory, 60 or so for a laptop; without it, measured here for some seconds")
    p.add_argument("--tflops", type=float, metavar="X", help="10^12 FLOP/s of products; without it, measured here in float32")


def plan(model: str, batch: int, prompt: int | None, gen: int, dtype: str, backend: str, device: str | None, memory: float | None,
         bandwidth: float | None, tflops: float | None) -> None:  # fmt: skip
    from opt_np import plan as p
    from opt_np.classes import BACKENDS, choose_backend

    cfg = config_of(model)
    prompt = max(1, min(512, cfg.max_position_embeddings + 1 - gen)) if prompt is None else prompt
    p.checked(cfg, batch, prompt, gen)
    for option, value in (("--memory", memory), ("--bandwidth", bandwidth), ("--tflops", tflops)):
        if value is not None and not 0 < value <= 1e12:
            raise ValueError(f"{option} is {value:g}; it must be above 0, and at most 1e12")
    kind, dtype = cfg.quantized[0] if cfg.quantized else dtype if dtype.startswith("int") else None, "float32" if dtype.startswith("int") else dtype
    room, speed, *peaks = p.DEVICES.get(device or "", (p.available(), None, None, None))
    flops = peaks[dtype not in ("float16", "bfloat16")]  # int8 and int4 weights are computed with in float32
    if not device and (bandwidth is None or tflops is None):
        from opt_fast.limits import measure

        measured = measure(os.cpu_count() or 1)
        speed, flops = measured["bandwidth"], measured["matmul"]
    speed, flops = (x * unit if x else known for x, unit, known in ((bandwidth, 1e9, speed), (tflops, 1e12, flops)))
    given = bool(bandwidth) + bool(tflops)
    stated = "as stated" if device or given == 2 else "as stated and measured here, just now" if given else "as measured here, just now"
    where = f"{speed / 1e9:.1f} GB/s and {flops / 1e12:.3g} TFLOP/s, {stated}"  # type: ignore[operator]
    backend = choose_backend("cpu" if device and backend == "auto" else backend, dtype)
    if dtype not in BACKENDS[backend]:
        raise ValueError(f"backend {backend!r} computes in {' or '.join(BACKENDS[backend])}, not {dtype!r}")
    number = 8 if dtype == "float64" else 2 if device and dtype in ("float16", "bfloat16") else 4
    print(p.report(cfg, batch, prompt, gen, dtype, kind, backend, memory * 1e9 if memory else room, speed, flops, where, number))  # type: ignore[arg-type]


def config_of(model: str) -> Any:
    """The config of a published size, a folder or a hub id."""
    from opt_np.config import SIZES, OPTConfig

    if model.removeprefix("facebook/").removeprefix("opt-") in SIZES:
        return OPTConfig.from_size(model.removeprefix("facebook/").removeprefix("opt-"))
    from opt_np import checkpoint, hub

    return checkpoint.load_config(hub.find(model, tokenizer=False).config)
