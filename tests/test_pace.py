from hypothesis import given
from hypothesis import strategies as st

from modelfs.fetch.pace import STEP, Pace

MB = 10**6
LIMIT = 16


def simulate(rate_of, seconds, limit=LIMIT):
    """Run a saturated engine whose network yields ``rate_of(connections)`` bytes per second."""
    pace, received, history = Pace(limit), 0.0, []
    for tick in range(int(seconds * 10)):
        received += rate_of(pace.allowed) * 0.1
        pace.look(100 + (tick + 1) * 0.1, int(received), saturated=True)
        history.append(pace.allowed)
    return history


def test_fast_connections_reach_the_limit_at_once():
    assert simulate(lambda count: count * 90 * MB, 0.5)[-1] == LIMIT


def test_a_slow_network_is_not_shared_among_many():
    history = simulate(lambda count: 12 * MB, 60)
    assert max(history) <= 2 * STEP
    assert sum(history) / len(history) < 1.5 * STEP


def test_slow_connections_that_add_up_are_added_up():
    assert simulate(lambda count: count * 2 * MB, 20)[-1] == LIMIT


def test_nothing_is_learnt_from_an_idle_engine():
    pace = Pace(LIMIT)
    for tick in range(100):
        pace.look(tick * 0.1, 0, saturated=False)
    assert pace.allowed == STEP


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 10**9), st.booleans()), max_size=200), st.integers(1, 32))
def test_the_number_stays_in_its_bounds(steps, limit):
    pace, now, received = Pace(limit), 0.0, 0
    for elapsed, count, saturated in steps:
        now, received = now + elapsed, received + count
        pace.look(now, received, saturated=saturated)
        assert min(STEP, limit) <= pace.allowed <= limit
