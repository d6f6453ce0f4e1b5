"""What an update may and may not depend on: padding, micro-batches, observation tokens, branches; what learns."""

import copy
from types import SimpleNamespace

import pytest
import torch

import rollout
from engines import torch_engine
from classifier_loss import BAD, GOOD
import train
from support.batches import make_question
from support.run import gradient_norms_apart, set_rate
from support.setup import make_optimizer
from games.game import Observation
from actor import forward
from helpers import advantages_of, lay_out, make_batch, micro_batches, sampled_logprobs, update


def gradients(model):
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])


def run_update(model, chat, episodes, max_tokens=8192, head=None, question=False, coef=0.5, kl=False):
    batch = make_batch(episodes, advantages_of(episodes))
    if kl:
        batch.ref_logprobs = batch.old_logprobs - 0.3
    optimizer = torch.optim.SGD(list(model.parameters()), lr=0.0)
    stats = update(model, head, optimizer, batch, make_question(chat) if question else None, kl_coef=0.1 * kl,
                   classifier_coef=coef, max_tokens=max_tokens, max_norm=1e9)
    return stats, gradients(model)


def test_sampling_logprobs_equal_the_trainers(model, chat, episodes):
    """Ragged rows, a cache that lives on over turns, rows that drop out: recorded numbers are the trainer's."""
    batch = lay_out(episodes)
    assert (batch.old_logprobs - sampled_logprobs(model, batch, 1.0, 500)).abs().max() < 1e-4
    assert (batch.old_logprobs - sampled_logprobs(model, batch, 2.0, 500)).abs().max() > 0.1  # the test can fail


def test_finished_conversations_leave_the_others_alone(model, chat):
    """Rows of different length, one of which stops after the first turn: the other's numbers stay the trainer's."""
    engine = torch_engine.TorchEngine(model, chat.eos, temperature=0.7, max_new_tokens=5)
    engine.start(seed=3)
    sequences = {0: [5, 6, 7], 1: [8, 9], 2: [10, 11, 12, 13]}
    episodes = {row: rollout.Episode(None, 0) for row in sequences}
    for row, ids in sequences.items():
        episodes[row].give(ids)
    for rows in ([0, 1, 2], [0, 2], [2]):
        for row, (ids, logprobs) in zip(rows, engine.generate(rows, [episodes[r].tokens for r in rows])):
            episodes[row].steps.append(rollout.Step(len(episodes[row].tokens), len(episodes[row].tokens) + len(ids), None))
            episodes[row].sample(ids, logprobs)
            episodes[row].give([20 + row, 21])
    batch = lay_out(list(episodes.values()))
    assert (batch.old_logprobs - sampled_logprobs(model, batch, 0.7, 8192)).abs().max() < 1e-4


def test_gradient_is_unchanged_by_micro_batches_and_padding(model, chat, episodes):
    """One episode at a time has no padding at all; all six together are padded to the longest."""
    head = torch.nn.Linear(32, 1)
    width = max(len(e.tokens) for e in episodes)
    assert len(micro_batches(episodes, 1)) == 6 and len(micro_batches(episodes, 10 * width)) == 1
    assert len({len(e.tokens) for e in episodes}) > 1
    whole, a = run_update(model, chat, episodes, 10 * width, head, question=True, kl=True)
    parts, b = run_update(model, chat, episodes, 1, head, question=True, kl=True)
    assert torch.allclose(a, b, atol=1e-5 * a.abs().max()) and a.abs().max() > 1e-4
    for name in whole:
        assert whole[name] == pytest.approx(parts[name], abs=1e-4), name


def test_observation_tokens_get_no_gradient(model, chat, episodes):
    """d loss / d logits is zero at every place that predicts a given token, and not at those that predict sampled ones."""
    episode = episodes[0]
    caught = {}

    def catch(module, inputs, output):
        caught["rows"] = inputs[0].shape[0]

    handle = model.get_output_embeddings().register_forward_hook(catch)
    run_update(model, chat, [episode, episodes[1]])
    handle.remove()
    assert caught["rows"] == sum(episode.sampled) + sum(episodes[1].sampled)  # the head never sees another place
    # And what is scored is what the model itself says of the sampled tokens, one place to their left.
    batch = make_batch(episodes[:2], advantages_of(episodes[:2]))
    out = forward(model, batch.sequences, batch.sampled)
    logits = model(input_ids=torch.tensor([episode.tokens])).logits[0]
    by_hand = [torch.log_softmax(logits[t - 1], -1)[episode.tokens[t]].item() for t, s in enumerate(episode.sampled) if s]
    assert out["logprobs"][:len(by_hand)].tolist() == pytest.approx(by_hand, abs=1e-4)
    assert len(batch.part([0]).token_weights) == len(by_hand)


@pytest.mark.parametrize("form", ["generative", "value"])
def test_classifier_gradient_reaches_the_shared_trunk(model, chat, episodes, form):
    """With all advantages zero only L_cls is left; it must move every layer of the trunk, embeddings included."""
    for episode in episodes:
        episode.reward = 1.0
    head = torch.nn.Linear(32, 1) if form == "value" else None
    run_update(model, chat, episodes, head=head, question=form == "generative")
    touched = {name for name, p in model.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    # a bias of the keys shifts all attention scores of a query alike and has no gradient by construction
    expected = {name for name, _ in model.model.named_parameters() if "k_proj.bias" not in name}
    assert expected <= touched | {name for name in expected if "k_proj.bias" in name}
    _, without = run_update(model, chat, episodes)
    assert without.abs().max() == 0.0


def test_branch_sees_its_prefix_and_nothing_after_its_step(model, chat, episodes):
    """A branch's verdict equals that of a separate sequence, and changing later tokens does not change it."""
    episode = episodes[0]
    question = make_question(chat)
    q, verdicts = question.prompts[True], question.verdicts
    step = episode.steps[0]
    asked = [(step.end, q, verdicts[GOOD]), (episode.steps[1].end, q, verdicts[BAD])]
    packed = forward(model, [episode.tokens], [episode.sampled], branches=[asked])
    alone = episode.tokens[:step.end] + q
    logits = model(input_ids=torch.tensor([alone])).logits[0, -1]
    expected = torch.log_softmax(logits, -1)[verdicts[GOOD][0]].item()
    assert len(verdicts[GOOD]) == 1 and packed["verdicts"][0].item() == pytest.approx(expected, abs=1e-4)
    plain = forward(model, [episode.tokens], [episode.sampled])["logprobs"]
    assert torch.allclose(packed["logprobs"], plain, atol=1e-4)  # the episode does not see the branches
    other = [t if i < step.end else (t + 1) % 300 for i, t in enumerate(episode.tokens)]
    changed = forward(model, [other], [episode.sampled], branches=[[(step.end, q, verdicts[GOOD])]])
    assert changed["verdicts"][0].item() == pytest.approx(expected, abs=1e-4)


def test_two_updates_learn_the_labels(model, chat, episodes):
    """L_cls falls when it is trained on: both forms, a hundred steps on six episodes."""
    head, advantages = torch.nn.Linear(32, 1), torch.zeros(len(episodes))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    batch = make_batch(episodes, advantages)
    losses = [update(model, head, optimizer, batch, make_question(chat), classifier_coef=1.0) for _ in range(100)]
    assert losses[-1]["generative_loss"] < 0.5 * losses[0]["generative_loss"]
    assert losses[-1]["value_loss"] < 0.5 * losses[0]["value_loss"]
    for cell in ("generative_good_won", "generative_bad_lost", "value_good_lost", "value_bad_won"):
        assert losses[-1][f"right_{cell}"] == losses[-1][f"count_{cell}"] > 0


# ----------------------------------------------------------------------------------------- a toy game is learnt

class ToyPool:
    """Two steps: after prompt 1 the right answer is 3, after prompt 2 it is 5; reward for both right."""
    restarts = 0

    def reset(self, games):
        self.right = [True] * len(games)
        self.at = [0] * len(games)
        return [Observation("1", ["3", "5"], 0, 0.0, False, False) for _ in games]

    def step(self, commands):
        out = []
        for slot, command in commands:
            self.right[slot] &= command == ("3", "5")[self.at[slot]]
            self.at[slot] += 1
            done = self.at[slot] == 2
            won = done and self.right[slot]
            out.append(Observation("2", ["3", "5"], self.at[slot], float(won), won, done))
        return out


class ToyChat:
    eos = 7
    first_prompt = staticmethod(lambda text: [int(text)])
    next_prompt = staticmethod(lambda text, ended=True: [int(text)])
    parse = staticmethod(lambda ids: (str(ids[0]), None))


def test_a_two_step_game_is_learnt():
    """From 1/64 by chance to nearly always: sampling, advantages, alignment of tokens and the loss all have to be right."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
                                         tie_word_embeddings=False, bos_token_id=None, eos_token_id=7, pad_token_id=0))
    engine, optimizer = torch_engine.TorchEngine(model, 7, max_new_tokens=1), torch.optim.AdamW(model.parameters(), lr=1e-2)
    rates = []
    for iteration in range(40):
        episodes, _ = rollout.play(engine, ToyPool(), ToyChat, list(range(8)), 32, max_steps=2, seed=iteration)
        update(model, None, optimizer, make_batch(episodes, advantages_of(episodes)))
        rates.append(sum(e.won for e in episodes) / len(episodes))
    assert rates[0] < 0.1 and rates[-1] > 0.9


# ------------------------------------------------------------------------------- the classifier's rate, question, norms

def test_a_question_after_an_answer_that_was_cut_begins_as_play_goes_on(model, chat, episodes):
    """Regression: the question always began as after an answer that ended, so a cut one was left without its end."""
    question, batch = make_question(chat), make_batch(episodes, advantages_of(episodes))
    steps = [(e, step) for e in episodes for step in e.steps]
    cut = [e.tokens[step.end - 1] != chat.eos for e, step in steps]
    assert any(cut) and question.prompts[False] == [chat.eos] + question.prompts[True]
    batch.question_weights = torch.full((len(steps),), 1 / len(steps))
    asked = [entry for one in batch.branches(question) for entry in one]
    assert [ids == question.prompts[False] for _, ids, _ in asked] == cut
    # and that is what the next observation's prompt looks like in the episode itself
    e, step = next((e, step) for (e, step), c in zip(steps, cut) if c and step.end < len(e.tokens))
    assert e.tokens[step.end] == chat.eos and not e.sampled[step.end]


def test_the_value_head_learns_at_a_rate_of_its_own(model, chat, episodes):
    """Regression: in the policy's group, at a language model's 1e-6, it moved by 3e-5 in a whole run."""
    args, head = SimpleNamespace(lr=1e-6, head_lr=1e-2, warmup=0, lr_end=1.0, iterations=5), torch.nn.Linear(32, 1)
    optimizer = make_optimizer(args, model, head)
    assert [sorted(p.shape for p in part["params"]) for part in optimizer.param_groups][1] == [(1,), (1, 32)]
    before, head_before = copy.deepcopy(model.state_dict()), head.weight.clone()
    batch = make_batch(episodes, advantages_of(episodes))
    for iteration in range(1, 6):
        set_rate(optimizer, args, iteration)
        update(model, head, optimizer, batch, classifier_coef=1.0)
    assert (head.weight - head_before).abs().max() > 0.02
    moved = max((p - before[n]).abs().max().item() for n, p in model.state_dict().items())
    assert 0 < moved < 1e-5


def test_gradient_norms_apart_are_those_of_the_two_terms(model, chat, episodes):
    """lambda L_cls alone scales with lambda; GRPO alone is what a run without classifier computes."""
    head, batch = torch.nn.Linear(32, 1), make_batch(episodes, advantages_of(episodes))
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.0)
    found = []
    for coef in (0.3, 0.6):
        args = SimpleNamespace(clip=0.2, kl_coef=0.0, classifier_coef=coef, temperature=1.0, micro_tokens=500,
                               classifier="both", head_layer=-1, epo=0.0)
        run = SimpleNamespace(args=args, model=model, value_head=head, optimizer=optimizer, shared=None, turn_entropies=[],
                              question=make_question(chat))
        found.append(gradient_norms_apart(run, batch, train.gradients))
    assert found[1]["grad_norm_classifier"] == pytest.approx(2 * found[0]["grad_norm_classifier"], rel=1e-4)
    alone = update(model, None, optimizer, batch, max_norm=1e9)
    assert found[0]["grad_norm_grpo"] == found[1]["grad_norm_grpo"] == pytest.approx(alone["grad_norm"], rel=1e-4)
