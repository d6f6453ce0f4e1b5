"""Sampling by vLLM (https://docs.vllm.ai): token ids in, token ids and log-probabilities out.

Requests join and leave the running batch at every step (continuous batching): an episode whose answer is short plays on
while others still write. Each turn's request repeats the conversation so far; prefix caching computes only what is new.

After an update the engine must sample from the new weights: `load` writes them to a folder and has vLLM reload it, through
public calls alone, then forgets the cached prefixes (they were computed with the old weights).

Trap: with tied embeddings vLLM's CPU build keeps a stale output layer after a reload. train.py therefore compares the
engine's log-probabilities with the trainer's after each sync, and stops where they disagree.
"""

import os
import tempfile

import torch


class VLLMEngine:
    """The same interface as `torch_engine.TorchEngine`: start, submit, poll, load."""

    def __init__(self, folder, ends, temperature, max_new_tokens, max_context, dtype="auto", memory=0.4,
                 tensor_parallel=1, seed=0):
        """folder: Hugging Face folder or hub name. ends: the token id that ends a turn, or several such ids. memory: share
        of the GPU's memory for vLLM; the trainer needs the rest."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process: nothing to lose when it ends
        from vllm import EngineArgs, LLMEngine
        self.ends = [ends] if isinstance(ends, int) else sorted(ends)
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        # Ids in and ids out: vLLM needs no tokenizer, and would load the wrong one for our policies.
        # processed_logprobs: of the distribution that is sampled from, after the temperature.
        self.engine = LLMEngine.from_engine_args(EngineArgs(
            model=folder, skip_tokenizer_init=True, dtype=dtype, max_model_len=max_context, enable_prefix_caching=True,
            gpu_memory_utilization=memory, tensor_parallel_size=tensor_parallel, seed=seed,
            logprobs_mode="processed_logprobs", disable_log_stats=True,
            # vLLM 0.32 winds a request's random generator back after a part of its prompt, which CPU generators cannot
            enable_chunked_prefill=torch.cuda.is_available(),
            max_num_batched_tokens=None if torch.cuda.is_available() else max(8192, max_context),
            # started by torchrun or accelerate: an engine for each process, on the GPU of that process
            distributed_executor_backend="external_launcher" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None))
        self.scratch = tempfile.TemporaryDirectory(prefix="nano-gcd-weights-")  # gone with this object, or with the process

    def start(self, seed):
        """Forget all conversations. Every request gets a seed of its own, so that sampling repeats."""
        self.seed, self.turns, self.waiting = seed, 0, {}

    def submit(self, row, tokens):
        """Ask for the continuation of a conversation; `row` is its name."""
        from vllm import SamplingParams, TokensPrompt
        self.turns += 1
        request = f"{self.seed}-{row}-{self.turns}"
        self.waiting[request] = row
        sampling = SamplingParams(temperature=self.temperature, max_tokens=self.max_new_tokens, stop_token_ids=self.ends,
                                  logprobs=0, detokenize=False, seed=hash((self.seed, row, len(tokens))) % 2**31)
        self.engine.add_request(request, TokensPrompt(prompt_token_ids=list(tokens)), sampling)

    def poll(self):
        """Run until at least one conversation has ended its turn; [(row, new ids, log-probabilities), ...]."""
        found = []
        while not found and self.waiting:
            for output in self.engine.step():
                if output.finished:
                    answer = output.outputs[0]
                    ids = list(answer.token_ids)
                    found.append((self.waiting.pop(output.request_id), ids,
                                  [choice[token].logprob for token, choice in zip(ids, answer.logprobs)]))
        return found

    def load(self, weights):
        """Sample from these weights from now on: a state dictionary as plain transformers names it."""
        from huggingface_hub import save_torch_state_dict
        # Not save_pretrained: where several processes run, transformers lets the first alone write.
        save_torch_state_dict(weights, self.scratch.name)
        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": self.scratch.name})
        self.engine.reset_prefix_cache()
