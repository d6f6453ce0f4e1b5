"""Whatever the model: `forward` and the PyTorch engine give its own log-probabilities; where a turn ends.

Small random models of many architectures, with sliding windows shorter than the conversations, against their
plain forward pass on one sequence at a time, under either attention implementation.
"""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from actor import forward, output_logits
from engines.torch_engine import TorchEngine
from rollout import ChatFormat, Episode
from support.policies import (add_lora, compute_in_bfloat16, generation_ends, load_policy, save_policy,
                              train_tokenizer)

COMMON = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
              pad_token_id=0, bos_token_id=1, eos_token_id=2)
SOME_SLIDE = dict(use_sliding_window=True, sliding_window=6, max_window_layers=2)
KINDS = {
    "llama": {}, "qwen2": SOME_SLIDE, "qwen3": SOME_SLIDE,
    "mistral": dict(sliding_window=6), "phi3": dict(sliding_window=6),
    "gemma2": dict(sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=5.0,
                   final_logit_softcapping=3.0),
    "gemma3_text": dict(sliding_window=6, query_pre_attn_scalar=8),
    "gpt_oss": dict(sliding_window=6, num_local_experts=4, num_experts_per_tok=2),
    "cohere": dict(logit_scale=0.3), "granite": dict(logits_scaling=3.0)}
MODELS = [(kind, attention) for kind in KINDS for attention in ("sdpa", "eager")
          if (kind, attention) != ("gpt_oss", "sdpa")]


def small(kind, attention=None, **options):
    """A random model whose logits differ visibly from token to token, and with what a token may see."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**COMMON, **KINDS.get(kind, {}), **options})
    options = {"attn_implementation": attention} if attention else {}
    model = AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35)
    return model.eval()


@torch.no_grad()
def plain(model, tokens, temperature=1.0):
    """(T - 1,) log-probabilities of tokens[1:] by the model's own forward pass on this sequence alone."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1].float() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def some_tokens(count, seed):
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_forward(model):
    """Two conversations of 30 and 22 tokens in one batch, all scored; then with two questions to each."""
    episodes = [Episode(None, 0), Episode(None, 1)]
    for i, (episode, count) in enumerate(zip(episodes, (30, 22))):
        episode.give(some_tokens(4, i))
        episode.sample(some_tokens(count - 4, 10 + i), [0.0] * (count - 4))
    branches = [[(end, some_tokens(3, end), some_tokens(2, end + 50)) for end in ends]
                for ends in ((12, 30), (9, 20))]
    own = torch.cat([plain(model, e.tokens)[3:] for e in episodes])
    verdicts = [plain(model, e.tokens[:end] + question + verdict)[-2:]
                for e, asked in zip(episodes, branches) for end, question, verdict in asked]
    with torch.no_grad():
        sequences, sampled = [e.tokens for e in episodes], [e.sampled for e in episodes]
        out = forward(model, sequences, sampled)
        branched = forward(model, sequences, sampled, branches=branches)
    assert own.std() > 0.1  # a model that says the same of all tokens would prove nothing
    for found in (out["logprobs"], branched["logprobs"]):
        assert found.tolist() == pytest.approx(own.tolist(), abs=2e-4)
    assert branched["verdicts"].tolist() == pytest.approx([v.sum().item() for v in verdicts], abs=5e-4)
    first = branched["verdict_logits"].float().log_softmax(-1)                                   # (Q, V)
    tokens = [verdict[0] for asked in branches for _, _, verdict in asked]
    assert first[range(4), tokens].tolist() == pytest.approx([v[0].item() for v in verdicts], abs=2e-4)


@pytest.mark.parametrize("kind, attention", MODELS)
def test_the_trainer_scores_as_the_model_does(kind, attention):
    """Boolean masks were added to scores (off by up to 31 nats), windows forgotten, soft caps left out."""
    check_forward(small(kind, attention))


def test_through_peft_too():
    model = add_lora(small("gemma2"), 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    check_forward(model.eval())


@pytest.mark.parametrize("kind, attention", MODELS)
def test_the_engine_samples_from_the_model(kind, attention):
    """Three turns, conversations of different length that outgrow the window; one ends after the first."""
    model = small(kind, attention)
    engine = TorchEngine(model, 2, temperature=0.7, max_new_tokens=5)
    engine.start(seed=3)
    talks = {row: some_tokens(count, row) for row, count in enumerate((4, 9, 6, 17))}
    for turn, rows in enumerate(([0, 1, 2, 3], [0, 1, 3], [0, 1, 3])):
        for row in rows:
            engine.submit(row, list(talks[row]))
        for row, ids, logprobs in engine.poll():
            own = plain(model, talks[row] + ids, 0.7)[-len(ids):]
            assert logprobs == pytest.approx(own.tolist(), abs=2e-4)
            talks[row] += ids + some_tokens(3 + 2 * row, 100 * turn + row)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("max_scores", [2**22, 1])
def test_a_group_s_prompt_is_read_once_and_nobody_is_mixed_up(kind, max_scores):
    """Groups of 4, 1 and 3 conversations; answers of 1 to 8 tokens, so that those that go on change places
    with those that ended; conversations and a whole group drop out. max_scores 1: one token at a time."""
    model = small(kind)
    engine = TorchEngine(model, range(50, 60), max_new_tokens=8)
    engine.max_scores, read = max_scores, []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: read.append(inputs[0].numel()))
    engine.start(seed=5)
    groups = [(0, 5, 6, 9), (3,), (4, 7, 8)]
    prompts = {row: some_tokens(11 + g, g) for g, rows in enumerate(groups) for row in rows}
    talks, lengths = {row: list(ids) for row, ids in prompts.items()}, set()
    for turn, left in enumerate(([*talks], [0, 3, 4, 6, 7], [3, 4, 7], [4])):
        for row in left:
            engine.submit(row, list(talks[row]))
        before, answers = sum(read), engine.poll()
        assert [row for row, *_ in answers] == sorted(left)
        if turn == 0:  # 11 + 12 + 13 tokens for eight prompts
            assert read[0] == 36 and before == 0
        for row, ids, logprobs in answers:
            assert not set(ids[:-1]) & set(engine.ends) and (len(ids) == 8 or ids[-1] in engine.ends)
            own = plain(model, talks[row] + ids)[-len(ids):]
            assert logprobs == pytest.approx(own.tolist(), abs=2e-4)
            lengths.add(len(ids))
            talks[row] += ids + some_tokens(2 + row, 100 * turn + row)
    handle.remove()
    assert len(lengths) > 3  # answers of many lengths
    assert model.config._attn_implementation in ("sdpa", "eager")  # as it was


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_in_bfloat16_and_greedily(temperature):
    """The engine in the precision of `--precision bfloat16`; at temperature 0 the likeliest token, and the
    same episodes for any seed; at 1 the same for the same seed alone."""
    model = small("qwen3")
    compute_in_bfloat16(model)
    answers = []
    for seed in (0, 0, 1):
        engine = TorchEngine(model, 2, temperature, max_new_tokens=6)
        engine.start(seed)
        talks = {row: some_tokens(12, row // 3) for row in range(6)}
        for row, ids in talks.items():
            engine.submit(row, ids)
        answers.append(engine.poll())
    assert answers[0] == answers[1] and (answers[0] == answers[2]) == (temperature == 0)
    for row, ids, logprobs in answers[0]:
        with torch.no_grad():
            logits = output_logits(model, model.get_decoder()(
                input_ids=torch.tensor([talks[row] + ids])).last_hidden_state)[0, 11:-1].float()
        own = torch.log_softmax(logits, -1)                                                      # (n, V)
        assert logprobs == pytest.approx(own.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist(), abs=0.15)
        if temperature == 0:
            assert all(own[i].max() - own[i, token] < 0.15 for i, token in enumerate(ids))


def folder_of(model, path):
    """The model with a tokenizer of its vocabulary's size, saved."""
    tokenizer = train_tokenizer(["a b"], vocab_size=1)
    save_policy(str(path), model, tokenizer)
    return str(path)


@pytest.mark.parametrize("kind, options", [
    ("bloom", dict(n_head=4, n_layer=2)), ("mpt", dict(d_model=32, n_heads=4, n_layers=2)), ("mamba", {}),
    ("hyperclovax", dict(logits_scaling=3.0))])
def test_what_cannot_be_honoured_is_refused_in_one_line(kind, options, tmp_path):
    """ALiBi counts positions from the mask, recurrent layers cannot branch, HyperCLOVA X scales."""
    folder = folder_of(small(kind, vocab_size=400, **options), tmp_path / kind)
    with pytest.raises(ValueError) as caught:
        load_policy(folder)
    assert str(caught.value).startswith(folder) and "cannot be trained here" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loading_keeps_the_soft_cap_in_attention_and_leaves_dropout_out(tmp_path):
    """SDPA has no soft cap and says nothing; GPT-2 asks for dropout, which would train another
    policy than the one that sampled."""
    capped, uncapped = (small("gemma2", attention, vocab_size=400) for attention in ("eager", "sdpa"))
    loaded, _ = load_policy(folder_of(capped, tmp_path / "gemma2"))
    ids = torch.tensor([some_tokens(20, 0)])
    with torch.no_grad():
        capped, uncapped, loaded = (model(input_ids=ids).logits for model in (capped, uncapped, loaded))
    assert torch.allclose(capped, loaded, atol=1e-5) and (capped - uncapped).abs().max() > 0.1
    gpt2 = dict(n_embd=32, n_layer=2, n_head=4)
    for kind, options in (("gpt2", gpt2), ("llama", dict(attention_dropout=0.5))):
        model, _ = load_policy(folder_of(small(kind, vocab_size=400, **options), tmp_path / kind))
        assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


# ------------------------------------------------------------------------------------------ the end of a turn

TEMPLATES = {  # as their makers write them, shortened: template, what ends an answer, what is between two answers
    "chatml": ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
               "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "<|im_end|>",
               "<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"),
    "llama3": ("{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] "
               "+ '<|eot_id|>' }}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
               "<|eot_id|>", "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nb<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "gemma": ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
              "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + m['role'].replace('assistant', 'model') "
              "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}", "<end_of_turn>",
              "<end_of_turn>\n<start_of_turn>user\nb<end_of_turn>\n<start_of_turn>model\n"),
    "llama2": ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}"
               "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}",
               "</s>", " </s>[INST] b [/INST]")}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<|end_header_id|>",
           "<start_of_turn>", "<end_of_turn>", "</s>"]


def tokenizer_with(template, eos):
    tokenizer = train_tokenizer(["user\n assistant\n model\n system\n"] * 10, vocab_size=330)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_says_what_ends_a_turn(name):
    """`eos_token` was believed. SmolLM2's GGUF file names <|im_start|>: answers never ended."""
    template, end, between = TEMPLATES[name]
    tokenizer = tokenizer_with(template, "<|im_start|>")
    chat = ChatFormat(tokenizer, "Be good.", ends=[7])
    assert tokenizer.decode([chat.eos]) == end and chat.ends == {chat.eos, 7}
    assert tokenizer.decode(chat.next_prompt("b", answer_ended=False)) == between
    assert tokenizer.decode(chat.next_prompt("b")) == between.split(end, 1)[1]
    first = tokenizer.decode(chat.first_prompt("You see a bed."))
    assert "Be good." in first and "You see a bed." in first  # where there is no system turn, too
    messages = [{"role": role, "content": text} for role, text in (("user", "x"), ("assistant", "y"), ("user", "b"))]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert whole.endswith(between)


def test_without_a_special_token_after_the_answer_the_tokenizer_s_word_counts():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = tokenizer_with(template, "</s>")
    chat = ChatFormat(tokenizer, "Be good.")
    assert tokenizer.decode([chat.eos]) == "</s>" and tokenizer.decode(chat.next_prompt("b")) == "\nuser: b\n"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="ends a turn"):
        ChatFormat(tokenizer, "Be good.")


def test_any_of_several_ends_ends_a_turn(tmp_path):
    model = small("llama", vocab_size=400)
    model.generation_config.eos_token_id = [5, 6]
    assert generation_ends(folder_of(model, tmp_path / "llama")) == [5, 6]
    engine = TorchEngine(model, range(10, 200), max_new_tokens=20)
    engine.start(0)
    for row in range(8):
        engine.submit(row, some_tokens(5, row))
    answers = [ids for _, ids, _ in engine.poll()]
    assert {len(ids) for ids in answers} != {20} and len({ids[-1] for ids in answers if len(ids) < 20}) > 1
    assert all(not 10 <= token < 200 for ids in answers for token in ids[:-1])
