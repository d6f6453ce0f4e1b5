"""The coupling's two instruments against closed forms, real optimizer steps and finite differences."""

import argparse
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

import coupling
import helpers
import toy_bandit
from games.players import play_expert
from games import levels
from rollout import Episode, Step
from support import coupling_report, coupling_run, policies, probes

ARGS = dict(temperature=1.0, micro_tokens=8192, credit="grpo", weighting="token")


# ------------------------------------------------------------ a log-linear policy, where all is known exactly

S, S_PRIME = 2, 3  # the tokens that show the two states; tokens 0 and 1 are the actions: f, and the other one


class LogLinear(torch.nn.Module):
    """Two states whose features have the cosine rho, two actions, logits W phi(state), as in toy_bandit.py,
    part 3. A transformer to whoever calls it as actor.forward does; W is all it can learn."""

    config = SimpleNamespace(get_text_config=SimpleNamespace)  # with nothing after the output layer

    def __init__(self, rho, q, q_prime):
        super().__init__()
        self.features = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [rho, math.sqrt(1 - rho**2)]])
        self.output = torch.nn.Linear(2, 2, bias=False)
        logit = lambda x: math.log(x / (1 - x))
        difference = torch.tensor([logit(q), (logit(q_prime) - rho * logit(q)) / math.sqrt(1 - rho**2)])
        self.output.weight.data = torch.stack([difference / 2, -difference / 2])

    def get_decoder(self):
        return lambda input_ids, **_: SimpleNamespace(last_hidden_state=self.features[input_ids])

    def get_output_embeddings(self):
        return self.output


def played(state, group, good_reward, flawed, q, G=8):
    """G episodes of one step in a state, in which f (token 0) is taken exactly as often as by the policy."""
    episodes = []
    for i in range(G):
        action = 0 if i < round(q * G) else 1
        step = Step(1, 2, str(action), inadmissible=flawed and action == 0)
        logprob = math.log(q if action == 0 else 1 - q)
        episodes.append(Episode(None, group, [state, action], [False, True], [0.0, logprob], [step],
                                reward=good_reward if action == 0 else 0.0))
    return episodes


def two_states(rho, q=0.25, r=0.5, q_prime=0.125, r_prime=0.75, step=1e-3):
    """The split update of this policy: f is right in s and worth r; flawed in s', it costs r'."""
    args, model = SimpleNamespace(**ARGS, advantage="mean", blocks=2, step=step), LogLinear(rho, q, q_prime)
    first = [e for group in range(4) for e in (played(S, group, r, False, q) if group < 2
                                               else played(S_PRIME, group, -r_prime, True, q_prime))]
    held_out = played(S, 5, r, False, q) + played(S_PRIME, 6, -r_prime, True, q_prime)
    chat = SimpleNamespace(eos=7, tokenizer=SimpleNamespace(decode=lambda ids: ""))
    (first, _), (held_out, mask) = (coupling_run.prepare(args, chat, half) for half in (first, held_out))
    run = coupling_run.as_run(args, model, None)
    found, share = coupling.split_update(args, run, first, held_out, mask)
    return coupling_report.summarize(found["plain"], share, held_out, draws=50), found, held_out


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.95])
def test_leak_and_own_correction_of_a_log_linear_policy(rho):
    """Closed form. With g = (1/N) sum A d log pi / d z_f per state, and two actions (d z_other = - d z_f):
    d log pi(f|s') = (1 - q') 2 (g' + rho g). From f in s': g' = - r' q' (1-q')^2 / 2; from the other action
    there, which is unflawed and competes: - r' q'^2 (1-q') / 2; from s: r q (1-q) / 2. (Each state has half
    of the tokens.)"""
    q, r, q_prime, r_prime = 0.25, 0.5, 0.125, 0.75
    rows, found, held_out = two_states(rho, q, r, q_prime, r_prime)
    from_s, from_other = r * q * (1 - q) / 2, -r_prime * q_prime**2 * (1 - q_prime) / 2
    from_flaw = -r_prime * q_prime * (1 - q_prime)**2 / 2
    row, other = rows["inadmissible"], 2 * (1 - q_prime)
    assert row["leak"] == pytest.approx(other * (rho * from_s + from_other), rel=0.01)
    assert row["own"] == pytest.approx(other * from_flaw, rel=0.01)
    assert row["steps"] == 1 and rows["flawed"]["leak"] == row["leak"]
    # leak + own is what the argument calls the net push, times (1 - q') from logit to log-probability
    push = toy_bandit.net_push(rho, q_prime, r_prime, q, r)
    assert row["net"] == pytest.approx((1 - q_prime) * push, rel=0.01)
    # what it does to good actions: those held out are 2 f and 6 others in s, 7 others in s'
    push, push_prime = 2 * (from_s + rho * from_other), 2 * (rho * from_s + from_other)
    good = (2 * (1 - q) * push - 6 * q * push - 7 * q_prime * push_prime) / 15
    assert rows["good"]["leak"] == pytest.approx(good, rel=0.01, abs=1e-4)
    # the blocks: each is half of s and half of s', by the order of the groups
    change = found["plain"]["change"]
    assert change.shape == (2, 2, 16) and torch.allclose(change[:, 0], change[:, 1], rtol=0.02, atol=1e-4)


def test_the_ratio_crosses_one_at_the_edge_of_the_danger_zone():
    """A coupled policy is in the zone, an uncoupled one is not, and the edge is where theory has it."""
    q, r, q_prime, r_prime = 0.25, 0.5, 0.125, 0.5
    edge = toy_bandit.danger_edge(q_prime, r_prime, q, r)
    assert 0.3 < edge < 0.9
    at = {rho: two_states(rho, q, r, q_prime, r_prime)[0]["inadmissible"] for rho in (0.0, edge, 0.95)}
    assert at[edge]["ratio"] == pytest.approx(1.0, abs=0.01)
    assert at[0.95]["ratio"] > 1.2 and at[0.95]["net"] > 0
    assert at[0.0]["ratio"] < 0 and at[0.0]["net"] < at[0.0]["own"] < 0  # what else rises corrects, too


# ------------------------------------------------------------------------------ against a real optimizer step

def split(model, chat, episodes, v=None, step=1e-3, blocks=2):
    """The first two groups give the gradients, the third is held out."""
    args = SimpleNamespace(**ARGS, advantage="std", blocks=blocks, step=step)
    run = coupling_run.as_run(args, model, None)
    halves = [[e for e in episodes if (e.group < 2) == here] for here in (True, False)]
    (first, _), (held_out, mask) = (coupling_run.prepare(args, chat, half) for half in halves)
    if v == "estimate":
        v = coupling.second_moments(args, run, [first, held_out])
    found, _ = coupling.split_update(args, run, first, held_out, mask, v)
    return found, args, run, first, held_out, mask, v


def check_against_step(model, optimizer, found, args, run, first, held_out, mask, rate):
    """A real step on the undivided loss changes every held-out action by rate * (leak + own)."""
    before = coupling.action_logprobs(args, run, held_out, mask)
    weights = [p.detach().clone() for p in model.parameters()]
    batch = helpers.make_batch(first.episodes, helpers.advantages_of(first.episodes))
    helpers.update(model, None, optimizer, batch, max_norm=1e9)
    change = (coupling.action_logprobs(args, run, held_out, mask) - before) / rate
    for p, w in zip(model.parameters(), weights):
        p.data.copy_(w)
    parts = found["change"].sum((0, 1))
    assert change.abs().max() > 0
    assert (parts - change).abs().max() < 0.03 * change.abs().max()
    assert (parts - found["whole"]).abs().max() < 0.03 * change.abs().max()
    assert found["change"].abs().sum(1).max() > 0.2 * change.abs().max()  # neither part is nothing
    assert found["change"].sum(1).abs().amin(0).max() > 0


def test_leak_and_own_add_up_to_a_real_sgd_step(model, chat, episodes):
    found, args, run, first, held_out, mask, _ = split(model, chat, episodes)
    weights = [p.detach().clone() for p in model.parameters()]
    rate = 1e-5 * coupling.norm(model.parameters()) / coupling.norm(coupling.ascent(args, run, first))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    check_against_step(model, optimizer, found["plain"], args, run, first, held_out, mask, rate)
    again = split(model, chat, episodes)[0]["plain"]["change"]
    assert torch.equal(again, found["plain"]["change"])  # nothing was moved for good
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))


def test_a_cold_starts_file_has_no_second_moments(model, tmp_path):
    """Regression: cold_start.py saves a trainer.pt without an optimizer, which was taken for a broken one."""
    torch.save({"optimizer": None}, tmp_path / "trainer.pt")
    assert coupling_run.checkpoint_moments(str(tmp_path), model) is None


def test_one_block_is_the_sum_of_several(model, chat, episodes):
    """With one block the whole gradient is the sum of its two parts instead of a pass of its own: the same
    numbers up to rounding, among them the step's length."""
    one, two = (split(model, chat, episodes, blocks=blocks)[0]["plain"] for blocks in (1, 2))
    assert one["change"].shape[1] == 1 and two["change"].shape[1] == 2
    scale = two["whole"].abs().max()
    assert (one["change"].sum(1) - two["change"].sum(1)).abs().max() < 0.02 * scale
    assert (one["whole"] - two["whole"]).abs().max() < 0.02 * scale


def test_and_through_adam_to_a_real_adam_step(model, chat, episodes):
    """Adam without momentum, with the same second moments in its state and all but frozen."""
    found, args, run, first, held_out, mask, v = split(model, chat, episodes, "estimate")
    G = coupling.ascent(args, run, first)
    direction = [g / (moment.sqrt() + 1e-8) for g, moment in zip(G, v)]
    rate = 1e-5 * coupling.norm(model.parameters()) / coupling.norm(direction)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.0, 1 - 1e-6))
    for p, moment in zip(model.parameters(), v):
        optimizer.state[p] = {"step": torch.tensor(1e9), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": moment.clone()}
    check_against_step(model, optimizer, found["adam"], args, run, first, held_out, mask, rate)
    adam, plain = (found[rule]["whole"] / found[rule]["whole"].norm() for rule in ("adam", "plain"))
    assert (adam - plain).norm() > 0.1  # it is another direction


def test_and_to_adams_next_step_from_a_checkpoint(model, chat, episodes, tmp_path):
    """The batch's own gradient joins the moments, as in Adam's step: a weight whose moments are nearly gone goes no
    further than sqrt(1 / 0.05), where dividing by what was there would send it anywhere."""
    betas = (0.0, coupling_run.ADAMW["betas"][1])  # without momentum
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=betas, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in model.parameters():  # half of the weights are all but forgotten
            p.grad = 1e-3 * torch.randn(p.shape, generator=generator) * (1e-6 + (torch.rand(p.shape, generator=generator) < 0.5))
        optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "trainer.pt")
    v = coupling_run.checkpoint_moments(str(tmp_path), model)
    found, args, run, first, held_out, mask, _ = split(model, chat, episodes, v)
    G = coupling.ascent(args, run, first)
    direction = [g / (moment.sqrt() + 1e-8) for g, moment in zip(G, v(G))]
    assert max(d.abs().max() for d in direction) < 4.6
    rate = optimizer.param_groups[0]["lr"] = 1e-5 * coupling.norm(model.parameters()) / coupling.norm(direction)
    check_against_step(model, optimizer, found["adam"], args, run, first, held_out, mask, rate)


def test_second_moments_of_a_checkpoint_lose_their_bias(model, tmp_path):
    """Under a constant gradient g the estimate is g^2, however few steps were made."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **coupling_run.ADAMW)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "trainer.pt")
    moments = coupling_run.checkpoint_moments(str(tmp_path), model)
    same = moments([torch.full_like(p, 0.3) for p in model.parameters()])
    assert all(torch.allclose(m, torch.full_like(m, 0.09)) for m in same)
    assert coupling_run.checkpoint_moments(str(tmp_path / "nowhere"), model) is None
    assert coupling_run.checkpoint_moments(str(tmp_path), torch.nn.Linear(2, 2)) is None  # of another model
    (tmp_path / "trainer.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="cannot be read"):
        coupling_run.checkpoint_moments(str(tmp_path), model)


def test_only_the_tokens_between_the_tags_count(chat):
    encode = lambda text: chat.tokenizer.encode(text, add_special_tokens=False) + [chat.eos]
    for command in ("go to cabinet 1", "take mug 12 from plate 2"):
        ids = encode(f"<think>it is here</think><action>{command}</action>")
        mask = coupling_run.content(chat, ids)
        assert chat.tokenizer.decode([t for t, kept in zip(ids, mask) if kept]) == command
    assert coupling_run.content(chat, encode("look")) == [True] * (len(encode("look")) - 1) + [False]
    both = encode("<action>look</action><action>look</action>")
    assert coupling_run.content(chat, both) == [True] * (len(both) - 1) + [False]


# --------------------------------------------------------------------------------------------- the intervals

def test_intervals_hold_the_truth_as_often_as_they_say():
    """Leak and own vary from block to block and from game to game: intervals over the held-out games alone
    miss the truth far too often."""
    rng, inside, games, blocks = numpy.random.default_rng(0), {"both": 0, "games": 0}, 16, 8
    step = Step(0, 0, "look", inadmissible=True)
    number, flawed = torch.arange(games), torch.ones(games, dtype=torch.bool)
    held_out = SimpleNamespace(episodes=[SimpleNamespace(steps=[step])] * games, group=number,
                               episode_of_step=number, flawed=flawed)
    for trial in range(200):
        block, game = rng.normal(0, 1, (2, blocks, 1)), rng.normal(0, 1, (2, 1, games))
        change = (numpy.array([1.0, -1.0])[:, None, None] + block + game * 0.7) / blocks  # truth: +1 and -1
        found = {"change": torch.tensor(change), "whole": torch.zeros(games, dtype=torch.float64)}
        rows = coupling_report.summarize(found, [1 / blocks] * blocks, held_out, draws=300, seed=trial)
        row = rows["inadmissible"]
        inside["both"] += row["leak_low"] < 1.0 < row["leak_high"]
        mean = change.sum(1)[0]  # what resampling the held-out games alone would say
        half = 1.96 * mean.std(ddof=1) / math.sqrt(games)
        inside["games"] += abs(mean.mean() - 1.0) < half
    assert 0.88 <= inside["both"] / 200 <= 0.99 and inside["games"] / 200 < 0.8


def test_no_ratio_where_nothing_corrects():
    values = coupling_report.quantities(numpy.array([0.2, 0.2]), numpy.array([-0.1, 0.1]))["ratio"]
    assert values[0] == pytest.approx(2.0) and math.isnan(values[1])
    assert coupling_report.interval(numpy.array([1.0] * 90 + [numpy.nan] * 10)) == (None, None)


def test_the_ratio_of_several_draws_is_that_of_the_means():
    """A draw whose correction is nearly nothing has a ratio of 100: it must not rule the mean."""
    row = lambda leak, own: {"plain": {"flawed": {"leak": leak, "own": own, "net": leak + own, "ratio": 7.0}}}
    rows = [row(0.1, -0.001), row(0.2, -0.2), row(0.3, -0.399)]
    ratio, low, high = coupling_report.combine(rows, "plain", "flawed")["ratio"]
    assert ratio == pytest.approx(0.6 / 0.6) and low < 1.0 < high
    doubled = [row(2 * r["plain"]["flawed"]["leak"], r["plain"]["flawed"]["own"]) for r in rows]
    gap, low, high = coupling_report.gaps(rows, doubled, "plain", "flawed")["ratio"]
    assert gap == pytest.approx(1.0)
    leaks, half = coupling_report.gaps(rows, doubled, "plain", "flawed")["leak"], 4.303 * 0.1 / math.sqrt(3)
    assert leaks == pytest.approx((0.2, 0.2 - half, 0.2 + half), rel=1e-3)
    none = coupling_report.combine([row(0.1, 0.2), row(0.1, 0.1)], "plain", "flawed")["ratio"]
    assert none == (None, None, None)  # nothing corrects


def test_what_became_of_a_flaw_is_read_from_the_level_trained_for(tmp_path):
    rates = lambda x: {name: x for name in coupling_report.FLAWS}
    rows = [{"iteration": 0, "eval_L1": rates(0.4)}, {"iteration": 1, "success": 0.5},
            {"iteration": 2, "eval_L1": rates(0.1), "eval_L0": rates(0.9)}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert coupling_report.fates([tmp_path])[tmp_path]["repeated"] == (0.4, 0.1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="no evaluation before and after"):
        coupling_report.fates([tmp_path])


# ------------------------------------------------------------------------------------------------- the kernel

@pytest.fixture
def seen(chat, pool):
    games = [levels.generated_game("valid_unseen", seed) for seed in range(12)]
    return probes.encode(probes.make_probes(games, pool, 15, count=16), chat)


def test_kernel_is_the_change_along_another_probes_gradient(model, seen):
    """K(x, x') = d/d eps log pi(x; theta + eps grad log pi(x')), by central differences of the logits."""
    grams = coupling.probe_kernel(model, seen[:4])
    assert set(grams) == {"all", "embeddings", "layer 1", "layer 2", "output layer"}
    assert torch.allclose(grams["all"], sum(gram for name, gram in grams.items() if name != "all"))

    def logprob(probe):
        logits = torch.log_softmax(model(input_ids=torch.tensor([probe.tokens])).logits[0].double(), -1)
        return sum(logits[t - 1, probe.tokens[t]] for t, counts in enumerate(probe.mask) if counts)

    head = list(model.lm_head.parameters()) + list(model.model.norm.parameters())
    for block, moved in (("all", list(model.parameters())), ("output layer", head)):
        for j in range(4):
            g = torch.autograd.grad(logprob(seen[j]), moved)
            weights, found, eps = [p.detach().clone() for p in moved], {}, 1e-3 / coupling.norm(g)
            for sign in (1, -1):
                for p, w, d in zip(moved, weights, g):
                    p.data.copy_(w + sign * eps * d)
                with torch.no_grad():
                    found[sign] = torch.stack([logprob(probe) for probe in seen[:4]])
            for p, w in zip(moved, weights):
                p.data.copy_(w)
            expected = (found[1] - found[-1]) / (2 * eps)
            largest = grams[block].abs().max().item()
            assert torch.allclose(grams[block][:, j], expected, rtol=0.03, atol=0.01 * largest)


def test_a_sketch_errs_by_as_much_as_it_says(model, seen):
    """A cosine by 1 / sqrt(buckets of the block), without bias; another seed is another sketch."""
    exact, bound = coupling.probe_kernel(model, seen), 1 / math.sqrt(2**12 / 4)  # of four blocks
    sketches = [coupling.probe_kernel(model, seen, exact=0, buckets=2**12, seed=seed) for seed in range(4)]
    upper = numpy.triu_indices(len(seen), 1)
    cosines = lambda gram: probes.cosine(gram.numpy())[upper]
    for block in ("layer 1", "all"):
        errors = [cosines(sketch[block]) - cosines(exact[block]) for sketch in sketches]
        assert 0.1 * bound < numpy.std(errors) < 1.5 * bound
        assert abs(numpy.mean(errors)) < bound / 4 and not numpy.allclose(errors[0], errors[1])


def test_parameter_blocks_hold_every_parameter_once(model):
    for most, names in ((8, ["embeddings", "layer 1", "layer 2", "output layer"]),
                        (3, ["embeddings", "layers 1-2", "output layer"])):
        blocks = coupling.parameter_blocks(model, most)
        assert list(blocks) == names
        members = sorted(i for numbers in blocks.values() for i in numbers)
        assert members == list(range(len(list(model.parameters()))))


def test_pair_groups_by_hand():
    make = lambda action, flawed, game, kind="look": probes.Probe([], [], action, flawed, game, kind)
    a = [make("go", False, "1"), make("go", True, "1"), make("go", True, "2"), make("go", False, "3", "heat"),
         make("look", True, "1")]
    pairs = {name: set(map(tuple, numpy.argwhere(m).tolist())) for name, m in probes.pair_groups(a).items()}
    assert pairs["A"] == {(0, 2), (1, 3), (2, 3)}   # (0, 1) is one game
    assert pairs["B"] == {(0, 3)} and pairs["C"] == {(0, 4), (1, 4)}
    assert pairs["D"] == {(0, 3), (1, 3), (2, 3)} and len(pairs["E"]) == 10
    gram = numpy.eye(5)
    gram[0, 2] = gram[2, 0] = 0.6
    assert probes.group_cosines(gram, a, draws=10)["A"]["cosine"] == pytest.approx(0.2)


def test_probes_are_what_the_judge_says_and_the_same_again(chat, pool, tmp_path):
    games = [levels.generated_game("valid_unseen", seed) for seed in range(12)]
    made = probes.make_probes(games, pool, 15, count=16)
    assert made == probes.make_probes(games, pool, 15, count=16)
    seen = probes.encode(made, chat)
    assert len(seen) == 16
    for action in {p.action for p in seen}:  # which action it is tells nothing
        assert sum(1 if p.flawed else -1 for p in seen if p.action == action) == 0
    turns = {game.name: turns for game, turns, _ in play_expert(games, pool, 15, sloppy=0.5)}
    for episode in made:
        for i, flaws in episode["probes"].items():
            _, command, before, after, *_ = turns[episode["game"]][int(i)]
            assert ("inadmissible" in flaws) == (not after.accepted)
            assert episode["turns"][int(i)][1] == command
    for probe in seen:
        assert chat.tokenizer.decode([t for t, kept in zip(probe.tokens, probe.mask) if kept]) == probe.action
        assert probe.tokens[-1] == chat.eos and not probe.mask[-1]


# ----------------------------------------------------------------------------------------------- the command

def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["coupling.py", *map(str, arguments)])
    coupling.main()


TINY = os.path.join(os.path.dirname(coupling.__file__), "policies", "tiny")
SMALL = ("--games", "generated", "--episodes", 32, "--blocks", 2, "--workers", 1)


def test_the_command_pairs_models_and_keeps_held_out_games_out(monkeypatch, tmp_path, capsys):
    """A model and its copy: the same games, samples and numbers. No game on both sides, all for training."""
    copy = shutil.copytree(TINY, tmp_path / "copy")
    file = tmp_path / "probes.jsonl"
    command(monkeypatch, "--model", TINY, "--model", copy, "--probes", file, "--probe-count", 12, "--no-adam",
            "--out", tmp_path / "out", "--report", tmp_path / "page.html", *SMALL)
    a, b = [json.loads(line) for line in open(tmp_path / "out" / "results.jsonl")]
    assert a["games"] == b["games"] and a["plain"] == b["plain"] and a["plain"]["flawed"]["own"] != 0
    first, held_out = map(set, a["games"])
    assert len(first) == len(held_out) == 2 and not first & held_out
    assert all("train" in name for name in first | held_out)
    printed = capsys.readouterr().out
    assert printed.count("additivity") == 2 and "paired by draw" in printed
    assert "same action, good and flawed" in printed
    assert {"danger_zone.png", "kernel.png", "kernel.jsonl"} <= set(os.listdir(tmp_path / "out"))
    assert "after the action, layer 4" in printed
    lines = [json.loads(line) for line in open(tmp_path / "out" / "kernel.jsonl")]
    assert lines[0]["cosines"] == lines[1]["cosines"] and lines[0]["layers"]["after"][4]["accuracy"][0] > 0
    assert max(cell["additivity"] for cell in a["plain"].values()) < 0.05
    before = file.read_text()
    assert all("valid_unseen" in json.loads(line)["game"] for line in before.splitlines())
    # the page: every held-out step with its own leak and own correction, whose means are the table's
    page = json.loads((tmp_path / "page.html").read_text().split('id="data">')[1].split("</script>")[0])
    steps = [step for episode in page["sets"][0]["episodes"] for step in episode["steps"]]
    for name in ("leak", "own"):
        mean = numpy.mean([step[name] for step in steps if step["flaws"]])
        assert mean == pytest.approx(a["plain"]["flawed"][name], rel=1e-4)
    assert {e["game"] for e in page["sets"][1]["episodes"]} <= held_out and [s["name"] for s in page["sets"]] == [TINY, str(copy)]
    table = {row[0]: row for row in page["sections"][0]["rows"]}
    assert table["flawed"][1] == a["plain"]["flawed"]["steps"] and float(table["flawed"][2].split()[0]) == pytest.approx(
        a["plain"]["flawed"]["leak"], abs=6e-4)
    probes_shown = next(s for s in page["sections"] if s["title"] == "The probes")["rows"]
    assert len(probes_shown) == sum(len(json.loads(line)["probes"]) for line in before.splitlines())
    assert all(row[2] == row[3] and float(row[2]) < 0 for row in probes_shown)
    assert sum(s["picture"] is not None for s in page["sections"]) == 2


def test_a_command_that_was_stopped_goes_on(monkeypatch, tmp_path, capsys):
    """What is there is not measured again (its row keeps a mark), the rest is; with other settings nothing is
    reused, nor of another policy in the same folder."""
    policy, out = shutil.copytree(TINY, tmp_path / "policy"), tmp_path / "out"
    arguments = ["--model", policy, "--draws", 2, "--no-adam", "--out", out, *SMALL, "--blocks", 1]
    command(monkeypatch, *arguments)
    whole = [json.loads(line) for line in open(out / "results.jsonl")]
    first = whole[0] | {"mark": 1}
    (out / "results.jsonl").write_text(json.dumps(first) + "\n")
    command(monkeypatch, *arguments)
    again = [json.loads(line) for line in open(out / "results.jsonl")]
    assert again[0] == first and "mark" not in again[1]
    assert again[1]["plain"] == whole[1]["plain"] != whole[0]["plain"]
    assert "t intervals over 2 draws" in capsys.readouterr().out
    command(monkeypatch, *arguments, "--temperature", 0.9)
    other = [json.loads(line) for line in open(out / "results.jsonl")]
    assert len(other) == 2 and "mark" not in other[0] and other[0]["plain"] != first["plain"]
    kept = [json.loads(line) for line in open(out / "results.old.jsonl")]
    assert [row["draw"] for row in kept] == [0, 1] and kept[0] == first  # nothing that took hours is lost
    command(monkeypatch, *arguments)  # back to the settings before: they had only waited
    assert json.loads((out / "results.jsonl").read_text().splitlines()[0]) == first
    command(monkeypatch, *arguments, "--temperature", 0.9)
    assert [json.loads(line) for line in open(out / "results.jsonl")] == other
    os.replace(out / "results.jsonl", out / "results.old.jsonl")  # as if the others had been stopped at once
    command(monkeypatch, *arguments, "--temperature", 0.9)
    assert [json.loads(line) for line in open(out / "results.jsonl")] == other
    marked = [row | {"mark": 1} for row in other]
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    model, tokenizer = policies.load_policy(policy)
    model.lm_head.weight.data *= 1.001  # another policy, if hardly
    shutil.rmtree(policy)
    policies.save_policy(str(policy), model, tokenizer, prompt="short")
    command(monkeypatch, *arguments, "--temperature", 0.9)
    assert not any("mark" in json.loads(line) for line in open(out / "results.jsonl"))


def test_a_draw_without_gradient_is_left_out_and_counted(monkeypatch, tmp_path, capsys):
    """Episodes of a draw that all have one reward teach nothing; the other draws are measured all the same."""
    collect = coupling.collect

    def collected(args, engine, chat, pool, games, seed, bar):
        episodes = collect(args, engine, chat, pool, games, seed, bar)
        for episode in episodes:
            episode.reward = 0.0 if seed < 10_007 else episode.reward  # draw 0 of seed 0
        return episodes

    monkeypatch.setattr(coupling, "collect", collected)
    out = tmp_path / "out"
    command(monkeypatch, "--model", TINY, "--draws", 3, "--no-adam", "--out", out, *SMALL, "--blocks", 1)
    rows = [json.loads(line) for line in open(out / "results.jsonl")]
    assert ["plain" in row for row in rows] == [False, True, True]
    assert "t intervals over 2 draws (1 more had no gradient)" in capsys.readouterr().out
    monkeypatch.setattr(coupling, "measure", lambda *args: {"games": [], "success": 0.0, "episodes": 32})
    with pytest.raises(SystemExit, match="nothing to show"):
        command(monkeypatch, "--model", TINY, "--draws", 2, "--no-adam", "--out", tmp_path / "none", *SMALL)
    assert "no draw has a gradient" in capsys.readouterr().out


def test_rows_from_before_held_out_games_could_be_chosen_count_as_they_were(tmp_path):
    """They held out training games: found by a command that does, waiting for one that holds out test games."""
    settings, path = {"seed": 0, "held_out": "train"}, str(tmp_path / "results.jsonl")
    old = {"model": "a", "draw": 0, "games": [["x"], ["y"]], "args": {"seed": 0}}
    coupling_report.write_lines(path, [old])
    games = [SimpleNamespace(name=name) for name in "xy"]
    find = lambda **chosen: coupling_run.KeptRows(path, SimpleNamespace(**settings | chosen)).find({"model": "a", "draw": 0}, games)
    assert find() == old and find(held_out="test") is None and find() == old


def test_a_language_model_on_a_cpu_is_measured_in_small_draws_unless_told_otherwise(capsys):
    """What is not given follows from the size; a given number stays, whatever the size."""
    def settled(parameters, device="cpu", **given):
        args = SimpleNamespace(device=device, group_size=8, probes=None, after=[], **given)
        coupling_run.settle(args, parameters)
        return args.draws, args.episodes, args.blocks, args.no_adam

    assert settled(1_000_000) == settled(135_000_000, device="cuda") == (1, 256, 8, False)
    assert capsys.readouterr().out == ""
    assert settled(135_000_000) == (3, 32, 1, True)
    assert "135 million parameters on a CPU: 3 draws of 32 episodes" in capsys.readouterr().out
    assert settled(135_000_000, draws=1) == (1, 32, 2, True)  # one draw's interval needs blocks
    assert settled(135_000_000, episodes=256, blocks=4, no_adam=False) == (3, 256, 4, False)
    assert settled(1_000_000, episodes=32) == (1, 32, 2, False)  # as many blocks as there are groups


def test_draws_share_no_game(monkeypatch):
    args = SimpleNamespace(model=[TINY], games="generated", env="alfworld", level="L1", task_types=None,
                           max_steps=None, device="cpu", draws=5, episodes=256, group_size=8, seed=0, held_out="train")
    games = coupling_run.choose_games(args)
    assert len({g.name for g in games}) == len(games) == 5 * 32 and args.max_steps == 20
    args.env, args.model, args.draws = "scienceworld", [TINY + "-scienceworld"], 50
    args.games = "auto"
    with pytest.raises(ValueError, match="trains on .* fewer --draws"):
        coupling_run.choose_games(args)


def test_flaws_are_held_out_on_kinds_of_task_that_the_gradient_has_not_seen(monkeypatch):
    """--level L2 --held-out test: of each draw's games the first half are types 1 to 4 of train, the other 5 and
    6 of valid_unseen; which half is which, `measure` takes from their places."""
    args = SimpleNamespace(model=[TINY], games="generated", env="alfworld", level="L2", task_types=None,
                           max_steps=None, device="cpu", draws=3, episodes=64, group_size=8, seed=0, held_out="test")
    games, types = coupling_run.choose_games(args), list(levels.TASK_TYPES)
    assert len({g.name for g in games}) == len(games) == 3 * 8
    for draw in range(3):
        drawn = games[8 * draw:8 * (draw + 1)]
        assert all(g.split == "train" and g.task_type in types[:4] for g in drawn[:4])
        assert all(g.split == "valid_unseen" and g.task_type in types[4:] for g in drawn[4:])
    args.draws = 100
    with pytest.raises(ValueError, match="level L2 tests on .* fewer --draws"):
        coupling_run.choose_games(args)


@pytest.mark.parametrize("arguments, line", [
    (("--model", "no/such/folder"), "not a checkpoint"),
    (("--model", TINY, "--episodes", "100"), "--episodes 100"),
    (("--model", TINY, "--blocks", "1"), "--blocks"),
    (("--model", TINY, "--draws", "0"), "--draws"),
    (("--model", TINY, "--after", "no/such/run"), "no metrics.jsonl"),
    (("--model", TINY, "--model", TINY), "twice"),
    (("--model", TINY, "--report", "no/such/page.html"), "there is no folder no/such"),
    (("--model", TINY, "--out", os.path.join(TINY, "config.json")), "config.json"),
    (("--model", TINY, "--probes", os.path.join(TINY, "config.json"), *SMALL), "not a file of probes"),
    (("--model", TINY, "--temperature", "0", *SMALL), "--temperature"),
])
def test_bad_input_gets_one_clear_line(monkeypatch, capsys, tmp_path, arguments, line):
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, "--out", tmp_path / "out", *arguments)
    said = capsys.readouterr().err.splitlines()[-1] if stopped.value.code == 2 else str(stopped.value)
    assert line in said and said.startswith("coupling.py: ") and "\n" not in said.strip()
