"""The order in which jobs are taken."""

from hypothesis import given
from hypothesis import strategies as st

from loraformat.engine.jobs import Job, deal_jobs
from loraformat.engine.tile_sums import TileSums

_PLACES = st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 50))


def _job(order: tuple[str, int], output_bytes: int) -> Job:
    return Job(order, "", -1, output_bytes, TileSums)


@given(st.lists(st.builds(_job, _PLACES, st.integers(0, 9))), st.integers(1, 4))
def test_each_job_is_dealt_once(jobs: list[Job], workers: int) -> None:
    assert sorted(deal_jobs(jobs, workers)) == list(range(len(jobs)))


@given(st.lists(st.builds(_job, _PLACES, st.integers(0, 9))))
def test_one_worker_reads_in_order(jobs: list[Job]) -> None:
    orders = [jobs[number].order for number in deal_jobs(jobs, 1)]
    assert orders == sorted(orders)


def test_workers_take_different_files() -> None:
    jobs = [_job((file, place), 10) for file in "ba" for place in range(3)]
    assert [jobs[number].order for number in deal_jobs(jobs, 2)] == [
        (file, place) for place in range(3) for file in "ab"
    ]


def test_one_file_is_read_in_order_by_all() -> None:
    jobs = [_job(("a", place), 10) for place in (2, 0, 3, 1)]
    assert deal_jobs(jobs, 2) == [1, 3, 0, 2]


def test_models_of_one_base_read_a_place_one_after_another() -> None:
    jobs = [_job((file, place), 10) for _ in range(2) for file in "ab" for place in range(2)]
    dealt = [jobs[number].order for number in deal_jobs(jobs, 2)]
    assert dealt == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 1), ("b", 1)]
