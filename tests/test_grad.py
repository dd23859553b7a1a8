"""Every gradient equals autograd's, and the optimiser equals torch's, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from reference import PADDINGS, VARIANTS, batch, build, decoder_names, tensors
from torch.nn.functional import cross_entropy

from opt_np import grad, model, ops, optim
from opt_np.tree import flatten, map_leaves, unflatten

CLOSE = 1e-8  # relative


def lm_loss(hf, ids, mask, labels):
    """HF's loss without its cast to float32."""
    logits = hf(*tensors(ids, mask)).logits
    return cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), torch.tensor(labels)[:, 1:].reshape(-1))


def compare(grads, hf):
    """Each tensor against autograd's; k_proj.bias has a true gradient of 0 (softmax ignores it), so the largest gradient sets its scale."""
    ours, theirs = flatten(grads), decoder_names({name: p.grad.numpy() for name, p in hf.named_parameters()})
    assert set(ours) == set(theirs)
    floor = 1e-6 * max(np.abs(g).max() for g in theirs.values())
    errors = {name: np.abs(ours[name] - g).max() / max(np.abs(g).max(), floor) for name, g in theirs.items()}
    name = max(errors, key=errors.get)
    assert errors[name] <= CLOSE, f"{name}: relative error {errors[name]:.1e}"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_language_model_gradients_equal_autograd(variant, padding):
    hf, cfg, params = build(variant)
    ids, mask = batch(padding)
    labels = np.where(np.random.default_rng(2).random(ids.shape) < 0.2, -100, ids if mask is None else np.where(mask, ids, -100))
    hf.zero_grad()
    expected = lm_loss(hf, ids, mask, labels)
    expected.backward()
    loss, grads = grad.loss_and_grads(params, ids, labels, cfg, attention_mask=mask)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    compare(grads, hf)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
@pytest.mark.parametrize("labels", [[2, 0, 1], [[0.0, 1, 1], [1, 0, 0], [1, 1, 1]]], ids=["single_label", "multi_label"])
def test_classification_gradients_equal_autograd(variant, padding, labels):
    kind = "multi_label_classification" if isinstance(labels[0], list) else None
    hf, cfg, params = build(variant, "classify", num_labels=3, problem_type=kind)
    ids, mask = batch(padding)
    hf.zero_grad()
    expected = hf(*tensors(ids, mask), labels=torch.tensor(labels, dtype=torch.float64 if kind else torch.long)).loss
    expected.backward()
    loss, grads = grad.loss_and_grads(params, ids, labels, cfg, mask, head=grad.classification_head)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    compare(grads, hf)


def test_regression_gradients_equal_autograd():
    hf, cfg, params = build("pre_norm", "classify", num_labels=1)
    ids, mask = batch("right")
    hf.zero_grad()
    expected = hf(*tensors(ids, mask), labels=torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)).loss
    expected.backward()
    loss, grads = grad.loss_and_grads(params, ids, [0.5, -1.0, 2.0], cfg, mask, head=grad.classification_head)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    compare(grads, hf)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
@pytest.mark.parametrize("labels", [[[0, 2], [3, 3], [16, 16]], [[0, 17], [4, 99], [1, 2]]], ids=["inside", "cut_off"])
def test_question_answering_gradients_equal_autograd(variant, padding, labels):
    hf, cfg, params = build(variant, "qa")
    ids, mask = batch(padding)
    start, end = (torch.tensor(side) for side in zip(*labels, strict=True))
    hf.zero_grad()
    expected = hf(*tensors(ids, mask), start_positions=start, end_positions=end).loss
    expected.backward()
    loss, grads = grad.loss_and_grads(params, ids, labels, cfg, mask, head=grad.question_head)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    compare(grads, hf)


def test_the_pads_row_learns_from_the_head_and_not_from_the_lookup():
    hf, cfg, params = build("untied")
    ids, _ = batch("left")  # pads inside, no mask: they are looked up
    _, grads = grad.loss_and_grads(params, ids, ids, cfg)
    assert not grads["embed_tokens"]["weight"][cfg.pad_token_id].any()
    assert grads["lm_head"]["weight"][cfg.pad_token_id].any()
    hf.zero_grad()
    lm_loss(hf, ids, None, ids).backward()
    compare(grads, hf)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_that_keeps_its_inputs_equals_the_layer_bit_for_bit(variant):
    for dtype in ("float64", "float32"):
        _, cfg, params = build(variant, dtype=dtype)
        ids, mask = batch("left")
        layout = model.make_layout(cfg, ids, mask)
        x = np.random.default_rng(0).normal(size=(*ids.shape, cfg.hidden_size)).astype(dtype)
        expected = model.decoder_layer(x, params["layers"][0], cfg, layout, ops, None, 0, model.no_tap)
        assert np.array_equal(grad.decoder_layer_fwd(x, params["layers"][0], cfg, layout)[0], expected)
        h, _ = grad.decoder_fwd(params, ids, cfg, mask, rng=None)
        assert np.array_equal(h, model.last_hidden_state(params, ids, cfg, attention_mask=mask))


@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.3, 0.0), (0.0, 0.3), (0.2, 0.2)])
def test_gradients_under_dropout_are_the_slope_of_the_loss(variant, dropout, attention_dropout):
    _, cfg, params = build(variant, activation_function="gelu")  # relu's kinks would disturb the differences
    cfg = replace(cfg, dropout=dropout, attention_dropout=attention_dropout)
    ids, mask = batch("left")

    def loss_at(p):
        return grad.loss_and_grads(p, ids, ids, cfg, mask, rng=np.random.default_rng(5))  # the same rng drops the same numbers

    _, grads = loss_at(params)
    rng = np.random.default_rng(6)
    direction = map_leaves(lambda a: rng.normal(size=a.shape), params)
    direction["embed_tokens"]["weight"][cfg.pad_token_id] = 0  # padding_idx: this row's gradient leaves the lookup out on purpose
    step, towards = 1e-6, flatten(direction)
    up, down = (loss_at(unflatten({name: p + sign * step * towards[name] for name, p in flatten(params).items()}))[0] for sign in (1, -1))
    slope = sum(np.vdot(g, towards[name]) for name, g in flatten(grads).items())
    assert (up - down) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_dropout_keeps_the_mean_and_drops_the_share():
    x = np.ones((200, 200))
    y, kept = grad.dropout_fwd(x, 0.25, np.random.default_rng(0))
    assert y.mean() == pytest.approx(1, abs=0.02)
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.02)
    assert np.array_equal(grad.dropout_bwd(x, kept), y)
    assert grad.dropout_fwd(x, 0.25, None)[0] is x


@given(split=st.integers(1, 2), seed=st.integers(0, 9))
def test_accumulated_gradients_equal_those_of_the_whole_batch(split, seed):
    _, cfg, params = build("pre_norm")
    ids, mask = batch("both", seed=seed)
    labels = np.where(mask, ids, -100)
    items = int((labels[:, 1:] != -100).sum())
    loss, whole = grad.loss_and_grads(params, ids, labels, cfg, mask)
    parts = [grad.loss_and_grads(params, ids[rows], labels[rows], cfg, mask[rows], num_items=items) for rows in (slice(split), slice(split, None))]
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-12)
    for name, g in flatten(whole).items():
        assert np.allclose(sum(flatten(p)[name] for _, p in parts), g, rtol=1e-9, atol=1e-12), name


def test_logits_in_blocks_change_nothing(monkeypatch):
    _, cfg, params = build("pre_norm")
    ids, _ = batch("none")
    loss, whole = grad.loss_and_grads(params, ids, ids, cfg)
    monkeypatch.setattr(grad, "LOGIT_ROWS", 7)
    loss_blocks, blocks = grad.loss_and_grads(params, ids, ids, cfg)
    assert loss_blocks == pytest.approx(loss, rel=1e-13)
    assert all(np.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(flatten(whole).values(), flatten(blocks).values(), strict=True))


def test_nothing_to_learn_from_is_an_error():
    _, cfg, params = build("pre_norm")
    with pytest.raises(ValueError, match="no label is left"):
        grad.loss_and_grads(params, [[5, 6]], [[5, -100]], cfg)


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        (grad.language_model_head, [[5, -1, 6]], "from -1"),
        (grad.language_model_head, [[5, 6, 99]], "to 98"),
        (grad.language_model_head, [[5, 6]], r"labels is \(1, 2\)"),
        (grad.classification_head, [3], "from 3 to 3"),
        (grad.question_head, [[0, 1], [0, 1]], r"\(2, 2\); 1 rows"),
    ],
)
def test_labels_that_cannot_be_are_refused(head, labels, message):
    _, cfg, params = build("pre_norm", {"classification_head": "classify", "question_head": "qa"}.get(head.__name__, "lm"), num_labels=3)
    with pytest.raises(ValueError, match=message):
        grad.loss_and_grads(params, [[5, 6, 7]], labels, cfg, head=head)


def test_a_row_without_a_class_is_left_out_as_in_hf():
    hf, cfg, params = build("pre_norm", "classify", num_labels=3)
    ids, mask = batch("left")
    hf.zero_grad()
    expected = hf(*tensors(ids, mask), labels=torch.tensor([1, -100, 2])).loss
    expected.backward()
    loss, grads = grad.loss_and_grads(params, ids, [1, -100, 2], cfg, mask, head=grad.classification_head)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    compare(grads, hf)


def test_parameters_that_a_step_could_not_reach_are_refused():
    p = {"weight": np.asfortranarray(np.ones((2, 3)))}
    with pytest.raises(ValueError, match="weight is not C-contiguous"):
        optim.adamw_step(p, {"weight": np.ones((2, 3))}, optim.adamw_init(p), 0.1)


def test_gradients_are_in_the_dtype_of_the_parameters():
    _, cfg, params = build("like_350m", dtype="float32")
    ids, mask = batch("left")
    _, grads = grad.loss_and_grads(params, ids, ids, cfg, mask, rng=np.random.default_rng(0))
    assert {g.dtype for g in flatten(grads).values()} == {np.dtype(np.float32)}


# ---- the optimiser -----------------------------------------------------------------------------------------------------------------------


def labels_of(task, ids, mask):
    return {"lm": np.where(mask, ids, -100), "classify": np.array([2, 0, 1]), "qa": np.array([[0, 2], [3, 5], [4, 4]])}[task]


def torch_loss(task, hf, ids, mask, labels):
    if task == "lm":
        return lm_loss(hf, ids, mask, labels)
    t = torch.tensor(labels)
    extra = {"labels": t} if task == "classify" else {"start_positions": t[:, 0], "end_positions": t[:, 1]}
    return hf(*tensors(ids, mask), **extra).loss


@pytest.mark.parametrize("variant", ["pre_norm", "like_350m"])
@pytest.mark.parametrize("task", ["lm", "classify", "qa"])
def test_twenty_adamw_steps_equal_torchs(task, variant):
    head = {"lm": grad.language_model_head, "classify": grad.classification_head, "qa": grad.question_head}[task]
    extra = {"num_labels": 3} if task == "classify" else {}
    hf, cfg, shared = build.__wrapped__(variant, task, **extra)
    params = map_leaves(np.copy, shared)  # theirs is updated in place too
    decay = [p for name, p in hf.named_parameters() if optim.decays(name)]
    spare = [p for name, p in hf.named_parameters() if not optim.decays(name)]
    theirs = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": spare, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8)
    state, losses = optim.adamw_init(params), []
    for step in range(20):
        ids, mask = batch("both", seed=step)
        labels, lr = labels_of(task, ids, mask), optim.learning_rate(step, 20, 1e-2, warmup=5)
        loss, grads = grad.loss_and_grads(params, ids, labels, cfg, mask, head=head)
        norm = optim.clip_by_global_norm(grads, 1.0)
        optim.adamw_step(params, grads, state, lr, betas=(0.9, 0.95), weight_decay=0.1)

        theirs.zero_grad()
        expected = torch_loss(task, hf, ids, mask, labels)
        expected.backward()
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0).item(), rel=1e-9)
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        losses.append(loss)
    assert len(set(losses)) == 20
    for name, p in flatten(params).items():
        assert np.abs(p - flatten(shared)[name]).max() <= 1e-9 * max(1, np.abs(p).max()), name


def test_adamw_updates_more_than_one_chunk_alike():
    n = optim.CHUNK + 17
    p, g = {"weight": np.linspace(-1, 1, n)}, {"weight": np.linspace(1, -2, n)}
    t = torch.tensor(p["weight"].copy(), requires_grad=True)
    t.grad = torch.tensor(g["weight"])
    torch.optim.AdamW([t], lr=0.1, weight_decay=0.2).step()
    optim.adamw_step(p, g, optim.adamw_init(p), 0.1, weight_decay=0.2)
    assert np.allclose(p["weight"], t.detach().numpy(), rtol=1e-13)


def test_clipping_equals_torchs():
    for scale in (1e-3, 1.0, 1e3):
        g = {"a": np.linspace(-1, 1, 7) * scale, "b": np.ones((2, 2)) * scale}
        tensors_ = [torch.nn.Parameter(torch.zeros(a.shape, dtype=torch.float64)) for a in g.values()]
        for t, a in zip(tensors_, g.values(), strict=True):
            t.grad = torch.tensor(a.copy())
        expected = torch.nn.utils.clip_grad_norm_(tensors_, 1.0).item()
        assert optim.clip_by_global_norm(g, 1.0) == pytest.approx(expected, rel=1e-12)
        assert all(np.allclose(a, t.grad.numpy(), rtol=1e-12) for a, t in zip(g.values(), tensors_, strict=True))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_equal_hfs(schedule):
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = transformers.get_scheduler(schedule, dummy, num_warmup_steps=4, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(theirs.get_last_lr()[0])
        dummy.step()
        theirs.step()
    ours = [optim.learning_rate(step, 20, 0.5, 4, schedule) for step in range(20)]
    assert np.allclose(ours[4:], expected[4:], rtol=1e-12)
    assert np.allclose(ours[:4], expected[1:5], rtol=1e-12)  # HF's first step has a rate of 0; ours already learns


def test_other_schedules():
    assert optim.learning_rate(19, 20, 0.5, 4, "constant") == 0.5
    assert optim.learning_rate(20, 20, 0.5, 4, "cosine", floor=0.1) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="linear, cosine, constant"):
        optim.learning_rate(5, 20, 0.5, 0, "sudden")
