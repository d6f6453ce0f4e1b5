"""The report page: what it says of a step against other ways to find it out, and the page in a real browser.

The browser is Chromium, Debian's or playwright's own, driven by playwright (requirements-browser.txt); where it
is not there, the tests that look at a page are skipped."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from rollout import FLAWS
from support import report
from support.batches import make_question

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def data_of(path):
    """The data in a page, as the browser reads them."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


# ------------------------------------------------------------------------------------------ what is said of a step

def test_observations_and_answers_are_what_was_read_and_sampled(episodes, chat):
    """Put back into the chat's format, they give the very tokens of the episode."""
    for episode in episodes:
        begin = 0
        for k, (step, (observation, answer)) in enumerate(zip(episode.steps, report.texts(episode, chat), strict=True)):
            ended = episode.tokens[begin - 1] == chat.eos
            again = chat.next_prompt(observation, ended) if k else chat.first_prompt(observation)
            assert again == episode.tokens[begin:step.start] and "<|im_start|>" not in observation
            assert answer == chat.tokenizer.decode(episode.tokens[step.start:step.end])
            begin = step.end
    assert "Your task is to" in report.texts(episodes[0], chat)[0][0]


@torch.no_grad()
def test_probabilities_against_plain_forward_passes(model, chat, episodes):
    """Of every step alone: the head on the model's own hidden state, the two verdicts after the question, spelled out. In
    micro-batches that take the episodes in another order."""
    del episodes[0].steps[1:]  # the first becomes the shortest
    for values in (episodes[0].tokens, episodes[0].sampled, episodes[0].logprobs):
        del values[episodes[0].steps[0].end:]
    head, question = torch.nn.Linear(model.config.hidden_size, 1), make_question(chat)
    found = report.chances(model, episodes, head, -1, question, max_tokens=300)
    good, bad = (chat.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("good", "bad"))
    heads, words = [], []
    for episode in episodes:
        for step in episode.steps:
            ids = episode.tokens[:step.end]
            hidden = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            heads.append(torch.sigmoid(head(hidden)).item())
            asked = torch.tensor([ids + question.prompts[ids[-1] == chat.eos]])
            two = model(input_ids=asked).logits[0, -1, [good, bad]].softmax(-1)
            words.append(two[0].item())
    assert found["head"] == pytest.approx(heads, abs=1e-5) and found["words"] == pytest.approx(words, abs=1e-5)
    assert max(words) - min(words) > 1e-3 and report.chances(model, episodes) == {}


def command(*arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_of_a_run_and_of_two_checkpoints(tmp_path):
    """A run's page has its test games and its last groups; its advantages are (R - mean) / std by hand. Then the run's
    checkpoint beside the policy it began as, with the oracle."""
    run = tmp_path / "run"
    done = command("train.py", "--games", "generated", "--iterations", "1", "--tasks", "2", "--group-size", "4", "--updates",
                   "1", "--max-steps", "8", "--eval-games", "2", "--workers", "1", "--classifier", "both", "--credit", "grpo",
                   "--warmup-updates", "0", "--labels", "rules", "--out", str(run), "--seed", "3")
    assert done.returncode == 0, done.stderr
    data = data_of(run / "report.html")
    assert [one["name"] for one in data["sets"]] == ["L1, test", "L0, test", "training"] and len(data["metrics"]) == 2
    training, groups = data["sets"][2]["episodes"], {}
    assert len(training) == 8 and data["facts"]["credit"] == "grpo"
    for episode in training:
        groups.setdefault(episode["group"], []).append(episode)
    for group in groups.values():
        rewards = torch.tensor([e["reward"] for e in group], dtype=torch.float64)
        std = ((rewards - rewards.mean()) ** 2).mean().sqrt()
        for episode, reward in zip(group, rewards):
            wanted = 0.0 if std == 0 else ((reward - rewards.mean()) / std).item()
            for step in episode["steps"]:
                assert step["advantage"] == pytest.approx(wanted, abs=1e-4)
                assert step["label"] == (0 if step["flaws"] else 1 if episode["won"] else -1)
    steps = [s for one in data["sets"] for e in one["episodes"] for s in e["steps"]]
    assert all(0 < s["head"] < 1 and 0 < s["words"] < 1 and s["logprob"] <= 0 for s in steps)
    assert all("advantage" not in s for e in data["sets"][0]["episodes"] for s in e["steps"])

    page = tmp_path / "both.html"
    done = command("evaluate.py", "--compare", "policies/tiny", str(run / "checkpoint-000001"), "--games", "generated",
                   "--count", "3", "--max-steps", "8", "--workers", "1", "--report", str(page), "--oracle")
    assert done.returncode == 0, done.stderr
    data = data_of(page)
    a, b = data["sets"]
    assert "McNemar" in data["compared"] and [e["game"] for e in a["episodes"]] == [e["game"] for e in b["episodes"]]
    for episode in a["episodes"]:
        far = episode["steps"][0]["oracle"][1]
        for step in episode["steps"]:  # the distance goes on from step to step, and falls where the step is good
            label, before, after = step["oracle"]
            assert before == far and label == (after < before) and "head" not in step and "words" not in step
            far = after
        assert (far == 0) == episode["won"]
    assert all("head" in s and "words" in s for e in b["episodes"] for s in e["steps"])


@pytest.mark.parametrize("arguments, message", [
    (["--report", "/no/such/folder/r.html"], "--report /no/such/folder/r.html: there is no folder /no/such/folder"),
    (["--report", "r.html", "--agent", "expert"], "--report shows a checkpoint's steps: expert has none"),
    (["--report", "r.html", "--compare", "a.json", "policies/tiny"], "--report shows a checkpoint's steps: a.json has none"),
    (["--oracle"], "--oracle goes with --report"),
])
def test_bad_input_is_one_clear_line_before_anything_is_played(arguments, message):
    done = command("evaluate.py", *arguments)
    assert done.returncode != 0 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not os.path.exists(os.path.join(ROOT, "r.html"))


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("before")
    with pytest.raises(TypeError):
        report.write_report(str(page), "x", facts={"what": object()})
    assert page.read_text() == "before" and os.listdir(tmp_path) == ["page.html"]


# --------------------------------------------------------------------------------------------- the page in a browser

HOSTILE = ("<action>look</action></script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
           "<!-- <script>")


def an_episode(game, won, actions, flaws=(), **more):
    """An episode as `describe` makes it: {position: numbers of flaws}."""
    steps = [{"observation": f"You see {action}.", "answer": f"<action>{action}</action>", "action": action, "tag": None,
              "flaws": dict(flaws).get(k, []), "logprob": -0.5, "label": int(k not in dict(flaws)), **more}
             for k, action in enumerate(actions)]
    return {"game": game, "task": game.split("-")[0], "group": 0, "won": won, "score": None, "reward": float(won),
            "truncated": False, "steps": steps}


def a_set(name, episodes):
    line = {"games": len(episodes), "won": sum(e["won"] for e in episodes), "success": 0.5, "low": 0.2, "high": 0.8,
            "steps": 2.0}
    return {"name": name, "about": "by hand", "episodes": episodes,
            "summary": {**line, **{flaw: 0.25 for flaw in FLAWS}, "tasks": {"pick": line}}}


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements-browser.txt")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium (apt-get install chromium): {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def view(browser, tmp_path):
    """view(sets, ...) writes a page and opens it; in the end there must have been no complaint in the console."""
    said, pages = [], []

    def view(sets, width=1280, hash="", scheme="light", **more):
        path = tmp_path / f"page-{len(pages)}.html"
        report.write_report(str(path), more.pop("title", "a title"), sets, **more)
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.set_default_timeout(20_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda one: None if one.url.startswith(("file:", "data:")) else said.append(one.url))
        page.goto(path.as_uri() + hash)
        pages.append(page)
        return page
    yield view
    for page in pages:
        page.close()
    assert said == []


def listed(page):
    return [name.inner_text() for name in page.query_selector_all("#list a.row:first-child")]


def two_sets():
    return [a_set("test", [an_episode("pick-1", True, ["go", "take"], {1: [1, 3]}),
                           an_episode("cool-2", False, ["go", "zebra"]),
                           an_episode("pick-3", False, ["go"] * 3, {0: [0], 2: [4]})]),
            a_set("training", [an_episode("pick-9", w, ["a"], advantage=a) for w, a in ((True, 1.0), (False, -1.0))])]


def test_filters(view):
    page = view(two_sets())
    assert listed(page) == ["pick-1", "cool-2", "pick-3"] and page.inner_text("#count") == "3 of 3"

    def chosen(selector, value):
        (page.fill if selector == "#text" else page.select_option)(selector, value)
        page.wait_for_timeout(300)  # a keystroke later
        return listed(page)
    assert chosen("#task", "pick") == ["pick-1", "pick-3"] and chosen("#outcome", "lost") == ["pick-3"]
    assert chosen("#task", "") == ["cool-2", "pick-3"] and chosen("#outcome", "") == ["pick-1", "cool-2", "pick-3"]
    assert chosen("#flaw", "repeated") == ["pick-1"] and chosen("#flaw", "any") == ["pick-1", "pick-3"]
    assert chosen("#flaw", "none") == ["cool-2"] and chosen("#flaw", "") and chosen("#text", "see ZEBRA") == ["cool-2"]
    assert chosen("#text", "nowhere") == [] and page.inner_text("#count") == "0 of 3"
    chosen("#text", "")
    assert chosen("#set", "1") == ["pick-9 (1)", "pick-9 (2)"]


def test_cells_say_flaws_without_colour_and_link_to_their_step(view):
    page = view(two_sets())
    cells = page.query_selector_all("#list > div:first-child .cell")
    assert [one.inner_text() for one in cells] == ["·", "ir"]
    assert cells[1].get_attribute("title") == "step 2: inadmissible, repeated"
    cells[1].click()
    page.wait_for_selector(".step.now")
    assert "step=2" in page.url and page.query_selector(".step.now code").inner_text() == "take"
    said = page.inner_text(".step.now")
    for what in ("You see take.", "<action>take</action>", "inadmissible, repeated", "label\nbad", "no group", "-0.500"):
        assert what in said
    again = view(two_sets(), hash=page.url[page.url.index("#"):])  # the link, in a new window
    assert again.query_selector(".step.now code").inner_text() == "take" and "won in 2 steps" in again.inner_text("#detail")


def test_keys_walk_through_episodes_and_steps(view):
    page = view(two_sets())
    shown = lambda: page.inner_text("#detail h3")
    for key, game in (("n", "pick-1"), ("n", "cool-2"), ("n", "pick-3"), ("n", "pick-3"), ("p", "cool-2")):
        page.keyboard.press(key)
        page.wait_for_timeout(100)
        assert shown() == game and "now" in page.get_attribute(f"#list > div:has-text('{game}')", "class")
    for key, step in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowRight", 2), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        page.wait_for_timeout(50)
        assert page.query_selector(".step.now summary a").inner_text() == str(step) and f"step={step}" in page.url
    page.keyboard.press("/")
    page.keyboard.type("n")  # in the search field a key is a letter
    assert shown() == "cool-2" and page.input_value("#text") == "n"
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Choose an episode.")


def test_two_checkpoints_part_where_they_differ(view):
    """The shared step stands there once, with what either thinks of it; then both side by side."""
    a = a_set("A", [an_episode("pick-1", True, ["go", "take", "put"], head=0.9), an_episode("pick-2", True, ["x"])])
    b = a_set("B", [an_episode("pick-1", False, ["go", "drop"], head=0.2), an_episode("pick-2", True, ["x"])])
    page = view([a, b], compared="B - A on the same 2 games")
    assert "B - A" in page.inner_text("#compared") and listed(page) == ["pick-1", "pick-2"]
    page.keyboard.press("n")
    page.wait_for_selector("text=they part at step 2")
    shared, said = page.query_selector("#detail > .step"), lambda node: (node.query_selector("code") or node).inner_text()
    assert said(shared) == "go" and "0.900" in shared.inner_text() and "0.200" in shared.inner_text()
    rows = [[said(side) for side in row.query_selector_all(".side")] for row in page.query_selector_all(".pair")]
    assert rows == [["A", "B"], ["take", "drop"], ["put", "B ended: ✗ lost"], ["A ended: ✓ won", ""]]
    left, right = page.query_selector_all(".pair:has(.step) .side")[:2]
    assert left.bounding_box()["y"] == right.bounding_box()["y"] and left.bounding_box()["x"] < right.bounding_box()["x"]
    page.select_option("#outcome", "differ")
    page.wait_for_timeout(300)
    assert listed(page) == ["pick-1"]
    page.click("#list > div:first-child .strip:last-child .cell:nth-child(2)")  # B's second step
    page.wait_for_timeout(100)
    assert {s.inner_text() for s in page.query_selector_all(".step.now code")} == {"take", "drop"}
    page.select_option("select[aria-label=beside]", "none")
    page.wait_for_timeout(100)
    assert "they part" not in page.inner_text("#detail") and len(page.query_selector_all("#detail .step[data-step]")) == 3


@pytest.mark.parametrize("where", ["game", "answer", "observation", "title", "section"])
def test_hostile_text_is_seen_and_never_runs(view, where):
    episode, more = an_episode("pick-1", True, ["go"]), {}
    if where == "game":
        episode["game"] = episode["task"] = HOSTILE
    elif where in ("answer", "observation"):
        episode["steps"][0] |= {where: HOSTILE, "action": HOSTILE}
    elif where == "title":
        more = {"title": HOSTILE, "facts": {HOSTILE: HOSTILE}, "compared": ""}
    else:
        more = {"sections": [report.section(HOSTILE, HOSTILE, [HOSTILE], [[HOSTILE]], pre=HOSTILE)]}
    page = view([a_set("test", [episode])], **more)
    page.keyboard.press("n")
    page.wait_for_selector("#detail h3")
    assert page.evaluate("window.hacked") is None and page.evaluate("document.scripts.length") == 2
    assert page.query_selector("img") is None
    spot = {"game": "#list", "title": "#title", "section": "#more"}.get(where, "#detail")
    assert HOSTILE in page.inner_text(spot)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_a_phone_in_both_schemes(view, scheme):
    """No sideways scrolling at 375 pixels, with long words too; text against its background at least 4.5 to 1 (WCAG 2, AA)."""
    long = an_episode("pick-" + "x" * 200, False, ["y" * 300, "z"] * 20, {k: [0, 1, 3] for k in range(0, 40, 3)})
    metrics = [{"iteration": i, "success": 0.1 * i, **{flaw: 0.1 for flaw in FLAWS}} for i in range(5)]
    page = view([a_set("a name of a set " * 4, [long]), a_set("B", [long])], width=375, scheme=scheme, metrics=metrics,
                facts={"out": "w" * 200}, compared="v" * 300)
    assert page.query_selector("#summary td").bounding_box()["width"] > 90  # the task's name is not one letter wide
    for step in range(3):  # the list; an episode beside another; alone
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        poor = page.evaluate("""() => {
            const channels = c => c.match(/[\\d.]+/g).map(Number), light = c => channels(c).slice(0, 3).map(v => v / 255)
              .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
              .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
            const behind = n => { for (; n; n = n.parentElement) { const c = getComputedStyle(n).backgroundColor;
              if (channels(c)[3] !== 0) return c; } return "rgb(255, 255, 255)"; };
            return [...document.querySelectorAll("body *")].filter(n => n.offsetParent && n.style.background === "" &&
              [...n.childNodes].some(c => c.nodeType === 3 && c.data.trim())).map(n => {
              const a = light(getComputedStyle(n).color), b = light(behind(n));
              return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), n.className, n.textContent.slice(0, 40)]; })
              .filter(([ratio]) => ratio < 4.5); }""")
        assert poor == []
        if step == 0:
            page.keyboard.press("n")
            page.wait_for_selector(".pair")
            assert not page.is_visible("#list") and page.is_visible("a.back")
        elif step == 1:
            page.select_option("select[aria-label=beside]", "none")
            page.wait_for_timeout(100)


def test_curves_are_drawn_from_the_metrics(view):
    metrics = [{"iteration": 0, "eval_L1": {"success": 0.2, "low": 0.1, "high": 0.3, "played": {"a game": {}}}},
               *({"iteration": i, "success": i / 4, "kl": float("nan"), "inadmissible": 0.5} for i in (1, 2, 3))]
    page = view([], metrics=metrics)
    titles = [one.inner_text() for one in page.query_selector_all(".chart h3")]
    assert titles == ["success", "flawed actions, share of steps"]  # what was not measured is not drawn
    line = page.get_attribute(".chart polyline", "points").split()
    xs, ys = zip(*(map(float, point.split(",")) for point in line))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1]) and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2]) and ys[0] > ys[2]
    assert page.query_selector(".chart svg text").inner_html() == "0.0" and not page.is_visible("#episodes")


def test_further_sections_carry_text_table_and_picture(view):
    """A page of sections alone: no episodes, and the picture is in the page itself."""
    picture = os.path.join(ROOT, "docs", "4_remedy.png")
    page = view([], sections=[report.section("Coupling", "leak against own correction", ["kind", "leak"], [["repeated", 0.19]],
                                             picture), report.section("More", "words alone")])
    assert [one.inner_text() for one in page.query_selector_all("#more h2")] == ["Coupling", "More"]
    assert page.inner_text("#more td:nth-child(2)") == "0.19" and not page.is_visible("#episodes")
    page.wait_for_selector("#more img")
    assert page.evaluate("document.querySelector('#more img').naturalWidth") > 100


@pytest.mark.parametrize("width", [1280, 375])
def test_a_page_of_coupling_can_be_read(view, width):
    """What support/coupling_page.py makes: steps with leak and own correction, a long table folded, columns of text."""
    episode = an_episode("pick-1", True, ["go", "take"], {1: [1]}, advantage=0.5)
    for step, leak in zip(episode["steps"], (-0.25, 1.5)):
        step |= {"leak": leak, "own": -2.0}
    rows = [["go to desk 1", "good", "-1.50", f"game {i}", "You arrive at desk 1. " * 12] for i in range(41)]
    page = view([a_set("policies/tiny", [episode])], width=width, facts={"after": "runs/a, runs/b"}, sections=[
        report.section("The probes", "", ["action", "it is", "log pi", "in the game", "after"], rows),
        report.section("kernel", pre="a   1\nbb  2" + " 3" * 200)])
    page.click("summary:has-text('settings')")
    assert "runs/a, runs/b" in page.inner_text("#facts")
    assert not page.is_visible("#more table")
    page.click("#more summary")
    assert len(page.query_selector_all("#more tbody tr, #more table tr")) >= 42
    assert width < 1000 or page.query_selector("#more table").bounding_box()["width"] < width  # a long text wraps
    assert page.inner_text("#more pre").startswith("a   1\nbb  2") and page.evaluate("document.documentElement.scrollWidth") == width
    page.keyboard.press("n")
    page.wait_for_selector("#detail dl")
    said = page.inner_text("#detail .step[data-step='1']")
    assert "leak" in said and "+1.500" in said and "own correction" in said and "-2.000" in said


def test_a_single_point_is_seen(view):
    page = view([], metrics=[{"iteration": 1, "grad_norm_grpo": 0.2}, {"iteration": 2}])
    assert page.query_selector(".chart circle") and not page.query_selector(".chart polyline")


def test_a_thousand_episodes_are_there_at_once(view):
    episodes = [an_episode(f"pick-{i}", i % 2 == 0, ["go", "take"] * 10, {3: [1]}) for i in range(1000)]
    page = view([a_set("test", episodes)])
    times = page.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
    assert len(listed(page)) < 200 and times < 5000  # milliseconds, on a machine that does other things as well
    page.evaluate("document.querySelector('#list').scrollIntoView(); document.querySelector('#list').scrollTo(0, 1e9)")
    page.wait_for_selector("#list > div:nth-child(61)")
    begin = page.evaluate("performance.now()")
    page.fill("#text", "pick-999")
    page.wait_for_selector("text=1 of 1000")
    assert page.evaluate("performance.now()") - begin < 3000
    page.keyboard.press("Escape")
    page.goto(page.url.split("#")[0] + "#game=pick-777&at=0.0&step=4")
    page.wait_for_selector(".step.now")
    assert page.inner_text(".step.now summary a") == "4"
