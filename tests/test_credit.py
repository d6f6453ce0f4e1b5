"""Credit rules on one group of three hand-made episodes, against numbers computed by hand.

The group. States a, b, c; * is success. In brackets what the policy had read, below the tags and the labels.

    1, won    a [p] -go-> b       b [q] -take-> *
              planning good       explore good
    2, lost   a [p] -look-> a     a [n] -go-> b         b [q] -drop-> c
              planning bad        reflection none       monitor good
    3, lost   a [p] -wander-> c   c [q] -wander-> c     c [m] (malformed) c
              planning bad        explore bad           no tag, none

`look` has no effect. Rewards 1, 0, 0: mean 1/3, std sqrt(2)/3, so the outcomes z are sqrt(2), -sqrt(2)/2,
-sqrt(2)/2.
"""

import math
from types import SimpleNamespace

import pytest
import torch

import coupling
from actor import token_logprobs
from credit import CREDIT, GOAL, adca, distances, epo, flawed, gigpo, graphgpo, grpo, hgpo, penalty, rlvmr, tag_rewards, unflawed
from engines.torch_engine import TorchEngine
from games import levels
from helpers import make_batch
from rollout import Episode, Step, play
from support.policies import load_policy, make_chat

ROOT2, ROOT3 = math.sqrt(2), math.sqrt(3)
WON, LOST = ROOT2, -ROOT2 / 2
LABELS = [1, 1, 0, -1, 1, 0, 0, -1]


def step(state, observation, action, after, tag=None, reward=0.0, **flaws):
    return Step(0, 1, action, malformed=action is None, state=state, next_state=after, tag=tag, reward=reward,
                observation=observation, **flaws)


def group(number=0):
    first = [step("a", "p", "go", "b", "planning"), step("b", "q", "take", "w", "explore", 1.0)]
    second = [step("a", "p", "look", "a", "planning", no_effect=True),
              step("a", "n", "go", "b", "reflection"), step("b", "q", "drop", "c", "monitor")]
    third = [step("a", "p", "wander", "c", "planning"),
             step("c", "q", "wander", "c", "explore", repeated=True), step("c", "m", None, "c")]
    return [Episode("game", number, steps=first, won=True, reward=1.0), Episode("game", number, steps=second),
            Episode("game", number, steps=third)]


def approx(values):
    return pytest.approx(values, abs=1e-4)


def test_grpo_gives_every_step_its_episode_s_outcome():
    assert grpo(group()).tolist() == approx([WON] * 2 + [LOST] * 6)
    assert grpo(group(), normalize_std=False).tolist() == approx([2 / 3] * 2 + [-1 / 3] * 6)


def test_gigpo_by_hand():
    """gamma 0.5, so the returns G are 1/2, 1 | 0, 0, 0 | 0, 0, 0.

    From a: 1/2, 0, 0, 0: mean 1/8, variance ((3/8)^2 + 3 (1/8)^2) / 4 = 3/64, std sqrt(3)/8: z = sqrt(3), and
    three times -1/sqrt(3). From b: 1 and 0: z = 1 and -1. From c: 0 and 0, no variance.
    """
    near = -1 / ROOT3
    assert gigpo(group(), gamma=0.5).tolist() == approx(
        [WON + ROOT3, WON + 1, LOST + near, LOST + near, LOST - 1, LOST + near, LOST, LOST])
    assert gigpo(group(), gamma=0.5, weight=2.0)[0].item() == approx(WON + 2 * ROOT3)
    assert gigpo(group(), normalize_std=False, gamma=0.5).tolist() == approx(
        [2 / 3 + 3 / 8, 2 / 3 + 1 / 2, -1 / 3 - 1 / 8, -1 / 3 - 1 / 8, -1 / 3 - 1 / 2, -1 / 3 - 1 / 8]
        + [-1 / 3] * 2)


def test_gigpo_sees_a_difference_where_all_succeed():
    """One wins at once, one after a detour: G from a is 1 and 1/2, z = 1 and -1; the outcome says nothing."""
    quick = Episode("game", 0, steps=[step("a", "p", "take", "w", reward=1.0)], won=True, reward=1.0)
    slow = Episode("game", 0, won=True, reward=1.0)
    slow.steps = [step("a", "p", "go", "b"), step("b", "q", "take", "w", reward=1.0)]
    assert gigpo([quick, slow], gamma=0.5).tolist() == approx([1, -1, 0])
    assert grpo([quick, slow]).tolist() == [0, 0, 0]


def test_hgpo_by_hand():
    """gamma 0.5, history 1: terms for the last observation (weight 2) and for the last two (weight 3).

    After p: 1/2, 0, 0: z = sqrt(2), -sqrt(2)/2, -sqrt(2)/2. After q: 1, 0, 0 (one of them from the state c,
    which the policy cannot tell from b): the same z. After p, q: 1 (episode 1) and 0 (episode 3): z = 1 and
    -1. After n, q and after n or m: alone.
    """
    found = hgpo(group(), gamma=0.5, history=1)
    assert found.tolist() == approx([ROOT2, (2 * ROOT2 + 3) / 5, LOST, 0, LOST, LOST, (2 * LOST - 3) / 5, 0])
    flat = hgpo(group(), gamma=0.5, history=1, alpha=0.0)  # all terms weigh the same
    assert flat[1].item() == approx((ROOT2 + 1) / 2)
    assert hgpo(group(), gamma=0.5, history=0)[1].item() == approx(ROOT2)
    based = hgpo(group(), gamma=0.5, history=1, base=True)  # weights 1, 2, 3
    assert based[1].item() == approx((WON + 2 * ROOT2 + 3) / 6) and based[3].item() == approx(LOST)


def test_graphgpo_by_hand():
    """d: * 0, b 1, a 2, and c, from where nobody got on, 3. What each step's next state is worth, 10 * 0.1^d:

    from a: to b 1, to a 0.1, to b 1, to c 0.01: mean 0.5275, variance (2 * 0.4725^2 + 0.4275^2 + 0.5175^2) /
    4 = 0.22426875, std 0.473570: z = 0.99774, -0.90272, 0.99774, -1.09276. From b: 10 and 0.01: z = 1, -1.
    From c: equal. The second step of episode 2 leads on, and is hardly punished although the episode is lost.
    """
    to_b, to_a, to_c = 0.99774, -0.90272, -1.09276
    assert graphgpo(group()).tolist() == approx(
        [WON + to_b, WON + 1, LOST + to_a, LOST + to_b, LOST - 1, LOST + to_c, LOST, LOST])
    assert graphgpo(group(), normalize_std=False)[:2].tolist() == approx([2 / 3 + 0.4725, 2 / 3 + 4.995])


def test_graphgpo_far_from_success_is_not_drowned_by_eps():
    """Twelve steps before success one step leads on and one stays: z = 1 and -1, as anywhere. 10 * 0.1^11
    against 10 * 0.1^12, divided by a std + 1e-6, would have given 0.00005."""
    states = [f"s{i}" for i in range(12)] + ["w"]
    won = Episode("game", 0, won=True, reward=1.0)
    won.steps = [step(s, s, "on", t, reward=float(t == "w")) for s, t in zip(states, states[1:])]
    lost = Episode("game", 0, steps=[step("s0", "s0", "stay", "s0")])
    found = graphgpo([won, lost])
    assert found[0].item() == approx(1 + 1) and found[-1].item() == approx(-1 - 1)


def test_distances_are_those_of_the_shortest_observed_path_in_the_own_group():
    edges = [((0, "a"), (0, "b")), ((0, "b"), (0, "c")), ((0, "c"), (0, GOAL)), ((0, "a"), (0, "c")),
             ((0, "b"), (0, "x")), ((1, "a"), (1, "b"))]
    found = distances(edges)
    assert [found[0, s] for s in ("a", "b", "c", "x")] == [2, 2, 1, 3]
    assert found[1, "a"] == found[1, "b"] == 1  # no success in group 1: nothing tells its states apart


def test_rlvmr_by_hand():
    """Rewards: planning 1, 0, 0 (who won?): z = sqrt(2), -sqrt(2)/2, -sqrt(2)/2. explore 1 (new), 0 (`wander`
    once more): z = 1, -1. reflection 1 (`look` failed, now `go`), alone: 0. The rest: monitor 0, malformed
    -0.1: z = 1, -1.
    """
    assert [m for e in group() for m in tag_rewards(e)] == [1, 1, 0, 1, 0, 0, 0, -0.1]
    assert rlvmr(group()).tolist() == approx(
        [WON, (WON + 1) / 2, LOST, LOST / 2, (LOST + 1) / 2, LOST, (LOST - 1) / 2, (LOST - 1) / 2])
    assert rlvmr(group(), alpha=0.8)[1].item() == approx(0.8 * WON + 0.2)
    assert torch.equal(rlvmr(group(), alpha=1.0), grpo(group()))


def test_reflection_is_paid_after_a_failure_and_for_another_action_only():
    def paid(before, action):
        return tag_rewards(Episode("game", 0, steps=[before, step("a", "p", action, "b", "reflection")]))[1]
    for failure in ({"inadmissible": True}, {"no_effect": True}):
        assert paid(step("a", "p", "look", "a", **failure), "go") == 1
        assert paid(step("a", "p", "look", "a", **failure), "look") == 0
    assert paid(step("a", "p", None, "a"), "go") == 1
    assert paid(step("a", "p", "look", "b"), "go") == 0
    assert tag_rewards(Episode("game", 0, steps=[step("a", "p", "go", "b", "reflection")])) == [0]


def test_adca_by_hand():
    """Labels +0.2, +0.2 | -0.2, none, +0.2 | -0.2, -0.2, none: mean 0, std 0.2, z = +-1; times 0.1, and each
    step gets the sum of what follows: 0.2, 0.1 | 0, 0.1, 0.1 | -0.2, -0.1, 0. Only the mean subtracted: a
    fifth of that."""
    follow = torch.tensor([0.2, 0.1, 0.0, 0.1, 0.1, -0.2, -0.1, 0.0])
    found = adca(group(), labels=torch.tensor(LABELS)) - grpo(group())
    assert found.tolist() == approx(follow.tolist())
    found = adca(group(), labels=LABELS, normalize_std=False) - grpo(group(), normalize_std=False)
    assert found.tolist() == approx((0.2 * follow).tolist())
    with pytest.raises(ValueError, match="--labels"):
        adca(group())


def test_the_two_parts_and_the_penalty_by_hand():
    """Flawed: `look` (no effect), the second `wander` (repeated) and the malformed answer."""
    assert flawed(group()).tolist() == approx([0, 0, LOST, 0, 0, 0, LOST, LOST])
    assert unflawed(group()).tolist() == approx([WON, WON, 0, LOST, LOST, LOST, 0, 0])
    assert penalty(group(), size=0.5).tolist() == approx([WON, WON, LOST - 0.5, LOST, LOST, LOST, LOST - 0.5, LOST - 0.5])


def test_where_there_is_nothing_to_look_at_every_rule_is_grpo():
    """Six steps in six states, after six observations, without tags and without labels."""
    episodes = group()
    for number, one in enumerate(s for e in episodes for s in e.steps):
        one.state, one.next_state, one.observation = number, number + 1, number
        one.tag, one.malformed, one.no_effect, one.repeated = None, False, False, False
    for normalize_std in (True, False):
        plain = grpo(episodes, normalize_std)
        none = torch.full((8,), -1)
        assert not flawed(episodes, normalize_std).any()
        for name, rule in CREDIT.items():
            if name == "flawed":  # the other way round: nothing to look at is nothing to learn from
                continue
            own = {"base": True} if name == "hgpo" else {}
            found = rule(episodes, normalize_std=normalize_std, labels=none, **own)
            assert torch.allclose(found, plain, atol=1e-6) and found.shape == (8,), name
        assert not hgpo(episodes, normalize_std).any()  # without base: no pool, no advantage


def test_groups_do_not_see_each_other():
    """The same states, tags and texts in another group, with another outcome, change nothing in the first."""
    others = group(number=7)
    for one in others:
        one.won, one.reward = True, 1.0
        one.steps[-1].reward = 1.0
    for name, rule in CREDIT.items():
        alone, together = rule(group(), labels=LABELS), rule(group() + others, labels=LABELS + [0, 1] * 4)
        assert torch.allclose(alone, together[:8], atol=1e-6), name
        between = rule(others[:1] + group() + others[1:], labels=[0, 1] + LABELS + [0, 1] * 3)
        assert torch.allclose(alone, between[2:10], atol=1e-6), name


def test_a_group_without_tags_is_left_to_its_outcome_whatever_tags_another_has():
    bare = group(number=7)
    for one in bare:
        for s in one.steps:
            s.tag = None
    assert torch.equal(rlvmr(group() + bare)[8:], grpo(bare)) and torch.equal(rlvmr(group() + bare)[:8], rlvmr(group()))


def test_hgpo_compares_a_short_past_with_nobody():
    """p comes back at the third step of the second episode; returns there 0, at both openings 1/2 and 1/4, gamma
    1/2. Alone (k = 1): 1/2, 1/4, 0 with mean 1/4 and variance 1/24. With one step of past (k = 2) only the third
    has one, and it is alone: no term. Pooling the openings by it would compare them once more."""
    first = Episode("game", 0, won=True, reward=1.0, steps=[step("a", "p", "go", "b"), step("b", "q", "take", "w", reward=1.0)])
    second = Episode("game", 0, won=True, reward=0.5, steps=[
        step("a", "p", "look", "a"), step("a", "n", "go", "b", reward=0.5), step("b", "p", "drop", "c")])
    third = Episode("game", 0, steps=[step("a", "p", "wander", "c")])
    found = hgpo([first, second, third], gamma=0.5, history=1)
    # k = 1, all that read p: 1/2, 1/4, 0, 0; k = 2: a step whose past is too short has no term of that kind
    mean, std = 3 / 16, (((5 / 16) ** 2 + (1 / 16) ** 2 + 2 * (3 / 16) ** 2) / 4) ** 0.5
    assert found.tolist() == approx([(0.5 - mean) / std, 0.0, (0.25 - mean) / std, 0.0, -mean / std, -mean / std])


def test_a_group_without_success_teaches_nothing():
    """No success, no reward: 0 for all rules but those that have their signal from elsewhere (tags, labels).
    With partial scores and no success, GraphGPO is left with the outcome."""
    episodes = group()
    episodes[0].won, episodes[0].reward, episodes[0].steps[1].reward = False, 0.0, 0.0
    for name in ("grpo", "gigpo", "hgpo", "graphgpo"):
        assert CREDIT[name](episodes).tolist() == [0.0] * 8, name
    assert adca(episodes, labels=[1] * 8).tolist() == [0.0] * 8  # labels without variance
    assert rlvmr(episodes).tolist() == approx([0, 0.5, 0, 0, 0.5, 0, -0.5, -0.5])
    episodes[0].reward = episodes[0].steps[1].reward = 0.3
    assert torch.equal(graphgpo(episodes), grpo(episodes)) and graphgpo(episodes)[0] > 1


def test_rewards_of_steps_that_do_not_add_up_are_refused():
    """`--reward success` changes what an episode is worth; returns of the old rewards would not tell."""
    episodes = group()
    episodes[1].reward = 1.0
    for rule in (gigpo, hgpo):
        with pytest.raises(ValueError, match="do not add up"):
            rule(episodes)


def test_every_rule_on_a_real_group(pool):
    """The shipped policy on two generated houses: episodes of a group share states, and the rules differ."""
    model, tokenizer = load_policy("policies/tiny")
    chat, _ = make_chat(tokenizer, "alfworld", "policies/tiny")
    games = [levels.generated_game("train", seed) for seed in (3, 4)]
    episodes, _ = play(TorchEngine(model, chat.eos, max_new_tokens=24), pool, chat, games, 4, 12, seed=1)
    steps = [s for e in episodes for s in e.steps]
    labels = torch.tensor([0 if s.flawed else 1 for s in steps])
    found = {name: rule(episodes, labels=labels) for name, rule in CREDIT.items()}
    for advantages in found.values():
        assert advantages.shape == (len(steps),) and advantages.isfinite().all()
        assert advantages.dtype == torch.float32
    assert any(e.won for e in episodes) and torch.equal(found["rlvmr"], found["grpo"])
    for name in ("gigpo", "hgpo", "graphgpo", "adca", "penalty", "unflawed", "flawed"):
        assert (found[name] - found["grpo"]).abs().max() > 0.1, name
    # What `unflawed` and `flawed` train by are the parts that coupling.py tells apart: the same gradients.
    args, run = SimpleNamespace(temperature=1.0, micro_tokens=4096), SimpleNamespace(model=model)
    batch = make_batch(episodes, torch.zeros(len(episodes)))
    batch.advantages = found["grpo"]
    for name, part in zip(("unflawed", "flawed"), coupling.parts_of(args, run, batch)):
        batch.advantages = found[name]
        own = coupling.ascent(args, run, batch)
        assert coupling.norm(part) > 1e-3, name
        assert coupling.norm([a - b for a, b in zip(own, part)]) < 1e-5 * coupling.norm(part), name
        batch.advantages = found["grpo"]


# -------------------------------------------------------------------------------------------------------- EPO

def test_epo_penalty_and_gradient_by_hand():
    """Turns with mean entropy 0.4, 1.0 and 2.0, band 0.5 to 1.5: P = (0.1 + 0 + 0.5) / 3. Each token of the
    first turn (two of them) gets -1/3 * 1/2: more entropy lessens the loss; the second 0; the third (one
    token) +1/3."""
    entropies = torch.tensor([0.3, 0.5, 0.9, 1.0, 1.1, 2.0], requires_grad=True)
    penalty, mean = epo(entropies, [2, 3, 1], turns=3, reference=1.0)
    assert penalty.item() == approx(0.2) and mean.item() == approx(3.4 / 3)
    penalty.backward()
    assert entropies.grad.tolist() == approx([-1 / 6, -1 / 6, 0, 0, 0, 1 / 3])
    nothing, _ = epo(entropies, [2, 3, 1], turns=3)
    assert nothing.item() == 0.0
    one, two = entropies.split([2, 4])  # micro-batches add up
    (penalty, mean), (more, rest) = epo(one, [2], 3, 1.0), epo(two, [3, 1], 3, 1.0)
    assert (penalty + more).item() == approx(0.2) and (mean + rest).item() == approx(3.4 / 3)


@pytest.mark.parametrize("limit", [2**24, 7 * 50])  # all logits at once; seven tokens at a time
def test_epo_reaches_the_weights_outside_the_band_and_not_inside(limit):
    """The gradient at the output layer, not only at the entropies: those of the trainer had none."""
    torch.manual_seed(0)
    head, hidden, targets = torch.nn.Linear(8, 50, bias=False), torch.randn(20, 8), torch.randint(50, (20,))
    _, plain = token_logprobs(hidden, head, targets, max_logits=limit)
    assert not plain.requires_grad
    _, entropies = token_logprobs(hidden, head, targets, max_logits=limit, entropy_grad=True)
    assert torch.allclose(entropies, plain, atol=1e-6)
    full = torch.distributions.Categorical(logits=head(hidden))
    assert torch.allclose(entropies, full.entropy(), atol=1e-5)
    now = entropies.mean().item()

    def gradient(reference):
        penalty, _ = epo(token_logprobs(hidden, head, targets, 1.0, limit, True)[1], [20], 1, reference)
        return torch.autograd.grad(penalty, head.weight)[0]

    assert not gradient(now).any()                                    # inside the band
    above, below = gradient(now / 2), gradient(now * 4)
    assert above.abs().max() > 1e-3 and torch.allclose(above, -below, atol=1e-6)
    with torch.no_grad():
        head.weight -= 0.1 * above                                    # a step down the loss: less entropy
    assert token_logprobs(hidden, head, targets)[1].mean() < now


def test_the_loop_takes_every_rule_and_smooths_entropy(model, chat, episodes):
    """GRPO's rule is eq. 1 of grpo.py, bit for bit; EPO's term reaches the policy's gradient, and outside its band alone
    the penalty does."""
    from types import SimpleNamespace
    from grpo import group_advantages
    from helpers import advantages_of, make_batch, update
    from support.batches import lay_out
    from support.run import smooth_entropy
    batch = lay_out(episodes)
    for std in (True, False):
        expected = group_advantages(batch.reward, batch.group, std)[0][batch.episode_of_step]
        assert torch.equal(CREDIT["grpo"](episodes, std, None), expected)
    entropies = torch.rand(len(batch.step_of_token)).requires_grad_()
    run = SimpleNamespace(args=SimpleNamespace(epo=0.01, iterations=4), turn_entropies=[])
    loss, entropy = smooth_entropy(run, entropies, batch, len(batch.flawed))
    assert loss.item() == pytest.approx(-0.01 * entropy.item())  # no reference yet: the bonus alone
    run.turn_entropies = [entropy.item() / 4]                      # far above the band: the penalty pulls it down
    above, _ = smooth_entropy(run, entropies, batch, len(batch.flawed))
    assert above.item() > loss.item()
    run.args.epo = 0.0
    assert smooth_entropy(run, entropies, batch, len(batch.flawed))[0] == 0.0
    for episode in episodes:
        episode.reward = 1.0  # no advantage: only EPO is left
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert update(model, None, optimizer, make_batch(episodes, advantages_of(episodes)))["grad_norm"] == 0.0
    assert update(model, None, optimizer, make_batch(episodes, advantages_of(episodes)), epo=0.01)["grad_norm"] > 0.0
