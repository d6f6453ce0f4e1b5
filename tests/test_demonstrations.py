"""What experts did as training data: judged as a policy's steps are, learnt from however few there are."""

import copy
import random
import re

import pytest
import torch

import rollout
from cold_start import cold_start
from games import levels
from rollout import FLAWS, SYSTEM, ChatFormat
from games.players import play_expert
from support.demonstrations import TOOLS, expert_episodes, rename_house
from test_rollout import Scripted


def flaws(episode):
    return [{name for name in FLAWS if getattr(step, name)} for step in episode.steps]


@pytest.mark.parametrize("env", levels.ENVS)
def test_demonstrations_are_judged_as_play_judges(env, tokenizer, pool):
    """A policy that says word for word what the careless expert said gets the same flaws, reward and end."""
    chat = ChatFormat(tokenizer, SYSTEM[env])
    games = [levels.generated_game("train", seed) for seed in range(4)]
    if env == "scienceworld":
        games = levels.list_games(env, "train", task_types=["find-non-living-thing"], count=3)
    seen = set()
    for seed, game in enumerate(games):
        shown, *copies = expert_episodes([game], pool, chat, max_steps=60, progress=False, sloppy=0.7,
                                         seed=seed, copies=2)
        script = [f"<action>{step.action}</action><|im_end|>" for step in shown.steps]
        (played,), _ = rollout.play(Scripted(chat, script), pool, chat, [game], max_steps=len(script),
                                    max_context=10_000)
        assert flaws(shown) == flaws(played) and all(flaws(other) == flaws(shown) for other in copies)
        assert (shown.won, shown.score) == (played.won, played.score)
        assert (shown.tokens, shown.sampled) == (played.tokens, played.sampled)
        seen = seen.union(*flaws(shown))
        assert not shown.steps[-1].flawed  # what wins is no slip
    assert seen >= ({"inadmissible", "no_effect", "revisited"} if env == "alfworld" else {"no_effect"})


def test_a_renamed_house_is_the_same_house(pool):
    """Names and numbers change, one for one: what is the same thing stays so, and two things never become one."""
    games = [levels.generated_game("train", seed) for seed in range(30)]
    things = lambda text: re.findall(r"[a-z]+ \d+", text)
    changed = 0
    for number, (_, turns, won) in enumerate(play_expert(games, pool, 20)):
        say = rename_house(random.Random(number))
        texts = [text for observation, command, *_ in turns for text in (observation, command)]
        pairs = {(one, two) for text in texts for one, two in zip(things(text), things(say(text)), strict=True)}
        assert len({one for one, _ in pairs}) == len({two for _, two in pairs}) == len(pairs)
        kinds = {(one.split()[0], two.split()[0]) for one, two in pairs}
        assert all((one in TOOLS) == (two in TOOLS) and (one == two or one not in TOOLS) for one, two in kinds)
        task = lambda text: text.partition("task is to: ")[2].split()  # names without a number change along
        assert all(dict(kinds).get(one, two) == two for one, two in zip(task(texts[0]), task(say(texts[0])), strict=True))
        changed += sum(one != two for one, two in pairs)
    assert changed > 200


def test_a_cold_start_on_fewer_episodes_than_a_batch_learns_from_them(model, chat, pool):
    """It used to make no update at all, and saved the weights as they were."""
    games = [levels.generated_game("train", seed) for seed in range(3)]
    episodes = expert_episodes(games, pool, chat, progress=False)

    def loss():
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([e.tokens])).logits[0] for e in episodes]
        logprobs = [torch.log_softmax(x, -1) for x in logits]
        return -sum(lp[t - 1, e.tokens[t]].item() for lp, e in zip(logprobs, episodes)
                    for t, sampled in enumerate(e.sampled) if sampled)

    untouched, before = copy.deepcopy(model.state_dict()), loss()
    cold_start(model, episodes, epochs=10, batch=32, lr=1e-2, progress=False)
    assert all(not torch.equal(p, untouched[name]) for name, p in model.named_parameters())
    assert loss() < 0.7 * before
    with pytest.raises(ValueError, match="no episodes to learn from"):
        cold_start(model, [], progress=False)
