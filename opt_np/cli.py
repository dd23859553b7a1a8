"""The command line, opt-np: a user's mistake gives one line on stderr and status 1 (2 for unknown options), never a traceback."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from opt_np import __version__

HOW_TO_LOAD = ("model", "revision", "strict", "backend", "dtype", "quantize", "stream_layers")  # options of the commands that load a model
SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "opt-tiny"


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns its exit status."""
    if sys.stderr is None:  # closed by the shell; what prints to it, progress bars for one, expects a file
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" instead of ending the output
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    try:
        args = vars(build_parser().parse_args(argv))
        status = args.pop("run")(**args) or 0
        if sys.stdout:  # a shell can close it
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        say_no_more()
        return 0
    except (ValueError, OSError, MemoryError) as error:  # DataError and CheckpointError are ValueErrors
        say(f"{'not enough memory: ' if isinstance(error, MemoryError) else ''}{error}")
        return 1
    except Warning as warning:  # under python -W error
        say(f"warning: {warning}")
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, for a GPU's memory
            raise
        say(f"not enough memory: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130


def say(text: str) -> None:
    """To stderr, where that can be written: nobody reading it must not end the work."""
    with suppress(OSError):
        print(f"opt-np: {text}", file=sys.stderr, flush=True)


def say_no_more() -> None:
    """Discards further output, once its reader, such as head, has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults in the help, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line; subcommands use this class too. `fill`, if given, adds a command's options once it is chosen."""

    fill: Any = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        fill, self.fill = self.fill, None
        if fill:
            fill(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def named(text: str) -> str:
    """An argument that names a file, a folder or a model; an empty one, of a shell's variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a name")
    return text


def build_parser() -> argparse.ArgumentParser:
    from opt_np import cli_look  # which imports this module

    parser = Parser(prog="opt-np", description="OPT in NumPy: generate text, look inside, train.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="run", required=True, metavar="COMMAND")
    add_generate(commands)
    add_logits(commands)
    add_info(commands)
    add_download(commands)
    add_convert(commands)
    add_quantize(commands)
    add_verify(commands)
    add_train(commands)
    add_bench(commands)
    cli_look.add(commands)
    return parser


def add_command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help, formatter_class=Formatter)
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=named, default=None, metavar="MODEL", help="a folder or a hub id, facebook/opt-125m; without it, the one beside the source"
    )
    parser.add_argument("--revision", default=None, help="revision of the hub repository: a branch, a tag, a commit or refs/pr/N")
    parser.add_argument("--strict", action="store_true", help="refuse weights that are NaN or infinite, instead of warning")
    parser.add_argument("--backend", default="auto", choices=("auto", "numpy", "cpu", "cuda"), help="auto: cpu where Numba is installed, else numpy")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "float16", "bfloat16"), help="of the weights in memory")
    parser.add_argument("--quantize", default=None, choices=("int8", "int4"), help="quantize the matrices while loading")


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
    try:
        return [int(i) for i in word.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not ids separated by commas, such as 31,7") from None


# No option has a default here: if not given, it is the model's own (generation_config.json), else the value in brackets in the help.
GENERATE_OPTIONS: dict[str, tuple[tuple[str, Any, str], ...]] = {
    "how long (not given: the model's own choice, else as in brackets; so for all that follow)": (
        ("max_new_tokens", int, "tokens to add at most (100, or what the context holds)"),
        ("max_length", int, "tokens in all, at most"),
        ("min_new_tokens", int, "tokens to add at least"),
        ("min_length", int, "tokens in all, at least"),
        ("eos_token_id", {"type": int, "nargs": "+", "metavar": "ID"}, "ids that end the text; -1 for none (the model's)"),
        ("stop_strings", {"nargs": "+", "metavar": "TEXT"}, "stop at any of these texts (put options that take lists after the prompt)"),
        (
            "overflow",
            {"choices": ("error", "truncate_left", "slide")},
            "text longer than the context: refuse it, drop the prompt's first tokens once, or keep a sliding window (error)",
        ),
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
    from opt_np.generate import most_tokens
    from opt_np.settings import resolve

    language_model, tokenizer = load(**{name: options.pop(name) for name in HOW_TO_LOAD})
    text = given(prompt)
    ids, cfg = [tokenizer.encode(text)], language_model.config
    if options.get("early_stopping") in ("true", "false"):
        options["early_stopping"] = options["early_stopping"] == "true"
    with warnings.catch_warnings(action="ignore"):  # the options are resolved again below, and then it may warn
        settings = resolve(options, language_model.generation_config, cfg)
    if settings.max_new_tokens is None and settings.max_length is None:
        kept = {"error": len(ids[0]), "truncate_left": 1, "slide": -100}[settings.overflow]  # of the prompt; when sliding, any length fits
        options["max_new_tokens"] = max(1, min(100, most_tokens(cfg, settings) - kept))
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
    p.add_argument("--out", type=named, default=None, metavar="FILE.npy", help="also save the logits, (tokens, vocabulary), as a NumPy file")


def logits(text: str, top: int, out: str | None, **how_to_load: Any) -> None:
    import numpy as np

    from opt_np import checkpoint, explore
    from opt_np.arrays import host

    if top < 1:
        raise ValueError(f"--top is {top}; it must be at least 1")
    target = out and explore.check_out(out)
    language_model, tokenizer = load(**how_to_load)
    ids = tokenizer.encode(given(text))
    rows = host(language_model([ids]).logits)[0]  # (T, V)
    rows = rows.astype(np.float32) if rows.dtype == np.float16 else rows  # a sum of probabilities needs more bits
    if target:
        checkpoint.write_numpy(target, rows)
    log_p = rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True)
    print(f"{'token':>16}  logprob  likeliest next")
    for t, row in enumerate(log_p):
        own = f"{log_p[t - 1, ids[t]]:7.3f}" if t else "      -"
        best = np.argsort(-row, kind="stable")[:top]
        print(f"{tokenizer.decode([ids[t]])!r:>16}  {own}  " + "  ".join(f"{tokenizer.decode([i])!r} {np.exp(row[i]):.3f}" for i in best))


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
    backend = choose_backend(backend_for(source.name, backend, dtype, quantize), dtype)
    description = load_ops(backend).description()  # first, because the backend may be missing
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
    print(f"backend      {backend}, {description}")


def add_download(commands: Any) -> None:
    p = add_command(commands, "download", download, "Fetch a model from the Hugging Face hub, or bring it up to date; a killed download goes on.")
    p.add_argument("model", type=named, help="a hub id, such as facebook/opt-125m")
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
    p.add_argument("model", type=named, help="a folder or a hub id")
    p.add_argument("out", type=named, metavar="OUT", help="a new or empty folder")
    p.add_argument("--dtype", default=None, choices=("float32", "float16", "bfloat16"), help="of the weights; without it, as they are stored")
    p.add_argument("--revision", default=None, help="revision of the hub repository: a branch, a tag, a commit or refs/pr/N")
    p.add_argument("--strict", action="store_true", help="refuse weights that are NaN or infinite, instead of warning")


def convert(model: str, out: str, dtype: str | None, revision: str | None, strict: bool) -> None:
    from opt_np import checkpoint, hub

    new_folder(out)
    source = hub.find(model, revision)
    params, cfg = checkpoint.load_from(source, None, strict)
    with emptied_on_failure(out):
        checkpoint.copy_small_files(source, out)
        checkpoint.save(out, params, cfg, dtype)
    print(written(out))


def add_quantize(commands: Any) -> None:
    p = add_command(commands, "quantize", quantize, "Write a model with int8 or int4 matrices, and tell how far each is from what it was.")
    p.add_argument("model", type=named, help="a folder or a hub id")
    p.add_argument("out", type=named, metavar="OUT", help="a new or empty folder")
    p.add_argument("--kind", default="int8", choices=("int8", "int4"), help="int8: a scale for each row; int4: for each group of a row")
    p.add_argument("--group-size", type=int, default=None, choices=(32, 64), help="columns that share a scale, of int4 (default: 32)")
    p.add_argument("--revision", default=None, help="revision of the hub repository: a branch, a tag, a commit or refs/pr/N")


def quantize(model: str, out: str, kind: str, group_size: int | None, revision: str | None) -> None:
    from tqdm import tqdm

    from opt_np import checkpoint, hub
    from opt_np.quantize import quantizer, with_kind

    if kind == "int8" and group_size:
        raise ValueError("--group-size is of int4's groups, and int8 has a scale for each row: give --kind int4, or no --group-size")
    group_size = group_size or 32
    new_folder(out)
    source, errors = hub.find(model, revision), {}
    with tqdm(desc="matrices", unit="", disable=None) as bar:

        def seen(name: str, error: float) -> None:
            errors[name] = error
            bar.update()

        params, cfg = checkpoint.load_from(source, None, strict=True, quantizer=quantizer(kind, group_size, seen))
    with emptied_on_failure(out):
        checkpoint.copy_small_files(source, out)
        checkpoint.save(out, params, with_kind(cfg, kind, group_size))
    width = max(map(len, errors))
    print(f"{'matrix':<{width}}  relative error")
    print("\n".join(f"{name:<{width}}  {100 * error:.2f} %" for name, error in errors.items()))
    print(written(out))


@contextmanager
def emptied_on_failure(out: str) -> Iterator[None]:
    """Removes the files of a folder that was new or empty if the body raises: they would refuse the next attempt."""
    try:
        yield
    except BaseException:
        for path in Path(out).glob("*"):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        raise


def new_folder(out: str) -> None:
    """Raises ValueError for one that cannot be made, or that holds anything, before anything is computed for it."""
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not an empty folder; choose another name, so that nothing is overwritten")
    above = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not os.access(above, os.W_OK):
        raise ValueError(f"{folder} cannot be written: {above} is read-only here")


def written(out: str) -> str:
    return f"{out}: " + ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in sorted(Path(out).iterdir()))


def add_verify(commands: Any) -> None:
    p = add_command(commands, "verify", verify, "Prove that this port computes the model: layer by layer against PyTorch, then by published numbers.")
    p.add_argument("model", type=named, nargs="?", default=None, metavar="MODEL", help="a folder or a hub id (default: the shipped model)")
    p.add_argument("--revision", default=None, help="revision of the hub repository: a branch, a tag, a commit or refs/pr/N")
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
        try:
            print("\n".join(v.table(checks, every_point)), flush=True)
        except BrokenPipeError:  # the exit status still reports the failure
            say_no_more()
    status, last_line = v.verdict(found)
    print(last_line)
    return status


def add_train(commands: Any) -> None:
    from opt_np.train import CHOICES, Options

    p = add_command(commands, "train", train, "Train from nothing, or from a checkpoint, and save so that a killed run resumes to the same bits.")
    d = Options(out="")
    source = p.add_argument_group("what to learn from")
    source.add_argument("--task", default=d.task, choices=CHOICES["task"], help="language model, text classification, question answering")
    source.add_argument("--text", type=named, nargs="+", default=None, metavar="FILE", help="plain text files, or folders of .txt (lm)")
    source.add_argument("--data", type=named, metavar="FILE", help="JSON lines: text | text, label | question, context, answer, answer_start")
    source.add_argument("--eval-text", type=named, nargs="+", default=None, metavar="FILE", help="text to evaluate on (lm)")
    source.add_argument("--eval-data", type=named, metavar="FILE", help="JSON lines to evaluate on")
    source.add_argument("--model", type=named, metavar="MODEL", help="start from this checkpoint, a folder or a hub id, and its tokenizer")
    shape = p.add_argument_group("a model from nothing")
    for name, help in (("vocab_size", "ids of the tokenizer to learn"), ("hidden_size", "width D"), ("num_layers", "blocks"), ("num_heads", "heads")):
        add_option(shape, d, name, help)
    run = p.add_argument_group("the run")
    run.add_argument("--out", type=named, required=True, metavar="DIR", help="where the checkpoint, log.jsonl and the state to resume from go")
    run.add_argument("--resume", action="store_true", help="go on from the state in --out")
    run.add_argument("--backend", default=d.backend, choices=CHOICES["backend"], help="compute backend; auto: cpu where Numba is installed")
    for name, help in (
        ("context", "tokens per window"), ("batch_size", "windows or examples per batch"), ("accumulate", "batches per step"), ("steps", "updates"),
        ("seed", "of parameters, order and dropout"), ("learning_rate", "its peak"), ("schedule", "after the warm-up"),
        ("warmup_steps", "steps of rising learning rate"), ("weight_decay", "of matrices"),
        ("max_grad_norm", "gradients are clipped to this norm, 0 for no clipping"),
        ("dropout", "after attention and after fc2"), ("save_every", "steps between checkpoints"),
        ("eval_every", "steps between evaluations, 0 for one at the end"),
        ("save_dtype", "number format of the checkpoint"),
    ):  # fmt: skip
        add_option(run, d, name, help)


def add_option(group: Any, defaults: Any, name: str, help: str) -> None:
    from opt_np.train import CHOICES

    default = getattr(defaults, name)
    group.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, choices=CHOICES.get(name), help=help)


def train(**args: Any) -> None:
    from opt_np.train import Options
    from opt_np.train import train as run

    args["text"], args["eval_text"] = tuple(args["text"] or ()), tuple(args["eval_text"] or ())
    options = Options(**args)
    last = run(options)
    if last["step"] < options.steps:
        print(f"stopped after step {last['step']} of {options.steps}; the same command with --resume goes on", file=sys.stderr)
    print(f"{options.out}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in last.items()))


def add_bench(commands: Any) -> None:
    p = add_command(commands, "bench", bench, "Measure speed against what people use, once all agree on the results.")
    p.fill = fill_bench  # type: ignore[attr-defined]  # its imports would slow every other command


def fill_bench(p: argparse.ArgumentParser) -> None:
    from opt_fast import bench as cpu
    from opt_fast import bench_attention as attention
    from opt_fast import bench_decode as decode
    from opt_fast import bench_hf as hf

    kinds = p.add_subparsers(dest="what", required=True, metavar="WHAT")
    cpu.add_options(add_command(kinds, "cpu", bench, "Measure speed and memory against the engines for CPUs, once all agree on the results."))
    attention.add_options(add_command(kinds, "attention", bench, "Measure our attention on a GPU against torch's, once all are right."))
    hf.add_options(
        add_command(kinds, "hf-tables", bench, "Make HF's tables of OPT's speed again, with our attention beside torch's in HF's own model.")
    )
    decode.add_options(add_command(kinds, "decode", bench, "Measure decoding on a GPU, token by token, against HF's model and memory's speed."))
    own = p.format_help
    p.format_help = lambda: "\n".join([own(), *(kind.format_help() for kind in kinds.choices.values())])  # type: ignore[method-assign]


def bench(what: str, **args: Any) -> None:
    from opt_fast import bench, bench_attention, bench_decode, bench_hf

    modules: dict[str, Any] = {"cpu": bench, "attention": bench_attention, "hf-tables": bench_hf, "decode": bench_decode}
    modules[what].run(what, **args)


def given(text: str) -> str:
    """A text from the command line, or for "-" standard input without its final line break."""
    if text == "-" and sys.stdin is None:
        raise ValueError("- stands for standard input, and that is closed; give the text itself")
    return standard_input().removesuffix("\n") if text == "-" else text


def standard_input() -> str:
    """All of it, read as a file is: UTF-8, with or without a mark in front, and any line breaks."""
    if not hasattr(sys.stdin, "buffer"):
        return sys.stdin.read()
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input cannot be read as UTF-8 text: {error}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def find_model(model: str | None) -> str | Path:
    if model is None and not SHIPPED.is_dir():
        raise ValueError(f"no --model given, and the shipped one is not at {SHIPPED} (it comes with the source, not with the package); name a folder")
    return model if model is not None else SHIPPED


def backend_for(name: Any, backend: str, dtype: str, quantize: str | None) -> str:
    """NumPy for the shipped model under "auto": it is so small that starting Numba would cost more than it saves."""
    return "numpy" if backend == "auto" and dtype == "float32" and not quantize and Path(name) == SHIPPED else backend


def load(
    model: str | None, revision: str | None, strict: bool, backend: str, dtype: str, quantize: str | None, stream_layers: bool
) -> tuple[Any, Any]:
    """The language model and its tokenizer; a GPT-2 is loaded as an OPT."""
    from opt_np import hub
    from opt_np.checkpoint import read_json
    from opt_np.classes import OPTForCausalLM
    from opt_np.tokenizer import OPTTokenizer

    name = find_model(model)
    if read_json(hub.find(name, revision, tokenizer=False).config / "config.json").get("model_type") == "gpt2":
        from opt_np import gpt2

        if quantize or stream_layers:
            raise ValueError(f"{name} is a GPT-2; --quantize and --stream-layers are for OPT: convert it with save_pretrained first")
        return gpt2.load(name, revision, dtype, backend, strict)
    tokenizer = OPTTokenizer.from_pretrained(name, revision)
    backend = backend_for(name, backend, dtype, quantize)
    return OPTForCausalLM.from_pretrained(name, revision, dtype, backend, quantize, strict=strict, stream_layers=stream_layers), tokenizer
