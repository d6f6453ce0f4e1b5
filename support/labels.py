"""Where labels come from (`--labels`): functions from the steps of an iteration to good (1), bad (0), left out (-1).

    flaws     any unflawed step is good, any flawed one bad, whatever became of the episode         (classifier_loss.py)
    rules     the same, without the unflawed steps of lost episodes
    outcome   the sign of the advantage: the outcome itself
    oracle    good shortens the distance to the goal, known to nobody who plays: for measuring      (games/oracle.py)
    critic    a language model behind an OpenAI-compatible address, --critic-url, --critic-model    (support/critic.py)

Each is called with a batch (support/batches.py) and the run (support/setup.py); (S,) long.
"""

import functools
import os

import torch

from classifier_loss import flaw_labels, outcome_labels, rule_labels
from games.oracle import oracle_labels
from support.critic import ask_critic, critic_labels


def flat(per_episode):
    return torch.tensor([label for steps in per_episode for label in steps])


def by_critic(batch, run):
    """The critic's labels; its answers are kept in the run's folder, so that a resumed run asks nothing twice."""
    args = run.args
    cache = os.path.join(args.out, f"critic-{run.accelerator.process_index}.jsonl")
    ask = functools.partial(ask_critic, model=args.critic_model, url=args.critic_url, cache=cache)
    return flat(critic_labels(batch.episodes, run.tokenizer, ask))


LABELS = {
    "flaws": lambda batch, run: flaw_labels(batch.flawed),
    "rules": lambda batch, run: rule_labels(batch.won, batch.flawed),
    "outcome": lambda batch, run: outcome_labels(batch.advantages),
    "oracle": lambda batch, run: flat(oracle_labels(batch.episodes, run.pool)),
    "critic": by_critic,
}
