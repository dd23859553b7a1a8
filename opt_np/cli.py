"""The command line: opt-np generate | logits | info | train. A user's mistake is one line on stderr and a status of 1, never a traceback."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "opt-tiny"


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns its exit status."""
    args = vars(build_parser().parse_args(argv))
    command = args.pop("run")
    warnings.showwarning = lambda message, *_, **__: print(f"opt-np: warning: {message}", file=sys.stderr)
    try:
        command(**args)
        sys.stdout.flush()
    except BrokenPipeError:  # what reads our output, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:  # DataError and CheckpointError are ValueErrors
        print(f"opt-np: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("opt-np: stopped", file=sys.stderr)
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes told in one line; subcommands get this class too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="opt-np", description="OPT in NumPy: generate text, look at logits, train.")
    commands = parser.add_subparsers(dest="run", required=True, metavar="COMMAND")
    add_generate(commands)
    add_logits(commands)
    add_info(commands)
    add_train(commands)
    return parser


def add_command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, metavar="DIR", help="a model's folder (default: the model that comes with the source)")
    parser.add_argument("--backend", default="auto", choices=("auto", "numpy", "cpu", "cuda"), help="what computes")


def add_generate(commands: Any) -> None:
    p = add_command(commands, "generate", generate, "Continue a text, printing each word as it comes.")
    p.add_argument("prompt", help="the text to continue; - reads it from standard input")
    add_model(p)
    p.add_argument(
        "--max-new-tokens", type=int, default=None, metavar="N", help="how many tokens to add at most (default: 100, or what the context holds)"
    )
    p.add_argument("--do-sample", action="store_true", help="draw tokens at random instead of always taking the likeliest")
    p.add_argument("--temperature", type=float, default=1.0, help="below 1 safer, above 1 wilder (with --do-sample)")
    p.add_argument("--top-k", type=int, default=50, help="draw from the K likeliest; 0 for all (with --do-sample)")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that reach probability P (with --do-sample)")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes tokens already seen less likely")
    p.add_argument("--seed", type=int, default=None, help="the same seed draws the same text")


def generate(prompt: str, model: str | None, backend: str, max_new_tokens: int | None, **options: Any) -> None:
    language_model, tokenizer = load(model, backend)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = [tokenizer.encode(text)]
    if max_new_tokens is None:
        max_new_tokens = max(1, min(100, language_model.config.max_position_embeddings + 1 - len(ids[0])))
    steps = language_model.stream(ids, max_new_tokens=max_new_tokens, tokenizer=tokenizer, **options)
    print(text, end="", flush=True)
    for step in steps:
        print(step.text[0], end="", flush=True)
    print()


def add_logits(commands: Any) -> None:
    p = add_command(commands, "logits", logits, "Show the likeliest next tokens after each token of a text.")
    p.add_argument("text", help="the text; - reads it from standard input")
    add_model(p)
    p.add_argument("--top", type=int, default=5, metavar="K", help="how many candidates to show")
    p.add_argument("--out", default=None, metavar="FILE.npy", help="also save the logits, (tokens, vocabulary), as a NumPy file")


def logits(text: str, model: str | None, backend: str, top: int, out: str | None) -> None:
    import numpy as np

    if top < 1:
        raise ValueError(f"--top is {top}; it must be at least 1")
    language_model, tokenizer = load(model, backend)
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


def add_info(commands: Any) -> None:
    add_model(add_command(commands, "info", info, "Describe a model: shape, parameters, memory, tokenizer."))


def info(model: str | None, backend: str) -> None:
    from opt_np import checkpoint
    from opt_np.classes import choose_backend
    from opt_np.init import ALL_HEADS
    from opt_np.tokenizer import OPTTokenizer
    from opt_np.tree import flatten

    folder = find_model(model)
    params, cfg = checkpoint.load(folder)
    tokens = OPTTokenizer.from_pretrained(folder).vocab_size
    count = sum(a.size for a in flatten(params).values())
    norm = "pre-norm" if cfg.do_layer_norm_before else "post-norm"
    stored = sum(path.stat().st_size for path in checkpoint.safetensors_files(folder))
    cache = 2 * cfg.num_hidden_layers * cfg.hidden_size * 4
    print(f"model        {folder}")
    heads = f"{cfg.num_attention_heads} heads of {cfg.head_dim}"
    print(f"shape        {cfg.num_hidden_layers} {norm} layers, hidden {cfg.hidden_size}, {heads}, ffn {cfg.ffn_dim}")
    dtype = cfg.extra.get("torch_dtype", cfg.extra.get("dtype", "unknown"))
    print(f"parameters   {count:,} ({stored / 1e6:.1f} MB stored as {dtype}, {4 * count / 1e6:.1f} MB in float32)")
    print(f"context      {cfg.max_position_embeddings} tokens, {cache / 1024:.0f} KiB of keys and values each in float32")
    print(f"vocabulary   {cfg.vocab_size} rows, {tokens} tokens")
    print(f"head         {', '.join(h for h in ALL_HEADS if h in params) or 'tied to embed_tokens'}")
    print(f"backend      {choose_backend(backend)}")


def add_train(commands: Any) -> None:
    from opt_np.train import Options

    p = add_command(commands, "train", train, "Train from nothing, or from a checkpoint, and save so that a killed run resumes to the same bits.")
    d = Options(out="")
    source = p.add_argument_group("what to learn from")
    source.add_argument("--task", default=d.task, choices=("lm", "classify", "qa"), help="language model, text classification, question answering")
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


def find_model(model: str | None) -> Path:
    if model is None and not SHIPPED.is_dir():
        raise ValueError(f"no --model given, and the shipped one is not at {SHIPPED} (it comes with the source, not with the package); name a folder")
    return Path(model) if model is not None else SHIPPED


def load(model: str | None, backend: str) -> tuple[Any, Any]:
    from opt_np.classes import OPTForCausalLM
    from opt_np.tokenizer import OPTTokenizer

    folder = find_model(model)
    if folder == SHIPPED and backend == "auto":
        backend = "numpy"  # so small that starting Numba would cost more than it saves
    return OPTForCausalLM.from_pretrained(folder, backend=backend), OPTTokenizer.from_pretrained(folder)
