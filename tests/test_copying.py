"""docs/copying.md: its code, as it stands on the page, in the real TRL; and TRL's loss against ours.

Needs TRL (requirements-trl.txt); skipped without it."""

import os
import re

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: requirements-trl.txt")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # about rollout_func

from classifier_loss import value_head_loss  # noqa: E402
from grpo import group_advantages, grpo_loss, token_weights  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def page():
    """The names that the page's code defines."""
    with open(os.path.join(ROOT, "docs", "copying.md")) as file:
        code = re.findall(r"^```python\n(.*?)^```", file.read(), re.DOTALL | re.MULTILINE)
    names = {"__name__": "docs.copying"}
    for one in code:
        exec(compile(one, "docs/copying.md", "exec"), names)
    assert len(code) == 3
    return names


@pytest.fixture
def trainer(page, pool, tmp_path):
    """make(**config) -> (trainer, batch): two games, four episodes each of the shipped policy, scored by TRL."""
    def make(**config):
        config = {"games": 2, "group_size": 4, "max_steps": 8, "seed": 5, "use_bias_correction_kl": False, **config}
        trainer = page["make_trainer"](pool, os.path.join(ROOT, "policies", "tiny"), str(tmp_path), **config)
        trainer.model.train()
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        rows = [{"prompt": str(i)} for i in range(2) for _ in range(4)]
        batch = trainer._generate_and_score_completions(rows)
        assert trainer.model.training  # sampling left it as it was
        return trainer, rows, batch
    return make


def flat(batch, rows, name):
    """(N,) a (B, T) tensor's entries at the sampled tokens of some rows."""
    return torch.cat([batch[name][b][(batch["completion_mask"] * batch["tool_mask"])[b] > 0] for b in rows])


def counts(batch):
    return (batch["completion_mask"] * batch["tool_mask"]).sum(1)


def ours(trainer, batch, advantages, weighting, rows=None):
    """grpo_loss on the log-probabilities that TRL computes for its batch."""
    rows = range(len(counts(batch))) if rows is None else rows
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logprobs, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, batch["completion_ids"].shape[1])
    episode = torch.arange(len(rows)).repeat_interleave(counts(batch)[list(rows)])
    weights = token_weights(episode, episode, weighting)
    return grpo_loss(flat({**batch, "now": logprobs}, rows, "now"), flat(batch, rows, "old_per_token_logps"),
                     advantages[list(rows)][episode], weights, ref_logprobs=flat(batch, rows, "ref_per_token_logps"),
                     kl_coef=0.01)[0]


def moved(trainer, batch):
    """Old log-probabilities that the policy has moved away from, some beyond the clip range; advantages of either sign."""
    generator = torch.Generator().manual_seed(0)
    shape = batch["completion_ids"].shape
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, shape[1])
    batch["old_per_token_logps"] = now + 0.3 * torch.randn(shape, generator=generator)
    batch["ref_per_token_logps"] = now + 0.3 * torch.randn(shape, generator=generator)
    batch["advantages"] = torch.randn(shape[0], generator=generator)
    return batch


@pytest.mark.parametrize("loss_type, weighting", [("bnpo", "token"), ("dapo", "token"), ("grpo", "episode")])
def test_our_loss_is_trl_s(page, trainer, loss_type, weighting):
    """To 1e-6, value and gradient, on real episodes of several turns, beyond the clip range, with KL."""
    made, _, batch = trainer(loss_type=loss_type)
    batch = moved(made, batch)
    gradients, losses = [], []
    for loss in (super(page["GCDTrainer"], made).compute_loss(made.model, batch),
                 ours(made, batch, batch["advantages"], weighting)):
        made.model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and abs(losses[0]) > 1e-3
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].norm() > 1e-2
    other = ours(made, batch, batch["advantages"], {"token": "episode", "episode": "token"}[weighting]).item()
    assert abs(other - losses[0]) > 1e-4  # the weighting makes a difference that this test would see
    made.args.use_bias_correction_kl = True  # TRL's default: another KL
    assert abs(super(page["GCDTrainer"], made).compute_loss(made.model, batch).item() - losses[0]) > 5e-6


def test_micro_batches_change_bnpo_and_not_dapo(page, trainer):
    """Two micro-batches of unlike length: dapo's parts add up to the batch's loss as ours do, bnpo's do not."""
    gaps = {}
    for loss_type in ("dapo", "bnpo"):
        made, _, batch = trainer(loss_type=loss_type, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        batch = moved(made, batch)
        order = counts(batch).argsort()
        parts = [{k: v[rows] if v.dim() else v for k, v in batch.items()} for rows in (order[:4], order[4:])]
        with torch.no_grad():
            total = sum(super(page["GCDTrainer"], made).compute_loss(made.model, part) for part in parts)
            gaps[loss_type] = abs(total - ours(made, batch, batch["advantages"], "token")).item()
            own = lambda one: made.compute_loss(made.model, one) - super(page["GCDTrainer"], made).compute_loss(
                made.model, one)
            whole = own(batch).item()
            assert sum(map(own, parts)).item() == pytest.approx(whole, abs=1e-6)  # the classifier's parts add up
            made.current_gradient_accumulation_steps = 1  # an optimizer step for each part: its mean is the whole's
            assert sum(map(own, parts)).item() / 2 == pytest.approx(whole, abs=1e-6)
    assert gaps["dapo"] < 1e-6 < 1e-4 < gaps["bnpo"]


def test_advantages_differ_by_the_std(trainer):
    """TRL divides by the sample's standard deviation, we by the population's: a factor of sqrt((G - 1) / G), G = 4."""
    made, _, _ = trainer()
    rewards = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    made.reward_funcs = [lambda completions, **_: rewards.tolist()]
    batch = made._generate_and_score_completions([{"prompt": str(i)} for i in range(2) for _ in range(4)])
    wanted = group_advantages(rewards, torch.arange(2).repeat_interleave(4))[0]
    assert torch.allclose(batch["advantages"], wanted * (3 / 4) ** 0.5, atol=5e-4)  # eps 1e-4 there, 1e-6 here
    assert (batch["advantages"] - wanted).abs().min() > 0.05


def test_the_batch_that_reaches_the_loss(page, trainer):
    """Labels, ends and weights stay with their episodes, and the head's values are those at the ends of the actions."""
    made, rows, batch = trainer()
    assert batch["ends"].shape == batch["labels"].shape == batch["label_weights"].shape
    for b, row in enumerate(rows):
        n = len(row["ends"])
        assert batch["ends"][b, :n].tolist() == row["ends"] and not batch["ends"][b, n:].any()
        assert batch["labels"][b, :n].tolist() == [int(not flaw) for flaw in row["flawed"]]
        assert all(batch["tool_mask"][b, end - 1] == 1 for end in row["ends"])  # the last token of an answer
    assert batch["label_weights"].sum() == pytest.approx(1.0)
    with torch.no_grad():
        whole = made.compute_loss(made.model, batch) - super(page["GCDTrainer"], made).compute_loss(made.model, batch)
        values, labels = [], []
        for b, row in enumerate(rows):
            ids = batch["prompt_ids"][b][batch["prompt_mask"][b] > 0].tolist() + batch["completion_ids"][b].tolist()
            for end, flaw in zip(row["ends"], row["flawed"]):
                cut = ids[:int(batch["prompt_mask"][b].sum()) + end]
                hidden = made.model.get_decoder()(input_ids=torch.tensor([cut])).last_hidden_state[0, -1]
                values.append(made.value_head(hidden)[0])
                labels.append(int(not flaw))
        weights = batch["label_weights"][batch["ends"] > 0]
        by_hand = value_head_loss(torch.stack(values), torch.tensor(labels), weights)
    assert whole.item() == pytest.approx(0.3 * by_hand.item(), abs=1e-5) and by_hand > 0.1


def test_one_step_lowers_both_losses(page, pool, tmp_path):
    """TRL's own train(): one optimizer step in two micro-batches, both losses computed again on the same episodes."""
    made = page["make_trainer"](
        pool, os.path.join(ROOT, "policies", "tiny"), str(tmp_path), games=4, group_size=4, max_steps=10, seed=1,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, num_train_epochs=1, learning_rate=1e-4,
        lr_scheduler_type="constant")
    seen, score = [], made._generate_and_score_completions

    def keep(inputs):
        seen.append(score(inputs))
        return seen[-1]
    made._generate_and_score_completions = keep
    head = made.value_head.weight.detach().clone()
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train()
    assert made.state.global_step == 1 and len(seen) == 1
    batch, after = seen[0], [p.detach().clone() for p in made.model.parameters()]
    assert batch["advantages"].abs().max() > 0  # some group had won and lost episodes
    made.model.train()
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps

    @torch.no_grad()
    def losses(parameters, head_weight):
        for p, value in zip(made.model.parameters(), parameters):
            p.copy_(value)
        made.value_head.weight.copy_(head_weight)
        own = super(page["GCDTrainer"], made).compute_loss(made.model, batch).item()
        return own, (made.compute_loss(made.model, batch).item() - own) / 0.3
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    trained_head = made.value_head.weight.detach().clone()
    losses(before, head)
    with torch.no_grad():  # else TRL takes the present policy for the one that sampled
        batch["old_per_token_logps"], _, _ = made._get_per_token_logps_and_entropies(
            made.model, ids, mask, batch["completion_ids"].shape[1])
    (grpo_before, head_before), (grpo_after, head_after) = losses(before, head), losses(after, trained_head)
    assert grpo_after < grpo_before and head_after < head_before
    _, trunk_only = losses(after, head)
    assert trunk_only < head_before  # the trunk, too, has learnt to tell them apart
    assert (trained_head - head).abs().max() == pytest.approx(1e-3, rel=0.1)  # Adam's first step is as long as the head's rate
