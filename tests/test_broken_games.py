"""Broken ALFWorld game files: each is named, left out and counted, whoever plays, and the others go on."""

import json
import os
import subprocess
import sys

import pytest

import rollout
from evaluate import evaluate, reference_result
from games import houses, levels
from games.game import BadGame, Game, Observation
from games.pool import EnvPool, make_world
from test_rollout import Scripted

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HOUSE = houses.generate("train", 3)  # cool some plate and put it in sinkbasin
GOOD = {key: HOUSE[key] for key in ("pddl_domain", "grammar", "pddl_problem")} | {"solvable": True}
DOMAIN, GRAMMAR, PROBLEM = GOOD["pddl_domain"], GOOD["grammar"], GOOD["pddl_problem"]
HOME = "json_2.1.1/valid_seen/pick_cool_then_place_in_recep-Plate-None-SinkBasin-1"
BLOCKS = ("(define (domain blocks) (:predicates (on ?x ?y) (clear ?x)) (:action move :parameters (?x ?y) "
          ":precondition (clear ?y) :effect (and (on ?x ?y) (not (clear ?y)))))")


def but(**changes):
    return json.dumps(GOOD | changes)


def typo(right, wrong):
    assert right in PROBLEM
    return but(pddl_problem=PROBLEM.replace(right, wrong))


def without(key):
    return json.dumps({k: v for k, v in GOOD.items() if k != key})


LISTED = {  # seen when the games are listed: what the file holds -> what the line says
    "truncated": (but()[:5000], "unreadable"),
    "empty": ("", "unreadable"),
    "null": ("null", "JSON's null"),
    "a list": (f"[{but()}]", "no game in it"),
    "a text": ('"game"', "no game in it"),
    "no grammar": (without("grammar"), "no grammar in it"),
    "no mark": (without("solvable"), "not marked solvable"),
    "unsolvable": (but(solvable=False), "marked unsolvable"),
    "old ALFWorld": (but(grammar=GRAMMAR.replace("move {o} to {r}", "put {o} in/on {r}")), "`put`"),
    "half a grammar": (but(grammar=GRAMMAR[:len(GRAMMAR) // 4]), "a cut grammar"),
    "empty problem": (but(pddl_problem=" \n"), "no pddl_problem in it"),
    "null problem": (but(pddl_problem=None), "no pddl_problem in it"),
    "null domain": (but(pddl_domain=None), "no pddl_domain in it"),
}
LOADED = {  # seen when it is loaded
    "no PDDL": (but(pddl_problem="It is a nice house."), "cannot load it"),
    "half a problem": (but(pddl_problem=PROBLEM[:len(PROBLEM) // 2]), "cannot load it"),
    "half a domain": (but(pddl_domain=DOMAIN[:len(DOMAIN) // 2]), "cannot load it"),
    "unknown object": (typo("agent1 loc_start)", "agent1 loc_99)"), "cannot load it"),
    "unknown type": (typo("(?r - receptacle)", "(?r - cupboard)"), "cannot load it"),
    "unknown predicate": (typo("(openable ", "(opnable "), "predicate 'opnable'"),
    "typo in the goal": (typo("(inReceptacle ?o", "(inRecptacle ?o"), "predicate 'inrecptacle'"),
    "foreign domain": (but(pddl_domain=BLOCKS), "does not know the predicate"),
    "cut grammar": (but(grammar=GRAMMAR[:len(GRAMMAR) * 9 // 10]), "cannot load it"),
}
DEADLY = {  # the native library exits, and the worker process with it
    "goal of wrong arity": (typo("(inReceptacle ?o ?r)", "(inReceptacle ?o)"), "kills or hangs"),
    "typo in an effect": (but(pddl_domain=DOMAIN.replace("(opened ?r)", "(opend ?r)")), "kills or hangs"),
}
PLAYED = {  # seen when a command is to be answered
    "a rule left out": (but(grammar=GRAMMAR.replace('"GotoLocation.feedback"', '"Goto"')), "play 'go to"),
}


def write(root, **files):
    """Official games of these names and contents below `root`; their sorted names."""
    names = []
    for name, content in sorted(files.items()):
        folder = root / HOME / f"trial_{name}"
        folder.mkdir(parents=True)
        (folder / "game.tw-pddl").write_text(content)
        names.append(os.path.join(*folder.parts[-3:]))
    return names


def test_every_file_that_holds_no_game_is_named_and_counted(tmp_path, monkeypatch):
    contents = {f"{i:02}": content for i, (content, _) in enumerate(LISTED.values())}
    *bad, good = write(tmp_path, z=json.dumps(GOOD), **contents)
    monkeypatch.setattr(houses, "ALFWORLD_DATA", str(tmp_path))
    lines = []
    games = levels.list_games("alfworld", "valid_seen", "official", warn=lines.append)
    assert [game.name for game in games] == [good]
    assert len(lines) == 1 and lines[0].startswith(f"skipped {len(bad)} of {len(bad) + 1} games: ")
    assert all(name in lines[0] for name in bad) and all(reason in lines[0] for _, reason in LISTED.values())


@pytest.mark.parametrize("kind", [*LISTED, *LOADED, *DEADLY, *PLAYED])
def test_a_broken_game_beside_a_good_one(kind, tmp_path, monkeypatch, pool, chat):
    content, reason = {**LISTED, **LOADED, **DEADLY, **PLAYED}[kind]
    bad, good = write(tmp_path, a=content, b=json.dumps(GOOD))
    monkeypatch.setattr(houses, "ALFWORLD_DATA", str(tmp_path))
    lines = []
    games = levels.list_games("alfworld", "valid_seen", "official", warn=lines.append)
    if kind in LISTED:
        assert [g.name for g in games] == [good] and len(lines) == 1
        assert lines[0].startswith(f"skipped 1 of 2 games: {bad}: ") and reason in lines[0]
        assert "\n" not in lines[0]
        return
    assert [g.name for g in games] == [bad, good] and lines == []
    engine = Scripted(chat, ["<action>go to fridge 1</action><|im_end|>"])
    model, played = evaluate(engine, pool, chat, games, max_steps=2)
    expert, luck = (reference_result(agent, games, pool, 30) for agent in ("expert", "random"))
    for result in (model, expert, luck):
        assert list(result["played"]) == [good] and len(result["bad_games"]) == 1, result
        line, = result["bad_games"]
        assert line.startswith(bad + ": ") and reason in line and "\n" not in line and len(line) < 400
    assert expert["won"] == 1 and [len(e.steps) for e in played] == [2]
    training, report = rollout.play(engine, pool, chat, games, group_size=3, max_steps=2)
    assert [e.game.name for e in training] == [good] * 3 and report["bad_games"] == model["bad_games"]


def test_a_deadly_game_is_found_among_others_and_remembered(tmp_path):
    """Four restarts used to end the run, and name the first game of the batch."""
    for name, (content, _) in DEADLY.items():
        (tmp_path / name).write_text(content)
    one, other = (Game("alfworld", "valid_seen", name, "", str(tmp_path / name)) for name in DEADLY)
    a, b = levels.generated_game("train", 0), levels.generated_game("train", 1)
    with EnvPool(1) as pool:
        first, second = pool.reset([a, b])
        after = pool.step([(0, "look"), (1, "inventory")])
    with EnvPool(1) as pool:
        found = pool.reset([a, one, one, other, b])
        assert [found[0], found[4]] == [first, second] and [type(o) for o in found[1:4]] == [BadGame] * 3
        assert [str(o).split(":")[0] for o in found[1:4]] == [one.name, one.name, other.name]
        assert pool.restarts == 5  # one for the batch, two for each of the games
        assert pool.step([(0, "look"), (4, "inventory")]) == after
        assert isinstance(pool.reset([other, a])[0], BadGame) and pool.restarts == 5


def test_a_worker_that_cannot_start_is_no_game_s_fault(monkeypatch):
    with EnvPool(1) as pool:
        broken = lambda: subprocess.Popen(["false"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        monkeypatch.setattr(pool, "_start", broken)
        pool.processes[0].kill()
        with pytest.raises(RuntimeError, match="workers of alfworld die before"):
            pool.reset([levels.generated_game("train", 0)])


def test_a_failed_load_leaves_no_game_behind(tmp_path):
    """Loading is skipped where a game is loaded already: never where another one was tried in between."""
    (tmp_path / "bad").write_text(but(pddl_domain=DOMAIN.replace("(:action Open", "(:action Open ")))
    (tmp_path / "good").write_text(but())
    bad, good = (Game("alfworld", "valid_seen", name, "", str(tmp_path / name)) for name in ("bad", "good"))
    world = make_world("alfworld")
    first = world.reset(good)
    assert isinstance(first, Observation)
    with pytest.raises(BadGame, match="cannot load it"):  # the same problem and grammar in another domain
        world.reset(bad)
    assert world.reset(good) == first
    assert world.step("go to fridge 1").text.startswith("You arrive at fridge 1.")


@pytest.mark.parametrize("agent", ["expert", "model"])
def test_where_no_game_can_be_played_the_exit_status_says_so(agent, tmp_path):
    write(tmp_path, a=LOADED["half a problem"][0], b=LOADED["unknown object"][0])
    done = subprocess.run([sys.executable, os.path.join(ROOT, "evaluate.py"), "--agent", agent, "--games",
                           "official", "--level", "L0", "--workers", "1"], capture_output=True, text=True,
                          env={**os.environ, "ALFWORLD_DATA": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("evaluate.py: none of the 2 games can be played: valid_seen/pick_cool")
