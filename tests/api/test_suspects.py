import random

import pytest

from api.suspects import CLEARING_TOKENS, Suspects


def die(suspects: Suspects, *worked_on: str) -> str | None:
    """A ring died; the next one serves."""
    guilty = suspects.ring_died(worked_on)
    suspects.ring_began()
    return guilty


def test_one_death_makes_nobody_a_suspect():
    suspects = Suspects()
    assert die(suspects, "a", "b") is None
    assert suspects.on_trial is None
    assert suspects.may_run("a") and suspects.may_run("new")


def test_after_two_deaths_those_that_ran_each_time_are_tried_one_at_a_time():
    suspects = Suspects()
    die(suspects, "a", "b", "c")
    die(suspects, "d", "b", "c")
    assert suspects.on_trial == "b"
    assert [name for name in "abcd" if suspects.may_run(name)] == ["b"]
    assert not suspects.may_run("new")
    assert not suspects.gained("b", CLEARING_TOKENS - 1)
    assert suspects.gained("b", 1)
    assert suspects.on_trial == "c"
    assert suspects.gained("c", CLEARING_TOKENS)
    assert suspects.on_trial is None and suspects.may_run("new")


def test_only_what_kills_the_ring_alone_twice_is_guilty_and_that_frees_all_others():
    suspects = Suspects()
    die(suspects, "a", "b")
    die(suspects, "a", "b")
    assert die(suspects, "a") is None
    assert suspects.on_trial == "a"
    assert die(suspects, "a") == "a"
    assert suspects.on_trial is None
    assert die(suspects, "b") is None and suspects.on_trial is None, "b's earlier deaths were a's work"


def test_a_request_that_was_alone_all_the_time_is_tried_as_well():
    suspects = Suspects()
    assert [die(suspects, "a") for _ in range(4)] == [None, None, None, "a"]


def test_who_gets_further_between_deaths_is_no_suspect():
    suspects = Suspects()
    for _ in range(20):
        die(suspects, "a", "b")
        assert not suspects.gained("a", CLEARING_TOKENS)
        assert not suspects.gained("b", CLEARING_TOKENS)
    assert suspects.on_trial is None


def test_tokens_of_different_rings_are_not_added_up():
    suspects = Suspects()
    die(suspects, "a")
    suspects.gained("a", CLEARING_TOKENS - 1)
    suspects.ring_began()  # the last one ended of a known cause
    suspects.gained("a", 1)
    die(suspects, "a")
    assert suspects.on_trial == "a"


def test_a_trial_ends_with_its_request():
    suspects = Suspects()
    die(suspects, "a", "b")
    die(suspects, "a", "b")
    assert not suspects.forget("b"), "it was not on trial"
    assert suspects.forget("a")
    assert suspects.on_trial is None


def test_a_death_while_nothing_ran_changes_no_trial():
    suspects = Suspects()
    die(suspects, "a")
    die(suspects, "a")
    assert [die(suspects) for _ in range(9)] == [None] * 9
    assert suspects.on_trial == "a"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_killers", [0, 1, 2])
def test_killers_are_found_and_chance_convicts_nobody(seed: int, num_killers: int):
    """A model of the ring: a step gives each running request one token; a killer's ring dies when it comes to its
    place. Every now and then a machine dies, as nobody's fault, though never twice within a trial."""
    chance = random.Random(seed)
    length = dict.fromkeys("abcdefgh", 150)
    deadly_at = {name: chance.randrange(150) for name in chance.sample(sorted(length), num_killers)}
    done = dict.fromkeys(length, 0)
    suspects, guilty = Suspects(), set[str]()
    next_accident = chance.randrange(60)
    for step in range(10_000):
        running = [name for name in done if suspects.may_run(name)]
        is_accident = step >= next_accident
        if is_accident:
            next_accident = step + CLEARING_TOKENS + 2 + int(chance.expovariate(1 / 30))
        if is_accident or any(deadly_at.get(name) == done[name] for name in running):
            if (found := die(suspects, *running)) is not None:
                guilty.add(found)
                del done[found]
            continue
        for name in running:
            done[name] += 1
            if done[name] == length[name]:
                suspects.forget(name)
                del done[name]
            elif suspects.gained(name, 1):
                break  # others may run now
    assert done == {}
    assert guilty == set(deadly_at)
