"""The end of ranks that a ring left on other machines, and with it the answer to whether those machines are there.

Ranks end by themselves when their ring is over, but not one that is stopped or stuck, and it would hold the memory that
the next ring needs. Called by `stop`, and by the supervisor before it starts a ring again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from distributed.errors import HostError
from distributed.ssh import CONNECT_TIMEOUT_S, run_script

if TYPE_CHECKING:
    from config import Settings

END_TIMEOUT_S = 60.0


def end_on_workers(
    settings: Settings, targets: Sequence[str], instance: str, connect_timeout_s: float = CONNECT_TIMEOUT_S
) -> dict[str, HostError]:
    """End the ranks of `instance` on all `targets` at once. Returns where that was not possible, and why: HostAway for
    a machine that does not answer."""
    with ThreadPoolExecutor(max_workers=max(1, len(targets))) as pool:
        failures = pool.map(lambda target: _end_on_worker(settings, target, instance, connect_timeout_s), targets)
        return {target: failure for target, failure in zip(targets, failures, strict=True) if failure is not None}


def _end_on_worker(settings: Settings, target: str, instance: str, connect_timeout_s: float) -> HostError | None:
    # awk gets the marker from the environment: on a command line it would find itself. A stopped process needs CONT.
    script = f"""export marker='-m server --instance {instance}'
left() {{ ps -axww -o pid= -o stat= -o command= | awk 'index($0, ENVIRON["marker"]) && $2 !~ /^Z/ {{print $1}}'; }}
[ -n "$(left)" ] || exit 0
kill -TERM $(left) 2>/dev/null; kill -CONT $(left) 2>/dev/null
n=0; while [ -n "$(left)" ] && [ $n -lt 25 ]; do sleep 0.2; n=$((n + 1)); done
[ -z "$(left)" ] || kill -KILL $(left) 2>/dev/null
sleep 0.2; [ -z "$(left)" ]
"""
    try:
        done = run_script(settings, target, script, timeout_s=END_TIMEOUT_S, connect_timeout_s=connect_timeout_s)
    except HostError as error:
        return error
    if done.returncode == 0:
        return None
    return HostError(f"{target}: {done.stderr.strip() or 'a rank there does not end'}")
