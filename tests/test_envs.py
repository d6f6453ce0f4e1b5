"""The games: generated houses, the expert, speed without change, flaws, dead workers, broken files."""

import os
import signal
import subprocess
import sys
from collections import defaultdict

import pytest

from support import bench
from games import levels
from games.pool import make_world
from games import houses
from support.demonstrations import play_expert
from games.pool import EnvPool
from rollout import Step, judge

OFFICIAL = levels.official_folder()


def test_every_generated_game_is_won_by_the_expert(pool, request):
    """Hundreds of seeds with --long, dozens otherwise; all six task types; mostly in 20 steps or fewer."""
    counts = (150, 100, 150) if request.config.getoption("--long") else (40, 30, 40)
    for split, count in zip(("train", "valid_seen", "valid_unseen"), counts):
        games = levels.list_games("alfworld", split, "generated", count=count)
        results = list(play_expert(games, pool))
        assert len(results) == count and all(won for *_, won in results)
        assert {game.task_type for game, *_ in results} == set(levels.TASK_TYPES)
        assert sum(len(turns) <= 20 for _, turns, _ in results) >= 0.98 * count


def test_as_many_generated_games_of_a_kind_as_asked_for():
    """L2's test has two kinds of task: `--count 400` is 400 such houses, the first of them those that no count gives."""
    usual = levels.level_games("alfworld", "L2", "test", "generated")
    more = levels.level_games("alfworld", "L2", "test", "generated", count=400)
    assert len(more) == len({game.name for game in more}) == 400 and more[:len(usual)] == usual
    assert {levels.TASK_TYPES[game.task_type] for game in more} == {5, 6}


def pairs_and_layout(problem):
    kind = {}
    for line in problem.splitlines():
        words = line.strip("()").split()
        if words and words[0] in ("receptacleType", "objectType"):
            kind[words[1]] = words[2][:-4]
    inside = [line.strip("()").split() for line in problem.splitlines() if line.startswith("(inReceptacle")]
    receptacles = sorted(kind[w.strip("()").split()[1]] for w in problem.splitlines() if w.startswith("(receptacleType"))
    return {(kind[o], kind[r]) for _, o, r in inside}, tuple(receptacles)


def test_unseen_houses_show_what_training_never_shows():
    """Read from the finished PDDL text, not from the generator's own functions."""
    trained_pairs, trained_layouts = set(), set()
    for seed in range(1500):
        for split in ("train", "valid_seen"):
            game = houses.generate(split, seed)
            pairs, layout = pairs_and_layout(game["pddl_problem"])
            target, end = game["name"].split("-")[-2:]
            trained_pairs |= {p for p in pairs if p[0] != "DeskLamp"} | {(target, end)}
            trained_layouts.add(layout)
    for seed in range(200):
        game = houses.generate("valid_unseen", seed)
        _, layout = pairs_and_layout(game["pddl_problem"])
        assert layout not in trained_layouts
        assert tuple(game["name"].split("-")[-2:]) not in trained_pairs


def test_splits_use_different_houses():
    texts = [houses.generate(split, seed)["pddl_problem"] for split in houses.SPLITS for seed in range(200)]
    assert len(set(texts)) == len(texts)


def replay(games, processes=2):
    world = make_world("alfworld")
    played = [bench.record(game, world, seed=i) for i, game in enumerate(games)]
    stock, _, _ = bench.stock_replay([(bench.game_data(g), c) for g, (c, *_) in zip(games, played)], processes)
    for game, (commands, ours, _), theirs in zip(games, played, stock):
        assert len(ours) == len(commands) + 1 > 10
        for a, b in zip(ours, theirs):
            assert list(a) == b, game.name


def test_generated_games_play_as_in_stock_alfworld(request):
    """Raw observation, admissible commands and success, byte for byte, expert play and random play."""
    count = 12 if request.config.getoption("--long") else 4
    replay([levels.generated_game("valid_unseen", seed) for seed in range(count)])


@pytest.mark.skipif(not OFFICIAL, reason="needs the official ALFWorld games (set ALFWORLD_DATA)")
def test_official_games_play_as_in_stock_alfworld(request):
    """Every 40th of the 274 validation games, every 8th with --long, all with --all-games (stock takes seconds for each)."""
    games = levels.list_games("alfworld", "valid_seen", "official") + levels.list_games("alfworld", "valid_unseen", "official")
    assert len(games) == 274 and games == sorted(games[:140]) + sorted(games[140:])
    option = request.config.getoption
    replay(games[::1 if option("--all-games") else 8 if option("--long") else 40])


@pytest.mark.skipif(not OFFICIAL, reason="needs the official ALFWorld games (set ALFWORLD_DATA)")
def test_expert_on_official_pick_two(pool):
    """ALFWorld's hand-coded expert wins a quarter of these."""
    games = levels.list_games("alfworld", "valid_seen", "official", task_types=[6])
    won = [won for *_, won in play_expert(games, pool)]
    assert len(won) == 24 and sum(won) / len(won) > 0.75


def test_a_game_again_after_another_is_the_same(pool):
    """Loading is skipped when the game is loaded already; that must never mean the wrong game."""
    a, b = levels.generated_game("train", 0), levels.generated_game("train", 1)
    world = make_world("alfworld")
    first = world.reset(a)
    world.step(first.admissible[0])
    assert world.reset(a) == first
    other = world.reset(b)
    assert other.text != first.text and world.reset(a) == first and world.reset(b) == other


def test_flaws_in_a_real_game():
    """A scripted episode with one of each flaw."""
    world = make_world("alfworld")
    now = world.reset(levels.generated_game("train", 0))  # bed, cabinet, desk, drawer, ...: see the observation
    assert "bed 1" in now.text and "desk 1" in now.text
    tried, visited, seen = defaultdict(set), {now.state}, []
    script = ["go to bed 1", "go to desk 1", "go to bed 1", "go to desk 1", "go to bed 99", "go to bed 99", "look",
              "open cabinet 1", "go to cabinet 1", "open cabinet 1"]
    for command in script:
        step, before = Step(0, 0, command), now
        now = world.step(command)
        judge(step, before, now, tried, visited)
        seen.append({name for name in ("inadmissible", "no_effect", "repeated", "revisited") if getattr(step, name)})
    assert seen == [set(), set(), {"revisited"}, {"repeated", "revisited"}, {"inadmissible"}, {"inadmissible", "repeated"},
                    {"no_effect"}, {"inadmissible"}, set(), set()]


def test_a_killed_worker_is_replaced_and_its_episodes_go_on():
    games = [levels.generated_game("train", seed) for seed in range(4)]
    with EnvPool(2) as pool:
        first = pool.reset(games)
        commands = [(slot, o.admissible[1]) for slot, o in enumerate(first)]
        expected = [pool.step(commands), pool.step([(s, "look") for s in range(4)])]
        pool.reset(games)
        assert pool.step(commands) == expected[0]
        os.kill(pool.processes[0].pid, signal.SIGKILL)
        assert pool.step([(s, "look") for s in range(4)]) == expected[1] and pool.restarts == 1
        os.kill(pool.processes[1].pid, signal.SIGSTOP)  # hangs instead of dying
        pool.timeout = 1.0
        assert pool.step([(s, "look") for s in range(4)])[3].text == expected[1][3].text and pool.restarts >= 2


def run_python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True,
                          cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def test_wrong_path_is_one_clear_line_and_creates_nothing(tmp_path):
    missing = str(tmp_path / "not" / "there")
    done = run_python("import sys, evaluate; sys.argv = ['evaluate.py', '--games', 'official', '--agent', 'expert'];"
                      "evaluate.main()", ALFWORLD_DATA=missing)
    assert done.returncode == 1 and "no folder json_2.1.1" in done.stderr and "Traceback" not in done.stderr
    assert not os.path.exists(missing)
    done = run_python("from games import levels; print(levels.choose_games('auto'))", ALFWORLD_DATA=missing)
    assert done.stdout.strip() == "generated"


def test_each_environment_maps_the_small_library():
    import fast_downward
    original = os.path.join(os.path.dirname(fast_downward.__file__), "libdownward.so")
    make_world("alfworld")
    assert os.path.getsize(fast_downward.interface.DOWNWARD_LIB_PATH) < 2_000_000 < os.path.getsize(original)
