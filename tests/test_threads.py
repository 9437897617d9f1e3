"""Guards work side by side: the order and the results of a plain loop, items taken as they are needed, errors where they stand."""

import threading
import time

import pytest
from threadpoolctl import threadpool_info

from emlens import threads


def test_results_come_in_the_order_of_the_items_whoever_is_done_first(monkeypatch):
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    seen = set()

    def work(i: int) -> int:
        seen.add(threading.get_ident())
        time.sleep(0.02 if i % 2 == 0 else 0)
        return i * i

    assert list(threads.side_by_side(work, range(12))) == [i * i for i in range(12)] and len(seen) > 1
    seen.clear()
    assert list(threads.side_by_side(work, range(3), most=1)) == [0, 1, 4] and len(seen) == 1
    assert list(threads.side_by_side(work, [])) == []


def test_items_are_taken_as_there_is_room_for_them(monkeypatch):
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    each = threads.side_by_side(lambda i: i, items())
    assert next(each) == 0 and len(taken) <= 3
    each.close()
    assert len(taken) <= 3


def test_an_error_comes_where_its_item_stands_and_ends_the_work(monkeypatch):
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    begun, found = [], []

    def work(i: int) -> int:
        begun.append(i)
        if i == 3:
            raise ValueError("layer 3: two rows span one direction")
        return i

    with pytest.raises(ValueError, match="layer 3"):
        for one in threads.side_by_side(work, range(100)):
            found.append(one)
    assert found == [0, 1, 2] and max(begun) < 10


def test_one_thread_holds_blas_to_one_and_gives_it_back():
    def allowed() -> list[int]:
        return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]

    before = allowed()
    assert set(threads.one_thread(allowed)()) == {1} and allowed() == before
