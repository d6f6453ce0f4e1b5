"""Shared pieces: a small random policy with a real tokenizer, and pytest's two options."""

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)  # tiny models: more threads only wait for each other

from support import policies  # noqa: E402
from games import levels  # noqa: E402
from games.pool import EnvPool  # noqa: E402
import rollout  # noqa: E402
from engines import torch_engine  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true",
                     help="also what takes minutes: every ScienceWorld task and 35 official games beside the stock "
                     "packages, each way in which a process may die, runs compared bit for bit")
    parser.addoption("--all-games", action="store_true",
                     help="all 274 official validation games beside stock ALFWorld, which takes seconds for each")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes a minute and more, only with --long")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="takes long: --long runs it"))


@pytest.fixture(scope="session")
def tokenizer():
    texts = [rollout.SYSTEM["alfworld"], rollout.QUESTION, "good", "bad", "assistant\n", "user\n", "system\n",
             "go to cabinet 1", "You arrive at cabinet 1. On the cabinet 1, you see a mug 1, and a plate 2."] * 10
    return policies.train_tokenizer(texts, vocab_size=400)


@pytest.fixture
def model(tokenizer):
    model = policies.tiny_model(tokenizer, hidden=32, layers=2, heads=2, feed_forward=64, seed=1)
    with torch.no_grad():  # larger weights than at initialisation, so that wrong logits differ visibly
        for p in model.parameters():
            p.mul_(3.0 if p.dim() > 1 else 1.0)
    return model


@pytest.fixture
def chat(tokenizer):
    return rollout.ChatFormat(tokenizer, rollout.SYSTEM["alfworld"])


@pytest.fixture(scope="session")
def pool():
    with EnvPool(2) as pool:
        yield pool


@pytest.fixture
def episodes(model, tokenizer, chat, pool):
    """Six episodes in three groups of a random policy on real games, with rewards and flaws set by hand."""
    games = [levels.generated_game("train", seed) for seed in range(3)]
    engine = torch_engine.TorchEngine(model, chat.eos, max_new_tokens=6)
    played, _ = rollout.play(engine, pool, chat, games, group_size=2, max_steps=3, seed=0)
    for i, episode in enumerate(played):
        episode.won = i % 2 == 0
        episode.reward = float(episode.won)
        for k, step in enumerate(episode.steps):
            step.malformed, step.repeated = False, k == 1
    return played
