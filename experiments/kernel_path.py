"""The beginnings of docs/coupling.md, question (iii): policies with random weights and after a few updates of
cold start, all with the shipped policy's tokenizer, to measure their kernel.

    python -m experiments.kernel_path --out runs/path       # runs/path/updates-0, -30, -100
    python coupling.py --draws 0 --probes FILE --model runs/path/updates-0 --model runs/path/updates-30 ...
"""

import argparse
import copy
import os

from cold_start import cold_start
from games import levels
from games.pool import EnvPool
from support.demonstrations import expert_episodes
from support.policies import load_policy, make_chat, save_policy, tiny_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write the policies into")
    parser.add_argument("--updates", type=int, nargs="+", default=[0, 30, 100])
    parser.add_argument("--games", type=int, default=640, help="training games that the expert plays")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    _, tokenizer = load_policy("policies/tiny")
    chat, _ = make_chat(tokenizer, "alfworld", "policies/tiny")
    games = levels.level_games("alfworld", "L1", "train", "generated", None)
    with EnvPool(1) as pool:
        episodes = expert_episodes(levels.sample_games(games, args.games, args.seed), pool, chat, 20, seed=args.seed)
    start = tiny_model(tokenizer, seed=args.seed)
    for updates in args.updates:
        model = copy.deepcopy(start)
        if updates:
            epochs = -(-max(args.updates) // (len(episodes) // 32))  # the schedule is the longest one's
            cold_start(model, episodes, epochs, 32, seed=args.seed, stop=updates)
        folder = os.path.join(args.out, f"updates-{updates}")
        save_policy(folder, model, tokenizer, prompt="short", cold_start=vars(args), stopped_after=updates)
        print(f"saved {folder}", flush=True)


if __name__ == "__main__":
    main()
