"""The loss at the end of the layers: only targets count, in chunks, as the plain model computes it."""

import pytest
import torch

from edge_client.tuning import loss as loss_module
from edge_client.tuning.examples import IGNORED, Example
from edge_client.tuning.loss import loss_and_gradient, pack, sequence_losses
from tests.families import FAMILIES, build
from tests.unit.tuning_fake import Cloud, Head, examples


def test_packing_sends_no_last_token_and_looks_one_ahead():
    one = Example(torch.tensor([5, 6, 7]), torch.tensor([IGNORED, IGNORED, 7]), 1)
    two = Example(torch.tensor([8, 9, 10, 11]), torch.tensor([IGNORED, 9, IGNORED, 11]), 2)
    packed = pack([one, two])
    assert packed.ids.tolist() == [5, 6, 8, 9, 10] and packed.lengths == (2, 3)
    assert packed.positions.tolist() == [1, 2, 4] and packed.targets.tolist() == [7, 9, 11]


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradient_are_those_of_the_plain_model(name, monkeypatch):
    model = build(name).double().requires_grad_(False)
    head = Head(model.model.norm, model.lm_head, getattr(model.config, "final_logit_softcapping", None))
    batch = examples(3)
    packed, total = pack(batch), sum(example.targets for example in batch)

    seen = []

    def record(_, args):
        seen.append(args[0].requires_grad_())

    hook = model.model.norm.register_forward_pre_hook(record)
    wanted = torch.zeros((), dtype=torch.float64)
    for example in batch:
        logits = model(example.ids[None]).logits[0, :-1]
        wanted = wanted + torch.nn.functional.cross_entropy(logits, example.labels[1:], reduction="sum")
    hook.remove()
    gradients = torch.autograd.grad(wanted / total, seen)
    hidden = torch.cat([h.detach()[0, :-1] for h in seen])

    found = loss_and_gradient(head, hidden, packed, total)
    assert found[0] == pytest.approx(float(wanted.detach() / total), rel=1e-12)
    expected = torch.cat([g[0, :-1] for g in gradients])
    torch.testing.assert_close(found[1], expected, rtol=1e-9, atol=1e-14)
    unlearned = torch.ones(len(hidden), dtype=torch.bool)
    unlearned[packed.positions] = False
    assert unlearned.any() and not found[1][unlearned].any()

    # a few positions at a time, and without a gradient: the same
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 3 * model.config.vocab_size)
    chunked = loss_and_gradient(head, hidden, packed, total)
    assert chunked[0] == pytest.approx(found[0], rel=1e-12)
    torch.testing.assert_close(chunked[1], found[1], rtol=1e-12, atol=1e-15)
    assert loss_and_gradient(head, hidden, packed, total, want_gradient=False) == (chunked[0], None)


def test_shares_of_micro_batches_add_up_to_the_mean_over_all_targets():
    cloud = Cloud()
    batch = examples(5)
    total = sum(example.targets for example in batch)
    hidden = torch.randn(len(pack(batch).ids), 48, dtype=torch.float64)
    whole, gradient = loss_and_gradient(cloud.head, hidden, pack(batch), total)
    assert len({example.targets for example in batch}) > 1, "the counts of targets should differ"
    shares, at = [], 0
    for example in batch:
        size = len(example.ids) - 1
        share, part = loss_and_gradient(cloud.head, hidden[at : at + size], pack([example]), total)
        torch.testing.assert_close(part, gradient[at : at + size], rtol=1e-12, atol=1e-15)
        shares.append(share)
        at += size
    assert sum(shares) == pytest.approx(whole, rel=1e-12)


def test_half_precision_hidden_states_give_a_loss_in_single():
    model = build("gemma2").to(torch.bfloat16)
    head = Head(model.model.norm, model.lm_head, model.config.final_logit_softcapping)
    batch = examples(2)
    hidden = torch.randn(len(pack(batch).ids), 48).to(torch.bfloat16)
    assert head.logits(hidden).dtype == torch.float32
    share, gradient = loss_and_gradient(head, hidden, pack(batch), 7)
    assert gradient.dtype == torch.bfloat16 and gradient.any() and 0 < share < 100


def test_each_sequence_has_its_own_loss(monkeypatch):
    cloud = Cloud("llama")
    batch = [
        *examples(5),
        Example(torch.tensor([5, 6, 7]), torch.tensor([IGNORED] * 3), 6),
    ]  # the last: nothing
    packed = pack(batch)
    hidden = torch.randn(len(packed.ids), cloud.plan.hidden_size, dtype=torch.float64)
    wanted = []
    for lengths, example in zip(hidden.split(list(packed.lengths)), batch, strict=True):
        logits = cloud.head.logits(lengths)
        wanted.append(float(torch.nn.functional.cross_entropy(logits, example.labels[1:], reduction="sum")))
    assert sequence_losses(cloud.head, hidden, packed) == pytest.approx(wanted, rel=1e-12)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 1)  # one position at a time
    assert sequence_losses(cloud.head, hidden, packed) == pytest.approx(wanted, rel=1e-12)
    total = sum(example.targets for example in batch)
    mean, _ = loss_and_gradient(cloud.head, hidden, packed, total, want_gradient=False)
    assert sum(wanted) / total == pytest.approx(mean, rel=1e-12)
