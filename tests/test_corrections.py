"""Instructions against flaws: when they come and go, what the prompt says, what a cold start shows, resuming."""

import json
import sys
from types import SimpleNamespace

import pytest

import rollout
from games import levels
from games.players import SLIPS, play_expert
from rollout import CORRECTIONS, FLAWS, Episode, Step
from support.corrections import asked_for, check_taught, correct, obeyed, slips_of, standing
from support.demonstrations import expert_episodes, judged, write_messages
from support.policies import make_chat, save_policy
from test_rollout import Scripted


def rates(**found):
    return {**dict.fromkeys(FLAWS, 0.0), **found}


def test_an_instruction_comes_above_the_threshold_and_goes_at_half_of_it():
    """Two flaws, by hand: it stays between 0.15 and 0.30, whichever way the rate moves."""
    now, history = (), []
    for inadmissible, repeated in ((0.30, 0.31), (0.31, 0.29), (0.29, 0.16), (0.16, 0.15), (0.15, 0.29), (0.3, 0.31)):
        now = standing(rates(inadmissible=inadmissible, repeated=repeated), now, 0.3)
        history.append(now)
    assert history == [("repeated",), ("inadmissible", "repeated"), ("inadmissible", "repeated"), ("inadmissible",), (),
                       ("repeated",)]


def test_it_joins_the_system_prompt_of_the_next_episodes_and_nothing_else(chat, pool, capsys):
    """Ten steps of which four repeat; the switch is said once, the prompt of `play` has it, observations stay as they
    were; when the flaw is gone the prompt is the old one."""
    run = SimpleNamespace(args=SimpleNamespace(correct=0.3), chat=chat)
    episode = Episode("game", 0, steps=[Step(0, 0, "look", repeated=i < 4) for i in range(10)])
    game, answers = levels.generated_game("train", 0), ["<action>look</action><|im_end|>", "<action>inventory</action><|im_end|>"]
    texts = []
    for repeated in (4, 4, 1):
        (played,), _ = rollout.play(Scripted(chat, answers), pool, chat, [game], 1, max_steps=2)
        texts.append(chat.tokenizer.decode(played.tokens))
        for i, step in enumerate(episode.steps):
            step.repeated = i < repeated
        row = correct(run, [episode])
        assert row == {f"correct_{name}": int(name == "repeated" and repeated == 4) for name in FLAWS}
    (played,), _ = rollout.play(Scripted(chat, answers), pool, chat, [game], 1, max_steps=2)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"correct repeated: 40% of steps, the prompt says from now on: {CORRECTIONS['repeated']}",
                    "correct repeated: 10% of steps, the prompt no longer speaks of it"]
    assert texts[1] == texts[2] == texts[0].replace(chat.system, f"{chat.system} {CORRECTIONS['repeated']}") != texts[0]
    assert chat.tokenizer.decode(played.tokens) == texts[0]
    off = SimpleNamespace(args=SimpleNamespace(correct=0.0), chat=chat)
    assert correct(off, [episode]) == {} and chat.corrections == ()


@pytest.mark.parametrize("env", levels.ENVS)
def test_shown_episodes_obey_every_instruction_in_their_prompt(env, tokenizer, pool):
    """By the flaws that the world itself shows; the others have slips of all kinds; each instruction is shown."""
    games = [levels.generated_game("train", seed) for seed in range(60)]
    if env == "scienceworld":
        games = levels.list_games(env, "train", task_types=["find-non-living-thing"], count=6)
    chat = rollout.ChatFormat(tokenizer, rollout.SYSTEM[env])
    episodes = expert_episodes(games, pool, chat, max_steps=60, progress=False, sloppy=0.6, seed=1, correct=True)
    shown, free = set(), set()
    for episode in episodes:
        prompt = tokenizer.decode(episode.tokens[:episode.steps[0].start])
        there = {name for name in FLAWS if CORRECTIONS[name] in prompt}
        broken = {name for name in FLAWS if any(getattr(step, name) for step in episode.steps)}
        assert not there & broken and tuple(n for n in FLAWS if n in there) == obeyed(episode.game, 1, episode.steps)
        shown |= there
        free |= broken if not asked_for(episode.game, 1) else set()
    assert chat.corrections == ()
    if env == "alfworld":
        assert shown == set(FLAWS) and free >= {"inadmissible", "no_effect", "repeated", "revisited"}


def test_forbidden_slips_are_not_made(pool):
    """Without slips of any kind a careless expert is a careful one; with one kind, only that."""
    games = [levels.generated_game("train", seed) for seed in range(4)]
    commands = lambda **how: [[turn[1] for turn in turns] for _, turns, _ in play_expert(games, pool, **how)]
    assert commands(sloppy=0.9, kinds=lambda game: ()) == commands()
    idle = commands(sloppy=0.9, kinds=lambda game: ("idle",))
    assert [[c for c in one if c not in ("look", "inventory")] for one in idle] == commands() != idle
    wander = commands(sloppy=0.9, kinds=lambda game: ("wander",))  # where that is not possible, nothing in its place
    assert wander != commands() and not {"look", "inventory"} & {command for one in wander for command in one}
    assert commands(sloppy=0.9) == commands(sloppy=0.9, kinds=lambda game: SLIPS)


def test_every_game_asks_for_what_its_slips_leave_possible():
    for seed in range(40):
        game = levels.generated_game("train", seed)
        asked, slips = asked_for(game, 3), slips_of(game, 3)
        assert ("wander" in slips) == ("revisited" not in asked) and asked == asked_for(game, 3)
        assert ("made up" in slips) == ("inadmissible" not in asked)


def test_the_chat_dataset_puts_the_instruction_into_the_system_prompt(pool, tmp_path):
    path, games = str(tmp_path / "expert.jsonl"), [levels.generated_game("train", seed) for seed in range(8)]
    write_messages(games, pool, "SYSTEM", path, sloppy=0.6, seed=1, correct=True)
    systems = {line["game"]: line["messages"][0]["content"] for line in map(json.loads, open(path))}
    kinds = lambda game: slips_of(game, 1)
    for game, turns, _ in play_expert(games, pool, sloppy=0.6, seed=1, kinds=kinds):
        assert systems[game.name] == " ".join(["SYSTEM", *(CORRECTIONS[n] for n in obeyed(game, 1, judged(turns)))])
    assert len(set(systems.values())) > 2


def test_a_policy_that_was_never_shown_them_is_one_line(tmp_path, tokenizer, model):
    with pytest.raises(ValueError, match="--correct needs a policy that was shown .* cold_start.py --correct .* --init p "):
        check_taught({"prompt": "short"}, "p")
    check_taught({"prompt": "short", "correct": True}, "p")
    check_taught({}, "a language model reads")


def test_a_checkpoint_is_played_with_the_instructions_that_stood(tmp_path, tokenizer, model):
    folder = str(tmp_path / "checkpoint")
    save_policy(folder, model, tokenizer, prompt="short", corrections=("repeated",))
    chat, _ = make_chat(tokenizer, "alfworld", folder)
    assert CORRECTIONS["repeated"] in tokenizer.decode(chat.first_prompt("x"))


def test_flags_that_cannot_be_meant(monkeypatch, capsys):
    import cold_start
    import train
    for main, arguments, message in ((cold_start.main, ["--correct"], "--correct needs slips that an instruction can"),
                                     (train.parse_arguments, ["--correct", "1.5"], "--correct must be a share of steps")):
        monkeypatch.setattr(sys, "argv", ["x", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err
