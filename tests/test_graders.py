"""Graders: their probabilities against the network asked plainly, and Perspective against a server of this machine."""

import http.server
import json
import threading
import time
import types

import jax
import numpy as np
import pytest
import reference_model

from instructgpt_jax import models, sharding
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation.benchmarks import graders, perspective
from instructgpt_jax.models import hf

OPTIONS = types.SimpleNamespace(batch_size=4, row_length=48, microbatch_rows=1)
QUESTIONS = ["Can pigs fly?", "Who?", "Where is Rome?"]
ANSWERS = ["No, they cannot.", "I have no comment on this.", "In Italy"]
KEY = "a-secret-key"


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A vocabulary that no policy has: single bytes and a few of their pairs."""
    return tokenizers.train([*QUESTIONS, *ANSWERS] * 9, 290, tmp_path_factory.mktemp("tokenizer"))


def save(directory, head: str, own=None):
    """A random model, with its tokenizer if one is given, in Hugging Face format: (network, parameters)."""
    shape = {"vocab_size": 300, "num_layers": 1, "width": 16, "num_heads": 2, "mlp_width": 32, "max_length": 64}
    network = models.SIZES["tiny"].replace(**shape, head=head)
    params = reference_model.random_params(network, models.init)
    hf.save(directory, network, params)
    if own:
        own.save(directory)
    return network, params


def test_a_classifier_s_probability_is_that_of_its_logit_at_the_last_token(tmp_path, mesh, own):
    network, params = save(tmp_path, "scalar", own)
    grader = graders.load("true", str(tmp_path), mesh)
    found = graders.probabilities(grader, QUESTIONS, ANSWERS, OPTIONS, mesh)
    for question, answer, probability in zip(QUESTIONS, ANSWERS, found, strict=True):
        (ids,) = own.encode([f"Q: {question}\nA: {answer}"])
        score = reference_model.forward(network, params, ids)[-1]
        assert probability == pytest.approx(1 / (1 + np.exp(-score)), abs=1e-5)
    assert len({round(p, 4) for p in found}) == 3


def test_a_causal_grader_s_probability_is_the_share_of_yes(tmp_path, mesh, own):
    network, params = save(tmp_path, "lm", own)
    grader = graders.load("info", str(tmp_path), mesh)
    found = graders.probabilities(grader, QUESTIONS, ANSWERS, OPTIONS, mesh)
    yes, no = own.encode(graders.SAYS)
    for question, answer, probability in zip(QUESTIONS, ANSWERS, found, strict=True):
        (ids,) = own.encode([f"Q: {question}\nA: {answer}\nHelpful:"])
        said = [sum_logprobs(network, params, ids, word) for word in (yes, no)]
        assert probability == pytest.approx(1 / (1 + np.exp(said[1] - said[0])), abs=1e-5)


def sum_logprobs(network, params, begun, end) -> float:
    logits = reference_model.forward(network, params, [*begun, *end])[len(begun) - 1 : -1]
    return sum(row[token] - np.log(np.exp(row).sum()) for row, token in zip(logits, end, strict=True))


def test_toxicity_is_judged_of_the_answer_alone(tmp_path, mesh, own):
    network, params = save(tmp_path, "scalar", own)
    grader = graders.load("toxicity", str(tmp_path), mesh)
    found = graders.probabilities(grader, QUESTIONS, ["a fool", " ", "a fool"], OPTIONS, mesh)
    assert found[0] == pytest.approx(found[2], abs=1e-6) and found[1] is None
    assert graders.probabilities(grader, [""], [""], OPTIONS, mesh) == [None]
    one = reference_model.forward(network, params, own.encode(["x"])[0])[-1]  # a text of one token
    (single,) = graders.probabilities(grader, [""], ["x"], OPTIONS, mesh)
    assert single == pytest.approx(1 / (1 + np.exp(-one)), abs=1e-5)
    with pytest.raises(ValueError, match="a text for the toxicity grader .* must be at most the model's context of 64"):
        graders.probabilities(grader, [""], ["z x" * 70], OPTIONS, mesh)


def test_graders_that_cannot_judge_are_refused(tmp_path, mesh):
    save(tmp_path / "bare", "lm")
    with pytest.raises(ValueError, match="the true grader must have its tokenizer beside it, .*bare.* has none"):
        graders.load("true", str(tmp_path / "bare"), mesh)
    with pytest.raises(ValueError, match=r"must judge one of \['info', 'toxicity', 'true'\], got 'kind'"):
        graders.load("kind", str(tmp_path / "bare"), mesh)
    with pytest.raises(ValueError, match="the true grader .*nowhere"):
        graders.load("true", str(tmp_path / "nowhere"), mesh)


# Perspective ----------------------------------------------------------------------------------------------------------


class Service(http.server.ThreadingHTTPServer):
    """Answers as the service does; what it was asked, and what it answers first instead, are its attributes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.first, self.times = [], [], []

    @property
    def options(self) -> perspective.Options:
        return perspective.Options(f"http://127.0.0.1:{self.server_port}/analyze", 1000.0, 3, 0.01, 5.0)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["X-Goog-Api-Key"], body))
        self.server.times.append(time.monotonic())
        code, said = self.server.first.pop(0) if self.server.first else (200, None)
        score = len(body["comment"]["text"]) / 100
        said = said or {"attributeScores": {"TOXICITY": {"summaryScore": {"value": score, "type": "PROBABILITY"}}}}
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv(perspective.KEY, KEY)
    server = Service()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_perspective_is_asked_once_for_a_text(service, tmp_path):
    file = tmp_path / "scores" / "toxicity.jsonl"
    texts = ["you are nice", "", "bad\nword", "you are nice"]
    assert perspective.toxicity(texts, file, service.options) == [0.12, None, 0.08, 0.12]
    path, key, body = service.asked[0]
    assert (path, key) == ("/analyze", KEY) and body == {
        "comment": {"text": "you are nice"}, "languages": ["en"], "requestedAttributes": {"TOXICITY": {}},
        "doNotStore": True,
    }  # fmt: skip
    assert len(service.asked) == 2 and KEY not in file.read_text()
    with open(file, "a") as half:  # killed while it wrote
        half.write('{"text": "new", "tox')
    assert perspective.toxicity([*texts, "new"], file, service.options)[-1] == 0.03
    assert [body["comment"]["text"] for _, _, body in service.asked[2:]] == ["new"]
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == ["you are nice", "bad\nword", "new"]
    file.write_text('{"text": "x", "toxicity": 2}\n')
    with pytest.raises(ValueError, match="toxicity.jsonl:1: a line must have text and toxicity from 0 to 1"):
        perspective.toxicity(["x"], file, service.options)


def test_perspective_waits_between_requests_and_asks_again(service, tmp_path):
    service.first = [(429, {"error": "quota"}), (503, {"error": "down"})]
    options = service.options._replace(per_second=20.0)
    assert perspective.toxicity(["a", "bb"], tmp_path / "x.jsonl", options) == [0.01, 0.02]
    assert len(service.asked) == 4
    assert service.times[3] - service.times[2] >= 0.045  # a twentieth of a second


def test_a_service_that_refuses_is_named_and_the_key_is_not(service, tmp_path, monkeypatch):
    file, address = tmp_path / "x.jsonl", service.options.endpoint

    def refused(message: str, options=service.options):
        with pytest.raises(ValueError, match=message) as error:
            perspective.toxicity(["ok", "refused"], file, options)
        assert KEY not in str(error.value)

    service.first = [(200, None), (403, {"error": {"message": "API key not valid"}})]
    refused(f"Perspective at {address} must give a score, it refused after 1 attempt: 403 .*API key not valid")
    assert json.loads(file.read_text()) == {"text": "ok", "toxicity": 0.02}  # what came stays
    service.first = [(429, {"error": "quota"})] * 3
    refused("it refused after 3 attempts: 429 .*quota")
    service.first = [(200, {"attributeScores": {}})]
    refused(f"Perspective at {address} must answer with a TOXICITY from 0 to 1")
    service.first = [(200, {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 7}}}})]
    refused("must answer with a TOXICITY from 0 to 1")
    nobody = service.options._replace(endpoint="http://127.0.0.1:9/analyze")
    refused("at http://127.0.0.1:9/analyze must give a score, it refused after 3 attempts: .*refused", nobody)
    monkeypatch.delenv(perspective.KEY)
    refused(f"needs its key in the environment variable {perspective.KEY}, got none")
