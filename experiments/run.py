"""Runs of train.py, one after the other, each a row of results.jsonl: what the tables and pictures are made from.

    python experiments/run.py --list                               # experiments, their arms and what is done of them
    python experiments/run.py default                              # all arms and seeds of one; again: goes on
    python experiments/run.py credit --arms gigpo adca --seeds 0
    OMP_NUM_THREADS=1 python experiments/run.py default --workers 1    # one core a run: two of these share a machine

A run whose row is there is skipped; one that was killed is resumed from its checkpoint, to the same numbers. Rows come
seed by seed, all arms of a seed first, so that what is there at any time can be paired. The same seed plays the same games
in every arm. What is asked of these runs was written down before: experiments/README.md.
"""

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
ALFWORLD = "--env alfworld --games generated"
SMOLLM2 = f"{ALFWORLD} --precision bfloat16 --max-new-tokens 32"
LIGHT_START = (f"{SMOLLM2} --eval-games 0 --model policies/cache-smollm2-start-2 --max-steps 14 --tasks 3 --iterations 12 "
               "--kl-coef 0 --micro-tokens 4096")
# An arm's policy where RL begins: after the supervised updates, in one iteration whose rate is a millionth of the usual.
NO_STEP = "--iterations 1 --warmup 1000000 --coupling-every 0"

# experiment -> (flags of all its runs, {arm: flags of its own}, seeds)
EXPERIMENTS = {
    # The larger start, which was the default's until 2026-11-22: GRPO alone and both forms of the classifier.
    "default": (f"{ALFWORLD} --model policies/tiny", {
        "none": "--classifier none", "value": "--classifier value", "generative": "--classifier generative"}, range(3)),
    # Place c of experiments/README.md.
    "default-scienceworld": ("--env scienceworld", {"none": "--classifier none", "value": "--classifier value"}, range(6)),
    # That each credit rule learns; no claim is made from these.
    "credit": (f"{ALFWORLD} --classifier none", {
        **{rule: f"--credit {rule} --model policies/tiny" for rule in ("gigpo", "hgpo", "graphgpo", "adca")},
        "epo": "--epo 0.001 --model policies/tiny", "rlvmr": "--credit rlvmr --model policies/cache-tags",
        "tags": "--credit grpo --model policies/cache-tags"}, range(3)),  # rlvmr's start (cold_start.py --tags), GRPO's credit
    # lambda and rate for the experiment proper, on training games and with seeds of their own.
    "tuning": (f"{ALFWORLD} --eval-games 0 --model policies/tiny-reads", {
        "none": "--classifier none", "none-constant": "--classifier none --lr-end 1",
        **{f"{form}-{coef}": f"--classifier {form} --classifier-coef {coef}"
           for form in ("value", "generative") for coef in (0.1, 0.3, 1.0, 3.0)}}, range(100, 102)),
    # Does the classification loss help? Place a of experiments/README.md.
    "classifier": (f"{ALFWORLD} --eval-games 0 --model policies/tiny-reads --coupling-every 16", {
        "none": "--classifier none", "value": "--classifier value", "adca": "--classifier none --credit adca",
        "stop-gradient": "--classifier value --control stop-gradient",
        "shuffled": "--classifier value --control shuffled", "generative": "--classifier generative",
        "random-target": "--classifier value --control random-target",
        "warmed-up": f"--classifier none {NO_STEP}", "warmed-up-value": f"--classifier value {NO_STEP}"}, range(8)),
    # Place b: SmolLM2 from its light start, which experiments/smollm2_start.sh makes (its default folder). The same commands
    # on a GPU, with as many --seeds as it has time for; rows say where they were made. 1e-5 by the tuning rule, which neither rate passed well.
    "smollm2-tuning": (LIGHT_START, {
        **{f"none-{lr}": f"--classifier none --lr {lr}" for lr in ("1e-5", "3e-5", "1e-4")},
        **{f"{name}-24": f"--classifier none --lr-end 1 --iterations 24 {flags}"  # twice as long, at a constant rate
           for name, flags in {"lora": "--lr 1e-4 --lora-rank 16", "all": "--lr 1e-5"}.items()}}, range(100, 101)),
    "smollm2": (f"{LIGHT_START} --lr 1e-5", {
        "none": "--classifier none", "value": "--classifier value", "generative": "--classifier generative",
        "adca": "--classifier none --credit adca", "stop-gradient": "--classifier value --control stop-gradient",
        "shuffled": "--classifier value --control shuffled"}, range(6)),
    # Again, for the split through Adam alone, repaired on 2026-11-25 (`classifier`'s rows have the rule before).
    "classifier-adam": (f"{ALFWORLD} --eval-games 0 --model policies/tiny-reads --coupling-every 16", {
        "none": "--classifier none", "value": "--classifier value", "adca": "--classifier none --credit adca",
        "generative": "--classifier generative"}, range(8)),
    # What the two parts of the gradient do when each trains alone, and whether a plain penalty does what ADCA does; beside `none`
    # and `adca` of `classifier`, which play the same games.
    "parts": (f"{ALFWORLD} --eval-games 0 --model policies/tiny-reads", {
        **{rule: f"--classifier none --credit {rule}" for rule in ("unflawed", "flawed", "penalty")},
        "unflawed-value": "--credit unflawed --classifier value",
        "unflawed-shuffled": "--credit unflawed --classifier value --control shuffled",
        # a sixth of `classifier`'s lambda; none of it: L_cls in the supervised updates before RL alone
        "value-0.05": "--classifier value --classifier-coef 0.05", "value-0": "--classifier value --classifier-coef 0"}, range(8)),
    # Hypothesis G's other half: RL on four kinds of task (1 to 4), success on the two it has not had (5 and 6).
    "unseen-types": (f"{ALFWORLD} --level L2 --eval-games 0 --model policies/tiny-reads", {
        "none": "--classifier none", "value": "--classifier value", "adca": "--classifier none --credit adca",
        "warmed-up": f"--classifier none {NO_STEP}", "warmed-up-value": f"--classifier value {NO_STEP}"}, range(6)),
    # Place d: ALFWorld's own games, from a policy that learnt from careless expert episodes in its training games.
    "official": ("--env alfworld --games official --eval-games 0 --model policies/tiny-official-careless --iterations 12", {
        "none": "--classifier none", "value": "--classifier value", "adca": "--classifier none --credit adca",
        "warmed-up": f"--classifier none {NO_STEP}", "warmed-up-value": f"--classifier value {NO_STEP}"}, range(3)),
    # (rows `no-leak`: made by a program that is gone, commit 4b864fb; EXPERIMENTS.md, 2026-11-25)
    # (rows `generative-untaught`: `generative` before its warm-up was repaired; experiments/README.md, 2026-11-24)
}
# experiment -> flags of evaluate.py for what its runs begin and end with: more games than train.py plays by the way.
ENDS = {"classifier": [f"{ALFWORLD} --level L1 --count 400"], "classifier-adam": [f"{ALFWORLD} --level L1 --count 400"],
        "parts": [f"{ALFWORLD} --level L1 --count 400"],
        "unseen-types": [f"{ALFWORLD} --level L2 --count 400"],
        "official": [f"--env alfworld --games official --level {level}" for level in ("L0", "L1")],  # 140 and 134 games
        "smollm2": [f"{SMOLLM2} --batch 40 --level {level} --count 200" for level in ("L1", "L2")]}
# Starts that are not in the repository: what makes them.
MADE_BY = {"policies/cache-smollm2-start-2": "experiments/smollm2_start.sh (12 minutes of a core for the first two stages, which are enough)",
           "policies/cache-tags": "cold_start.py --tags, at the top of that file, with --out policies/cache-tags"}
# Of an iteration's line in metrics.jsonl, what a row keeps.
KEPT = ("iteration", "success", "reward", "score", "steps", "inadmissible", "repeated", "no_effect", "malformed",
        "revisited", "flawed", "inadmissible_anew", "kl", "entropy", "grad_norm", "grad_norm_grpo", "grad_norm_classifier", "seconds_play",
        "seconds_update", "tokens")
KEPT_PREFIXES = ("accuracy_", "advantage_", "probe")
COUPLING = ("leak_", "own_")  # of the iterations that --coupling-every measures, the start among them


def command_of(experiment, arm, seed, workers=None):
    """The arguments of train.py, but for --out."""
    common, arms, _ = EXPERIMENTS[experiment]
    more = ["--workers", str(workers)] if workers else []
    return [*shlex.split(common), *shlex.split(arms[arm]), "--seed", str(seed), *more]


def compact(result):
    """An evaluation without the name of every game: `won` has a digit for each, in the order of their names.

    >>> compact({"success": 0.5, "tasks": {"look": {"won": 1}}, "bad_games": [],
    ...          "played": {"b": {"won": True, "steps": 3}, "a": {"won": False, "steps": 9}}})
    {'success': 0.5, 'tasks': {'look': {'won': 1}}, 'won_by_game': '01', 'steps_by_game': [9, 3]}
    """
    names = sorted(result["played"])
    found = {key: value for key, value in result.items() if key not in ("played", "bad_games")}
    played = [result["played"][name] for name in names]
    if os.path.isabs(found.get("model") or ""):
        found["model"] = os.path.relpath(found["model"], ROOT)  # which folder this project lies in is no result
    found |= {"won_by_game": "".join(str(int(game["won"])) for game in played),
              "steps_by_game": [game["steps"] for game in played]}
    if played and played[0].get("score") is not None:
        found["score_by_game"] = [game["score"] for game in played]
    return found


def row_of(folder, **about):
    """A run's row from its folder; None unless the run is complete. about: experiment, arm, seed, commit, command."""
    try:
        with open(os.path.join(folder, "config.json")) as file:
            config = json.load(file)
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            rows = [json.loads(line) for line in file if line.endswith("\n")]
    except (OSError, ValueError):
        return None
    if not rows or rows[-1]["iteration"] < config["iterations"]:
        return None
    minutes = sum(row.get("seconds_play", 0) + row.get("seconds_update", 0) for row in rows) / 60
    keep = lambda row: {k: v for k, v in row.items() if k in KEPT or k.startswith(KEPT_PREFIXES)}
    split = lambda row: {k: v for k, v in row.items() if k.startswith(COUPLING)}
    evaluations = lambda row: {k[5:]: compact(v) for k, v in row.items() if k.startswith("eval_")}
    return {**about, "minutes": round(minutes, 1), "before": evaluations(rows[0]) if rows[0]["iteration"] == 0 else {},
            "after": evaluations(rows[-1]), "training": [keep(row) for row in rows if row["iteration"] > 0],
            "coupling": [{"iteration": row["iteration"]} | split(row) for row in rows if split(row)]}


def read_rows(path):
    """The rows of a file, none where there is no such file yet."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def read_runs(path):
    """The rows of results.jsonl, of each run the last: after --ends-later it has two, the second with its evaluations."""
    return list({(row["experiment"], row["arm"], row["seed"]): row for row in read_rows(path)}.values())


def append(path, row):
    """Add a row, whole, also where several runners share the file."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")


def commit():
    """The commit of the code that runs, with `+` where it has been changed since (a new row is no change)."""
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(git("status", "--porcelain", "-uno", "--", ".", ":!experiments/*.jsonl"))


def gpu_of(folder):
    """The GPU that a run's config.json names, or None."""
    try:
        with open(os.path.join(folder, "config.json")) as file:
            return json.load(file).get("machine", {}).get("gpu")
    except (OSError, ValueError):
        return None


def evaluated(model, flags, path, workers=None):
    """What evaluate.py says of a policy, by `flags`; kept at `path`, so that it is played once. None where it fails."""
    if not os.path.exists(path):
        partial = f"{path}.{os.getpid()}"
        with open(partial, "w") as file:
            done = subprocess.run([sys.executable, os.path.join(ROOT, "evaluate.py"), *shlex.split(flags), "--model", model,
                                   "--json", *(["--workers", str(workers)] if workers else [])], stdout=file, cwd=ROOT)
        if done.returncode:
            os.remove(partial)
            return None
        os.replace(partial, path)
    with open(path) as file:
        return compact(json.load(file))


def ends(experiment, folder, command, args):
    """{"before": {level: result}, "after": ...}: the experiment's own evaluations of a finished run; None where one fails."""
    if not os.path.isdir(folder):  # of a row made elsewhere with --ends-later
        return None
    start, found = command[command.index("--model") + 1], {"before": {}, "after": {}}
    last = os.path.join(folder, sorted(name for name in os.listdir(folder) if name.startswith("checkpoint-"))[-1])
    for flags in ENDS[experiment]:
        level = flags.split("--level ")[1].split()[0]
        before = os.path.join(args.runs, experiment, f"start-{os.path.basename(start)}-{level}.json")
        found["before"][level] = evaluated(start, flags, before, args.workers)
        found["after"][level] = evaluated(last, flags, os.path.join(folder, f"end-{level}.json"), args.workers)
    return found if all(result for when in found.values() for result in when.values()) else None


def trained(folder, name, command, **about):
    """A run of train.py, begun or resumed: its row, None where it failed."""
    os.makedirs(folder, exist_ok=True)
    if os.path.exists(os.path.join(folder, "config.json")):
        arguments = ["--resume", folder]
    else:
        arguments = [*command, "--out", folder]
    note = os.path.join(folder, "commit.txt")  # of the beginning: a resumed run keeps it
    if not os.path.exists(note):
        with open(note, "w") as file:
            file.write(commit())
    with open(note) as file:
        began = file.read()
    print(f"{name}: python train.py {shlex.join(arguments)}", flush=True)
    with open(os.path.join(folder, "log.txt"), "a") as log:
        done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *arguments], stdout=log, stderr=log, cwd=ROOT)
    row = row_of(folder, **about, commit=began, command=shlex.join(["python", "train.py", *command]), date=time.strftime("%Y-%m-%d"),
                 cores=os.cpu_count(), threads=os.environ.get("OMP_NUM_THREADS"), gpu=gpu_of(folder))
    return None if done.returncode else row


def do(experiment, arm, seed, args):
    """One run, begun or resumed; appends its row. Returns a line that says what became of it."""
    name = f"{experiment}/{arm}, seed {seed}"
    there = [row for row in read_runs(args.results) if (row["experiment"], row["arm"], row["seed"]) == (experiment, arm, seed)]
    own_ends = experiment in ENDS and not args.ends_later
    if there and (there[0]["after"] or not own_ends):
        return f"{name}: done before"
    folder = os.path.join(args.runs, experiment, f"{arm}-seed{seed}")
    command = command_of(experiment, arm, seed, args.workers)
    row = there[0] if there else trained(folder, name, command, experiment=experiment, arm=arm, seed=seed)
    if row is None:
        return f"{name}: FAILED, see {folder}/log.txt"
    if own_ends:
        found = ends(experiment, folder, command, args)
        if not found:
            return f"{name}: trained, but its evaluation FAILED"
        row |= found
    append(args.results, row)
    return f"{name}: {row['minutes']} minutes, " + ", ".join(
        f"{level} {100 * result['success']:.1f}%" for level, result in row["after"].items())


def main():
    parser = argparse.ArgumentParser(description="Runs of an experiment, as rows of results.jsonl.")
    parser.add_argument("experiment", nargs="?", choices=list(EXPERIMENTS), help="which one")
    parser.add_argument("--list", action="store_true", help="what there is, and what is done of it")
    parser.add_argument("--arms", nargs="+", help="these only")
    parser.add_argument("--seeds", nargs="+", type=int, help="these instead of the experiment's own")
    parser.add_argument("--results", default=os.path.join(HERE, "results.jsonl"), help="where the rows are")
    parser.add_argument("--runs", default=os.path.join(ROOT, "runs", "experiments"), help="where the runs are")
    parser.add_argument("--ends-later", action="store_true", help="rows without the experiment's own evaluations; the same command without this adds them")
    parser.add_argument("--workers", type=int, help="environment processes of a run (default as train.py)")
    args = parser.parse_args()
    if args.list or not args.experiment:
        rows = read_runs(args.results)
        for name, (common, arms, seeds) in EXPERIMENTS.items():
            print(f"{name}: {common}")
            for arm, flags in arms.items():
                there = sorted(row["seed"] for row in rows if (row["experiment"], row["arm"]) == (name, arm))
                print(f"    {arm:16} {flags:60} seeds {list(seeds)}, done {there}")
        return
    _, arms, seeds = EXPERIMENTS[args.experiment]
    unknown = set(args.arms or []) - set(arms)
    if unknown:
        parser.error(f"--arms {' '.join(sorted(unknown))}: {args.experiment} has {', '.join(arms)}")
    for arm in args.arms or arms:
        command = command_of(args.experiment, arm, 0)
        start = command[command.index("--model") + 1] if "--model" in command else "."
        if not os.path.isdir(os.path.join(ROOT, start)):
            parser.error(f"{start}, where {arm} starts, is not there. It is made by " + MADE_BY.get(start, "cold_start.py"))
    args.runs = os.path.abspath(args.runs)  # train.py is started from the project's folder
    failed = 0
    try:
        for seed in args.seeds or seeds:
            for arm in args.arms or arms:
                line = do(args.experiment, arm, seed, args)
                print(line, flush=True)
                failed += "FAILED" in line
    except OSError as error:
        sys.exit(f"run.py: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit("\nrun.py: stopped. The same command goes on.")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
