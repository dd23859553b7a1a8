"""The command line, opt-np: a user's mistake is one line on stderr and a status of 1, never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

HOW_TO_LOAD = ("model", "revision", "strict", "backend", "dtype", "quantize", "stream_layers")  # options of commands that compute
SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "opt-tiny"


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns its exit status."""
    args = vars(build_parser().parse_args(argv))
    command = args.pop("run")
    warnings.showwarning = lambda message, *_, **__: print(f"opt-np: warning: {message}", file=sys.stderr)
    status = 0
    try:
        status = command(**args) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # what reads our output, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError) as error:  # DataError and CheckpointError are ValueErrors
        print(f"opt-np: {'not enough memory: ' if isinstance(error, MemoryError) else ''}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("opt-np: stopped", file=sys.stderr)
        return 130
    return status


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes told in one line; subcommands get this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="opt-np", description="OPT in NumPy: generate text, look at logits, train.")
    commands = parser.add_subparsers(dest="run", required=True, metavar="COMMAND")
    add_generate(commands)
    add_logits(commands)
    add_score(commands)
    add_embed(commands)
    add_info(commands)
    add_download(commands)
    add_convert(commands)
    add_quantize(commands)
    add_verify(commands)
    add_train(commands)
    add_trace(commands)
    add_plan(commands)
    add_explore(commands)
    add_bench(commands)
    return parser


def add_command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help, formatter_class=Formatter)
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=None, metavar="MODEL", help="a folder or a hub id, facebook/opt-125m; without it, the one beside the source"
    )
    parser.add_argument("--revision", default=None, help="of a hub id: a branch, a tag, a commit or refs/pr/N")
    parser.add_argument("--strict", action="store_true", help="refuse weights that are NaN or infinite, instead of warning")
    parser.add_argument("--backend", default="auto", choices=("auto", "numpy", "cpu", "cuda"), help="what computes")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "float16", "bfloat16"), help="of the weights in memory")
    parser.add_argument("--quantize", default=None, choices=("int8", "int4"), help="keep matrices as whole numbers, made while loading")


def add_stream_layers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stream-layers", action="store_true", help="for a model larger than memory: read its layers anew at every pass")


def add_generate(commands: Any) -> None:
    p = add_command(commands, "generate", generate, "Continue a text, printing each word as it comes.")
    p.add_argument("prompt", help="the text to continue; - reads it from standard input")
    add_model(p)
    p.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="the same seed draws the same text")
    add_stream_layers(p)
    p.add_argument("--explain", type=int, metavar="N", default=argparse.SUPPRESS, help="show instead why each token was chosen among the N likeliest")
    for title, options in GENERATE_OPTIONS.items():
        group = p.add_argument_group(title)
        for name, kind, help in options:
            how = kind if isinstance(kind, dict) else {"type": kind, "metavar": "N" if kind is int else "X"}
            group.add_argument("--" + name.replace("_", "-"), help=help, default=argparse.SUPPRESS, **how)


def id_list(word: str) -> list[int]:
    return [int(i) for i in word.split(",")]


# None has a default here: what is not given is the model's own (generation_config.json), else what the help says in brackets.
GENERATE_OPTIONS: dict[str, tuple[tuple[str, Any, str], ...]] = {
    "how long (not given: the model's own choice, else as in brackets; so for all that follow)": (
        ("max_new_tokens", int, "tokens to add at most (100, or what the context holds)"),
        ("max_length", int, "tokens in all, at most"),
        ("min_new_tokens", int, "tokens to add at least"),
        ("min_length", int, "tokens in all, at least"),
        ("eos_token_id", {"type": int, "nargs": "+", "metavar": "ID"}, "ids that end the text; -1 for none (the model's)"),
        ("stop_strings", {"nargs": "+", "metavar": "TEXT"}, "words that end the text; after the prompt, as all lists"),
        ("overflow", {"choices": ("error", "truncate_left", "slide")}, "past the context: refuse, forget the start at once, or as it goes (error)"),
    ),
    "what may be said": (
        ("repetition_penalty", float, "above 1 makes tokens already seen less likely (1)"),
        ("no_repeat_ngram_size", int, "no run of N tokens comes twice (0: off)"),
        ("bad_words_ids", {"type": id_list, "nargs": "+", "metavar": "ID,ID"}, "never these ids in a row"),
    ),
    "chance": (
        ("do_sample", {"action": argparse.BooleanOptionalAction}, "draw tokens at random instead of taking the likeliest"),
        ("temperature", float, "below 1 safer, above 1 wilder (1)"),
        ("top_k", int, "draw from the N likeliest; 0 for all (50)"),
        ("top_p", float, "draw from the likeliest that reach probability X (1)"),
        ("min_p", float, "draw from those at least X times as likely as the likeliest (0)"),
        ("typical_p", float, "draw from those of typical surprise that reach probability X (1)"),
    ),
    "search": (
        ("num_return_sequences", int, "texts to print, with --do-sample or beams (1)"),
        ("num_beams", int, "continuations kept side by side (1)"),
        ("length_penalty", float, "of beams: above 0 favours long texts, below 0 short ones (1)"),
        ("early_stopping", {"choices": ("true", "false", "never")}, "of beams: stop at as many finished texts as beams (false)"),
        ("penalty_alpha", float, "contrastive search among --top-k: the weight, 0 to 1, of not being like the text so far (0: off)"),
    ),
}


def generate(prompt: str, explain: int | None = None, **options: Any) -> None:
    from opt_np.generate import room
    from opt_np.settings import resolve

    language_model, tokenizer = load(**{name: options.pop(name) for name in HOW_TO_LOAD})
    text = sys.stdin.read() if prompt == "-" else prompt
    ids, cfg = [tokenizer.encode(text)], language_model.config
    if options.get("early_stopping") in ("true", "false"):
        options["early_stopping"] = options["early_stopping"] == "true"
    with warnings.catch_warnings(action="ignore"):  # it is resolved again below, and then says what it has to say
        settings = resolve(options, language_model.generation_config, cfg)
    if settings.max_new_tokens is None and settings.max_length is None:
        kept = {"error": len(ids[0]), "truncate_left": 1, "slide": -100}[settings.overflow]  # of the prompt: sliding, all fits
        options["max_new_tokens"] = max(1, min(100, room(cfg, settings) - kept))
    if explain is not None:
        print(*language_model.explain(ids, explain, tokenizer, **options), sep="\n\n")
    elif settings.beams or settings.num_return_sequences > 1:
        rows = language_model.generate(ids, tokenizer=tokenizer, **options)[:, len(ids[0]) :]
        print("\n---\n".join(text + continuation for continuation in tokenizer.batch_decode(rows, skip_special_tokens=True)))
    else:
        steps = language_model.stream(ids, tokenizer=tokenizer, **options)
        print(text, end="", flush=True)
        for step in steps:
            print(step.text[0], end="", flush=True)
        print()


def add_logits(commands: Any) -> None:
    p = add_command(commands, "logits", logits, "Show the likeliest next tokens after each token of a text.")
    p.add_argument("text", help="the text; - reads it from standard input")
    add_model(p)
    add_stream_layers(p)
    p.add_argument("--top", type=int, default=5, metavar="K", help="how many candidates to show")
    p.add_argument("--out", default=None, metavar="FILE.npy", help="also save the logits, (tokens, vocabulary), as a NumPy file")


def logits(text: str, top: int, out: str | None, **how_to_load: Any) -> None:
    import numpy as np

    if top < 1:
        raise ValueError(f"--top is {top}; it must be at least 1")
    language_model, tokenizer = load(**how_to_load)
    ids = tokenizer.encode(sys.stdin.read() if text == "-" else text)
    rows = np.asarray(language_model([ids]).logits)[0]  # (T, V)
    if out:
        np.save(out, rows)
    log_p = rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)
    print(f"{'token':>16}  logprob  likeliest next")
    for t, row in enumerate(log_p):
        own = f"{log_p[t - 1, ids[t]]:7.3f}" if t else "      -"
        best = np.argsort(-row, kind="stable")[:top]
        print(f"{tokenizer.decode([ids[t]])!r:>16}  {own}  " + "  ".join(f"{tokenizer.decode([i])!r} {np.exp(row[i]):.3f}" for i in best))


def add_score(commands: Any) -> None:
    p = add_command(commands, "score", score, "Tell how likely each token of a text was, how sure the model was, and the text's perplexity.")
    add_text(p)
    add_model(p)
    add_stream_layers(p)
    p.add_argument("--top", type=int, default=3, metavar="K", help="how many of the likeliest tokens to show in each place")
    p.add_argument("--json", action="store_true", help="one JSON object for each token instead of the table")
    p.add_argument("--window", type=int, default=None, metavar="N", help="tokens read at one time; without it the model's context, 2048 at most")
    p.add_argument("--stride", type=int, default=None, metavar="N", help="for a text longer than the window: each next one begins N tokens later")
    p.add_argument("--perplexity", action="store_true", help="instead of tokens, the text's perplexity by each convention that people publish")
    p.add_argument("--reliability", default=None, metavar="FILE.png", help="also tell how far confidence is from how often it is right, and plot it")
    p.add_argument("--mc-dropout", dest="samples", type=int, default=None, metavar="N", help="also tell what N passes with dropout disagree about")
    p.add_argument("--with", nargs="+", default=None, metavar="MODEL", help="after the text: also tell what they and the first disagree about")


def score(text: str | None, file: str | None, perplexity: bool, window: int | None, stride: int | None, **options: Any) -> None:
    from opt_np import perplexity as p
    from opt_np import score as s

    how_to_load = {name: options.pop(name) for name in HOW_TO_LOAD}
    if options["samples"] is not None and how_to_load["backend"] == "auto":
        how_to_load["backend"] = "numpy"  # which alone computes dropout
    for name, option in (("json", "--json"), ("reliability", "--reliability"), ("samples", "--mc-dropout"), ("with", "--with")):
        if perplexity and options[name] is not None and options[name] is not False:
            raise ValueError(f"--perplexity is about a whole text, and {option} about its tokens: give one of the two")
    if options["samples"] is not None and options["with"]:
        raise ValueError("--mc-dropout and --with both tell what predictions disagree about: give one of the two")
    content = text_of(text, file)
    language_model, tokenizer = load(**how_to_load)
    if perplexity:
        print(p.table(p.every_convention(language_model, tokenizer, content, window, stride)))
        return
    others = [load(**{**how_to_load, "model": name, "revision": None}) for name in options.pop("with") or ()]
    print(s.report(language_model, tokenizer, content, window, stride, others=others, **options))


def add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", default=None, help="the text; - reads it from standard input")
    parser.add_argument("--file", default=None, metavar="FILE", help="read the text from this file instead")


def text_of(text: str | None, file: str | None) -> str:
    if (text is None) == (file is None):
        raise ValueError("give one text: in quotes, or - for standard input, or --file FILE")
    if file is None:
        content = sys.stdin.read() if text == "-" else str(text)
    else:
        try:
            content = Path(file).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from None
    if not content:
        raise ValueError(f"{file or 'the text'} is empty; there is nothing to read")
    return content


def add_embed(commands: Any) -> None:
    p = add_command(commands, "embed", embed, "Make a vector of each text, or find out which layer's vectors find the right document.")
    p.add_argument("texts", nargs="*", default=None, metavar="TEXT", help="the texts")
    p.add_argument("--file", default=None, metavar="FILE", help="a text on each line; - for standard input")
    add_model(p)
    add_stream_layers(p)
    p.add_argument("--layer", type=int, default=None, metavar="N", help="0 for the embeddings, -1, which is the default, for what the head reads")
    p.add_argument("--pooling", default="mean", choices=("mean", "last", "weighted", "max"), help="of its tokens; weighted: later ones count more")
    p.add_argument("--skip-bos", action="store_true", help="leave out the </s> in front")
    p.add_argument("--no-normalize", action="store_true", help="leave the vectors as long as they are")
    p.add_argument("--out", default=None, metavar="FILE.npy", help="save the vectors, (texts, width), as a NumPy file instead of printing them")
    p.add_argument("--sweep", default=None, metavar="FILE.jsonl", help="lines of {query, document}: how often each layer finds a query's document")


def embed(texts: list[str], file: str | None, layer: int | None, pooling: str, skip_bos: bool, no_normalize: bool, out: str | None,
          sweep: str | None, **how_to_load: Any) -> None:  # fmt: skip
    import numpy as np

    from opt_np import embeddings as e
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
    found = e.embed_texts(*load(**how_to_load), texts, -1 if layer is None else layer, pooling=pooling, normalize=not no_normalize, skip_bos=skip_bos)
    if out:
        np.save(out, found)
        print(f"{out}: {len(found)} vectors of {found.shape[1]} numbers")
    else:
        print("\n".join(json.dumps({"text": text, "embedding": row.tolist()}) for text, row in zip(texts, found, strict=True)))


def lines_of(file: str | None) -> list[str]:
    lines = text_of(*(("-", None) if file == "-" else (None, file))).removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines]


def add_info(commands: Any) -> None:
    add_model(add_command(commands, "info", info, "Describe a model: shape, parameters, memory, tokenizer."))


def info(model: str | None, revision: str | None, strict: bool, backend: str, dtype: str, quantize: str | None) -> None:
    from opt_np import checkpoint
    from opt_np.classes import choose_backend, load_ops
    from opt_np.hub import find, has_tokenizer
    from opt_np.init import ALL_HEADS
    from opt_np.quantize import num_parameters
    from opt_np.tokenizer import OPTTokenizer
    from opt_np.tree import flatten

    source = find(find_model(model), revision)
    params, cfg = checkpoint.load_from(source, None, strict)
    flat = flatten(params)
    count, stored = num_parameters(params), sum(a.nbytes for a in flat.values())
    norm = "pre-norm" if cfg.do_layer_norm_before else "post-norm"
    dtypes = ", ".join(sorted({a.dtype.name for a in flat.values()}))
    print(f"model        {source.name}")
    print(f"files        {', '.join(path.name for path in checkpoint.weight_files(checkpoint.weights_entry(source.weights)))} in {source.weights}")
    heads = f"{cfg.num_attention_heads} heads of {cfg.head_dim}"
    print(f"shape        {cfg.num_hidden_layers} {norm} layers, hidden {cfg.hidden_size}, {heads}, ffn {cfg.ffn_dim}")
    print(f"parameters   {count:,} in {len(flat)} tensors ({stored / 1e6:.1f} MB stored as {dtypes}, {4 * count / 1e6:.1f} MB in float32)")
    cache = 2 * cfg.num_hidden_layers * cfg.hidden_size * 4
    print(f"context      {cfg.max_position_embeddings} tokens, {cache / 1024:.0f} KiB of keys and values each in float32")
    tokens = f"{OPTTokenizer.from_folder(source.tokenizer).vocab_size} tokens" if has_tokenizer(source.tokenizer) else "no tokenizer"
    print(f"vocabulary   {cfg.vocab_size} rows, {tokens}")
    print(f"head         {', '.join(h for h in ALL_HEADS if h in params) or 'tied to embed_tokens'}")
    backend = choose_backend(backend_for(source.name, backend, dtype, quantize), dtype)
    print(f"backend      {backend}, {load_ops(backend).description()}")


def add_download(commands: Any) -> None:
    p = add_command(commands, "download", download, "Fetch a model from the Hugging Face hub, or bring it up to date; a killed download goes on.")
    p.add_argument("model", help="a hub id, such as facebook/opt-125m")
    p.add_argument("--revision", default="main", help="a branch, a tag, a commit or refs/pr/N")


def download(model: str, revision: str | None) -> None:
    from opt_np import checkpoint, hub

    if not hub.is_hub_id(model):
        raise ValueError(f"{model} is {'here already' if os.path.exists(model) else 'no hub id'}; a hub id looks like facebook/opt-125m")
    source = hub.find(model, revision, refresh=True)
    checkpoint.load_config(source.config)
    for title, folder in (("weights", source.weights), ("config", source.config), ("tokenizer", source.tokenizer)):
        print(f"{title:<12} {folder}")


def add_convert(commands: Any) -> None:
    p = add_command(
        commands, "convert", convert, "Write a model of any layout as safetensors with config and tokenizer, as HF and this project read it."
    )
    p.add_argument("model", help="a folder or a hub id")
    p.add_argument("out", metavar="OUT", help="a new or empty folder")
    p.add_argument("--dtype", default=None, choices=("float32", "float16", "bfloat16"), help="of the weights; without it, as they are stored")
    p.add_argument("--revision", default=None, help="of a hub id: a branch, a tag, a commit or refs/pr/N")
    p.add_argument("--strict", action="store_true", help="refuse weights that are NaN or infinite, instead of warning")


def convert(model: str, out: str, dtype: str | None, revision: str | None, strict: bool) -> None:
    from opt_np import checkpoint, hub

    new_folder(out)
    source = hub.find(model, revision)
    params, cfg = checkpoint.load_from(source, None, strict)
    checkpoint.save(out, params, cfg, dtype)
    checkpoint.copy_small_files(source, out)
    print(written(out))


def add_quantize(commands: Any) -> None:
    p = add_command(commands, "quantize", quantize, "Write a model with int8 or int4 matrices, and tell how far each is from what it was.")
    p.add_argument("model", help="a folder or a hub id")
    p.add_argument("out", metavar="OUT", help="a new or empty folder")
    p.add_argument("--kind", default="int8", choices=("int8", "int4"), help="int8: a scale for each row; int4: for each group of a row")
    p.add_argument("--group-size", type=int, default=32, choices=(32, 64), help="columns that share a scale, of int4")
    p.add_argument("--revision", default=None, help="of a hub id: a branch, a tag, a commit or refs/pr/N")


def quantize(model: str, out: str, kind: str, group_size: int, revision: str | None) -> None:
    from tqdm import tqdm

    from opt_np import checkpoint, hub
    from opt_np.quantize import quantizer, with_kind

    new_folder(out)
    source, errors = hub.find(model, revision), {}
    with tqdm(desc="matrices", unit="", disable=None) as bar:

        def seen(name: str, error: float) -> None:
            errors[name] = error
            bar.update()

        params, cfg = checkpoint.load_from(source, None, strict=True, quantizer=quantizer(kind, group_size, seen))
    checkpoint.save(out, params, with_kind(cfg, kind, group_size))
    checkpoint.copy_small_files(source, out)
    width = max(map(len, errors))
    print(f"{'matrix':<{width}}  relative error")
    print("\n".join(f"{name:<{width}}  {100 * error:.2f} %" for name, error in errors.items()))
    print(written(out))


def new_folder(out: str) -> None:
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"{out} is there already and not an empty folder; choose another name, so that nothing is overwritten")


def written(out: str) -> str:
    return f"{out}: " + ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in sorted(Path(out).iterdir()))


def add_verify(commands: Any) -> None:
    p = add_command(commands, "verify", verify, "Prove that this port computes the model: layer by layer against PyTorch, then by published numbers.")
    p.add_argument("model", nargs="?", default=None, metavar="MODEL", help="a folder or a hub id (default: the model that comes with the source)")
    p.add_argument("--revision", default=None, help="of a hub id: a branch, a tag, a commit or refs/pr/N")
    p.add_argument("--backend", default="numpy", choices=("auto", "numpy", "cpu", "cuda"), help="what is tested; NumPy in float64, others in float32")
    p.add_argument("--golden", default=None, metavar="ID", help="the published model of which MODEL is an unchanged copy: facebook/opt-125m")
    p.add_argument("--every-point", action="store_true", help="show the points of every layer, not of the first and the first that fails only")


def verify(model: str | None, revision: str | None, backend: str, golden: str | None, every_point: bool) -> int:
    from itertools import groupby

    from opt_np import verify as v

    found = []
    name = model if model is not None else find_model(None)
    for _, group in groupby(v.checks(name, revision, backend, golden), key=lambda check: check.group):
        found += (checks := list(group))
        print("\n".join(v.table(checks, every_point)), flush=True)
    status, last_line = v.verdict(found)
    print(last_line)
    return status


def add_train(commands: Any) -> None:
    from opt_np.train import CHOICES, Options

    p = add_command(commands, "train", train, "Train from nothing, or from a checkpoint, and save so that a killed run resumes to the same bits.")
    d = Options(out="")
    source = p.add_argument_group("what to learn from")
    source.add_argument("--task", default=d.task, choices=CHOICES["task"], help="language model, text classification, question answering")
    source.add_argument("--text", nargs="+", default=(), metavar="FILE", help="plain text files, or folders of .txt (lm)")
    source.add_argument("--data", metavar="FILE", help="JSON lines: text | text, label | question, context, answer, answer_start")
    source.add_argument("--eval-text", nargs="+", default=(), metavar="FILE", help="text to evaluate on (lm)")
    source.add_argument("--eval-data", metavar="FILE", help="JSON lines to evaluate on")
    source.add_argument("--model", metavar="DIR", help="start from this checkpoint and its tokenizer, instead of from nothing")
    shape = p.add_argument_group("a model from nothing")
    for name, help in (("vocab_size", "ids of the tokenizer to learn"), ("hidden_size", "width D"), ("num_layers", "blocks"), ("num_heads", "heads")):
        add_option(shape, d, name, help)
    run = p.add_argument_group("the run")
    run.add_argument("--out", required=True, metavar="DIR", help="where the checkpoint, log.jsonl and the state to resume from go")
    run.add_argument("--resume", action="store_true", help="go on from the state in --out")
    run.add_argument("--backend", default=d.backend, choices=CHOICES["backend"], help="what computes: auto is cpu where Numba imports")
    for name, help in (
        ("context", "tokens per window"), ("batch_size", "windows or examples per batch"), ("accumulate", "batches per step"), ("steps", "updates"),
        ("seed", "of parameters, order and dropout"), ("learning_rate", "its peak"), ("schedule", "linear, cosine or constant after the warm-up"),
        ("warmup_steps", "steps of rising learning rate"), ("weight_decay", "of matrices"),
        ("max_grad_norm", "gradients are clipped to this norm, 0 for no clipping"),
        ("dropout", "after attention and after fc2"), ("save_every", "steps between checkpoints"),
        ("eval_every", "steps between evaluations, 0 for none"),
        ("save_dtype", "float32 or float16, of the checkpoint"),
    ):  # fmt: skip
        add_option(run, d, name, help)


def add_option(group: Any, defaults: Any, name: str, help: str) -> None:
    default = getattr(defaults, name)
    group.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=help)


def train(**args: Any) -> None:
    from opt_np.train import Options
    from opt_np.train import train as run

    args["text"], args["eval_text"] = tuple(args["text"]), tuple(args["eval_text"])
    options = Options(**args)
    last = run(options)
    if last["step"] < options.steps:
        print(f"stopped after step {last['step']} of {options.steps}; the same command with --resume goes on", file=sys.stderr)
    print(f"{options.out}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in last.items()))


def add_explore(commands: Any) -> None:
    p = add_command(commands, "explore", explore, "Write a page that shows in any browser, offline, what a model makes of a text, layer by layer.")
    p.add_argument("text", help="the text; - reads it from standard input")
    add_model(p)
    add_stream_layers(p)
    p.add_argument("--out", required=True, metavar="FILE.html", help="the page to write; one that is there is replaced")


def explore(text: str, out: str, **how_to_load: Any) -> None:
    from opt_np.explore import check_out, page, write

    check_out(out)  # before the model is loaded
    language_model, tokenizer = load(**how_to_load)
    folder = Path(find_model(how_to_load["model"]))
    name = folder.resolve().name if folder.exists() else str(folder)  # of a hub id, all of it
    size = write(out, page(language_model, tokenizer, sys.stdin.read() if text == "-" else text, name))
    print(f"{out}: {size / 1e6:.1f} MB, to be opened in any browser")


def add_bench(commands: Any) -> None:
    from opt_fast.bench import add_options

    add_options(add_command(commands, "bench", bench, "Measure speed and memory against the engines people use, once all agree on the results."))


def bench(**args: Any) -> None:
    from opt_fast.bench import run

    run(**args)


def add_trace(commands: Any) -> None:
    p = add_command(commands, "trace", trace, "Show every step that a text takes through the model: equation, shape, FLOPs, bytes and checksum.")
    p.add_argument("text", help="the text; - reads it from standard input")
    add_model(p)
    add_stream_layers(p)
    p.add_argument("--fused", action="store_true", help="the steps as the backend runs them, attention and mlp each in one")
    p.add_argument("--against", choices=AGAINST, help="show instead where the same model, computed so, differs first")
    p.add_argument("--beside", metavar="MODEL", help="show instead the steps of another model side by side, a GPT-2 or an OPT")
    p.add_argument("--out", metavar="FILE.npz", help="also save every step's values, by name, as a NumPy file")


def add_plan(commands: Any) -> None:
    from opt_np.config import SIZES
    from opt_np.plan import DEVICES

    p = add_command(commands, "plan", plan, "Tell before anything is loaded whether a generation fits into memory, and how long it takes at least.")
    sizes = ", ".join(f"opt-{size}" for size in SIZES)
    p.add_argument("--model", required=True, help=f"one of {sizes}; or a folder or hub id, of which config.json is read")
    p.add_argument("--batch", type=int, default=1, metavar="N", help="rows at once")
    p.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of each prompt")
    p.add_argument("--gen", type=int, default=128, metavar="N", help="new tokens of each row")
    kinds = ("float64", "float32", "float16", "bfloat16", "int8", "int4")
    p.add_argument("--dtype", default="float32", choices=kinds, help="of the weights in memory")
    p.add_argument("--backend", default="auto", choices=("auto", "numpy", "cpu"), help="whose memory is planned")
    p.add_argument("--device", default=None, choices=tuple(DEVICES), help="another machine than this one: its memory and speeds as published")
    p.add_argument("--memory", type=float, metavar="GB", help="to fit into, in 10^9 bytes; without it, what is free on this machine")
    p.add_argument("--bandwidth", type=float, metavar="GB/s", help="of memory; without it, measured here, which takes some seconds")
    p.add_argument("--tflops", type=float, metavar="X", help="10^12 FLOP/s of products; without it, measured here in float32")


def plan(model: str, batch: int, prompt: int, gen: int, dtype: str, backend: str, device: str | None, memory: float | None,
         bandwidth: float | None, tflops: float | None) -> None:  # fmt: skip
    from opt_np import plan as p
    from opt_np.classes import choose_backend

    cfg = config_of(model)
    p.checked(cfg, batch, prompt, gen)
    for option, value in (("--memory", memory), ("--bandwidth", bandwidth), ("--tflops", tflops)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{option} is {value:g}; it must be above 0")
    kind, dtype = (dtype, "float32") if dtype.startswith("int") else (None, dtype)
    room, speed, flops = p.DEVICES.get(device or "", (p.available(), None, None))
    if not device and (bandwidth is None or tflops is None):
        from opt_fast.limits import measure

        measured = measure(os.cpu_count() or 1)
        speed, flops = measured["bandwidth"], measured["matmul"]
    speed, flops = (x * unit if x else known for x, unit, known in ((bandwidth, 1e9, speed), (tflops, 1e12, flops)))
    given = bool(bandwidth) + bool(tflops)
    stated = "as stated" if device or given == 2 else "as stated and measured here" if given else "as measured here"
    where = f"{speed / 1e9:.1f} GB/s and {flops / 1e12:.3g} TFLOP/s, {stated}"  # type: ignore[operator]
    backend = "cpu" if device else "numpy" if dtype == "float64" else choose_backend(backend, dtype)
    number = 8 if dtype == "float64" else 2 if device and dtype in ("float16", "bfloat16") else 4
    print(p.report(cfg, batch, prompt, gen, dtype, kind, backend, memory * 1e9 if memory else room, speed, flops, where, number))  # type: ignore[arg-type]


def config_of(model: str) -> Any:
    """The config of a published size, a folder or a hub id."""
    from opt_np.config import SIZES, OPTConfig

    if model.removeprefix("facebook/").removeprefix("opt-") in SIZES:
        return OPTConfig.from_size(model.removeprefix("facebook/").removeprefix("opt-"))
    from opt_np import checkpoint, hub

    return checkpoint.load_config(hub.find(model, tokenizer=False).config)


AGAINST = ("numpy", "cpu", "float64", "float32", "float16", "bfloat16", "int8", "int4", "torch")


def trace(text: str, fused: bool, against: str | None, beside: str | None, out: str | None, **how: Any) -> None:
    from opt_np import trace as t

    if sum(map(bool, (against, beside, out))) > 1:
        raise ValueError("--against, --beside and --out are three ways to go on; choose one")
    language_model, tokenizer = load(**how)
    text = sys.stdin.read() if text == "-" else text
    ids = [tokenizer.encode(text)]
    if beside:
        from opt_np.gpt2 import side_by_side

        print(side_by_side(language_model, tokenizer, *load_any(beside), text))
        return
    steps = t.record(language_model, ids, fused=fused, values=bool(against or out))
    if against:
        print(t.compare(steps, record_against(against, ids, fused, language_model, how)))
        return
    if out:
        import numpy as np

        values: dict[str, Any] = {step.name: step.value for step in steps}
        np.savez(out, **values)
    print(t.table(steps))


def record_against(what: str, ids: list[list[int]], fused: bool, language_model: Any, how: dict[str, Any]) -> Any:
    """The trace of the same checkpoint by other means."""
    from opt_np import trace as t
    from opt_np import verify

    if what == "torch":
        try:
            torch, transformers = verify.oracle_libraries()
        except ImportError as error:
            raise ValueError(str(error)) from None
        from opt_np import hub

        plain, _ = load(**{**how, "backend": "numpy", "dtype": "float32", "quantize": None})
        source = hub.find(find_model(how["model"]), how["revision"], tokenizer=False)
        with verify.quiet(transformers):
            return t.record_torch(verify.pytorch_model(torch, transformers, source.config, plain.params), ids)
    if what in ("int8", "int4"):
        other = {"quantize": what}
    else:
        other = {"backend": what} if what in ("numpy", "cpu") else {"dtype": what, "backend": "numpy" if what == "float64" else "auto"}
    return t.record(load(**{**how, **other})[0], ids, fused=fused)


def load_any(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer: a GPT-2, if config.json says so, else an OPT."""
    from opt_np import gpt2, hub
    from opt_np.checkpoint import read_json

    if read_json(hub.find(name).config / "config.json").get("model_type") == "gpt2":
        return gpt2.load(name)
    return load(name, None, False, "numpy", "float32", None, False)


def find_model(model: str | None) -> str | Path:
    if model is None and not SHIPPED.is_dir():
        raise ValueError(f"no --model given, and the shipped one is not at {SHIPPED} (it comes with the source, not with the package); name a folder")
    return model if model is not None else SHIPPED


def backend_for(name: Any, backend: str, dtype: str, quantize: str | None) -> str:
    """The shipped model is so small that starting Numba would cost more than it saves."""
    return "numpy" if backend == "auto" and dtype == "float32" and not quantize and Path(name) == SHIPPED else backend


def load(
    model: str | None, revision: str | None, strict: bool, backend: str, dtype: str, quantize: str | None, stream_layers: bool
) -> tuple[Any, Any]:
    """The language model and its tokenizer."""
    from opt_np.classes import OPTForCausalLM
    from opt_np.tokenizer import OPTTokenizer

    name = find_model(model)
    tokenizer = OPTTokenizer.from_pretrained(name, revision)
    backend = backend_for(name, backend, dtype, quantize)
    return OPTForCausalLM.from_pretrained(name, revision, dtype, backend, quantize, strict=strict, stream_layers=stream_layers), tokenizer
