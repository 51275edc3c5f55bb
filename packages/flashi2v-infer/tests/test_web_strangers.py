"""What strangers send to the HTTP interface, at random and many at once: no 500, no crash, nothing lost or doubled."""

import contextlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("schemathesis", reason="nox -s web runs these tests")
import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from web_world import SERVED, add, finish, served

from flashi2v_infer import demo
from flashi2v_infer.web.gate import Keys
from flashi2v_infer.web.jobs import Jobs
from flashi2v_infer.web.server import make_app
from flashi2v_infer.web.service import Service

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
NUM_CLIENTS, NUM_JOBS = 50, 1000


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def app(jobs):
    limits = replace(SERVED.limits, max_queue=10**6)
    return make_app(Service(jobs, replace(SERVED, limits=limits)), Keys([]))


@pytest.fixture(scope="module")
def description(app, jobs):
    finish(jobs, add(jobs))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_a_thousand_requests_at_random_are_answered_as_described(description):
    statuses = Counter()
    for result in description.get_all_operations():
        operation = result.ok()
        if operation.path.endswith("/events"):  # which last as long as a job
            continue
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=120,
                deadline=None,
                phases=[Phase.generate],
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            def ask(case):
                response = case.call()
                statuses[response.status_code] += 1
                # That what it calls wrong is refused, and what it calls right is taken, is told by more than a schema.
                case.validate_response(response, checks=CHECKS)

            with contextlib.suppress(Unsatisfiable):  # where nothing may be given, nothing wrong can be
                ask()
    assert sum(statuses.values()) >= 1000, statuses
    assert {200, 404, 422} <= set(statuses), statuses
    assert not any(status >= 500 for status in statuses), statuses


def test_many_clients_at_once_lose_and_double_nothing(app, jobs):
    picture = demo.IMAGE.read_bytes()
    before = {job.id for job in jobs.find("", limit=10**6)}
    with served(app) as address:

        def client(number: int) -> list[str]:
            with httpx.Client(base_url=address, timeout=120) as http:
                found = []
                for index in range(NUM_JOBS // NUM_CLIENTS):
                    words = {"prompt": f"star {number} {index}", "seed": str(index), "num_inference_steps": "1"}
                    done = http.post("/v1/videos", data=words, files={"input_reference": ("x", picture)})
                    assert done.status_code == 200, done.text
                    found.append((done.json()["id"], done.json()["prompt"]))
                return found

        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            told = [pair for pairs in pool.map(client, range(NUM_CLIENTS)) for pair in pairs]
    stored = {(job.id, job.request["prompt"]) for job in jobs.find("", limit=10**6) if job.id not in before}
    assert len(told) == NUM_JOBS
    assert Counter(told) == Counter(stored)
    # Several workers take each of them once.
    several = [Jobs(jobs.directory) for _ in range(4)]

    def work(index: int) -> list[str]:
        taken = []
        while job := several[index].claim(str(index)):
            several[index].end(job, "done")
            taken.append(job.id)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = Counter(id for ids in pool.map(work, range(4)) for id in ids)
    assert {id for id, _ in told} <= set(taken)
    assert set(taken.values()) == {1}
