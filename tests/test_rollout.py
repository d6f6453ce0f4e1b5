"""Conversations as tokens: what is given and what is sampled, and how an episode ends."""

from types import SimpleNamespace

import pytest
import torch

from games import levels

from games.game import Observation

from games.pool import make_world
import rollout
from engines import torch_engine
from games.players import play_expert, random_agent
from support.demonstrations import expert_episodes


class Scripted:
    """An engine that answers from a script of texts, one per turn, the same for every row."""
    max_new_tokens = 24

    def __init__(self, chat, answers):
        self.chat, self.answers = chat, answers

    def start(self, seed):
        self.turn = -1

        self.asked = []

    def submit(self, row, tokens):
        self.asked.append(row)

    def poll(self):
        self.turn += 1
        rows, self.asked = self.asked, []
        text = self.answers[self.turn % len(self.answers)]
        ids = self.chat.tokenizer.encode(text, add_special_tokens=False)
        return [(row, ids, [-0.5] * len(ids)) for row in rows]


def test_the_pieces_are_the_whole_conversation(chat, pool):
    """Prompt, answers and observations joined are exactly what the chat template writes for the conversation."""
    game = levels.generated_game("train", 0)
    answers = ["<action>go to bed 1</action><|im_end|>", "<action>look</action><|im_end|>", "I think so.<|im_end|>"]
    (episode,), _ = rollout.play(Scripted(chat, answers), pool, chat, [game], 1, max_steps=3)
    world = make_world("alfworld")
    texts = [world.reset(game).text, world.step("go to bed 1").text, world.step("look").text]
    messages = [{"role": "system", "content": chat.system}]
    for text, answer in zip(texts, answers):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.removesuffix("<|im_end|>")}]
    whole = chat.tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert chat.tokenizer.decode(episode.tokens) == whole
    assert episode.tokens == chat.tokenizer.encode(whole, add_special_tokens=False)
    sampled = [t for t, s in zip(episode.tokens, episode.sampled) if s]
    assert chat.tokenizer.decode(sampled) == "".join(answers)
    for step, answer in zip(episode.steps, answers):
        assert chat.tokenizer.decode(episode.tokens[step.start:step.end]) == answer
    assert [s.malformed for s in episode.steps] == [False, False, True]
    assert len(episode.tokens) == len(episode.sampled) == len(episode.logprobs)
    assert {l for l, s in zip(episode.logprobs, episode.sampled) if not s} == {0.0}


def test_steps_know_the_states_and_the_text_between_which_they_lie(chat, pool):
    """As the world itself has them, played beside it; an answer without an action changes nothing and earns nothing."""
    game = levels.generated_game("train", 0)
    commands = [turn[1] for _, turns, _ in play_expert([game], pool) for turn in turns]
    answers = ["Well."] + [f"<action>{c}</action><|im_end|>" for c in commands]
    (episode,), _ = rollout.play(Scripted(chat, answers), pool, chat, [game], 1, max_steps=20)
    world = make_world("alfworld")
    seen = [world.reset(game)]
    seen += [world.step(c) for c in commands]
    states, texts = [o.state for o in seen], [o.text for o in seen]
    assert episode.won and [s.reward for s in episode.steps] == [0.0] * len(commands) + [1.0]
    assert [s.state for s in episode.steps] == states[:1] + states[:-1]
    assert [s.next_state for s in episode.steps] == states
    read = texts[:1] + [rollout.NO_ACTION] + texts[1:-1]
    assert [s.observation for s in episode.steps] == [rollout.digest(text) for text in read]
    assert episode.steps[0].malformed and len(set(states)) > 3


def test_an_answer_cut_off_gets_its_end_given_not_sampled(chat, pool):
    game = levels.generated_game("train", 0)
    (episode,), _ = rollout.play(Scripted(chat, ["<action>look</action>", "<action>look"]), pool, chat, [game], 1, max_steps=2)
    first, second = episode.steps
    assert episode.tokens[first.end] == chat.eos and not episode.sampled[first.end]
    assert second.malformed and not first.malformed


def test_two_actions_are_malformed(chat):
    parse = lambda text: chat.parse_action(chat.tokenizer.encode(text, add_special_tokens=False))
    assert parse("<think>hm</think><action> go to bed 1 </action>") == "go to bed 1"
    assert parse("<action>a</action><action>b</action>") is None and parse("<action></action>") is None and parse("go") is None


def test_flaw_rates_by_hand():
    """Five steps: refused, the same refused again, repeated but allowed, refused and malformed, unflawed."""
    steps = [rollout.Step(0, 1, "a", **{name: True for name in flaws}) for flaws in (
        ["inadmissible"], ["inadmissible", "repeated"], ["repeated"], ["inadmissible", "malformed"], [])]
    found = rollout.flaw_rates([rollout.Episode(None, 0, steps=steps[:2]), rollout.Episode(None, 1, steps=steps[2:])])
    assert found == pytest.approx({"malformed": 0.2, "inadmissible": 0.6, "no_effect": 0.0, "repeated": 0.4, "revisited": 0.0,
                                   "flawed": 0.8, "inadmissible_anew": 0.4})


def test_full_context_ends_an_episode_flagged(chat, pool):
    game = levels.generated_game("train", 0)
    first = len(chat.first_prompt(make_world("alfworld").reset(game).text))
    (episode,), _ = rollout.play(Scripted(chat, ["<action>look</action><|im_end|>"]), pool, chat, [game], 1,
                                 max_steps=20, max_context=first + 60)
    assert episode.truncated and 1 <= len(episode.steps) < 20 and len(episode.tokens) <= first + 60


def test_the_limit_of_steps_may_differ_by_task(chat, pool):
    games = [levels.generated_game("train", seed) for seed in range(12)]
    one = next(game for game in games if game.task_type != games[0].task_type)
    limits = {games[0].task_type: 2, one.task_type: 5}
    engine = Scripted(chat, ["<action>look</action><|im_end|>"])
    played, _ = rollout.play(engine, pool, chat, [games[0], one], 2, max_steps=limits)
    assert [len(e.steps) for e in played] == [2, 2, 5, 5]
    assert [len(turns) for _, turns, won in random_agent([games[0], one], pool, limits) if not won] == [2, 5]
    assert [len(turns) for _, turns, won in play_expert([games[0], one], pool, limits, sloppy=0.9) if not won] == [2, 5]


def test_a_bar_ends_full_also_where_episodes_end_early(chat, pool):
    """One episode plays its three steps, the other's context is full after one or two of them."""
    for room in (10**5, 60):
        bar = SimpleNamespace(n=0)
        bar.update = lambda n: setattr(bar, "n", bar.n + n)
        engine = Scripted(chat, ["<action>look</action><|im_end|>"] * 3)
        game = levels.generated_game("train", 0)
        room += len(chat.first_prompt(pool.reset([game])[0].text))
        (episode,), _ = rollout.play(engine, pool, chat, [game], 1, max_steps=3, max_context=room, bar=bar)
        assert bar.n == 3 and (len(episode.steps) < 3) == (room < 10**5)


def test_a_group_that_starts_differently_is_refused(chat):
    class Pool:
        def reset(self, games):
            return [Observation(str(i), [], i, 0.0, False, False) for i, _ in enumerate(games)]
    with pytest.raises(RuntimeError, match="start differently"):
        rollout.play(Scripted(chat, [""]), Pool(), chat, [levels.generated_game("train", 0)], 2)


def test_sampling_repeats_with_its_seed_and_greedy_takes_the_best(model, chat, pool):
    games = [levels.generated_game("train", s) for s in range(2)]
    engine = torch_engine.TorchEngine(model, chat.eos, max_new_tokens=4)
    tokens = lambda seed: [e.tokens for e in rollout.play(engine, pool, chat, games, 2, 2, seed=seed)[0]]
    assert tokens(1) == tokens(1) != tokens(2)
    engine.temperature = 0
    engine.start(0)
    prompt = chat.first_prompt("look")
    ids, _ = engine.generate([0], [prompt])[0]
    assert ids[0] == model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax()


def test_a_saved_policy_comes_back_the_same(model, tokenizer, tmp_path):
    """AutoTokenizer replaced the word splitting of a qwen2 folder: `assistant\\n` became two tokens, and a policy
    with 0.15 nats of loss won no game at all."""
    from support.policies import load_policy, save_policy
    save_policy(str(tmp_path / "policy"), model, tokenizer)
    loaded, again = load_policy(str(tmp_path / "policy"))
    text = "<|im_start|>assistant\n<action>go to cabinet 12</action><|im_end|>\n<|im_start|>user\n"
    assert again.encode(text) == tokenizer.encode(text) and again.decode(again.encode(text)) == text
    assert again.chat_template == tokenizer.chat_template and again.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([tokenizer.encode(text)])
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_expert_episodes_are_marked_as_sampled_and_win(chat, pool):
    games = [levels.generated_game("train", s) for s in range(6)]
    episodes = expert_episodes(games, pool, chat, progress=False)
    assert len(episodes) == 6
    for episode in episodes:
        for step in episode.steps:
            assert all(episode.sampled[step.start:step.end]) and not episode.sampled[step.start - 1]
            assert chat.parse_action(episode.tokens[step.start:step.end]) == step.action
        assert sum(episode.sampled) == sum(s.end - s.start for s in episode.steps)
