import pytest

from api.restart_policy import (
    LONGEST_BACKOFF_S,
    MAX_FAILED_RESTARTS,
    MAX_FAILED_STARTS,
    MAX_OUT_OF_MEMORY,
    RestartPolicy,
    RingLost,
)


def failed_start(*, permanent: bool = False) -> RingLost:
    return RingLost("it does not start", permanent=permanent)


def served(seconds: float = 1.0, num_tokens: int = 0, **about: bool) -> RingLost:
    lost = RingLost("rank 1 is lost", **about)
    lost.served_s, lost.num_tokens = seconds, num_tokens
    return lost


def delays(policy: RestartPolicy, *ends: RingLost) -> list[float | None]:
    return [policy.seconds_to_next_start(end) for end in ends]


def test_a_server_that_never_gets_ready_is_given_up():
    *before, last = delays(RestartPolicy(), *[failed_start()] * MAX_FAILED_STARTS)
    assert None not in before and last is None


def test_one_that_was_ready_is_tried_for_longer_and_then_given_up_as_well():
    policy = RestartPolicy()
    assert policy.seconds_to_next_start(served(num_tokens=5)) == 0
    expected = [0, 1, 2, 4, 8, 16] + [LONGEST_BACKOFF_S] * (MAX_FAILED_RESTARTS - 7)
    assert delays(policy, *[failed_start()] * MAX_FAILED_RESTARTS) == [*expected, None]


@pytest.mark.parametrize("has_served", [False, True])
def test_what_another_start_cannot_mend_is_given_up_at_once(has_served: bool):
    policy = RestartPolicy()
    if has_served:
        policy.seconds_to_next_start(served(num_tokens=5))
    assert policy.seconds_to_next_start(failed_start(permanent=True)) is None


def test_rings_that_did_something_are_followed_at_once_however_many_die():
    assert delays(RestartPolicy(), *[served(num_tokens=1)] * 100) == [0] * 100
    assert delays(RestartPolicy(), *[served(seconds=3600)] * 100) == [0] * 100


def test_rings_that_die_before_they_did_anything_follow_more_and_more_slowly_but_for_ever():
    assert delays(RestartPolicy(), *[served()] * 20) == [0, 1, 2, 4, 8, 16] + [LONGEST_BACKOFF_S] * 14


def test_a_ring_that_did_something_makes_the_next_start_an_early_one_again():
    assert delays(RestartPolicy(), served(), served(), served(num_tokens=1), served(), served()) == [0, 1, 0, 0, 1]


def test_a_machine_that_was_away_is_not_held_against_the_rings():
    policy = RestartPolicy()
    policy.seconds_to_next_start(served(num_tokens=5))
    for _ in range(5):
        assert None not in delays(policy, *[failed_start()] * (MAX_FAILED_RESTARTS - 1))
        policy.begin_anew()
    assert policy.seconds_to_next_start(failed_start()) == 0


def test_memory_that_is_never_enough_is_a_state_and_no_loop():
    lost = served(num_tokens=99, out_of_memory=True)
    *before, last = delays(RestartPolicy(), *[lost] * MAX_OUT_OF_MEMORY)
    assert None not in before and last is None


def test_memory_that_was_enough_for_long_begins_to_count_anew():
    policy = RestartPolicy()
    for _ in range(10):
        assert None not in delays(policy, served(num_tokens=9, out_of_memory=True), served(seconds=3600, num_tokens=9))


def test_a_ring_that_made_way_for_another_was_ready():
    policy = RestartPolicy()
    policy.begin_anew()
    assert None not in delays(policy, *[failed_start()] * (MAX_FAILED_RESTARTS - 1))
