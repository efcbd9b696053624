"""Jobs run one after the other in one thread, and end if nobody waits for them."""

import threading
from collections.abc import Iterator

import pytest

from scripts.web.jobs import Jobs, Status


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    """Serves jobs in a thread of its own until the test ends."""
    jobs = Jobs()
    thread = threading.Thread(target=jobs.serve)
    thread.start()
    yield jobs
    jobs.close()
    thread.join()


def test_what_is_told_comes_first_and_the_result_last(jobs):
    steps = [Status("a"), Status("b", 1, 2)]

    def work(tell):
        for step in steps:
            tell(step)
        return 3

    *told, result = jobs.run(work)
    assert result == 3 and told[0] == Status("beginning") and set(told[1:]) <= {*told[:1], *steps}


def test_a_waiting_job_tells_its_place_and_jobs_keep_their_order(jobs):
    go, order = threading.Event(), []

    def first(tell):
        tell(Status("begun"))
        go.wait()
        order.append(1)

    one, two, three, four = (jobs.run(work) for work in (first, *([lambda tell: order.append(2)] * 3)))
    while next(one) != Status("begun"):
        pass
    assert next(two) == Status("waiting in the queue: 1 run before yours")
    assert next(three) == Status("waiting in the queue: 2 runs before yours")
    two.close()  # its reader has gone
    assert next(four) == Status("waiting in the queue: 2 runs before yours")
    go.set()
    assert [list(job)[-1] for job in (one, three, four)] == [None] * 3 and order == [1, 2, 2]


def test_an_error_is_raised_where_the_job_is_read_and_the_next_job_runs(jobs):
    with pytest.raises(ZeroDivisionError):
        list(jobs.run(lambda tell: 1 / 0))
    assert list(jobs.run(lambda tell: "next"))[-1] == "next"


def test_a_job_that_nobody_reads_stops_at_what_it_tells_next(jobs):
    closed, ended = threading.Event(), threading.Event()

    def work(tell):
        tell(Status("begun"))
        try:
            closed.wait()
            tell(Status("more"))
            ended.clear()
        finally:
            ended.set()

    reading = jobs.run(work)
    while next(reading) != Status("begun"):
        pass
    reading.close()
    closed.set()
    assert ended.wait(10) and list(jobs.run(lambda tell: "next"))[-1] == "next"
