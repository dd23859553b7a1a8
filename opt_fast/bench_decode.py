"""Decoding token by token on a GPU: opt-np bench decode

OPT's shapes with random weights in float16: milliseconds between two tokens of greedy generate, as its caller sees them, and the share of memory
bandwidth that this uses, beside HF's own model on the same weights: eager, sdpa, and with a static cache, which HF compiles. Then attention alone, 1
to 16 queries over many keys, beside torch's backends. A lane is one of those compared, such as "hf sdpa". Each lane's results are compared with
float32, or float64, before it is timed; lanes are interleaved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from opt_fast import bench_attention, bench_hf
from opt_fast.bench import middle, say, spread
from opt_fast.bench_attention import Clock, check_files, check_least, default_words, described, free_cached, keep, measure_limits, nvidia_smi, tell
from opt_np.config import OPTConfig

PARTS = ("models", "attention")
LANES = ("ours", "ours int8", "hf eager", "hf sdpa", "hf static")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"sizes": ("125m", "350m", "1.3b", "6.7b"), "batches": (1, 8, 64), "contexts": (128, 1920), "new": 100},
    "cpu": {"sizes": ("350m",), "batches": (1, 3), "contexts": (9,), "new": 12},
}
BUDGET = 4.0  # seconds that a lane's tokens may take in a round: slower lanes generate fewer
FIRST = 3  # first tokens, not counted: during them, work queued ahead of Python builds up
CHECKED = {"cuda": (2, 130), "cpu": (2, 13)}  # rows and tokens of the check's prompt
TOKENS = 5  # of the check
ALLOWED, INT8 = 3.0, 0.05  # error allowed: times that of HF's eager in float16; int8, whose weights differ: of the largest logit
KEYS = {"cuda": ((1, 32, 128, 16384), (8, 32, 128, 2048), (32, 32, 128, 2048), (8, 32, 64, 4096), (32, 32, 80, 2048)), "cpu": ((2, 2, 64, 100),)}
QUERIES = (1, 2, 4, 8, 16)


def add_options(parser: Any) -> None:
    words = partial(default_words, DEFAULTS)
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cuda", help="cpu is for trying this command, on tiny models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help="models, attention (default: both)")
    parser.add_argument("--lanes", nargs="+", choices=LANES, metavar="LANE", help=f"of {', '.join(LANES)} (default: all)")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="OPT's shapes " + words("sizes"))
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="rows " + words("batches"))
    parser.add_argument("--contexts", nargs="+", type=int, metavar="N", help="tokens of a row's prompt " + words("contexts"))
    parser.add_argument("--new", type=int, metavar="N", help=f"tokens that follow, fewer where they take {BUDGET:g} s " + words("new"))
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="that lanes take turns in")
    parser.add_argument("--seed", type=int, metavar="N", help="of weights and tokens (default: another one each time)")
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="also write the line of JSON there")


def run(what: str, device: str, parts: Iterable[str] | None = None, lanes: Iterable[str] | None = None, rounds: int = 3, seed: int | None = None,
        json_file: str | None = None, **asked: Any) -> None:  # fmt: skip
    """Runs the benchmark; sizes, batches, contexts and new that are not in `asked` have the device's default.

    Raises ValueError for options that cannot be measured, and if a lane's result is wrong.
    """
    options = DEFAULTS[device] | {key: value for key, value in asked.items() if value is not None}
    check_options({**options, "rounds": rounds}, json_file)
    bench_hf.need_device(device)
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    clock = Clock(device)
    say("measuring what the memory delivers")
    limits = measure_limits([], clock)  # only bandwidth, no matrix product
    result: dict[str, Any] = {
        "what": what,
        "seed": seed,
        "machine": described(clock),
        "state": nvidia_smi(clock),
        "rounds": rounds,
        "options": options,
    }
    result |= {"limits": limits, "checks": {}, "models": [], "attention": []}
    if "models" in (parts or PARTS):
        for size in options["sizes"]:
            for row in measure_model(size, device, [lane for lane in LANES if lane in (lanes or LANES)], limits["bandwidth"], rounds, seed,
                                     result["checks"], options):  # fmt: skip
                result["models"].append(row)
                keep(result, json_file)
    if "attention" in (parts or PARTS):
        for shape in KEYS[device]:
            result["attention"].append(measure_attention(shape, clock, limits["bandwidth"], rounds, seed))
            keep(result, json_file)
    tell(table(result), result, json_file)


def check_options(options: dict[str, Any], json_file: str | None) -> None:
    most = OPTConfig().max_position_embeddings
    check_least({name: options[name] for name in ("batches", "contexts", "rounds")})
    check_least({"new": options["new"]}, FIRST + 2)
    if max(options["contexts"]) + options["new"] > most:
        raise ValueError(f"--contexts {max(options['contexts'])} and --new {options['new']}: OPT has {most} positions")
    for size in options["sizes"]:
        OPTConfig.from_size(size)
    check_files(None, json_file)


# ---- whole models ------------------------------------------------------------------------------------------------------------------------

Said = tuple[list[float], np.ndarray, np.ndarray]  # when each token arrived, the tokens (B, new), their logits (B, new, V) if wanted


def measure_model(size: str, device: str, lanes: list[str], bandwidth: float, rounds: int, seed: int, checks: dict,
                  options: dict) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each batch and context."""
    say(f"making opt-{size}'s shape with random weights")
    model = bench_hf.build(size, device, seed)
    calls, nbytes = all_calls(model, lanes)
    left_out: dict[str, str] = {}
    checks[size] = check(size, model, calls, left_out, device, seed)
    for B in options["batches"]:
        for T in options["contexts"]:
            say(f"timing opt-{size}, batch {B}, after {T} tokens")
            ids = bench_hf.tokens(model, B, T, device, seed)
            taken, failed = take_turns({lane: calls[lane] for lane in calls if lane not in left_out}, ids, options["new"], rounds, device)
            cache = 2 * 2 * B * (T + options["new"] / 2) * model.config.num_hidden_layers * model.config.hidden_size  # bytes, about
            told = {}
            for lane, seconds in taken.items():
                ratio = {"ours": middle([b / a for a, b in zip(taken["ours"], seconds, strict=True)])} if "ours" in taken and lane != "ours" else {}
                share = 100 * (nbytes[lane] + cache) / (float(np.median(seconds)) * bandwidth)
                told[lane] = {"seconds": seconds, "median": float(np.median(seconds)), "percent_of_bandwidth": share, **ratio}
            yield {"model": size, "batch": B, "context": T, "left_out": left_out | failed, "lanes": told}
    del model, calls
    free_cached(device)


def all_calls(model: Any, lanes: list[str]) -> tuple[dict[str, Callable[..., Said]], dict[str, float]]:
    """Each lane's generating function, call(ids, new, logits), and the bytes of weights that it reads for a token."""
    params, cfg = our_params(model), OPTConfig.from_dict(model.config.to_dict())
    trees = {"ours": params, "ours int8": in_int8(params)} if "ours int8" in lanes else {"ours": params}
    calls: dict[str, Any] = {lane: partial(ours, trees.get(lane), cfg) if lane in trees else partial(hf, model, lane) for lane in lanes}
    return calls, {lane: read_bytes(trees.get(lane, params)) for lane in lanes}


def our_params(model: Any) -> Any:
    """HF's parameters under our names; the tensors are the same."""
    from opt_fast.engine import Params
    from opt_np.tree import unflatten

    flat = {name.removeprefix("model.decoder."): a for name, a in model.state_dict().items() if name != "lm_head.weight"}
    return Params(unflatten(flat))


def in_int8(params: Any) -> Any:
    """The tree with its matrices in int8 as opt_np.quantize makes them, except the position table."""
    from opt_fast.engine import Params
    from opt_fast.ops_cuda import pack_on

    return Params(pack_on(whole_numbers(params), params["embed_positions"]["weight"].device))


def whole_numbers(node: Any) -> Any:
    import torch

    if isinstance(node, list):
        return [whole_numbers(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "weight" in node and node["weight"].ndim == 2:
        scale = node["weight"].abs().amax(1).float() / 127
        whole = torch.cat([(part / s[:, None]).round() for part, s in zip(node["weight"].split(4096), scale.split(4096), strict=True)])
        return node | {"weight": whole.to(torch.int8), "scale": scale}
    return {name: child if name == "embed_positions" else whole_numbers(child) for name, child in node.items()}


def read_bytes(params: Any) -> float:
    """Bytes of all weights that each token needs: the whole token table, as the head, but not the position table, of which it reads one row."""
    from opt_np.tree import flatten

    return float(sum(a.numel() * a.element_size() for name, a in flatten(params).items() if not name.startswith("embed_positions")))


def ours(params: Any, cfg: OPTConfig, ids: Any, new: int, logits: bool = False) -> Said:
    from opt_fast import ops_cuda
    from opt_np import generate

    times, tokens, scores = [], [], []
    for step in generate.stream(params, ids.cpu().numpy(), cfg, ops=ops_cuda, max_new_tokens=new, eos_token_id=[]):
        times.append(time.perf_counter())
        tokens.append(step.ids)
        if logits:
            scores.append(np.asarray(step.logits))
    return times, np.stack(tokens, 1), np.stack(scores, 1) if logits else np.empty(0)


def hf(model: Any, lane: str, ids: Any, new: int, logits: bool = False) -> Said:
    import torch
    import transformers

    times: list[float] = []

    class Watch(transformers.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            input_ids[:, -1].tolist()  # waits for the token, as a caller would
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    more = {"cache_implementation": "static"} if lane == "hf static" else {}
    length = {"max_new_tokens": new, "min_new_tokens": new, "output_logits": logits, "return_dict_in_generate": True}
    settings = transformers.GenerationConfig(**length, **more, do_sample=False, eos_token_id=None, pad_token_id=1, bos_token_id=2)
    model.set_attn_implementation("eager" if lane == "hf eager" else "sdpa")
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, stopping_criteria=[Watch()])
    scores = torch.stack(found.logits, 1).float().cpu().numpy() if logits else np.empty(0)
    return times, found.sequences[:, ids.shape[1] :].cpu().numpy(), scores


def check(size: str, model: Any, calls: dict[str, Callable[..., Said]], left_out: dict[str, str], device: str, seed: int) -> dict[str, Any]:
    """{lane: {"error": …, "allowed": …}}: each lane's logits for the tokens that it generates, against the same text in float32.

    Records in `left_out` why one of HF's lanes cannot run. Raises ValueError if a lane's error is too large.
    """
    import copy

    import torch

    ids = bench_hf.tokens(model, *CHECKED[device], device, seed)
    exact = copy.deepcopy(model).float()
    exact.set_attn_implementation("eager")
    found: dict[str, Any] = {}
    for lane in sorted({*calls, "hf eager"}, key=lambda lane: lane != "hf eager"):  # first, as its error sets what is allowed
        try:
            _, tokens, logits = calls.get(lane, partial(hf, model, lane))(ids, TOKENS, logits=True)
        except Exception as error:
            if not lane.startswith("hf") or lane == "hf eager":
                raise
            left_out[lane] = bench_hf.why(error)
            say(f"{lane} is left out: {left_out[lane]}")
            continue
        text = torch.cat([ids, torch.from_numpy(tokens).to(ids.device)], 1)
        with torch.no_grad():
            truth = exact(text[:, :-1], use_cache=False).logits[:, -TOKENS:].cpu().numpy()
        off = float(np.abs(logits - truth).max() / np.abs(truth).max())
        allowed = INT8 if "int8" in lane else ALLOWED * found.get("hf eager", {"error": off})["error"]
        found[lane] = {"error": off, "allowed": allowed}
        if not off <= allowed:
            raise ValueError(f"opt-{size}: the logits of {lane} are off by {off:.2e} of the largest, and {allowed:.2e} is allowed; nothing was timed")
    del exact
    free_cached(device)
    say(f"opt-{size}: {', '.join(found)} agree")
    return found


def take_turns(calls: dict[str, Callable[..., Said]], ids: Any, new: int, rounds: int, device: str) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds between two tokens for each lane in each round, interleaved; and why a lane has none."""
    taken: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    failed: dict[str, str] = {}

    def once(lane: str, count: int) -> float | None:
        free_cached(device)
        try:
            return between(calls[lane](ids, count)[0])
        except Exception as error:
            if not isinstance(error, MemoryError) and not bench_hf.expected(lane.replace("hf", "sdpa"), error):
                raise
            failed[lane] = bench_hf.why(error)
            taken.pop(lane, None)
        return None

    for lane in calls:
        once(lane, new)  # captures graphs, and compiles for these shapes
        if lane not in failed and (estimate := once(lane, FIRST + 2)) is not None:
            taken[lane], counts[lane] = [], max(FIRST + 2, min(new, int(BUDGET / estimate)))
    for _ in range(rounds):
        for lane in list(taken):
            if (found := once(lane, counts[lane])) is not None:
                taken[lane].append(found)
    return taken, failed


def between(times: list[float]) -> float:
    """Mean seconds from token to token."""
    return (times[-1] - times[FIRST - 1]) / (len(times) - FIRST)


# ---- attention alone ---------------------------------------------------------------------------------------------------------------------


def measure_attention(shape: tuple[int, int, int, int], clock: Clock, bandwidth: float, rounds: int, seed: int) -> dict[str, Any]:
    """Times 1 to 16 queries of each row over its keys in our kernel, and 1 in torch's backends.  shape: B, H, Dh, S"""
    import torch

    B, H, Dh, S = shape
    say(f"timing attention, batch {B}, {H} heads of {Dh}, {S} keys")
    torch.manual_seed(seed)
    k, v = (torch.randn(B, S, H, Dh, device=clock.device, dtype=torch.float16) for _ in range(2))
    lanes, left_out = {}, {}
    for T in QUERIES:
        q = torch.randn(B, T, H, Dh, device=clock.device, dtype=torch.float16)
        near = exact(q[:1], k[:1], v[:1])
        for name, call in attention_calls(q, k, v).items():
            try:
                off = float((call()[:1].double() - near).abs().max() / near.abs().max())
            except RuntimeError as error:
                left_out[name] = bench_hf.why(error)
                continue
            if not off <= 4e-3:
                raise ValueError(f"attention of {name} is off by {off:.1e} of the largest, and 4e-3 is allowed; it was not timed")
            lanes[name] = call
    seconds: dict[str, list[float]] = {name: [] for name in lanes}
    for call in lanes.values():
        clock.seconds(call, 10)
    for _ in range(rounds):
        for name, call in lanes.items():
            seconds[name].append(float(np.median(clock.seconds(call, 10))))
    size = 2 * k.numel() * k.element_size()
    share = {name: 100 * size / (float(np.median(s)) * bandwidth) for name, s in seconds.items()}
    return {"B": B, "H": H, "Dh": Dh, "S": S, "bytes": size, "seconds": seconds, "percent_of_bandwidth": share, "left_out": left_out}


def attention_calls(q: Any, k: Any, v: Any) -> dict[str, Callable[[], Any]]:
    """Our kernel; for a single query also torch's backends, on views of the same memory."""
    from opt_fast.attention_cuda import compute

    T, scale = q.shape[1], q.shape[-1] ** -0.5
    calls: dict[str, Callable[[], Any]] = {f"ours, {T}": lambda: compute(q, k, v, scale, None)[0]}
    on = bench_attention.BACKENDS if q.is_cuda else bench_attention.ON_CPU
    for name in on if T == 1 else ():
        calls[f"torch-{name}"] = partial(by_torch, bench_attention.BACKENDS[name], q, k, v, scale)
    return calls


def by_torch(backend: str, q: Any, k: Any, v: Any, scale: float) -> Any:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).swapaxes(1, 2)


def exact(q: Any, k: Any, v: Any) -> Any:
    from opt_fast.attention_cuda import plain

    return plain(q.double(), k.double(), v.double(), q.shape[-1] ** -0.5)[0]


# ---- reporting ---------------------------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> list[str]:
    where, versions = result["machine"], result["machine"]["versions"]
    on = f"{where['gpu']}, CUDA {versions['cuda']}" if where["device"] == "cuda" else f"{where['cpu']}: to try this command, no result"
    lines = [f"decoding in float16, random weights, HF transformers {versions.get('transformers')}, torch {versions.get('torch')}, on {on}"]
    lines.append(f"memory is read at {result['limits']['bandwidth'] / 1e9:.4g} GB/s; medians of {result['rounds']} rounds, ratios in the same round")
    for row in result["models"]:
        lines += ["", f"opt-{row['model']}'s shape, batch {row['batch']}, after {row['context']} tokens"]
        for lane, told in row["lanes"].items():
            ratio = f"ours is {spread(told['ours'])} x as fast" if "ours" in told else ""
            lines.append(
                f"  {lane:10} {1e3 * told['median']:9.3f} ms a token {told['percent_of_bandwidth']:4.0f} % of the bandwidth  {ratio}".rstrip()
            )
        lines += [f"  {lane:10} left out: {reason}" for lane, reason in row["left_out"].items()]
    for row in result["attention"]:
        lines += [
            "",
            f"attention, batch {row['B']}, {row['H']} heads of {row['Dh']}, {row['S']} keys, {row['bytes'] / 1e6:.0f} MB of keys and values",
        ]
        for lane, seconds in row["seconds"].items():
            name = f"{lane} {'query' if lane == 'ours, 1' else 'queries'}" if lane.startswith("ours") else lane
            lines.append(f"  {name:16} {1e6 * float(np.median(seconds)):9.1f} µs {row['percent_of_bandwidth'][lane]:4.0f} % of the bandwidth")
        lines += [f"  {lane:16} left out: {reason}" for lane, reason in row["left_out"].items()]
    return lines
