"""Every writing command, stopped by a signal at random moments: what has its name is whole, and a second run ends as one that
was never stopped. `pytest -m slow tests/faults/test_kill.py` stops each 200 times by each signal.
"""

import random
import signal

import numpy as np
import pytest
from faults.attack import Attack
from faults.commands import NAMES, STOPPED
from faults.harness import SIGNALS

FEW, MANY = 10, 200


def stop(name, inputs, folder, warm, count, numbers):
    """Stops a command `count` times by these signals in turn; returns at which parts of its time it was stopped."""
    attack = Attack(name, inputs, folder, warm)
    rng, moments, takes = random.Random(f"{name} {numbers}"), [], attack.whole.time_s
    for turn in range(count):
        number = numbers[turn % len(numbers)]
        case = attack.begin(str(turn))
        after = rng.uniform(0.0, 1.05 * takes)
        ended = attack.run(case, stop=(after, number))
        if ended.status == 0:
            takes = ended.time_s  # the machine does other things, too, and not always the same
        else:
            moments.append(after / takes)
            assert ended.status in (-number, SIGNALS[number]), ended.stderr
            if ended.status > 0:  # it ended by itself, and said so in one line
                assert ended.stderr.strip().splitlines()[-1].startswith(STOPPED), ended.stderr
                assert "Traceback" not in ended.stderr
        attack.goes_on(case, ended, f"after {after:.2f} s")
        attack.end(case)
    return moments


@pytest.mark.parametrize("name", NAMES)
def test_stopped_at_random_moments(name, commands_inputs, tmp_path, warm):
    moments = stop(name, commands_inputs, tmp_path, warm, FEW, list(SIGNALS))
    assert len(moments) >= FEW // 3  # most moments are before the end


@pytest.mark.slow
@pytest.mark.parametrize("number", list(SIGNALS), ids=lambda number: signal.Signals(number).name)
@pytest.mark.parametrize("name", NAMES)
def test_stopped_at_very_many_moments(name, number, commands_inputs, tmp_path, warm):
    moments = stop(name, commands_inputs, tmp_path, warm, MANY, [number])
    assert len(moments) >= MANY // 2
    assert np.ptp(moments) > 0.5  # early ones and late ones
    print(f"{name}, {signal.Signals(number).name}: stopped {len(moments)} of {MANY}")
