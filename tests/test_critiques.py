"""Learning to judge in the cold start: reasons that are true, a loss on the right tokens, a question that is answered."""

import functools
import json
import os
import sys

import pytest
import torch

import cold_start
from actor import forward
from games import levels
from games.players import play_expert
from rollout import QUESTION, VERDICTS
from support.checkpoints import load_head, save_checkpoint, write_trainer
from support.critiques import (QUESTION_LONG, critiques, lesson_loss, make_critic, make_lesson, written)
from support.demonstrations import expert_episodes, judged, write_messages
from support.policies import load_policy, save_policy, tiny_model
from test_critic import asker, completion, server  # noqa: F401

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RULES = make_critic(type("Flags", (), {"critic": "both", "critic_url": None}), None)


@pytest.fixture(scope="session")
def tokenizer():
    """The shipped one: an episode is some 250 of its tokens."""
    return load_policy(os.path.join(ROOT, "policies", "tiny"))[1]


def houses(begin, end):
    return [levels.generated_game("train", seed) for seed in range(begin, end)]


# ------------------------------------------------------------------------------------------------------- reasons

def test_the_reasons_in_houses_are_facts_of_the_game(pool):
    """Each checked against what the game allowed just then, which no player sees and the reasons are not made from."""
    seen = set()
    for _, turns, won in play_expert(houses(0, 16), pool, sloppy=0.7, seed=2):
        steps, carried = judged(turns), None
        for (text, command, before, after, *_), step, (label, reason) in zip(turns, steps, critiques("alfworld", turns, steps)):
            if text.startswith("You pick up the "):
                carried = " ".join(text.split()[4:6])
            if text.startswith("You move the "):
                carried = None
            allowed = set(before.admissible)
            here = {c.split(" ", 2)[2] for c in allowed if c.startswith("go to ")}  # everywhere but here
            kinds = {"already at ": lambda x: x not in here, " is elsewhere.": lambda x: x in here,
                     " is not here.": lambda x: not any(c.startswith(f"take {x} from") for c in allowed),
                     " is closed.": lambda x: f"open {x}" in allowed, " is open.": lambda x: f"close {x}" in allowed,
                     " is in hand.": lambda x: x == carried, " is not in hand.": lambda x: x != carried,
                     " is not searched yet.": lambda x: f"go to {x}" in allowed}
            assert label == (not step.flawed)
            for sentence, is_so in kinds.items():
                assert "None" not in reason or "None" in command  # a slip before the first move: "go to None"
                if sentence in reason:
                    assert is_so(reason.replace(sentence, "").rstrip(".")), (command, reason, text)
                    seen.add(sentence)
            assert step.inadmissible == (label == 0 and "tried before" not in reason and "tells nothing" not in reason
                                         and "leads back" not in reason)
    assert seen >= {"already at ", " is elsewhere.", " is closed.", " is open.", " is not searched yet."}


def test_the_reasons_of_one_house_word_for_word(pool):
    (_, turns, _), = play_expert(houses(3, 4), pool, sloppy=0.9, seed=2)
    found = [(command, reason) for (_, command, *_), (_, reason) in zip(turns, critiques("alfworld", turns, judged(turns)))]
    assert found == PLATE


PLATE = [  # it cools a plate and puts it into the sink, with six slips on the way
    ("go to cabinet 1", "cabinet 1 is not searched yet."), ("open cabinet 1", "cabinet 1 is closed."),
    ("move book 1 to drawer 1", "drawer 1 is elsewhere."), ("go to countertop 1", "countertop 1 is not searched yet."),
    ("look", "look tells nothing new."), ("take plate 1 from countertop 1", "the task asks for plate."),
    ("inventory", "inventory tells nothing new."), ("go to fridge 1", "there it can cool plate 1."),
    ("go to fridge 1", "already at fridge 1."), ("cool plate 1 with fridge 1", "the task asks for plate."),
    ("go to microwave 1", "microwave 1 is not searched yet."), ("go to fridge 1", "it leads back, and nothing is done."),
    ("go to sinkbasin 1", "plate 1 is for sinkbasin 1."), ("go to sinkbasin 1", "already at sinkbasin 1."),
    ("move plate 1 to sinkbasin 1", "the task asks for plate.")]


def test_the_reasons_in_the_laboratory_name_what_is_not_there(pool):
    games = levels.list_games("scienceworld", "train", task_types=["find-non-living-thing"], count=2)
    named = 0
    for _, turns, _ in play_expert(games, pool, sloppy=0.9, seed=1):
        steps, shown = judged(turns), ""
        for (text, command, before, after, *_), step, (label, reason) in zip(turns, steps, critiques("scienceworld", turns, steps)):
            shown = text if text.startswith("You teleport") else shown + text
            assert label == (not step.flawed) and (reason != "the score rises." or after.score > before.score)
            if reason.endswith(" in sight."):
                thing = reason.removeprefix("no ").removesuffix(" in sight.")
                assert step.inadmissible and thing in command and thing not in shown
                named += 1
    assert named


# -------------------------------------------------------------------------------------------------------- the lesson

@pytest.fixture
def shown(chat, pool):
    """Careless experts' episodes, with critiques by rule."""
    return expert_episodes(houses(0, 6), pool, chat, max_steps=60, progress=False, sloppy=0.6, seed=1, critic=RULES)


def test_loss_falls_on_verdicts_and_critiques_alone(shown, chat, model):
    """Every branch by hand, in a plain pass over prefix, question and answer: only the answer's tokens count; the short
    form is the question that RL asks; both forms weigh good and bad alike."""
    lesson = make_lesson(shown, chat, "both", 3, torch.Generator().manual_seed(0))
    head = torch.nn.Linear(32, 1)
    out = forward(model, [e.tokens for e in shown], [e.sampled for e in shown], branches=lesson.branches, value_head=head,
                  action_ends=[[s.end for s in e.steps] for e in shown])
    encode = lambda text: chat.tokenizer.encode(text, add_special_tokens=False)
    expected, total, k = 0.0, {0: 0.0, 1: 0.0}, 0
    for episode, asked in zip(shown, lesson.branches):
        for (end, question, answer), (same, longer, explained) in zip(asked[::2], asked[1::2]):
            i, = [i for i, step in enumerate(episode.steps) if step.end == end == same]
            label, sentence = episode.critiques[i]
            assert question == chat.next_prompt(QUESTION) and answer == encode(VERDICTS[label])
            assert longer == chat.next_prompt(QUESTION_LONG)
            assert chat.tokenizer.decode(explained) == f"{sentence}\n{VERDICTS[label]}<|im_end|>"
            assert explained[-1 - len(answer):-1] == answer  # the very verdict of the short form
            for given, wanted in ((question, answer), (longer, explained)):
                ids = torch.tensor([episode.tokens[:end] + given + wanted])
                logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
                first = end + len(given)
                each = torch.stack([logprobs[first + n - 1, token] for n, token in enumerate(wanted)])
                assert torch.allclose(each.sum(), out["verdicts"][k], atol=1e-4)
                weight = lesson.answer_weights[k].item() * len(wanted)  # a mean over its tokens
                weight = weight if wanted is explained else lesson.answer_weights[k].item()
                expected = expected - weight * (each.mean() if wanted is explained else each.sum())
                total[label] += weight / 2
                k += 1
    assert k == len(lesson.answer_weights) and k >= 16
    assert total[0] == pytest.approx(0.5, abs=1e-5) and total[1] == pytest.approx(0.5, abs=1e-5)
    flawed = torch.tensor([s.flawed for e in shown for s in e.steps])
    bce = torch.nn.functional.softplus(torch.where(flawed, out["values"], -out["values"]))
    expected = expected + 0.5 * bce[flawed].mean() + 0.5 * bce[~flawed].mean()
    assert torch.allclose(lesson_loss(out, lesson), expected, atol=1e-4)


def judging(model, head, episodes, chat):
    """Of the question as RL asks it: mean log-probability of (either verdict, the true one); and the head's accuracy, mean
    over classes."""
    test = make_lesson(episodes, chat, "both", 4, torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = forward(model, [e.tokens for e in episodes], [e.sampled for e in episodes], branches=test.branches,
                      value_head=head, action_ends=[[step.end for step in e.steps] for e in episodes])
    words = [chat.tokenizer.encode(word, add_special_tokens=False)[0] for word in VERDICTS]
    either = out["verdict_logits"][::2].log_softmax(-1)[:, words].logsumexp(-1)  # every other branch is a long one
    right = (out["values"] > 0) == (test.labels == 1)
    accuracy = sum(right[test.labels == label].float().mean().item() for label in (0, 1)) / 2
    return either.mean().item(), out["verdicts"][::2].mean().item(), accuracy


@pytest.mark.long
def test_a_cold_start_with_a_critic_answers_the_question_of_rl_at_once(tokenizer, chat, pool):
    """On games that it never saw, before any warm-up. To the shipped policy the verdicts are as good as impossible."""
    learnt, held_out = (sorted(expert_episodes(houses(*span), pool, chat, max_steps=60, progress=False, sloppy=0.6,
                                               critic=RULES), key=lambda e: len(e.tokens))[:count]
                        for span, count in (((0, 40), 24), ((100, 112), 8)))
    shipped = load_policy(os.path.join(ROOT, "policies", "tiny"))[0]
    assert judging(shipped, torch.nn.Linear(128, 1), held_out, chat)[0] < -15
    model, head = tiny_model(tokenizer, hidden=64, layers=2, heads=2, feed_forward=128, seed=0), torch.nn.Linear(64, 1)
    cold_start.cold_start(model, learnt, epochs=20, batch=8, lr=5e-3, progress=False, critic_coef=1.0, value_head=head,
                          lesson=functools.partial(lesson_of, chat))
    either, true, accuracy = judging(model, head, held_out, chat)
    assert either > -0.3 and true > -1.0 and accuracy > 0.6, (either, true, accuracy)


def lesson_of(chat, chosen, generator):
    return make_lesson(chosen, chat, "both", 4, generator)


def test_a_value_head_is_found_again_where_it_was_saved(tokenizer, model, tmp_path):
    """By a cold start or a run; not where it read another layer, nor where there is none."""
    head, other = torch.nn.Linear(32, 1), torch.nn.Linear(32, 1)
    folder = str(tmp_path / "judge")
    save_policy(folder, model, tokenizer, extras=write_trainer(head), prompt="short", critic="value")
    assert load_head(folder, other) and torch.equal(head.weight, other.weight) and torch.equal(head.bias, other.bias)
    run = str(tmp_path / "run")
    os.makedirs(run)
    save_checkpoint(run, model, tokenizer, torch.optim.AdamW(model.parameters()), head, 3, head_layer=1)
    other = torch.nn.Linear(32, 1)
    assert not load_head(f"{run}/checkpoint-000003", other) and not torch.equal(head.weight, other.weight)
    assert load_head(f"{run}/checkpoint-000003", other, layer=1) and torch.equal(head.weight, other.weight)
    save_policy(folder, model, tokenizer, extras=write_trainer(None), prompt="short")
    assert not load_head(folder, other) and not load_head("HuggingFaceTB/some-model", other)
    os.truncate(f"{run}/checkpoint-000003/trainer.pt", 100)
    with pytest.raises(ValueError, match="trainer.pt cannot be read .* remove it"):
        load_head(f"{run}/checkpoint-000003", other, layer=1)


# --------------------------------------------------------------------------------- language models: written, exported

def test_a_language_model_writes_critiques_of_a_balanced_choice_of_steps(server, tmp_path, pool):  # noqa: F811
    """Its verdicts count, whatever the rules say; what it is not asked has none."""
    played = [(turns, judged(turns)) for _, turns, _ in play_expert(houses(0, 4), pool, sloppy=0.6, seed=1)]
    server.answer = lambda content: (200, completion(
        "It is refused.\nVERDICT: bad" if content.endswith("Nothing happens.") else "Sensible.\nVERDICT: good"))
    found = written(played, asker(server, tmp_path), 12, torch.Generator().manual_seed(0))
    steps = [(step, turn, said) for (turns, steps), those in zip(played, found)
             for turn, step, said in zip(turns, steps, those)]
    asked = [one for one in steps if one[2][0] != -1]
    assert len(steps) > 12 == len(asked) and sum(step.flawed for step, *_ in asked) == 6
    assert all(said == ((0, "It is refused.") if turn[3].text == "Nothing happens." else (1, "Sensible."))
               for _, turn, said in asked)
    contents = [request["messages"][1]["content"] for _, request in server.asked]
    assert len(contents) <= 12 and all("Your task is to" in text for text in contents)


def test_the_chat_dataset_asks_about_steps_and_only_the_last_answer_is_learnt(pool, tmp_path):
    path = str(tmp_path / "expert.jsonl")
    assert write_messages(houses(0, 3), pool, "SYSTEM", path, sloppy=0.6, seed=1, critic=RULES) == 3
    talks = [json.loads(line) for line in open(path)]
    assert [t["messages"] for t in talks if "weight" not in t["messages"][-1]] == [
        json.loads(line)["messages"] for line in plain_dataset(pool, tmp_path)]  # the episodes are what they were
    asked, verdicts = [t["messages"] for t in talks if "weight" in t["messages"][-1]], []
    for short, long in zip(asked[::2], asked[1::2]):
        assert short[:-2] == long[:-2] and short[-2]["content"] == QUESTION and long[-2]["content"] == QUESTION_LONG
        assert [m["role"] for m in short] == ["system"] + ["user", "assistant"] * (len(short) // 2)
        assert [m["weight"] for m in short if m["role"] == "assistant"] == [0] * (len(short) // 2 - 1) + [1]
        assert short[-3]["content"].startswith("<action>")
        reason, verdict = long[-1]["content"].split("\n")
        assert verdict == short[-1]["content"] and len(reason) > 10
        verdicts.append(verdict)
    assert verdicts.count("good") == verdicts.count("bad") >= 3


def plain_dataset(pool, tmp_path):
    path = str(tmp_path / "plain.jsonl")
    write_messages(houses(0, 3), pool, "SYSTEM", path, sloppy=0.6, seed=1)
    return open(path).readlines()


@pytest.mark.parametrize("arguments, message", [
    (["--critic", "generative"], "--critic needs bad actions to judge: add --sloppy 0.5"),
    (["--critic", "value", "--sloppy", "0.5", "--jsonl", "x.jsonl"], "--critic value has no words to write"),
    (["--critic", "both", "--sloppy", "0.5", "--critic-url", "http://x/v1"], "--critic-url and --critic-model go together"),
    (["--critic-url", "http://x/v1", "--critic-model", "judge"], "--critic-url and --critic-model go together"),
    (["--slips", "shown"], "--slips shown needs slips"),
    (["--slips", "shown", "--sloppy", "0.5", "--jsonl", "x.jsonl"], "is no part of a dataset"),
])
def test_flags_that_cannot_be_meant(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cold_start.py", "--games", "generated", *arguments])
    with pytest.raises(SystemExit):
        cold_start.main()
    assert message in capsys.readouterr().err


def test_a_critic_that_does_not_answer_is_one_line_and_nothing_is_half_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["cold_start.py", "--games", "generated", "--episodes", "2", "--workers", "1", "--sloppy",
                                      "0.6", "--critic", "generative", "--critic-url", "http://127.0.0.1:9/v1",
                                      "--critic-model", "judge", "--jsonl", str(tmp_path / "expert.jsonl")])
    monkeypatch.setattr("support.critiques.ask_critic", functools.partial(
        __import__("support.critic").critic.ask_critic, retries=0))
    with pytest.raises(SystemExit, match="judge at http://127.0.0.1:9/v1 does not answer .* go on with the same command"):
        cold_start.main()
    assert os.listdir(tmp_path) == ["expert.jsonl.critic.jsonl"]
