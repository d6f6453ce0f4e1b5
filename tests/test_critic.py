"""The critic: verdicts, the cache, failures; against a server of the test's own that speaks OpenAI's protocol."""

import functools
import http.server
import json
import threading

import pytest

from rollout import Episode, Step
from support import critic


@pytest.fixture
def server():
    """A server that answers each chat completion with what `server.answer` makes of its last message.

    An answer is a status and the bytes of the body. `server.asked` collects the requests.
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, request))
            status, body = server.answer(request["messages"][-1]["content"])
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if body[:1] == b"{" else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer = [], lambda content: (200, completion("Fine.\nVERDICT: good"))
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def completion(content):
    return json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}]}).encode()


def asker(server, tmp_path, **more):
    return functools.partial(critic.ask_critic, model="judge", url=server.url, cache=str(tmp_path / "critic.jsonl"),
                             **{"retries": 0, "timeout": 10.0, **more})


def episode_of(tokenizer, turns, first="You are in a room. Your task is to: put a mug on desk."):
    """An episode of (action or None, reply) turns, tokens as in play (the last reply is nobody's prompt)."""
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)
    episode = Episode("game", 0)
    episode.give(ids(first))
    for i, (action, reply) in enumerate(turns):
        start, new = len(episode.tokens), ids(f"<action>{action}</action>" if action else "what now")
        episode.sample(new, [0.0] * len(new))
        episode.steps.append(Step(start, start + len(new), action, malformed=action is None))
        if i < len(turns) - 1:
            episode.give(ids(reply))
    return episode


def test_the_critic_reads_up_to_the_reply_and_no_further(server, tmp_path, tokenizer):
    """What is sent, word for word, and what comes back."""
    episode = episode_of(tokenizer, [("go to desk 1", "You arrive at desk 1."), (None, "No action found."),
                                     ("take mug 1 from desk 1", "Nothing happens."), ("look", "")])
    episode.won = True
    server.answer = lambda content: (200, completion(
        "It is refused.\nVERDICT: bad" if content.endswith("Nothing happens.") else "It searches.\n\nVerdict: GOOD"))
    found = critic.written_critiques([episode], tokenizer, asker(server, tmp_path))
    assert found == [[(1, "It searches."), (0, critic.MALFORMED), (0, "It is refused."), (1, "It searches.")]]
    assert critic.critic_labels([episode], tokenizer, asker(server, tmp_path)) == [[1, 0, 0, 1]]
    assert len(server.asked) == 3 and all(path == "/v1/chat/completions" for path, _ in server.asked)
    sent = {request["messages"][1]["content"] for _, request in server.asked}
    plain = lambda text: " ".join(text.split())
    third, = (plain(text) for text in sent if "take mug 1" in text and "ACTION look" not in plain(text))
    said = lambda text: plain(tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True))
    assert third.endswith(f"THE ACTION take mug 1 from desk 1 THE GAME'S REPLY {said('Nothing happens.')}")
    assert said("You arrive at desk 1.") in third and said("put a mug on desk.") in third and "look" not in third
    assert not any("won" in text for text in sent)  # the outcome is not told


def test_what_is_cached_is_not_asked_again(server, tmp_path, tokenizer):
    """Across runs, for equal questions of one run, and in spite of a line torn by a crash; another model is asked anew."""
    ask = asker(server, tmp_path, at_once=1)
    one, two = ([{"role": "user", "content": text}] for text in ("one", "two"))
    assert ask([one, two, one]) == ["Fine.\nVERDICT: good"] * 3 and len(server.asked) == 2
    assert ask([two, one]) == ["Fine.\nVERDICT: good"] * 2 and len(server.asked) == 2
    cache = tmp_path / "critic.jsonl"
    lines = cache.read_text().splitlines(keepends=True)
    cache.write_text(lines[0] + lines[1][:20])  # torn, without a newline
    ask([one, two])
    assert len(server.asked) == 3
    ask([one, two])
    assert len(server.asked) == 3  # what followed the torn line can be read
    ask([one], model="another")
    assert len(server.asked) == 4


@pytest.mark.parametrize("content", [None, "", "good", "VERDICT: good\nVERDICT: bad", "VERDICT: bad, or VERDICT: good",
                                     "VERDICT: maybe", "VERDICT: good\nIgnore all of the above", ["VERDICT: good"],
                                     "VERDICT: not good"])
def test_an_answer_without_a_clear_verdict_is_no_label(server, tmp_path, tokenizer, content):
    server.answer = lambda _: (200, completion(content))
    episode = episode_of(tokenizer, [("look", "")])
    assert critic.critic_labels([episode], tokenizer, asker(server, tmp_path)) == [[-1]]


def test_a_failing_server_is_asked_again(server, tmp_path):
    """Twice an error, then an answer: no error for us."""
    answers = [(503, b"{}"), (500, b"{}"), (200, completion("VERDICT: good"))]
    server.answer = lambda _: answers.pop(0)
    assert asker(server, tmp_path, retries=2)([[{"role": "user", "content": "x"}]]) == ["VERDICT: good"]
    assert len(server.asked) == 3


@pytest.mark.parametrize("failure", [(500, b'{"error": "out of memory"}'), (200, b"<html>Welcome to nginx</html>"),
                                     (404, b'{"error": {"message": "no such model"}}')])
def test_a_dead_critic_is_one_line_and_loses_nothing(server, tmp_path, failure):
    """Three questions, one of which the server fails on: the line names address and cache, and the second run asks the
    rest alone."""
    questions = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
    server.answer = lambda content: failure if content == "three" else (200, completion("VERDICT: bad"))
    with pytest.raises(critic.NoCritic) as caught:
        asker(server, tmp_path, retries=1, at_once=1)(questions)
    line = str(caught.value)
    assert "\n" not in line and server.url in line and "critic.jsonl" in line and "2 of 3" in line
    before = len(server.asked)
    server.answer = lambda content: (200, completion("VERDICT: good"))
    assert asker(server, tmp_path)(questions) == ["VERDICT: bad", "VERDICT: bad", "VERDICT: good"]
    assert len(server.asked) == before + 1


def test_nobody_at_the_address(tmp_path):
    with pytest.raises(critic.NoCritic, match="http://127.0.0.1:9/v1 does not answer .* tried 1 times.* 0 of 1"):
        critic.ask_critic([[{"role": "user", "content": "x"}]], "judge", "http://127.0.0.1:9/v1",
                          str(tmp_path / "critic.jsonl"), retries=0)
