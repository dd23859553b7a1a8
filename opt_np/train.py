"""The training loop: batches, gradients, AdamW, a log, checkpoints, and resuming bit for bit."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from opt_np import checkpoint, hub
from opt_np.arrays import host
from opt_np.classes import choose_backend, load_ops
from opt_np.config import OPTConfig
from opt_np.grad import loss_and_grads
from opt_np.init import init_head, init_params
from opt_np.optim import SCHEDULES, adamw_init, adamw_step, clip_by_global_norm, learning_rate
from opt_np.tasks import Classification, DataError, LanguageModelling, QuestionAnswering, read_examples, read_texts
from opt_np.tokenizer import OPTTokenizer
from opt_np.tree import flatten, map_leaves, unflatten

LOG = "log.jsonl"
STATE = "train_state.safetensors"  # parameters, moments and step in one file, so that one rename commits all of them
BETAS = 0.9, 0.99  # OPT's own 0.95 was for batches of a million tokens; small ones need a longer memory of the squared gradient
TASKS: dict[str, Any] = {"classify": Classification, "qa": QuestionAnswering}
HEAD_OF = {"lm": "lm_head", "classify": "score", "qa": "qa_outputs"}
MAY_CHANGE = {"out", "resume", "text", "data", "steps", "save_every", "save_dtype", "eval_every", "eval_text", "eval_data"}  # data has a checksum
LEAST = {"steps": 1, "context": 2, "batch_size": 1, "accumulate": 1, "save_every": 1, "eval_every": 0, "warmup_steps": 0, "seed": 0,
         "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0}  # fmt: skip
SHAPE = "vocab_size", "hidden_size", "num_layers", "num_heads"
CHOICES = {"backend": ("auto", "numpy", "cpu", "cuda"), "task": ("lm", *TASKS), "schedule": SCHEDULES, "save_dtype": ("float32", "float16")}


@dataclass(frozen=True)
class Options:
    """The flags of `opt-np train`, with their defaults."""

    out: str
    task: str = "lm"
    text: tuple[str, ...] = ()
    data: str | None = None
    eval_text: tuple[str, ...] = ()
    eval_data: str | None = None
    model: str | None = None
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    context: int = 256
    batch_size: int = 8
    accumulate: int = 1
    steps: int = 1000
    seed: int = 0
    save_every: int = 100
    eval_every: int = 0
    save_dtype: str = "float32"
    dropout: float = 0.1
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    resume: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Raises ValueError naming the option."""
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:  # NaN too
                raise ValueError(f"{flag(name)} is {getattr(self, name)}; it must be at least {least}")
        for name, value in vars(self).items():
            if isinstance(value, int) and value >= 2**31:
                raise ValueError(f"{flag(name)} is {value}; it must be below 2147483648")
        if not math.isfinite(self.learning_rate):
            raise ValueError(f"--learning-rate is {self.learning_rate}; it must be finite")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{flag(name)} is {getattr(self, name)!r}; it must be one of {', '.join(values)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.text and self.data:
            raise ValueError("--text and --data are two sources; give one")
        if self.text and self.task != "lm":
            raise ValueError(f"--task {self.task} learns from --data, not from --text")
        other = "eval_data" if self.task == "lm" else "eval_text"
        if getattr(self, other):
            raise ValueError(f"--task {self.task} is evaluated on {flag(self.eval_source)}, not on {flag(other)}")
        if self.eval_every and not self.evaluated:
            raise ValueError(f"--eval-every {self.eval_every} needs {flag(self.eval_source)}, something to evaluate on")

    @property
    def eval_source(self) -> str:
        """The option that names the evaluation data."""
        return "eval_text" if self.task == "lm" else "eval_data"

    @property
    def evaluated(self) -> bool:
        return bool(getattr(self, self.eval_source))


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


@dataclass
class Run:
    """Everything that a training step reads or changes."""

    params: dict
    optimizer: dict
    cfg: OPTConfig
    tokenizer: OPTTokenizer
    task: Any
    backend: str

    @property
    def ops(self) -> ModuleType:
        return load_ops(self.backend)

    def own(self, function: Callable) -> Callable:
        """The backend's own version of this function, if it has one (torch tensors get their gradients from autograd), else the function."""
        return getattr(self.ops, function.__name__, function)


def train(options: Options) -> dict[str, Any]:
    """Trains until options.steps and returns the log's last line. Writes OUT/log.jsonl, a checkpoint, and the state to resume from.

    Raises DataError, CheckpointError and ValueError. After one Ctrl-C it finishes the step, saves, and returns.
    """
    if not options.out:
        raise ValueError("--out is empty; name the folder to train into")
    with alone_in(Path(options.out)):
        return train_in(Path(options.out), options)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Makes the folder and locks it while the body runs: two runs would overwrite each other's files. Raises ValueError."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"{out} cannot be written: it is read-only here")
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains into {out}; wait until it has ended, or choose another --out") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)
        if made:
            with suppress(OSError):
                out.rmdir()  # nothing was written


def train_in(out: Path, options: Options) -> dict[str, Any]:
    """`train`, once the folder is ours."""
    from tqdm import tqdm  # imported here, because it would slow the start of every other command

    begun = (out / STATE).exists()
    if begun and not options.resume:
        raise ValueError(f"{out} already holds a training run; continue it with --resume, or choose another --out")
    if not begun and (out / "config.json").exists():
        raise ValueError(f"{out} holds a model, but no training run to go on with; choose another --out")
    there = [name for name in (*checkpoint.TOKENIZER_FILES, LOG) if (out / name).exists()]
    if there and not begun and not Log.begun(out / LOG):
        raise ValueError(f"{out} holds {', '.join(there)}, not of a training run, and training would overwrite them; choose another --out")
    if options.resume and not begun:
        warnings.warn(f"{out} holds no training run yet; starting one", stacklevel=2)
    run = resumed_run(out, options) if begun else new_run(out, options)
    first, line = run.optimizer["step"], {}
    found: dict[str, Any] = {}
    if first >= options.steps:
        save(out, run, options)  # the run may have been killed after writing its last state, before the checkpoint
        found = run.task.evaluate(run.params, run.cfg, run.ops) if options.evaluated else {}
    with Log(out / LOG, first) as log, Interrupt() as interrupt, tqdm(desc="train", unit=" tokens", disable=None) as bar:
        for step in range(first, options.steps):
            line = train_step(run, options, step)
            done = step + 1 == options.steps or interrupt.asked
            if options.evaluated and (step + 1 == options.steps or (options.eval_every and (step + 1) % options.eval_every == 0)):
                line |= run.task.evaluate(run.params, run.cfg, run.ops)
            log.write(line)
            if done or (step + 1) % options.save_every == 0:
                save(out, run, options)
            bar.update(line["tokens"])
            bar.set_postfix_str(f"step {step + 1}/{options.steps}, loss {line['loss']:.3f}")
            if interrupt.asked:
                break
    return line or (log.last or {"step": first}) | found


def train_step(run: Run, options: Options, step: int) -> dict[str, Any]:
    """One optimiser step from `accumulate` batches; each batch's loss is divided by the number of items in all of them."""
    batches = [run.task.batch(step * options.accumulate + j) for j in range(options.accumulate)]
    items = sum(run.task.items(labels) for _, labels, _ in batches)
    loss, grads = 0.0, None
    for j, (ids, labels, mask) in enumerate(batches):
        rng = run.own(np.random.default_rng)([options.seed, step, j])
        part, part_grads = run.own(loss_and_grads)(run.params, ids, labels, run.cfg, mask, run.task.head, items, rng, run.ops)
        loss, grads = loss + part, part_grads if grads is None else add_(grads, part_grads)
    norm = run.own(clip_by_global_norm)(grads, options.max_grad_norm or math.inf)
    if not math.isfinite(norm):
        raise ValueError(f"step {step + 1}: the loss is {loss:.4g}, the gradient's norm {norm}; the last checkpoint stands. Lower --learning-rate")
    lr = learning_rate(step, options.steps, options.learning_rate, options.warmup_steps, options.schedule)
    run.own(adamw_step)(run.params, grads, run.optimizer, lr, BETAS, weight_decay=options.weight_decay)
    tokens = sum(ids.size if mask is None else int(mask.sum()) for ids, _, mask in batches)
    return {"step": step + 1, "loss": loss, "learning_rate": lr, "grad_norm": norm, "tokens": tokens}


def add_(total: dict, grads: dict) -> dict:
    """Adds gradients to a running total, in place."""
    for t, g in zip(flatten(total).values(), flatten(grads).values(), strict=True):
        t += g
    return total


def new_run(out: Path, options: Options) -> Run:
    """A run from scratch, or from the checkpoint --model; the task's head is created here, and only here."""
    if options.model:
        idle = [flag(name) for name in SHAPE if getattr(options, name) != getattr(Options, name)]
        if idle:
            warnings.warn(f"{', '.join(idle)}: no effect beside --model; {options.model} has its own", stacklevel=3)
        params, cfg = checkpoint.load(options.model)
        tokenizer = OPTTokenizer.from_pretrained(options.model)
    else:
        params, cfg, tokenizer = from_nothing(options)
    cfg = replace(cfg, dropout=options.dropout)
    task = make_task(options, tokenizer, cfg)
    if isinstance(task, Classification):
        labelled = cfg.with_labels(task.labels, problem_type="single_label_classification")
        if "score" not in params or cfg.extra.get("id2label") != labelled.extra["id2label"]:  # a head for exactly these labels is trained further
            params["score"] = init_head(cfg, "score", len(task.labels), options.seed)
        cfg = labelled
    elif isinstance(task, QuestionAnswering) and "qa_outputs" not in params:
        params["qa_outputs"] = init_head(cfg, "qa_outputs", seed=options.seed)
    params = checkpoint.with_head_only(params, HEAD_OF[options.task], options.model, f"--task {options.task}")
    backend = choose_backend(options.backend)
    run = Run(at_home(params, backend), at_home(adamw_init(params), backend), cfg, tokenizer, task, backend)
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).touch()  # first, as the sign that the other files are this run's
    tokenizer.save_pretrained(out)
    if options.model and options.task == "lm" and (defaults := hub.find(options.model).config / "generation_config.json").exists():
        checkpoint.write_text(out / defaults.name, defaults.read_text(encoding="utf-8"))
    return run


def at_home(tree: dict, backend: str) -> dict:
    """Parameters or moments where the backend trains: in the GPU's memory for CUDA, else unchanged."""
    return load_ops(backend).pack(tree) if backend == "cuda" else tree


def from_nothing(options: Options) -> tuple[dict, OPTConfig, OPTTokenizer]:
    """A tokenizer trained on the training texts, and random parameters."""
    texts = read_texts(options.text) if options.text else [str(value) for e in examples_of(options) for value in e.values()]
    tokenizer = OPTTokenizer.train(texts, options.vocab_size)
    cfg = OPTConfig(
        vocab_size=options.vocab_size, hidden_size=options.hidden_size, num_hidden_layers=options.num_layers, ffn_dim=4 * options.hidden_size,
        num_attention_heads=options.num_heads, max_position_embeddings=options.context,
    )  # fmt: skip
    return init_params(cfg, options.seed), cfg, tokenizer


def make_task(options: Options, tokenizer: OPTTokenizer, cfg: OPTConfig) -> Any:
    """The task that the options select, with its data. Raises DataError, ValueError."""
    if options.context > cfg.max_position_embeddings:
        raise ValueError(f"--context {options.context} is more than the model's max_position_embeddings={cfg.max_position_embeddings}; lower it")
    shape = options.context, options.batch_size, options.seed
    if options.task == "lm":
        texts = read_texts(options.text) if options.text else [e["text"] for e in examples_of(options)]
        return LanguageModelling(tokenizer, texts, read_texts(options.eval_text) if options.eval_text else [], *shape)
    if not options.data:
        raise DataError(f"--task {options.task} learns from --data FILE, JSON lines with {', '.join(TASKS[options.task].keys)}")
    if options.task == "classify" and tokenizer.pad_token_id != cfg.pad_token_id:  # rows are read at their last token that is not config.json's
        raise ValueError(f"the tokenizer pads with id {tokenizer.pad_token_id}, and config.json's pad_token_id is {cfg.pad_token_id}: a row's end "
                         f"could not be found; set one of them to the other")  # fmt: skip
    return TASKS[options.task](tokenizer, options.data, options.eval_data, *shape)


def examples_of(options: Options) -> list[dict]:
    """The examples of --data. Raises DataError."""
    if not options.data:
        raise DataError("nothing to learn from: give --text FILES, or --data FILE with JSON lines")
    return list(read_examples(options.data, TASKS[options.task].keys if options.task in TASKS else ("text",)).values())


def kept_options(options: Options, backend: str) -> dict[str, Any]:
    """The options that must not change for a resumed run to follow the same loss curve."""
    return {name: value for name, value in asdict(options).items() if name not in MAY_CHANGE} | {"backend": backend}


def save(out: Path, run: Run, options: Options) -> None:
    """Writes the state to resume from, then the checkpoint; each file is replaced atomically."""
    params = map_leaves(host, run.params)
    state = flatten({"params": params, "m": map_leaves(host, run.optimizer["m"]), "v": map_leaves(host, run.optimizer["v"])})
    metadata = {
        "step": str(run.optimizer["step"]),
        "config": json.dumps(run.cfg.to_dict()),
        "options": json.dumps(kept_options(options, run.backend)),
        "checksum": str(run.task.checksum()),
    }
    checkpoint.write_atomically(out / STATE, lambda path: checkpoint.write_safetensors(path, state, metadata))
    checkpoint.save(out, params, run.cfg, options.save_dtype)


def resumed_run(out: Path, options: Options) -> Run:
    """The run as it was when last saved; raises ValueError if its options or data were different."""
    from safetensors import SafetensorError, safe_open

    try:
        open(out / STATE, "rb").close()  # safetensors calls a file that may not be read missing
        with safe_open(out / STATE, framework="numpy") as file:
            metadata, state = file.metadata(), unflatten({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise checkpoint.CheckpointError(f"{out / STATE} cannot be read: {error}. Was it copied whole? Without it the run starts anew") from None
    if not {"config", "options", "checksum", "step"} <= (metadata or {}).keys():
        raise checkpoint.CheckpointError(
            f"{out / STATE} is not the state of a training run, but some other safetensors file; start anew in another --out"
        )
    cfg, tokenizer = OPTConfig.from_dict(json.loads(metadata["config"])), OPTTokenizer.from_pretrained(out)
    then = {"backend": "numpy"} | json.loads(metadata["options"])
    backend = then["backend"] if options.backend == "auto" else options.backend
    now = kept_options(options, backend)
    if not options.model:
        now.pop("model")  # it was read when the run started, and need not exist any more
    changed = [f"{flag(name)} {then[name]}" for name, value in now.items() if then.get(name, value) != value]
    if changed:
        raise ValueError(f"{out} was trained with {', '.join(changed)}; resume it with the same options")
    task = make_task(options, tokenizer, cfg)
    if metadata["checksum"] != str(task.checksum()):
        raise ValueError(f"{out} was trained on other data; resume it with the same --text or --data")
    optimizer = {"step": int(metadata["step"]), "m": state["m"], "v": state["v"]}
    return Run(at_home(state["params"], backend), at_home(optimizer, backend), cfg, tokenizer, task, backend)


class Log:
    """One JSON object per step; on resuming, the lines after the last saved step are dropped, because they will be written again."""

    def __init__(self, path: Path, step: int) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept = {found["step"]: line for line in lines if (found := self.parsed(line)) and found["step"] <= step}
        checkpoint.write_text(path, "".join(kept[n] + "\n" for n in sorted(kept)))
        self.last = self.parsed(kept[max(kept)]) if kept else {}
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed in __exit__)

    @classmethod
    def begun(cls, path: Path) -> bool:
        """Whether a run that stopped before it was saved has left the file: empty, or with a step in its first line."""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ["not there"]
        return not lines or bool(cls.parsed(lines[0]))

    @staticmethod
    def parsed(line: str) -> dict[str, Any]:
        """A line; {} for one that was damaged, as the last is where a machine stopped."""
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("step"), int) else {}

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after this step; the second stops at once. Threads other than the main one get no Ctrl-C."""

    def __enter__(self) -> Interrupt:
        self.asked, self._previous = False, None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._previous)

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
