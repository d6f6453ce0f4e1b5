"""How the loop wires the method together: what is weighed by what, whole groups, when a run stops, the warm-up."""

import math
from types import SimpleNamespace

import pytest
import torch

import train
from classifier_loss import generative_loss
from grpo import truncated_importance
from rollout import Episode, Step
from support import run as support_run
from support import warmup
from support.batches import deal, lay_out
from support.logs import Tally, flaw_advantages, metrics_of


def handmade(counts, groups=None):
    """Episodes whose steps have one token each; counts: (good, bad, won) of each."""
    episodes = []
    for i, (good, bad, won) in enumerate(counts):
        episode = Episode(SimpleNamespace(name=f"game {i}"), groups[i] if groups else i, won=won, reward=float(won))
        for k in range(good + bad):
            episode.sample([k], [-1.0])
            episode.steps.append(Step(k, k + 1, "x", repeated=k >= good))
        episodes.append(episode)
    return episodes


def weighed(episodes, weighting="token", questions=3):
    batch = lay_out(episodes)
    batch.labels = train.LABELS["flaws"](batch, None)
    return train.weigh(SimpleNamespace(labels="flaws", weighting=weighting, questions=questions), batch, seed=0)


def test_every_cell_of_class_and_outcome_weighs_a_quarter_in_the_loop():
    """Unequal cells: 5 good and 1 bad step of won episodes, 2 good and 7 bad ones of lost ones."""
    batch = weighed(handmade([(3, 1, True), (2, 0, True), (2, 7, False)]))
    good = batch.labels == 1
    for weights in (batch.value_weights, batch.question_weights):
        assert [weights[g & w].sum().item() for g in (good, ~good) for w in (batch.won, ~batch.won)] == pytest.approx([0.25] * 4)
    asked = batch.question_weights > 0
    # of each outcome as many good as bad ones, as many as the budget of 9 and the rarer class allow
    assert [int((asked & g & w).sum()) for g in (good, ~good) for w in (batch.won, ~batch.won)] == [1, 2, 1, 2]


@pytest.mark.parametrize("weighting, expected", [("token", [1 / 15] * 2), ("episode", [1 / 3 / 4, 1 / 3 / 9])])
def test_the_weighting_is_the_one_that_was_asked_for(weighting, expected):
    weights = weighed(handmade([(3, 1, True), (2, 0, True), (2, 7, False)]), weighting).token_weights
    assert [weights[0].item(), weights[-1].item()] == pytest.approx(expected)


def test_questions_and_their_weights_belong_together():
    verdicts = torch.tensor([-1.0, -10.0, -100.0])
    assert generative_loss(verdicts, torch.tensor([0.5, 0.3, 0.2])).item() == pytest.approx(0.5 + 3.0 + 20.0)


def test_answers_are_counted_in_their_own_cell():
    """Five answers: right about a good step of a won episode, wrong about one; right about a bad one of a lost
    one; wrong about a bad one of a won one; one that has no label."""
    tally = Tally()
    tally.judge("value", torch.tensor([1, 0, 0, 1, 1]).bool(), torch.tensor([1, 1, 0, 0, -1]),
                torch.tensor([1, 1, 0, 1, 0]).bool())
    found = metrics_of(handmade([(1, 1, True)]), [tally.sums])
    assert {k: v for k, v in found.items() if k.startswith(("count", "accuracy"))} == {
        "count_value_good_won": 2, "accuracy_value_good_won": 0.5, "count_value_bad_lost": 1, "accuracy_value_bad_lost": 1.0,
        "count_value_bad_won": 1, "accuracy_value_bad_won": 0.0}


def test_the_mean_advantage_of_each_flaw():
    """Won: a repeated step and a clean one; lost: one that is repeated and inadmissible, and a clean one."""
    episodes = handmade([(1, 1, True), (1, 1, False)])
    for episode, steps in zip(episodes, ([("repeated",), ()], [("repeated", "inadmissible"), ()])):
        for step, flaws in zip(episode.steps, steps):
            for name in ("malformed", "inadmissible", "no_effect", "repeated", "revisited"):
                setattr(step, name, name in flaws)
    found = flaw_advantages(episodes, torch.tensor([1.0, 2.0, -4.0, -3.0]))
    assert found == {"advantage_repeated": -1.5, "advantage_inadmissible": -4.0, "advantage_flawed": -1.5, "advantage_unflawed": -0.5}


def test_an_optimizer_step_has_whole_groups():
    batch = lay_out(handmade([(1, 0, True)] * 7, groups=[4, 4, 9, 9, 2, 2, 2]))
    shares = deal(batch, 2)
    assert sorted(sum(shares, [])) == list(range(7))
    assert sorted(tuple(sorted({batch.episodes[i].group for i in share})) for share in shares) == [(2, 9), (4,)]
    assert deal(batch, 5) == [[4, 5, 6], [0, 1], [2, 3]]  # no step without episodes


@pytest.mark.parametrize("gap, stops", [(0.05, False), (0.2, True), (math.nan, True)])
def test_a_run_stops_where_the_engine_samples_from_another_policy(gap, stops):
    run = SimpleNamespace(args=SimpleNamespace(engine_gap=0.1))
    sums = [{"gap": 1e-6}]
    if not stops:
        support_run.compare_engine(run, [gap, gap], sums)
        assert sums[0]["engine_gap"] == gap
        return
    with pytest.raises(SystemExit) as stopped:
        support_run.compare_engine(run, [gap, gap], sums)
    assert "from the trainer's" in str(stopped.value.code)
    with pytest.raises(SystemExit):  # the PyTorch engine's is known from the gradients' own pass
        support_run.compare_engine(run, [None, None], [{"gap": gap}])
    support_run.compare_engine(run, [None, None], [{"gap": 0.0}, {"gap": gap}])  # later steps: another policy by now


def test_three_updates_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    steps = []
    run = SimpleNamespace(args=SimpleNamespace(out=str(tmp_path)), skipped_in_a_row=0, accelerator=SimpleNamespace(
        is_main_process=True), optimizer=SimpleNamespace(step=lambda: steps.append(1)))
    for norm in (math.nan, math.inf, 1.0, math.nan, math.nan):
        support_run.step_if_finite(run, "batch", {"grad_norm": norm, "loss": 0.0})
    assert len(steps) == 1 and not (tmp_path / "bad_batch.pt").exists()
    with pytest.raises(SystemExit) as stopped:
        support_run.step_if_finite(run, "batch", {"grad_norm": 1.0, "loss": math.nan})
    assert "three updates in a row" in str(stopped.value.code) and torch.load(tmp_path / "bad_batch.pt") == "batch"


def test_rates_rise_over_the_warm_up_and_fall_to_their_end():
    optimizer = SimpleNamespace(param_groups=[{"peak": 1.0}, {"peak": 10.0}])
    args = SimpleNamespace(iterations=10, warmup=4, lr_end=0.5)
    rates = []
    for iteration in range(1, 11):
        support_run.set_rate(optimizer, args, iteration)
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * rates[-1])
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 0.85]) and rates[-1] == pytest.approx(0.55)


def test_importance_weights_have_no_gradient():
    trainer = torch.tensor([-1.0], requires_grad=True)
    assert not truncated_importance(trainer, torch.tensor([-1.5]), 2.0).requires_grad


def test_the_warm_up_knows_the_control_the_layer_and_the_temperature(model, episodes, monkeypatch):
    """Under `--control shuffled` the true labels must not be taught before RL either: of 12 steps half flawed,
    some draw must differ from the truth; class and outcome must not."""
    seen, passed = [], []
    monkeypatch.setattr(warmup, "play", lambda *args: (episodes, {"bad_games": []}))
    monkeypatch.setattr(warmup.levels, "sample_games", lambda *args: [])
    args = SimpleNamespace(seed=0, tasks=3, group_size=2, max_steps=3, max_context=2048, show_actions=False, control="shuffled",
                           warmup_updates=4, micro_tokens=8192, classifier="value", head_layer=1, temperature=0.7,
                           labels="flaws", weighting="token", questions=3)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    parts = [{"params": list(part.parameters()), "lr": 1e-3, "peak": 1e-3} for part in (model, head)]
    run = SimpleNamespace(args=args, model=model, value_head=head, question=None, games=None, engine=None, pool=None, chat=None,
                          optimizer=torch.optim.AdamW(parts))

    def weigh(args, batch, seed):
        truth = train.LABELS["flaws"](batch, None)
        seen.append((batch.labels, truth, batch.won))
        return train.weigh(args, batch, seed)

    real = warmup.forward
    monkeypatch.setattr(warmup, "forward", lambda *args: passed.append(args) or real(*args))
    warmup.warm_up(run, train.LABELS["flaws"], weigh)
    assert any(not torch.equal(labels, truth) for labels, truth, _ in seen)
    assert all(int(labels[won].sum()) == int(truth[won].sum()) for labels, truth, won in seen)
    assert all(call[3] == 0.7 and call[-1] == 1 for call in passed) and len(passed) >= 4
