"""Speeds as ratios, measured side by side in one run: machines differ and are noisy, ratios less so.

    python -m support.bench                 # everything, some 5 minutes on two cores
    python -m support.bench --only envs     # the environments against stock ALFWorld and ScienceWorld
    python -m support.bench --only models   # a language model plays and learns (support/bench_models.py)
    python -m support.bench --only sizes    # the shape of a tiny policy (support/bench_sizes.py)

Nothing here is asserted anywhere: it is measured, printed, and quoted in README.md with the machine it ran on.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# -------------------------------------------------------------------------------- ALFWorld, stock and with a memory

def game_data(game):
    from games import houses
    if isinstance(game.source, int):
        return houses.generate(game.split, game.source)
    with open(game.source) as file:
        return json.load(file)


def record(game, world, seed, expert_steps=30, random_steps=10):
    """Play the expert, then at random; returns (commands, transcript, seconds of all steps), transcript as stock's."""
    from games.experts import search_expert
    rng, commands, seconds = random.Random(seed), [], [0.0]
    observation = world.reset(game)
    transcript = [[world.raw, observation.admissible, observation.won]]

    def step(command):
        clock = time.perf_counter()
        observation = world.step(command)
        seconds[0] += time.perf_counter() - clock
        commands.append(command)
        transcript.append([world.raw, observation.admissible, observation.won])
        return observation

    try:
        agent = search_expert(observation.text)
        command = next(agent)
        for _ in range(expert_steps):
            observation = step(command)
            command = agent.send(observation.text)
    except (StopIteration, ValueError):
        pass
    for _ in range(random_steps):
        observation = step(rng.choice(observation.admissible + ["open the pod bay doors"]))
    return commands, transcript, seconds[0]


def stock_main():
    """Child process: replay jobs [(game data, commands)] on stock ALFWorld; JSON in, JSON out."""
    jobs, out = json.load(sys.stdin), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs.pddl import PddlEnv
    env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
    transcripts, reset_seconds, step_seconds = [], 0.0, 0.0
    for data, commands in jobs:
        clock = time.perf_counter()
        env.load(data)
        state = env.reset()
        reset_seconds += time.perf_counter() - clock
        transcript = [[state.feedback, state["admissible_commands"], bool(state["won"])]]
        for command in commands:
            clock = time.perf_counter()
            state, _, _ = env.step(command)
            step_seconds += time.perf_counter() - clock
            transcript.append([state.feedback, state["admissible_commands"], bool(state["won"])])
        transcripts.append(transcript)
    json.dump({"transcripts": transcripts, "reset": reset_seconds, "step": step_seconds}, out)
    out.flush()


def stock_replay(jobs, processes=1):
    """Stock ALFWorld in `processes` children (our memory patches TextWorld for a whole process)."""
    shares = [jobs[i::processes] for i in range(processes)]
    children = [subprocess.Popen([sys.executable, "-m", "support.bench", "--stock"], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=HERE) for _ in shares]
    for child, share in zip(children, shares):
        json.dump(share, child.stdin)
        child.stdin.close()
    replies = [json.loads(child.stdout.read()) for child in children]
    for child in children:
        child.stdout.close()
        child.wait()
    transcripts = [None] * len(jobs)
    for i, reply in enumerate(replies):
        transcripts[i::processes] = reply["transcripts"]
    return transcripts, sum(r["reset"] for r in replies), sum(r["step"] for r in replies)


def bench_envs(count=10, group=8):
    """Steps per second on one core, and resets of a game inside a group, against stock."""
    from games import levels
    from games.pool import make_world
    games = levels.list_games("alfworld", "valid_unseen", "auto", warn=lambda line: None)
    games = [games[i] for i in range(0, len(games), max(1, len(games) // count))][:count]
    world = make_world("alfworld")
    played = [record(game, world, seed=i) for i, game in enumerate(games)]
    steps = sum(len(commands) for commands, *_ in played)
    resets = step_seconds = 0.0
    for game, (commands, *_) in zip(games, played):
        world.reset(game)
        for _ in range(group):
            clock = time.perf_counter()
            world.reset(game)
            resets += time.perf_counter() - clock
            for command in commands:
                clock = time.perf_counter()
                world.step(command)
                step_seconds += time.perf_counter() - clock
    transcripts, stock_reset, stock_step = stock_replay([(game_data(g), c) for g, (c, *_) in zip(games, played)])
    same = all(a == [list(x) for x in b] for a, (_, b, _) in zip(transcripts, played))
    kind = "official" if isinstance(games[0].source, str) else "generated"
    print(f"\nALFWorld, {len(games)} {kind} games, {steps} steps, one core   (identical transcripts: {same})")
    for name, seconds in (("step, first episode", sum(t for *_, t in played) / steps),
                          ("step, later in a group", step_seconds / (steps * group))):
        print(f"  {name:24} stock {1000 * stock_step / steps:8.2f} ms   here {1000 * seconds:8.2f} ms   "
              f"ratio {stock_step / steps / seconds:6.1f}")
    reset = resets / (len(games) * group)
    print(f"  {'reset inside a group':24} stock {1000 * stock_reset / len(games):8.2f} ms   here {1000 * reset:8.2f} ms   "
          f"ratio {stock_reset / len(games) / reset:6.1f}")


# ------------------------------------------------------------------------------ ScienceWorld, stock and leanly stepped

def bench_scienceworld(steps=15):
    """Steps per second of one environment against the stock package, on the gold paths of a game of each task."""
    from games import levels
    from games.pool import make_world
    from games.scienceworld import SAME_ORDER, find_java
    os.environ["PATH"] += os.pathsep + os.path.dirname(find_java())  # the stock package wants `java` there
    os.environ["JAVA_TOOL_OPTIONS"] = " ".join(SAME_ORDER)  # lists in the same order, so that transcripts can be compared
    from scienceworld import ScienceWorldEnv
    stock, world = ScienceWorldEnv(envStepLimit=10_000), make_world("scienceworld")
    tasks = [task for task in levels.VARIATIONS if not task.startswith("mendelian")]  # their gold paths take ten seconds each
    games = [levels.list_games("scienceworld", "test", task_types=[task])[0] for task in tasks]
    for game in [games[0], *games]:
        if game is games[0]:  # twice: the first time warms both Java machines up
            seconds, same, done = {"stock": 0.0, "here": 0.0, "stock reset": 0.0, "here reset": 0.0}, True, 0
        path = world.gold_path(game)[:steps]
        clock = time.perf_counter()
        stock.load(*game.source, "easy")
        seen = [stock.reset()[0]]
        seconds["stock reset"] += time.perf_counter() - clock
        for command in path:
            clock = time.perf_counter()
            seen.append(stock.step(command)[0])
            seconds["stock"] += time.perf_counter() - clock
        clock = time.perf_counter()
        world.reset(game)
        seconds["here reset"] += time.perf_counter() - clock
        ours = [world.raw]
        for command in path:
            clock = time.perf_counter()
            world.step(command)
            seconds["here"] += time.perf_counter() - clock
            ours.append(world.raw)
        same, done = same and seen == ours, done + len(path)
    stock.close()
    print(f"\nScienceWorld, {len(tasks)} games, {done} steps, one core   (identical observations: {same})")
    for name, a, b, n in (("step", "stock", "here", done), ("reset", "stock reset", "here reset", len(tasks))):
        print(f"  {name:24} stock {1000 * seconds[a] / n:8.2f} ms   here {1000 * seconds[b] / n:8.2f} ms   "
              f"ratio {seconds[a] / seconds[b]:6.1f}")
    worlds = [make_world("scienceworld") for _ in range(128)]
    clock = time.perf_counter()
    for i, one in enumerate(worlds):
        one.reset(games[i % len(games)])
    print(f"  128 environments reset in {time.perf_counter() - clock:.1f} s", end="")
    status = f"/proc/{world.machine.process.pid}/status"
    if os.path.exists(status):  # Linux
        with open(status) as file:
            resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
        print(f"; their Java machine then holds {resident / 1e3:.0f} MB", end="")
    print()


# ------------------------------------------------------------------------------------------- playing and updating

def bench_loop(model_folder, tasks=16, group=8, repeats=3):
    """Playing against updating in the default run, and what the classifier adds to an update: train.py's own functions."""
    from types import SimpleNamespace

    import torch

    from actor import forward
    from engines.torch_engine import TorchEngine
    from games import levels
    from games.pool import EnvPool
    from rollout import play
    from support.batches import lay_out, make_question, micro_batches
    from support.policies import load_policy, make_chat
    from train import LABELS, gradients, weigh

    model, tokenizer = load_policy(model_folder)
    chat, _ = make_chat(tokenizer, "alfworld", model_folder)
    engine, question = TorchEngine(model, chat.ends, max_new_tokens=24), make_question(chat)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=0.0)  # time it, change nothing
    games = levels.sample_games(levels.list_games("alfworld", "train", "generated"), tasks, 0)
    with EnvPool(os.cpu_count()) as pool:
        play(engine, pool, chat, games[:2], 2, 20)  # warm up
        clock = time.perf_counter()
        episodes, report = play(engine, pool, chat, games, group, 20, seed=1)
        play_seconds = time.perf_counter() - clock
    args = SimpleNamespace(clip=0.2, kl_coef=0.0, classifier_coef=0.3, temperature=1.0, micro_tokens=8192, head_layer=-1,
                           epo=0.0, iterations=1, labels="flaws", weighting="token", questions=3)
    batch = lay_out(episodes)
    batch.advantages = (2.0 * batch.won - 1.0)
    batch.labels = LABELS["flaws"](batch, None)
    weigh(args, batch, seed=0)

    def separately():
        """The same questions as sequences of their own: the prefix is computed again for each."""
        asked = [(episode.tokens[:end] + ids, verdict) for episode, one in zip(episodes, batch.branches(question))
                 for end, ids, verdict in one]
        asked.sort(key=lambda pair: -len(pair[0]))
        for begin in range(0, len(asked), 16):
            part = asked[begin:begin + 16]
            out = forward(model, [ids + verdict for ids, verdict in part],
                          [[False] * len(ids) + [True] * len(verdict) for ids, verdict in part])
            (-out["logprobs"].mean()).backward()

    def timed(question=None, head=None, apart=False):
        run, best = SimpleNamespace(args=args, model=model, optimizer=optimizer, value_head=head, question=question,
                                    shared=None, turn_entropies=[]), float("inf")
        for _ in range(repeats):
            clock = time.perf_counter()
            gradients(args, run, batch)
            if apart:
                separately()
            optimizer.step()
            best = min(best, time.perf_counter() - clock)
        return best

    alone = timed()
    print(f"\n{len(episodes)} episodes, {sum(len(e.tokens) for e in episodes):,} tokens, {torch.get_num_threads()} threads")
    print(f"  playing {play_seconds:.1f} s (sampling {report['sample']:.1f}, environments {report['env']:.1f}), updating "
          f"{alone:.1f} s   playing / updating {play_seconds / alone:.2f}")
    for name, keywords in (("value head", dict(head=head)), ("generative, branches", dict(question=question)),
                           ("both", dict(question=question, head=head)),
                           ("generative, separate sequences", dict(apart=True))):
        print(f"  update with {name:32} {timed(**keywords) / alone:.2f} times GRPO alone")


def bench_engines(model_folder, tasks=16, group=8):
    """vLLM against our PyTorch engine: the same games, the same policy, sampled tokens per second of sampling."""
    import importlib.util
    if importlib.util.find_spec("vllm") is None:
        print("\nengines: vLLM is not installed, nothing to compare")
        return
    import torch

    from games import levels

    from games.pool import make_world
    from games.pool import EnvPool
    from support.policies import load_policy, make_chat
    from rollout import play
    from engines.torch_engine import TorchEngine
    from engines.vllm_engine import VLLMEngine
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_policy(model_folder, device)
    chat, _ = make_chat(tokenizer, "alfworld", model_folder)
    games, speeds = levels.sample_games(levels.list_games("alfworld", "train", "generated"), tasks, 0), {}
    with EnvPool(os.cpu_count()) as pool:
        for name, engine in (("PyTorch", TorchEngine(model, chat.ends, max_new_tokens=24)),
                             ("vLLM", VLLMEngine(model_folder, chat.ends, 1.0, 24, 2048, "float32", 0.2))):
            play(engine, pool, chat, games[:2], 2, 20)  # warm up
            episodes, report = play(engine, pool, chat, games, group, 20, seed=1)
            sampled = sum(sum(e.sampled) for e in episodes)
            speeds[name] = sampled / report["sample"]
            print(f"  {name:8} {len(episodes)} episodes, {sampled:,} sampled tokens, won {sum(e.won for e in episodes)}, "
                  f"{speeds[name]:,.0f} tokens/s of sampling on {device}")
    print(f"  vLLM / PyTorch {speeds['vLLM'] / speeds['PyTorch']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure speeds as ratios.")
    parser.add_argument("--only", choices=["envs", "loop", "engines", "models", "sizes", "memory"],
                        help="one part alone")
    parser.add_argument("--model", help="policy for the loop (default: the tiny one), for models (smollm2)")
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16"], help="for models")
    parser.add_argument("--lora-rank", type=int, default=16, help="for models; 0: all weights")
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stock:
        stock_main()
    else:
        if args.only in (None, "envs"):
            bench_envs()
            bench_scienceworld()
        if args.only in (None, "loop"):
            bench_loop(args.model or os.path.join(HERE, "policies", "tiny"))
        if args.only in (None, "engines"):
            bench_engines(args.model or os.path.join(HERE, "policies", "tiny"))
        if args.only == "models":  # alone, since SmolLM2 is not everywhere
            from support.bench_models import bench_models
            bench_models(args.model or "smollm2", args.precision, args.lora_rank)
        if args.only in (None, "sizes"):
            from support.bench_sizes import bench_sizes
            bench_sizes()
        if args.only in (None, "memory"):
            from support.bench_models import bench_memory
            bench_memory()
